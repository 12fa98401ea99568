"""The modes that the features of a layer are split into."""

import math
from collections.abc import Sequence
from functools import cache

from rankfold.errors import RankError

_MOST = 64


@cache
def balanced_modes(length: int, count: int) -> tuple[int, ...]:
    """The `count` factors of a length, ascending, whose sum is the least.

    Of a prime all but one are 1. Raises RankError for more than 64, which no length has.
    """
    if count > _MOST:
        raise RankError(f"{count} modes: {_MOST} are the most")
    if count == 1:
        return (length,)
    splits = (
        tuple(sorted((factor, *balanced_modes(length // factor, count - 1))))
        for factor in range(1, length + 1)
        if length % factor == 0
    )
    return min(splits, key=lambda factors: (sum(factors), factors))


def modes_of(length: int, modes: int | Sequence[int]) -> tuple[int, ...]:
    """The modes given, or so many balanced ones; RankError where they do not make the length."""
    if isinstance(modes, int):
        if modes < 1:
            raise RankError(f"{modes} modes: at least 1 is needed")
        return balanced_modes(length, modes)
    if math.prod(modes) != length or not all(mode >= 1 for mode in modes):
        raise RankError(f"modes {tuple(modes)} do not multiply to {length} features")
    return tuple(modes)


def paired_modes(
    in_features: int,
    out_features: int,
    in_modes: int | Sequence[int],
    out_modes: int | Sequence[int],
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Modes of the inputs and of the outputs, pair by pair; RankError where these are no pairs.

    Those of the outputs descend and those of the inputs ascend where they are not given, so that
    the pairs are of about one size.
    """
    given, made = modes_of(in_features, in_modes), modes_of(out_features, out_modes)
    if isinstance(out_modes, int):
        made = made[::-1]
    if len(given) != len(made):
        raise RankError(f"{len(given)} modes of inputs and {len(made)} of outputs are no pairs")
    return given, made
