"""Compress a pretrained scene-text recogniser without labels and count the words read right.

    make examples

EasyOCR's `english_g2` (seven convolutions, two bidirectional LSTMs, CTC) reads rendered words. One
plan keeps two budgets, of MACs and of parameters: as if convolutions kept 30 % of both and linear
layers half of their parameters; which layers give up how much is for the plan to say. The LSTMs
stay dense. Recovery sees rendered words in fonts that the test does not use, and only the
original's outputs, no text.
"""

import argparse
import copy
import time

import torch
from ocr_models import decode, make_recogniser
from rendered_text import split_fonts, word_batches

import rankfold
from rankfold.measure import in_fastest_memory_format

METHODS = ["tucker2", "svd"]  # those of Kim et al. 2016

CONVOLUTIONS_KEPT = 0.3  # of MACs and parameters
LINEAR_KEPT = 0.5  # of their parameters


def words_right(model: torch.nn.Module, batches: rankfold.Data) -> float:
    """Share of words read right, letter case aside."""
    right = total = 0
    for images, texts in batches:
        for read, written in zip(decode(model(images)), texts, strict=True):
            right += read.lower() == written.lower()
            total += 1
    return right / total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--words", type=int, default=1000, help="held-out words to test on")
    parser.add_argument("--recovery-words", type=int, default=3000)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", default="english_g2-small")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    model = make_recogniser()
    fonts, held_out_fonts = split_fonts()
    data = [images for images, _ in word_batches(options.recovery_words, fonts, seed=0)]
    test = word_batches(options.words, held_out_fonts, seed=1)
    one_word = [data[len(data) // 2][:1]]  # of a middling width: costs are counted, and times taken

    analysis = rankfold.analyze(model, one_word + data, methods=METHODS)
    convolutions = [layer for layer in analysis.layers if layer.layer.startswith("Conv2d")]
    linears = [layer for layer in analysis.layers if layer.layer.startswith("Linear")]
    plan = analysis.plan(
        macs=analysis.macs - (1 - CONVOLUTIONS_KEPT) * sum(layer.macs for layer in convolutions),
        params=analysis.parameters
        - (1 - CONVOLUTIONS_KEPT) * sum(layer.parameters for layer in convolutions)
        - (1 - LINEAR_KEPT) * sum(layer.parameters for layer in linears),
    )
    start = time.perf_counter()
    small = rankfold.factorize(model, plan)
    print(f"factorized in {time.perf_counter() - start:.1f} s")
    unrecovered = words_right(copy.deepcopy(small).eval(), test)
    recovery = rankfold.recover(
        small, data, teacher=model, epochs=options.epochs, learning_rate=5e-4
    )
    print(f"recovered in {recovery.seconds:.0f} s: {recovery.ended}, epoch {recovery.best} is best")
    small = in_fastest_memory_format(small, one_word[0])
    comparison = rankfold.measure(in_fastest_memory_format(model, one_word[0]), small, one_word)
    rankfold.save(small, options.out, force=True)
    loaded = rankfold.load(options.out, make_recogniser)
    print(comparison)
    for kind in ("Conv2d", "Linear"):
        entries = [entry for entry in plan.layers if entry.layer.startswith(kind)]
        macs = sum(e.after.macs for e in entries) / sum(e.before.macs for e in entries)
        print(f"{kind} layers keep {macs:.1%} of their MACs")
    with torch.no_grad():
        before, after = words_right(model, test), words_right(loaded, test)
    print(f"words right: dense {before:.1%}, factorized {unrecovered:.1%}, recovered {after:.1%}")


if __name__ == "__main__":
    main()
