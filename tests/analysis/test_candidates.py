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


def test_costs_that_are_not_multilinear_are_all_counted() -> None:
    ranks = [(rank,) for rank in range(1, 30)]
    assert costs_of_ranks(lambda r: (r[0] ** 2, r[0]), ranks) == [(r * r, r) for (r,) in ranks]


def test_a_single_rank() -> None:
    assert costs_of_ranks(lambda r: (r[0], 1), [(4,)]) == [(4, 1)]
