"""CREPE, which hears pitches: six one-dimensional convolutions with long kernels."""

import crepe

from rankfold.distances import SquaredError
from suite.case import Case

SHARES = (0.5, 0.25, 0.12)


def make() -> Case:
    frames, cents = crepe.tones(256, seed=1)
    test = list(zip(frames.split(16), cents.split(16), strict=True))
    calibration = crepe.tones(160, seed=0)[0]
    return Case(
        "CREPE",
        "pitches right, %",
        crepe.make_model,
        list(calibration.split(8)),
        list(crepe.tones(320, seed=2)[0].split(16)),
        lambda model: crepe.accuracy(model.eval(), test),
        SquaredError(),
        epochs=1,
        learning_rate=3e-4,
        fixed=("conv6",),
    )
