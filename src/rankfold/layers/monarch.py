"""Linear layers whose weight is a product of two block-diagonal matrices and permutations."""

import torch
from torch import nn

from rankfold.errors import RankError
from rankfold.layers.structured_linear import StructuredLinear


class MonarchLinear(StructuredLinear):
    """W = P L Pᵀ R, L and R block-diagonal, P a perfect shuffle: every output sees every input.

    Dao, Chen, Sohoni, Desai, Poli, Grogan, Liu, Rao, Rudra, Ré: Monarch: expressive structured
    matrices for efficient and accurate training. ICML 2022, section 3.1. R has so many `blocks` of
    neighbouring inputs, L as many of outputs that lie as far apart; each pair of a block of L and
    one of R has so many features in common as `rank` says, one in the paper's definition. That is,
    the weight between a block of inputs and one of outputs has this rank. Where the blocks do not
    divide a side, inputs are padded with zeros, and outputs cut.

    The factors are R, (blocks, blocks rank, inputs of a block), and L, (blocks, outputs of a block,
    blocks rank).
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int = 1,
        blocks: int | None = None,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """With as many blocks as inputs or outputs in one, about, unless `blocks` says how many.

        Raises RankError for blocks outside 1..min(in, out), and for a rank below 1 or above the
        lengths of a block.
        """
        self.blocks = balanced_blocks(in_features, out_features) if blocks is None else blocks
        if not 1 <= self.blocks <= min(in_features, out_features):
            least = min(in_features, out_features)
            raise RankError(f"{self.blocks} blocks are outside 1..{least}")
        self.lengths = block_lengths(in_features, out_features, self.blocks)
        if not 1 <= rank <= min(self.lengths):
            raise RankError(f"rank {rank} is outside 1..{min(self.lengths)}")
        self.rank = rank
        inputs, outputs = self.lengths
        between = self.blocks * rank
        shapes = [[self.blocks, between, inputs], [self.blocks, outputs, between]]
        super().__init__(in_features, out_features, shapes, bias, device, dtype)

    def product(self, rows: torch.Tensor) -> torch.Tensor:
        first, second = self.factors
        count, (inputs, outputs) = rows.shape[0], self.lengths
        padding = self.blocks * inputs - self.in_features
        padded = nn.functional.pad(rows, (0, padding)) if padding else rows
        by_input = padded.reshape(count, self.blocks, inputs).transpose(0, 1)
        between = torch.bmm(by_input, first.mT)
        # From (block of inputs, row, block of outputs, rank) to the blocks of outputs.
        split = between.reshape(self.blocks, count, self.blocks, self.rank)
        by_output = split.permute(2, 1, 0, 3).reshape(self.blocks, count, self.blocks * self.rank)
        made = torch.bmm(by_output, second.mT).permute(1, 2, 0)
        return made.reshape(count, self.blocks * outputs)[:, : self.out_features]

    def to_weight(self) -> torch.Tensor:
        first, second = self.factors
        blocks = torch.einsum(
            "qskr,kqrp->sqkp",
            second.unflatten(2, (self.blocks, self.rank)),
            first.unflatten(1, (self.blocks, self.rank)),
        )
        whole = blocks.flatten(2).flatten(0, 1)
        return whole[: self.out_features, : self.in_features]

    @torch.no_grad()
    def reset_parameters(self, gain: float = 1.0) -> None:
        """A random weight whose entries have mean 0 and variance gain² / in; zero bias.

        What lies between the two products has the scale of the inputs.
        """
        first, second = self.factors
        length = self.lengths[0]
        nn.init.normal_(first, std=length**-0.5)
        nn.init.normal_(second, std=gain * (length / (self.in_features * self.rank)) ** 0.5)
        if self._bias is not None:
            nn.init.zeros_(self._bias)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, blocks={self.blocks}, rank={self.rank}"


def balanced_blocks(in_features: int, out_features: int) -> int:
    """The square root of the shorter side: as many blocks as features in one."""
    return max(1, round(min(in_features, out_features) ** 0.5))


def block_lengths(in_features: int, out_features: int, blocks: int) -> tuple[int, int]:
    """Inputs of a block and outputs of a block, with those padded."""
    return -(-in_features // blocks), -(-out_features // blocks)
