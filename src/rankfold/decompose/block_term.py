"""The block-term decomposition: a sum of Tucker decompositions.

De Lathauwer: Decompositions of a higher-order tensor in block terms, part II. De Lathauwer, Nion:
part III, alternating least squares algorithms. SIMAX 30 (2008).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from rankfold.decompose.decomposition import (
    Decomposition,
    shape,
    to_unit_scale,
    working_precision,
)
from rankfold.decompose.triangular import solve_normal
from rankfold.decompose.tucker import Tucker, tucker
from rankfold.decompose.unfolding import mode_product, project, unfold
from rankfold.decompose.weights import Weights, Whitening
from rankfold.errors import RankError

# Steps of conjugate gradients for the cores in each sweep; they go on from the last ones.
_CORE_STEPS = 10


@dataclass(frozen=True)
class BlockTerm(Decomposition):
    """tensor ≈ the sum of `blocks`, all of the same ranks in the same modes."""

    blocks: tuple[Tucker, ...]

    @property
    def ranks(self) -> tuple[int, ...]:
        """Those of each block."""
        return self.blocks[0].ranks

    @property
    def modes(self) -> tuple[int, ...]:
        return self.blocks[0].modes

    @property
    def n_parameters(self) -> int:
        return sum(block.n_parameters for block in self.blocks)

    def to_tensor(self) -> torch.Tensor:
        total = self.blocks[0].to_tensor()
        for block in self.blocks[1:]:
            total = total + block.to_tensor()
        return total


def block_term(
    tensor: torch.Tensor,
    ranks: Sequence[int],
    blocks: int | None = None,
    modes: Sequence[int] | None = None,
    *,
    tolerance: float | None = None,
    iterations: int = 100,
    improvement: float = 1e-5,
    weights: Weights | None = None,
) -> BlockTerm:
    """Block-term decomposition by alternating least squares over the factors of all blocks.

    `tensor` has any order, float16 to float64; computed in float64. Each block has these `ranks` in
    `modes`, by default all. Give the number of `blocks`, or `tolerance`, the relative Frobenius
    error to keep, for which blocks are added until it is kept: each starts as the Tucker
    decomposition of what is left, and all of them are refined together by at most `iterations`
    sweeps, until one lowers the relative error by less than `improvement`. With one block this is
    `tucker`. `weights`, one for each mode that has one, define the norm of the error. Carries no
    gradient. Raises RankError for ranks or modes that the tensor does not have, or blocks below 1;
    ValueError for NaN, infinity, weights that do not fit, a tolerance outside (0, 1), or neither or
    both of blocks and tolerance.
    """
    if (blocks is None) == (tolerance is None):
        raise ValueError("give either a number of blocks or a tolerance")
    if tolerance is not None and not 0 < tolerance < 1:
        raise ValueError(f"tolerance must lie in (0, 1), not {tolerance}")
    if tensor.numel() == 0 or (blocks is not None and blocks < 1):
        raise RankError(f"{blocks} blocks of a tensor of shape {shape(tensor)}")
    work = working_precision(tensor.detach())
    whitening = Whitening.of(tensor.shape, weights)
    scaled, scale = to_unit_scale(whitening.whiten(work.double()))
    norm = torch.linalg.vector_norm(scaled).item()
    found: list[Tucker] = []
    rest = scaled
    while True:
        found.append(tucker(rest, ranks, modes))
        if len(found) > 1 and norm > 0:
            found = _alternate(scaled, found, iterations, improvement)
        rest = scaled - BlockTerm(tuple(found)).to_tensor()
        if blocks is not None and len(found) == blocks:
            break
        if tolerance is not None and torch.linalg.vector_norm(rest).item() <= tolerance * norm:
            break
    return BlockTerm(tuple(_restored(block, whitening, scale, work.dtype) for block in found))


def _restored(block: Tucker, whitening: Whitening, scale: float, dtype: torch.dtype) -> Tucker:
    core = scale * block.core
    for mode in whitening.roots.keys() - set(block.modes):
        core = mode_product(core, whitening.inverse_roots[mode], mode)
    factors = (
        whitening.restore(factor, mode).to(dtype)
        for mode, factor in zip(block.modes, block.factors, strict=True)
    )
    return Tucker(core.to(dtype), tuple(factors), block.modes)


def _alternate(
    tensor: torch.Tensor, blocks: Sequence[Tucker], iterations: int, improvement: float
) -> list[Tucker]:
    """Solve for the factors of one mode of all blocks, then the next, then for all cores."""
    total = tensor.square().sum().item()
    modes = blocks[0].modes
    blocks = list(blocks)
    error = math.inf
    for _ in range(iterations):
        for position in range(len(modes)):
            blocks = _with_best_factors(tensor, blocks, position)
        blocks, squared = _with_better_cores(tensor, blocks, total)
        before, error = error, math.sqrt(max(squared, 0.0) / total)
        if before - error < improvement:
            break
    return blocks


def _with_best_factors(tensor: torch.Tensor, blocks: list[Tucker], position: int) -> list[Tucker]:
    """The factors of one mode that are best for the cores and other factors as they are.

    With S_b the core of block b multiplied by its other factors, unfolded, the factors side by side
    solve [U_1 U_2 ...] (S Sᵀ) = T Sᵀ; both products need no S of full size.
    """
    mode = blocks[0].modes[position]
    products = torch.cat([_project(tensor, block, mode) for block in blocks], dim=1)
    rows = []
    for block in blocks:
        others = []
        for other in blocks:
            core = other.core
            for k, (m, mine, theirs) in enumerate(
                zip(block.modes, block.factors, other.factors, strict=True)
            ):
                if k != position:
                    core = mode_product(core, mine.mT @ theirs, m)
            others.append(unfold(block.core, mode) @ unfold(core, mode).mT)
        rows.append(torch.cat(others, dim=1))
    solved = solve_normal(torch.cat(rows), products)
    rank = blocks[0].ranks[position]
    updated = []
    for block, factor in zip(blocks, solved.split(rank, dim=1), strict=True):
        q, r = torch.linalg.qr(factor)
        factors = (*block.factors[:position], q, *block.factors[position + 1 :])
        updated.append(Tucker(mode_product(block.core, r, mode), factors, block.modes))
    return updated


def _project(tensor: torch.Tensor, block: Tucker, mode: int) -> torch.Tensor:
    """T Sᵀ of one block: (length of the mode, its rank)."""
    projected = project(tensor, block.factors, block.modes, skip=mode)
    return unfold(projected, mode) @ unfold(block.core, mode).mT


def _with_better_cores(
    tensor: torch.Tensor, blocks: list[Tucker], total: float
) -> tuple[list[Tucker], float]:
    """A few steps of conjugate gradients for all cores together, and the squared error left."""
    modes = blocks[0].modes
    right = torch.stack([project(tensor, block.factors, modes) for block in blocks])
    overlaps = [
        [
            [mine.mT @ theirs for mine, theirs in zip(a.factors, b.factors, strict=True)]
            for b in blocks
        ]
        for a in blocks
    ]

    def normal(cores: torch.Tensor) -> torch.Tensor:
        rows = []
        for overlap in overlaps:
            row = torch.zeros_like(cores[0])
            for core, matrices in zip(cores, overlap, strict=True):
                for mode, matrix in zip(modes, matrices, strict=True):
                    core = mode_product(core, matrix, mode)
                row = row + core
            rows.append(row)
        return torch.stack(rows)

    cores = torch.stack([block.core for block in blocks])
    image = normal(cores)
    rest = right - image
    direction = rest
    size = rest.square().sum()
    enough = 1e-20 * right.square().sum()
    for _ in range(_CORE_STEPS):
        if not size > enough:
            break
        turned = normal(direction)
        along = size / (direction * turned).sum()
        cores, image = cores + along * direction, image + along * turned
        rest = rest - along * turned
        size, previous = rest.square().sum(), size
        direction = rest + (size / previous) * direction
    squared = total - (cores * (2 * right - image)).sum().item()
    better = [Tucker(core, block.factors, modes) for core, block in zip(cores, blocks, strict=True)]
    return better, squared
