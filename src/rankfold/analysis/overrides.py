"""What the user decides for single layers, before the planner decides the rest."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import TypeVar

from rankfold.analysis.candidates import AnalysedLayer, Candidate
from rankfold.errors import PlanError

T = TypeVar("T")


@dataclass(frozen=True)
class Overrides:
    """By names or shell-style patterns of layers.

    The least and greatest rank bound every entry of a rank. A forced layer is factorized, by the
    one method; forced or not, at a rank below break-even.
    """

    keep: Sequence[str] = ()  # left dense
    force: Mapping[str, str] = field(default_factory=dict)  # pattern -> method
    least_rank: Mapping[str, int] = field(default_factory=dict)
    greatest_rank: Mapping[str, int] = field(default_factory=dict)

    def apply(self, layers: Sequence[AnalysedLayer]) -> list[AnalysedLayer]:
        """The layers with the candidates that are allowed.

        Raises PlanError, naming the layer, for patterns without a layer, or that contradict each
        other or what is possible.
        """
        for pattern in (*self.keep, *self.force, *self.least_rank, *self.greatest_rank):
            if not any(fnmatchcase(layer.name, pattern) for layer in layers):
                raise PlanError(f"no layer matches '{pattern}'")
        return [self._restrict(layer) for layer in layers]

    def forces(self, layer: AnalysedLayer) -> bool:
        """Whether the layer must not stay dense."""
        return any(fnmatchcase(layer.name, pattern) for pattern in self.force)

    def _restrict(self, layer: AnalysedLayer) -> AnalysedLayer:
        keep = any(fnmatchcase(layer.name, pattern) for pattern in self.keep)
        methods = set(_matching(layer, self.force))
        least = max(_matching(layer, self.least_rank), default=1)
        greatest = min(_matching(layer, self.greatest_rank), default=None)
        if keep and methods:
            raise PlanError(f"layer '{layer.name}' is both to be kept dense and forced")
        if len(methods) > 1:
            raise PlanError(f"layer '{layer.name}' is forced to {' and '.join(sorted(methods))}")
        if greatest is not None and not 1 <= least <= greatest:
            raise PlanError(
                f"layer '{layer.name}': no rank is at least {least} and at most {greatest}"
            )
        if keep:
            return replace(layer, candidates=(), reason=layer.reason or "kept dense, as asked")

        def allowed(candidate: Candidate) -> bool:
            return (not methods or candidate.method in methods) and all(
                entry >= least and (greatest is None or entry <= greatest)
                for entry in candidate.rank
            )

        def bounded(entry: Sequence[int]) -> tuple[int, ...]:
            most = entry[-1] if greatest is None else greatest
            return tuple(value for value in entry if least <= value <= most)

        found = tuple(candidate for candidate in layer.candidates if allowed(candidate))
        if methods:
            layer = replace(layer, methods={n: m for n, m in layer.methods.items() if n in methods})
        grids = {name: tuple(bounded(e) for e in grid) for name, grid in layer.grids.items()}
        if methods and not found:
            (method,) = methods
            why = layer.reason or "no rank below break-even is allowed"
            raise PlanError(f"layer '{layer.name}' cannot be forced to {method}: {why}")
        return replace(layer, candidates=found, grids=grids)


def _matching(layer: AnalysedLayer, table: Mapping[str, T]) -> Iterator[T]:
    return (value for pattern, value in table.items() if fnmatchcase(layer.name, pattern))
