"""How far a network's outputs are from its teacher's: what a recovery without labels lowers."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

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
    factorized network keeps the alignment of its teacher (`Transcription` is after what is read).
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
class Transcription:
    """Of sequences with a blank: the CTC loss of what the teacher reads, and the divergence.

    Of logits (n, frames, classes). The label is the teacher's best path without repeats and blanks:
    one wrong frame makes a wrong symbol, however small its share of the divergence. `weight` is
    that of the CTC loss, the mean over samples of the loss per symbol. It is not zero where the
    teacher is met: what is read may always be surer.

    Kim, Rush: Sequence-level knowledge distillation. arXiv:1606.07947 (2016), section 3.2. Graves
    et al.: Connectionist temporal classification. ICML 2006, section 4.
    """

    blank: int = 0
    weight: float = 0.5
    temperature: float = 1.0  # of the divergence

    def __post_init__(self) -> None:
        if not 0 <= self.weight < float("inf"):
            raise RankfoldError(f"weight={self.weight} must be at least 0 and finite")
        if self.blank < 0:
            raise RankfoldError(f"blank={self.blank} is the place of a class, at least 0")
        Divergence(self.temperature)  # refuses a bad one

    def __call__(self, output: Any, target: Any) -> torch.Tensor:
        """Raises ModelError if the two do not hold sequences of the same shapes, or none."""
        terms = [self._loss(ours, theirs) for ours, theirs in _pairs(output, target)]
        divergence = Divergence(self.temperature)(output, target)
        return divergence + self.weight * torch.stack(terms).mean()

    def _loss(self, ours: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
        if ours.dim() != 3 or self.blank >= ours.shape[2]:
            raise ModelError(
                f"an output of shape {tuple(ours.shape)} is no sequence (n, frames, classes) with "
                f"a blank in place {self.blank} of the classes"
            )
        best = theirs.argmax(-1)
        read = best != self.blank
        read[:, 1:] &= best[:, 1:] != best[:, :-1]
        symbols = read.sum(1)
        return nn.functional.ctc_loss(
            ours.float().log_softmax(-1).transpose(0, 1),
            best[read],
            torch.full_like(symbols, ours.shape[1]),  # frames, on the same device
            symbols,
            blank=self.blank,
        )


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
