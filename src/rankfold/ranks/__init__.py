"""Rank of one spectrum: each rule takes singular values and answers with a number of them."""

from rankfold.ranks.energy import energy_rank, tolerance_rank
from rankfold.ranks.evbmf import evbmf_rank
from rankfold.ranks.gavish_donoho import gavish_donoho_rank

__all__ = ["energy_rank", "evbmf_rank", "gavish_donoho_rank", "tolerance_rank"]
