"""How far the outputs of a changed network are from the original's, on batches held out."""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from operator import truediv
from typing import Any

import torch
from torch import nn

from rankfold.analysis.curvature import Outputs, classes_last, first_tensor, kind_of
from rankfold.batches import Forward, batch_size, run_or_explain, running, tensors_of
from rankfold.errors import CalibrationError
from rankfold.outputs import references
from rankfold.replacement import swapped

# So many, if there are, tell how far two networks are from each other.
_OUTPUTS = 64


@dataclass(frozen=True)
class Judge:
    """The original's outputs on a few batches, to compare others with."""

    model: nn.Module
    forward: Forward
    batches: Sequence[Any]
    targets: Sequence[Any]
    kind: Outputs

    @staticmethod
    def of(
        model: nn.Module, forward: Forward, batches: Sequence[Any], kind: Outputs | None
    ) -> "Judge":
        """Of outputs that are logits or values; None: as they look."""
        with running(model), torch.no_grad():
            targets = [run_or_explain(forward, model, b, i) for i, b in enumerate(batches)]
        if not any(tensor.numel() for target in targets for tensor in tensors_of(target)):
            raise CalibrationError("the outputs of the model hold no tensor of real numbers")
        return Judge(model, forward, batches, targets, kind or kind_of(targets[0]))

    def first(self, batches: int) -> "Judge":
        """Of so many of the batches, or of more where the outputs of those are too few to judge by.

        A sample's logits are one output, or one at each position; of values every one counts.
        """
        seen = count = 0
        for target in self.targets:
            if count >= max(1, batches) and seen >= _OUTPUTS:
                break
            count += 1
            if self.kind == "logits":
                seen += math.prod(classes_last(first_tensor(target)).shape[:-1])
            else:
                seen += sum(tensor.numel() for tensor in tensors_of(target))
        return replace(self, batches=self.batches[:count], targets=self.targets[:count])

    def divergence(self, replacements: Mapping[nn.Module, nn.Module]) -> float:
        """Of the model with some layers replaced for the while, from the model as it is."""
        with swapped(self.model, replacements) as network:
            return self.divergence_of(network)

    def divergence_of(self, network: nn.Module) -> float:
        """Of another network with the same outputs from the model.

        For logits the Kullback-Leibler divergence in nats per sample; for values the squared error
        relative to the squared norm, halved: the mean over the tensors of an output (see
        `rankfold.outputs.references`). Infinite where the outputs are not finite.
        """
        totals: dict[int, float] = defaultdict(float)
        weights: dict[int, float] = defaultdict(float)  # by the tensor's place in the output
        with running(network), torch.no_grad():
            for index, (batch, target) in enumerate(zip(self.batches, self.targets, strict=True)):
                output = run_or_explain(self.forward, network, batch, index)
                if self.kind == "logits":
                    totals[0] += _kl(first_tensor(target), first_tensor(output))
                    weights[0] += batch_size(batch)
                    continue
                pairs = zip(tensors_of(output), tensors_of(target), strict=True)
                for place, (ours, theirs) in enumerate(pairs):
                    totals[place] += (ours.double() - theirs.double()).square().sum().item() / 2
                    weights[place] += theirs.double().square().sum().item()
        lost = sum(totals.values())
        if lost == 0:
            return 0.0
        if not math.isfinite(lost) or not any(weights.values()):
            return math.inf
        norms = references(list(weights.values()))
        found = sum(map(truediv, totals.values(), norms)) / len(norms)
        return found if math.isfinite(found) else math.inf


def _kl(target: torch.Tensor, output: torch.Tensor) -> float:
    """Summed over samples and positions."""
    expected = classes_last(target).double().log_softmax(-1)
    found = classes_last(output).double().log_softmax(-1)
    # Classes that are ruled out, of probability 0, do not count.
    terms = torch.where(expected == -torch.inf, 0.0, expected.exp() * (expected - found))
    return terms.sum().item()
