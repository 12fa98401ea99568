"""The small VGG that ships with rankfold, on Fashion-MNIST."""

from rankfold.demo import accuracy, make_data, make_model, make_test
from rankfold.distances import SquaredError
from suite.case import Case

SHARES = (0.33, 0.2, 0.12)
TIMES = (0.5, 0.33)


def make() -> Case:
    data, test = make_data(), make_test()
    return Case(
        "demo",
        "images right, %",
        make_model,
        data,
        data,
        lambda model: accuracy(model, test),
        SquaredError(),
        epochs=3,
        learning_rate=1e-3,
    )
