"""Layers decomposed one by one into entries of a journal, which are what is kept of them."""

import math
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from rankfold.analysis.candidates import AnalysedLayer, Candidate, below_break_even
from rankfold.batches import Forward, all_finite
from rankfold.cost import count_parameters, shape_of_call
from rankfold.errors import CalibrationError, CheckpointError, ModelError
from rankfold.from_disk.metric import InputsMetric
from rankfold.from_disk.resident import FiledNetwork
from rankfold.journal import FACTORS, Journal
from rankfold.layers import as_linear, is_transposed_linear
from rankfold.methods import WEIGHT_METRIC, LowRank, Spectrum, reduction
from rankfold.methods.method import aligned_ranks
from rankfold.methods.moments import losses_by_rank
from rankfold.methods.svd import LowRankFamily, low_rank_factors, matrix_of
from rankfold.progress import Progress


@dataclass(frozen=True)
class Factors:
    """The decomposition of a layer, up to the greatest rank that pays."""

    left: torch.Tensor  # (rank, out), in the layer's dtype: its first rows are contiguous
    right: torch.Tensor  # (rank, in)
    singular_values: torch.Tensor  # (full rank,), float64
    losses: torch.Tensor  # (rank + 1,), float64: of each rank from 0 on
    shape: torch.Tensor  # int64: of the call that it was decomposed in

    @staticmethod
    def of(
        found: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
        dtype: torch.dtype,
        shape: Sequence[int],
    ) -> "Factors":
        left, right, values = found
        losses = losses_by_rank(values.square(), None)[: len(right) + 1]
        left, right = (factor.to(dtype).contiguous() for factor in (left.mT, right))
        return Factors(left, right, values.cpu(), losses, torch.tensor(shape))

    def family(self, layer: nn.Module, alignment: int) -> LowRankFamily:
        """What the method found for the layer, to build forms of it."""
        return LowRankFamily(
            _seen(layer), self.left.mT, self.right, self.singular_values, WEIGHT_METRIC, alignment
        )


