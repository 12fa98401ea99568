"""Rank of one spectrum: each rule takes singular values and answers with a number of them."""

from rankfold.ranks.energy import energy_rank
from rankfold.ranks.evbmf import evbmf_rank

__all__ = ["energy_rank", "evbmf_rank"]
