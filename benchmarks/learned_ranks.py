"""Ranks learned with the weights (LC) beside factorizing at once and in steps, on a processor.

As the second half of from_scratch.py, in little: the demo network, trained already, to a sixth of
its MACs on 5 000 labelled images of Fashion-MNIST, which it has seen, in twelve epochs each; three
seeds of the training. Writes learned_ranks.json, in which what is there is not done again, and a
table of docs/training.md.
"""

import json
from collections.abc import Callable

import torch
import typer
from from_scratch import DOCUMENT, FROM_TRAINED, HERE, SEEDS, Training, key, measured, table
from race import between_markers, machine, save
from torch import nn

from rankfold.demo import make_model

RESULTS = HERE / "learned_ranks.json"
IMAGES = 5_000

Make = Callable[[nn.Module, Training, int], nn.Module]
WAYS: dict[str, Make] = {"dense": lambda model, data, seed: model, **FROM_TRAINED}


def main(only_write: bool = False, threads: int = 2) -> None:
    torch.set_num_threads(threads)
    facts = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    networks = facts.setdefault("networks", {})
    data = Training(IMAGES)
    for seed in SEEDS:
        for name, make in WAYS.items():
            if only_write or key(name, seed) in networks:
                continue
            networks[key(name, seed)] = measured(make(make_model(), data, seed))
            print(name, seed, networks[key(name, seed)], flush=True)
            facts["machine"] = machine()
            save(RESULTS, facts)
    on = ", ".join(f"{name} {value}" for name, value in facts["machine"].items())
    text = f"{table(networks, list(WAYS))}\nMeasured on: {on}.\n"
    between_markers(DOCUMENT, "learned ranks", text)


if __name__ == "__main__":
    typer.run(main)
