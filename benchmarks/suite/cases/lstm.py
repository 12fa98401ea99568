"""A small LSTM on JapaneseVowels: its matrices are all there is to compress."""

import japanese_vowels

from rankfold.distances import Divergence
from suite.case import Case

SHARES = (0.75, 0.5, 0.3)
TIMES = (0.9, 0.75, 0.6)


def make() -> Case:
    data, test = japanese_vowels.make_data(), japanese_vowels.make_test()
    middle = data[len(data) // 2]
    return Case(
        "LSTM",
        "speakers right, %",
        japanese_vowels.make_model,
        [middle, *data],
        data,
        lambda model: japanese_vowels.accuracy(model.eval(), test),
        Divergence(2.0),
        epochs=20,
        learning_rate=1e-3,
    )