class FiledFactors:
    """The layers of a filed network, and their factors in a journal's entries."""

    def __init__(
        self, network: FiledNetwork, journal: Journal, alignment: int, patterns: Sequence[str]
    ) -> None:
        self.network, self.journal, self.method = network, journal, LowRank(alignment=alignment)
        self.inputs = InputsMetric()
        self.names = {module: name for name, module in network.model.named_modules()}
        self.reasons = {
            module: self._why_not(module, patterns)
            for module in self.names
            if any(own.dim() > 1 for own in module.parameters(recurse=False))
        }

    def decompose(self, batch: Any | None, forward: Forward, progress: Progress) -> None:
        """Make the factors that are not there: of weights alone, or running a batch."""
        able = [module for module, reason in self.reasons.items() if reason is None]
        missing = [module for module in able if self.journal.kept(self._entry(module)) is None]
        if batch is None:
            for module in progress(missing, "decomposing"):
                with self.network.resident(module):
                    shape = (1, 1) if isinstance(module, nn.Embedding) else (1, _inputs_of(module))
                    self._decompose(module, None, shape)
            return
        calls = self.journal.once(
            f"{FACTORS}/calls of all", lambda: self._run(batch, forward, able, missing, progress)
        )
        for module in able:
            count = calls[self.names[module]]
            if count != 1:
                again = f"it is called {count} times: its inputs are not in memory together"
                self.reasons[module] = again if count else "the forward pass never calls it"

    def _run(
        self,
        batch: Any,
        forward: Forward,
        able: Sequence[nn.Module],
        missing: Collection[nn.Module],
        progress: Progress,
    ) -> dict[str, int]:
        """How often each layer was called; each that is missing is decomposed as it is."""
        calls: Counter[nn.Module] = Counter()
        ticks = iter(progress(able, "running and decomposing"))

        def visit(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            if self.reasons.get(module, "") is not None:
                return
            calls[module] += 1
            if calls[module] == 1:
                next(ticks, None)
                if module in missing:
                    shape = shape_of_call(module, inputs[0])
                    self._decompose(module, inputs[0], shape)

        self.network.run(batch, forward, visit)
        return {self.names[module]: calls[module] for module in able}

    def layers(self) -> list[AnalysedLayer]:
        """All layers with a weight, those with factors with their candidates."""
        return [self._analysed(module, reason) for module, reason in self.reasons.items()]

    def form(self, module: nn.Module, rank: int) -> nn.Module:
        """A layer as two factors of a rank."""
        with self.network.resident(module):
            return self._read(module).family(module, self.method.alignment).build((rank,))

    def _why_not(self, module: nn.Module, patterns: Sequence[str]) -> str | None:
        if not any(fnmatchcase(self.names[module], pattern) for pattern in patterns):
            return "not among the layers asked for"
        if type(module) not in (nn.Linear, nn.Embedding) and not is_transposed_linear(module):
            return f"a {type(module).__name__}: linear layers and embeddings alone come from disk"
        weight = module.get_parameter("weight")
        owners = [
            other
            for other in self.names
            if any(own is weight for own in other.parameters(recurse=False))
        ]
        if len(owners) > 1:
            return "its weight is shared, which takes the whole network in memory"
        return reduction.why_not(self.method, module)

    def _decompose(
        self, module: nn.Module, inputs: torch.Tensor | None, shape: Sequence[int]
    ) -> None:
        """In the metric of its inputs; of weights alone without, as embeddings always are."""
        name, weight = self.names[module], module.get_parameter("weight").detach()
        if not all_finite(weight):
            raise ModelError(f"the weight of layer '{name}' holds NaN or infinity")
        ranks = [(rank,) for rank in aligned_ranks(min(weight.shape), self.method.alignment)]
        pay = below_break_even(module, self.method, ranks, [shape], _counts(module, shape))
        greatest = max((rank for (rank,) in pay), default=1)
        matrix = matrix_of(_seen(module))
        if inputs is None or isinstance(module, nn.Embedding):
            found = low_rank_factors(matrix, WEIGHT_METRIC, greatest)
        else:
            if not all_finite(inputs):
                raise CalibrationError(f"layer '{name}' is given NaN or infinity")
            found = self.inputs.factors(matrix, inputs, greatest)
        made = Factors.of(found, weight.dtype, shape)
        self.journal.once(self._entry(module), lambda: made, asdict, _factors)

    def _analysed(self, module: nn.Module, reason: str | None) -> AnalysedLayer:
        name, parameters = self.names[module], count_parameters(module)
        size = next(module.parameters(recurse=False)).element_size()
        if reason is not None:
            return AnalysedLayer(
                name, repr(module), parameters, 0, reason, {}, {}, (), {}, element_size=size
            )
        factors = self._read(module)
        shape = factors.shape.tolist()
        dense, greatest = _counts(module, shape), len(factors.left)
        ranks = [(rank,) for rank in range(self.method.alignment, greatest + 1)]
        ranks = [rank for rank in ranks if rank[0] % self.method.alignment == 0]
        pay = below_break_even(module, self.method, ranks, [shape], dense) if ranks else {}
        rows, columns = factors.left.shape[1], factors.right.shape[1]
        return AnalysedLayer(
            name,
            repr(module),
            *dense,
            None,
            {self.method.name: self.method},
            {self.method.name: (Spectrum(factors.singular_values, (rows, columns)),)},
            tuple(
                Candidate(self.method.name, rank, factors.losses[rank[0]].item(), *cost)
                for rank, cost in pay.items()
            ),
            {self.method.name: (tuple(rank for (rank,) in ranks),)},
            element_size=size,
        )

    def _entry(self, module: nn.Module) -> str:
        return f"{FACTORS}/{self.names[module]}"

    def _read(self, module: nn.Module) -> Factors:
        found = self.journal.kept(self._entry(module))
        if found is None:
            raise CheckpointError(f"{self.journal.directory}: a file of it is missing or damaged")
        return _factors(found)


def _factors(stored: dict[str, torch.Tensor]) -> Factors:
    try:
        return Factors(**stored)
    except TypeError as error:
        raise CheckpointError(f"an entry holds other things than factors: {error}") from error


def _seen(layer: nn.Module) -> Any:
    """A layer as the method sees it."""
    return as_linear(layer) if is_transposed_linear(layer) else layer


def _inputs_of(module: nn.Module) -> int:
    weight = module.get_parameter("weight")
    return weight.shape[0] if is_transposed_linear(module) else weight.shape[1]


def _counts(module: nn.Module, shape: Sequence[int]) -> tuple[int, int]:
    """Parameters and MACs of a layer as it is; a lookup multiplies nothing."""
    parameters = count_parameters(module)
    if isinstance(module, nn.Embedding):
        return parameters, 0
    return parameters, math.prod(shape[:-1]) * module.get_parameter("weight").numel()
