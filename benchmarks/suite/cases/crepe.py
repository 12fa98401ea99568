"""CREPE, which hears pitches: six one-dimensional convolutions with long kernels."""

import crepe

from rankfold.distances import SquaredError
from suite.case import Case


def make() -> Case:
    test = crepe.make_test()
    return Case(
        "CREPE",
        "pitches right, %",
        crepe.make_model,
        crepe.make_data(),
        list(crepe.tones(2_000, seed=2)[0].split(32)),
        lambda model: crepe.accuracy(model.eval(), test),
        SquaredError(),
        epochs=1,
        learning_rate=3e-4,
        shares=(0.5, 0.25),
    )
