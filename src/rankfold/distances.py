"""How far a network's outputs are from its teacher's: what a recovery without labels lowers."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from rankfold.analysis.curvature import classes_last
from rankfold.batches import tensors_of
from rankfold.errors import ModelError, RankfoldError

Distance = Callable[[Any, Any], torch.Tensor]  # (output, the teacher's output) -> scalar


@dataclass(frozen=True)
class SquaredError:
    """Mean squared difference over the variance of the target.

    Each tensor of a nested output counts alike, whatever its unit.
    """

    def __call__(self, output: Any, target: Any) -> torch.Tensor:
        """Raises ModelError if the two do not hold tensors of the same shapes, or none."""
        terms = [
            (a - b).square().mean() / (b.var(correction=0) + 1e-12)
            for a, b in _pairs(output, target)
        ]
        return torch.stack(terms).mean()


@dataclass(frozen=True)
class Divergence:
    """Kullback-Leibler divergence of softened distributions, times the temperature squared.

    Of logits, classes last ((n, classes, ...) for four dimensions and more), the mean over samples
    and positions. Hinton, Vinyals, Dean: Distilling the knowledge in a neural network.
    arXiv:1503.02531 (2015), section 2. Of a sequence with a blank (CTC) frame by frame: the
    factorized network keeps the alignment of its teacher.
    """

    temperature: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.temperature < float("inf"):
            raise RankfoldError(f"temperature={self.temperature} must be above 0")

    def __call__(self, output: Any, target: Any) -> torch.Tensor:
        """Raises ModelError if the two do not hold tensors of the same shapes, or none."""
        terms = []
        for ours, theirs in _pairs(output, target):
            found = (classes_last(ours).float() / self.temperature).log_softmax(-1)
            expected = (classes_last(theirs).float() / self.temperature).log_softmax(-1)
            # Classes that are ruled out, of probability 0, do not count.
            ruled_out = expected == -torch.inf
            gap = (expected - found).masked_fill(ruled_out, 0.0)
            terms.append((expected.exp() * gap).sum(-1).mean() * self.temperature**2)
        return torch.stack(terms).mean()


@dataclass(frozen=True)
class Cosine:
    """1 minus the cosine of the two along the last axis: of embeddings only the angle counts."""

    def __call__(self, output: Any, target: Any) -> torch.Tensor:
        """Raises ModelError if the two do not hold tensors of the same shapes, or none."""
        terms = [
            1 - torch.cosine_similarity(a, b, dim=-1, eps=1e-12).mean()
            for a, b in _pairs(output, target)
        ]
        return torch.stack(terms).mean()


def _pairs(output: Any, target: Any) -> list[tuple[torch.Tensor, torch.Tensor]]:
    ours, theirs = list(tensors_of(output)), list(tensors_of(target))
    if not ours or [tensor.shape for tensor in ours] != [tensor.shape for tensor in theirs]:
        raise ModelError(
            "the outputs of model and teacher are not tensors of the same shapes; where a network "
            "gives others in training, as of auxiliary heads, give a forward= that leaves them out"
        )
    return list(zip(ours, theirs, strict=True))
