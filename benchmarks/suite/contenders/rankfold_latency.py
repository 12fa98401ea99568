"""rankfold, asked for a share of the time; its journal keeps the analysis for the next share."""

import rankfold

NAME, PACKAGES, DISTRIBUTIONS = "rankfold, by the clock", ("rankfold",), {}
OF_TIME = True


def why_not(model):
    return None


def compress(case, share):
    asked = {"latency": share, "epochs": 0, "journal": "by-clock", "force": True}
    return rankfold.compress(case.make_model(), case.data, **asked)
