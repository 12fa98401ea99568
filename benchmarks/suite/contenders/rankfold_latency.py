"""rankfold, asked for a share of the time."""

import rankfold

NAME, PACKAGES, DISTRIBUTIONS = "rankfold, by the clock", ("rankfold",), {}


def why_not(model):
    return None


def compress(case, share):
    return rankfold.compress(case.make_model(), case.data, latency=share, epochs=0)
