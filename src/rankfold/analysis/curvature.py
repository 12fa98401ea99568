"""Gradients at the outputs whose second moment is a curvature of the loss, without labels.

- softmax at a temperature: outputs are logits, and labels are drawn from the model's own
  distribution (the true Fisher matrix: Martens, JMLR 21, 2020; not the empirical one);
- identity: outputs are values, and every one counts the same (random signs);
- labels: the gradient of the user's loss on the data's labels (the empirical Fisher matrix).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch

from rankfold.batches import batch_size, split_batch, tensors_of
from rankfold.outputs import references

Outputs = Literal["logits", "values"]

# Below this share of the entropy of a uniform distribution, outputs are taken for logits.
_PEAKED = 0.7


class Curvature(Protocol):
    """One way to draw gradients at the outputs."""

    @property
    def name(self) -> str: ...

    def backward(self, outputs: Any, batch: Any, generator: torch.Generator) -> None:
        """Run the graph of the outputs backward from one draw, and keep the graph."""


@dataclass(frozen=True)
class Softmax:
    """Of the first output, classes last ((n, classes, ...) for four dimensions and more)."""

    temperature: float = 1.0

    @property
    def name(self) -> str:
        return "softmax" if self.temperature == 1 else f"softmax@{self.temperature:g}"

    def backward(self, outputs: Any, batch: Any, generator: torch.Generator) -> None:
        logits = first_tensor(outputs)
        if not logits.requires_grad:
            return
        probabilities = (classes_last(logits).detach().float() / self.temperature).softmax(-1)
        flat = probabilities.reshape(-1, probabilities.shape[-1]).cpu()
        drawn = torch.multinomial(flat, 1, generator=generator).to(logits.device)
        gradient = probabilities.reshape(flat.shape).clone()
        gradient.scatter_add_(1, drawn, -torch.ones_like(drawn, dtype=gradient.dtype))
        classes_last(logits).backward(
            gradient.reshape(probabilities.shape).to(logits.dtype), retain_graph=True
        )


@dataclass(frozen=True)
class Identity:
    """Of all outputs: half the squared error, relative to the mean squared norm of a sample's.

    The mean over the tensors of an output (see `rankfold.outputs.references`).
    """

    name: str = "identity"

    def backward(self, outputs: Any, batch: Any, generator: torch.Generator) -> None:
        samples, tensors = batch_size(batch), list(tensors_of(outputs))
        norms = [tensor.detach().double().square().sum().item() for tensor in tensors]
        followed, signs = [], []
        for tensor, norm in zip(tensors, references(norms), strict=True):
            if tensor.requires_grad:
                scale = (samples / norm / len(tensors)) ** 0.5 if norm > 0 else 1.0
                drawn = 2 * torch.randint(2, tensor.shape, generator=generator) - 1
                followed.append(tensor)
                signs.append(scale * drawn.to(tensor))
        if followed:
            torch.autograd.backward(followed, signs, retain_graph=True)


@dataclass(frozen=True)
class Labels:
    """Of the user's loss_fn(output, label), a mean over the batch."""

    loss_fn: Callable[[Any, Any], torch.Tensor]
    name: str = "labels"

    def backward(self, outputs: Any, batch: Any, generator: torch.Generator) -> None:
        loss = self.loss_fn(outputs, split_batch(batch)[1])
        if loss.requires_grad:
            (loss * batch_size(batch)).backward(retain_graph=True)


def first_tensor(outputs: Any) -> torch.Tensor:
    return next(tensors_of(outputs))


def classes_last(logits: torch.Tensor) -> torch.Tensor:
    """Logits (n, classes), (n, steps, classes), or (n, classes, height, ...) as (..., classes)."""
    return logits.movedim(1, -1) if logits.dim() >= 4 else logits


def kind_of(outputs: Any) -> Outputs:
    """Whether outputs look like logits: one tensor whose softmax is mostly far from uniform."""
    logits = classes_last(first_tensor(outputs).detach()).float()
    if logits.dim() < 2 or logits.shape[-1] < 2:
        return "values"
    entropy = torch.special.entr(logits.softmax(-1)).sum(-1).mean()
    uniform = torch.tensor(float(logits.shape[-1])).log()
    return "logits" if entropy < _PEAKED * uniform else "values"
