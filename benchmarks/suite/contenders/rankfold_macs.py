"""rankfold, asked for a share of the MACs."""

import rankfold

NAME, PACKAGES, DISTRIBUTIONS = "rankfold, by MACs", ("rankfold",), {}


def why_not(model):
    return None


def compress(case, share):
    model = case.make_model()
    return rankfold.factorize(model, rankfold.analyze(model, case.data).plan(macs=share))
