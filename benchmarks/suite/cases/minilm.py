"""all-MiniLM-L6-v2, sentence embeddings: linear layers alone."""

import minilm
import sentence_embeddings

from rankfold.distances import Cosine
from suite.case import Case

SHARES = (0.7, 0.5, 0.35)


def make() -> Case:
    return Case(
        "MiniLM",
        "correlation with WordSim353, %",
        minilm.make_model,
        minilm.make_data(),
        sentence_embeddings.batches()[:100],
        lambda model: minilm.scores(model.eval())[0],
        Cosine(),
        epochs=1,
        learning_rate=2e-4,
        fixed=("network.embeddings.word_embeddings",),
        heads={
            f"network.encoder.layer.{layer}.attention.self.{name}": 12
            for layer in range(6)
            for name in ("query", "key", "value")
        },
    )
