"""Products of several small tensors, pair by pair, in the order that costs least.

Of all orders in which neighbours of a tensor network can be multiplied the best one is found by
dynamic programming over the sets of tensors (as in Pfeifer, Haegeman, Verstraete: Faster
identification of optimal contraction sequences for tensor networks. Physical Review E 90 (2014)).
The first tensor may have rows, whose number is known when the product is made: what an order costs
is linear in it, so that the best orders for all numbers are the lower envelope of a few lines,
found beforehand. One of them multiplies the tensors of a weight with each other first, and then the
rows by the whole weight: where rows are many, that is often the best.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Literal

import torch

ROWS = "z"
# What reading or writing a number takes, in multiply-accumulates: on a CPU 20 in cache, where the
# products of rows stay because so many rows at a time are multiplied as fit there; 150 beyond.
_TRAFFIC = 20
_CACHED = 2**19  # numbers
_FEWEST = 16  # rows at a time: of fewer, matrix products are slow
_MANY = 2**24  # rows, above which no other order is looked for
_EXPORTED = 32  # rows that a program with any number of rows is made for

Tree = int | tuple["Tree", "Tree"]  # the place of an operand, or a product of two


@dataclass(frozen=True)
class Sizes:
    """The lengths of axes, of which one, or none, is to be multiplied by the number of rows."""

    lengths: tuple[int, ...]
    marked: int | None

    def of(self, rows: int) -> tuple[int, ...]:
        place = self.marked
        if place is None:
            return self.lengths
        return *self.lengths[:place], self.lengths[place] * rows, *self.lengths[place + 1 :]


@dataclass(frozen=True)
class Operand:
    """Which tensor takes part in a product, and how it is laid out for it."""

    place: int
    axes: Sizes | None  # those of a result, which is still a matrix; None: it has them
    order: tuple[int, ...] | None  # of the axes; None: as they are
    laid_out: Sizes
    repeated: bool = False  # the same matrix for each of the rows

    def of(self, held: Sequence[torch.Tensor | None], rows: int) -> torch.Tensor:
        tensor = held[self.place]
        assert tensor is not None
        if self.order is not None:
            if self.axes is not None:
                tensor = tensor.reshape(self.axes.of(rows))
            tensor = tensor.permute(self.order)
        tensor = tensor.reshape(self.laid_out.of(rows))
        return tensor.expand(rows, *tensor.shape) if self.repeated else tensor


@dataclass(frozen=True)
class Step:
    """One product of two tensors: of matrices, of stacks of matrices, or of entries."""

    first: Operand
    second: Operand
    kind: Literal["mm", "bmm", "mul"]
    of_rows: bool  # or of tensors of the weight alone

    def of(self, held: Sequence[torch.Tensor | None], rows: int) -> torch.Tensor:
        first, second = self.first.of(held, rows), self.second.of(held, rows)
        if self.kind == "mm":
            return first @ second
        return torch.bmm(first, second) if self.kind == "bmm" else first * second


@dataclass(frozen=True)
class Order:
    """The steps that multiply a network, and how the last result is laid out."""

    steps: tuple[Step, ...]
    result: Operand
    cost: tuple[int, int]  # fixed, and for each row
    macs: tuple[int, int]
    widest: int  # numbers of the largest tensor that there is for each row

    @property
    def weight_first(self) -> bool:
        """Whether the first tensor, of the rows, comes last: all others are multiplied before."""
        return 0 in (self.steps[-1].first.place, self.steps[-1].second.place)

    def run(self, tensors: Sequence[torch.Tensor], rows: int) -> torch.Tensor:
        """The result; of so many rows at a time that what there is of them stays in cache."""
        held: list[torch.Tensor | None] = [*tensors, *[None] * len(self.steps)]
        for place, step in enumerate(self.steps, len(tensors)):
            if not step.of_rows:
                held[place] = step.of(held, rows)
        most = max(_FEWEST, _CACHED // max(1, self.widest))
        # A program for any number of rows has no loop over parts of them.
        if torch.compiler.is_compiling() or rows <= most or self.weight_first:
            return self._of_rows(held, tensors[0], rows, len(tensors))
        parts = tensors[0].split(most)
        return torch.cat([self._of_rows(held, part, len(part), len(tensors)) for part in parts])

    def _of_rows(
        self, held: Sequence[torch.Tensor | None], part: torch.Tensor, rows: int, given: int
    ) -> torch.Tensor:
        held = [part, *held[1:]]
        for place, step in enumerate(self.steps, given):
            if step.of_rows:
                held[place] = step.of(held, rows)
        return self.result.of(held, rows)


@dataclass(frozen=True)
class Contraction:
    """A sum of products, as `torch.einsum` writes it: "zab,Aap,pBb->zAB".

    An index of one letter may belong to any number of tensors; none is summed over that only one
    has. The index z, of the first tensor and of the result, counts rows.
    """

    equation: str
    orders: tuple[tuple[int, Order], ...]  # the most rows that each is best for, ascending

    def __call__(self, *tensors: torch.Tensor) -> torch.Tensor:
        """The result for tensors of the lengths that were planned for, with any number of rows."""
        rows = tensors[0].shape[0]
        return self.order_for(rows).run(tensors, rows)

    def order_for(self, rows: int) -> Order:
        """The order that costs least for so many rows."""
        if torch.compiler.is_exporting() and type(rows) is not int:
            rows = _EXPORTED  # a program for any number of them cannot compare it
        for most, order in self.orders:
            if rows <= most:
                return order
        return self.orders[-1][1]


def plan_contraction(equation: str, lengths: Mapping[str, int]) -> Contraction:
    """The best orders of a contraction of indices of these lengths, for every number of rows.

    Takes milliseconds for up to eight tensors, once for each equation and lengths.
    """
    return _planned(equation, tuple(sorted(lengths.items())))


@cache
def _planned(equation: str, lengths: tuple[tuple[str, int], ...]) -> Contraction:
    left, _, result = equation.partition("->")
    network = _Network(tuple(left.split(",")), result, dict(lengths))
    if ROWS not in result:
        return Contraction(equation, ((1, network.best_order(0)),))
    few, many = network.best_order(1), network.best_order(_MANY)
    return Contraction(equation, tuple(_envelope(network, few, many, _MANY)))


def _envelope(
    network: "_Network", few: Order, many: Order, most: int
) -> Iterator[tuple[int, Order]]:
    """The best orders from that for few rows to that for many, each with the most rows it suits."""
    (fixed, each), (more, less) = few.cost, many.cost
    if less >= each:
        yield most, few
        return
    crossing = (more - fixed) // (each - less)
    between = network.best_order(crossing)
    if _at(between.cost, crossing) < min(_at(few.cost, crossing), _at(many.cost, crossing)):
        yield from _envelope(network, few, between, crossing)
        yield from _envelope(network, between, many, most)
    else:
        yield crossing, few
        yield most, many


def _at(cost: tuple[int, int], rows: int) -> int:
    return cost[0] + cost[1] * rows


@dataclass(frozen=True, eq=False)
class _Network:
    """Tensors by the names of their indices, and of those that stay."""

    terms: tuple[str, ...]
    result: str
    lengths: dict[str, int]

    def best_order(self, rows: int) -> Order:
        """Of all products of neighbours, that of the least cost for so many rows."""
        count = len(self.terms)
        near = [
            sum(1 << n for n in range(count) if n != m and set(self.terms[n]) & set(self.terms[m]))
            for m in range(count)
        ]
        best: dict[int, tuple[int, Tree]] = {1 << place: (0, place) for place in range(count)}
        kept = {1 << place: frozenset(term) for place, term in enumerate(self.terms)}
        reach = {1 << place: near[place] for place in range(count)}
        apart = not self._hang_together(near)
        for group in range(1, 1 << count):
            if group & (group - 1) == 0:
                continue
            part = (group - 1) & group
            while part > group ^ part:
                other = group ^ part
                if part in best and other in best and (apart or reach[part] & other):
                    if group not in kept:
                        kept[group] = self._kept(group)
                        reach[group] = reach[part] | reach[other]
                    cost = _at(self._costs(kept[part], kept[other], kept[group])[0], rows)
                    cost += best[part][0] + best[other][0]
                    if group not in best or cost < best[group][0]:
                        best[group] = cost, (best[part][1], best[other][1])
                part = (part - 1) & group
        return _Layout(self).order(best[(1 << count) - 1][1])

    def _hang_together(self, near: Sequence[int]) -> bool:
        found = before = 1
        while True:
            for place, others in enumerate(near):
                if found >> place & 1:
                    found |= others
            if found == before:
                return found == (1 << len(near)) - 1
            before = found

    def _kept(self, group: int) -> frozenset[str]:
        """The indices that a product of these tensors has: those that others need."""
        inside = {i for place, term in enumerate(self.terms) if group >> place & 1 for i in term}
        outside = {
            i for place, term in enumerate(self.terms) if not group >> place & 1 for i in term
        }
        return frozenset(inside & (outside | set(self.result)))

    def _costs(
        self, first: frozenset[str], second: frozenset[str], made: frozenset[str]
    ) -> tuple[tuple[int, int], tuple[int, int]]:
        """Cost and multiply-accumulates of a product, (fixed, for each row)."""
        every = first | second
        # Products of entries alone are no multiply-accumulates.
        macs = self._volume(every) if every != made else 0
        moved = [(self._volume(one), ROWS in one) for one in (first, second, made)]
        fixed = _TRAFFIC * sum(volume for volume, with_rows in moved if not with_rows)
        each = _TRAFFIC * sum(volume for volume, with_rows in moved if with_rows)
        if ROWS in every:
            return (fixed, each + macs), (0, macs)
        return (fixed + macs, each), (macs, 0)

    def _volume(self, indices: frozenset[str]) -> int:
        return math.prod(self.lengths[index] for index in indices if index != ROWS)


class _Layout:
    """How the products of a tree are laid out, so that little has to be moved between them."""

    def __init__(self, network: _Network) -> None:
        self.network = network
        self.steps: list[Step] = []
        self.cost, self.macs, self.widest = [0, 0], [0, 0], 0

    def order(self, tree: Tree) -> Order:
        result = self.network.result
        place, axes = self._lay_out(tree, result)
        operand = self._operand(place, axes, result, [(index,) for index in result])
        fixed, each = self.cost
        macs = self.macs[0], self.macs[1]
        return Order(tuple(self.steps), operand, (fixed, each), macs, self.widest)

    def _lay_out(self, tree: Tree, wanted: str) -> tuple[int, str]:
        """The place of the product of a tree, and its axes: as wanted, where that is to be had."""
        terms = self.network.terms
        if isinstance(tree, int):
            return tree, terms[tree]
        first, second = (self._indices(side) for side in tree)
        kept = self._indices(tree)
        cost, macs = self.network._costs(first, second, kept)
        for total, added in ((self.cost, cost), (self.macs, macs)):
            total[0] += added[0]
            total[1] += added[1]
        if ROWS in kept:
            self.widest = max(self.widest, self.network._volume(kept))
        if first | second == kept:
            return self._entrywise(tree, "".join(sorted(kept, key=wanted.index)))
        shared = first & second
        batch = [index for index in wanted if index in shared]
        frees = [self._free(side, shared, wanted) for side in tree]
        if frees[0] and frees[1] and wanted.index(frees[1][0]) < wanted.index(frees[0][0]):
            tree, frees = (tree[1], tree[0]), [frees[1], frees[0]]
        if "".join((*batch, *frees[0], *frees[1])) != wanted:
            if not batch and (found := self._by_row(tree, frees, shared - kept, wanted)):
                return found
            # It has to be moved in any case: of the tensors that are given none needs to be.
            frees = [
                self._free(side, shared, terms[side] if isinstance(side, int) else wanted)
                for side in tree
            ]
        # The summed indices come in the order of a tensor that is given: it need not be moved.
        given = sorted((terms[side] for side in tree if isinstance(side, int)), key=_without_rows)
        summed = sorted(shared - kept, key=given[0].index if given else None)
        names = "".join((*batch, *frees[0], *summed)), "".join((*batch, *summed, *frees[1]))
        sides = [self._lay_out(side, name) for side, name in zip(tree, names, strict=True)]
        groups = [(frees[0], summed), (summed, frees[1])]
        operands = [
            self._operand(*side, name, [*([batch] if batch else []), *(tuple(one) for one in pair)])
            for side, name, pair in zip(sides, names, groups, strict=True)
        ]
        of_rows = ROWS in first | second
        self.steps.append(Step(operands[0], operands[1], "bmm" if batch else "mm", of_rows))
        return self._last(), "".join((*batch, *frees[0], *frees[1]))

    def _by_row(
        self,
        tree: tuple[Tree, Tree],
        frees: Sequence[Sequence[str]],
        shared: frozenset[str],
        wanted: str,
    ) -> tuple[int, str] | None:
        """A product of one matrix with that of each row, if this is laid out as wanted.

        A tensor (z, summed, free) need not be moved for it, nor what comes of it, (z, others,
        free).
        """
        if ROWS not in frees[0] and ROWS not in frees[1]:
            return None
        side = 0 if ROWS in frees[0] else 1
        own = [index for index in frees[side] if index != ROWS]
        made = "".join((ROWS, *frees[1 - side], *own))
        if not own or not frees[1 - side] or made != wanted:
            return None
        terms = self.network.terms
        given = sorted((terms[one] for one in tree if isinstance(one, int)), key=_without_rows)
        summed = sorted(shared, key=given[0].index if given else None)
        names = "".join((*frees[1 - side], *summed)), "".join((ROWS, *summed, *own))
        matrix, stack = self._lay_out(tree[1 - side], names[0]), self._lay_out(tree[side], names[1])
        once = self._operand(*matrix, names[0], [frees[1 - side], summed])
        each = self._operand(*stack, names[1], [(ROWS,), summed, own])
        self.steps.append(Step(replace(once, repeated=True), each, "bmm", True))
        return self._last(), made

    def _free(self, side: Tree, shared: frozenset[str], wanted: str) -> list[str]:
        indices = self._indices(side) - shared
        return [index for index in wanted if index in indices]

    def _entrywise(self, tree: tuple[Tree, Tree], made: str) -> tuple[int, str]:
        operands = []
        for side in tree:
            indices = self._indices(side)
            name = "".join(index for index in made if index in indices)
            where = self._lay_out(side, name)
            # An index that the other has alone is an axis of length 1.
            operands.append(
                self._operand(*where, name, [(i,) if i in indices else () for i in made])
            )
        of_rows = any(ROWS in self._indices(side) for side in tree)
        self.steps.append(Step(operands[0], operands[1], "mul", of_rows))
        return self._last(), made

    def _last(self) -> int:
        return len(self.network.terms) + len(self.steps) - 1

    def _indices(self, tree: Tree) -> frozenset[str]:
        return (
            self.network._kept(_group(tree))
            if not isinstance(tree, int)
            else frozenset(self.network.terms[tree])
        )

    def _operand(
        self, place: int, axes: str, names: str, groups: Sequence[Sequence[str]]
    ) -> Operand:
        """A tensor with these axes, moved into the order of names, in one axis for each group."""
        order = None if axes == names else tuple(axes.index(name) for name in names)
        made = None
        if place >= len(self.network.terms):
            made = self._sizes([(name,) for name in axes])
        return Operand(place, made, order, self._sizes(groups))

    def _sizes(self, groups: Sequence[Sequence[str]]) -> Sizes:
        lengths = self.network.lengths
        return Sizes(
            tuple(math.prod(lengths[i] for i in group if i != ROWS) for group in groups),
            next((place for place, group in enumerate(groups) if ROWS in group), None),
        )


def _without_rows(term: str) -> bool:
    return ROWS not in term


def _group(tree: Tree) -> int:
    """The operands of a tree, as bits."""
    return 1 << tree if isinstance(tree, int) else _group(tree[0]) | _group(tree[1])
