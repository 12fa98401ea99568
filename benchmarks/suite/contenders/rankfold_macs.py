"""rankfold, asked for a share of the MACs; its journal keeps the analysis for the next share."""

import rankfold

NAME, PACKAGES, DISTRIBUTIONS = "rankfold, by MACs", ("rankfold",), {}


def why_not(model):
    return None


def compress(case, share):
    model = case.make_model()
    analysis = rankfold.analyze(model, case.data, journal="by-macs")
    return rankfold.factorize(model, analysis.plan(macs=share))
