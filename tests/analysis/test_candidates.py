from itertools import product

import pytest

from rankfold.analysis.candidates import costs_of_ranks


def test_multilinear_costs_are_known_from_the_corners() -> None:
    ranks = [(a, b) for a in range(8, 65, 8) for b in range(8, 129, 8)]
    counted = []

    def count(rank):
        counted.append(rank)
        return 3 * rank[0] + 5 * rank[1] + 9 * rank[0] * rank[1], 7 * rank[0] * rank[1]

    costs = costs_of_ranks(count, ranks)
    assert len(counted) <= 6
    assert costs == [count(rank) for rank in ranks]


def test_quadratic_costs_of_a_single_rank_are_known_from_three() -> None:
    ranks = [(rank,) for rank in range(8, 257, 8)]
    counted = []

    def count(rank):
        counted.append(rank)
        return 5 * rank[0] ** 2 + 3 * rank[0] + 7, 11 * rank[0] ** 2

    costs = costs_of_ranks(count, ranks)
    assert len(counted) <= 5
    assert costs == [count(rank) for rank in ranks]


def test_costs_with_a_bend_are_known_from_parts_of_the_grid() -> None:
    """Where one side of a layer has fewer channels than the rank the other side has not."""
    ranks = list(product(range(8, 4001, 8), range(8, 1025, 8)))
    counted = []

    def count(rank):
        counted.append(rank)
        terms, width = rank
        return terms * (min(width, 128) + width + 9), terms * width

    costs = costs_of_ranks(count, ranks)
    assert len(counted) < len(ranks) / 50
    assert costs == [count(rank) for rank in ranks]


@pytest.mark.parametrize(
    "count",
    [
        lambda rank: (rank[0] ** 3, rank[0]),
        lambda rank: (rank[0], rank[0] ** 4),
        lambda rank: (rank[0] * rank[-1] ** 2, 1),
    ],
)
@pytest.mark.parametrize("entries", [1, 2])
def test_costs_of_another_kind_are_all_counted(count, entries) -> None:
    ranks = list(product(range(1, 30), repeat=entries))
    assert costs_of_ranks(count, ranks) == [count(rank) for rank in ranks]


def test_a_single_rank() -> None:
    assert costs_of_ranks(lambda r: (r[0], 1), [(4,)]) == [(4, 1)]
