"""A small decoder trained on Shakespeare: attention, linear layers, a tied embedding."""

import language_model_network as network

from rankfold.distances import Divergence
from suite.case import Case

SHARES = (0.8, 0.6, 0.4)


def make() -> Case:
    test = network.make_test()
    return Case(
        "language model",
        "minus perplexity",
        network.make_model,
        network.make_data(),
        network.make_data(),
        lambda model: -network.perplexity(model.eval(), test),
        Divergence(),
        epochs=1,
        learning_rate=3e-4,
        point=1.0,
        fixed=("tokens",),
        heads={
            f"blocks.{block}.attention.{name}": network.HEADS
            for block in range(network.BLOCKS)
            for name in ("query", "key", "value")
        },
    )
