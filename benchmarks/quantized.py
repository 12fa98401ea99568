"""Low rank and low precision together: dense, low rank, int8, and both, in ONNX Runtime.

Factors are quantized by ONNX Runtime's own quantizer, as a dense network would be: the demo network
(convolutions) with activations calibrated on its unlabelled images, MiniLM (linear layers, as
`recovery.py --step minutes --only MiniLM` leaves them) with activations scaled as they come.
Accuracy, bytes of the file, milliseconds of one batch in turns. Tulloch and Jia 2017 make the two
gains multiply. Writes quantized.json and a table of docs/recovery.md.
"""

import json
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import onnxruntime
import torch
import typer
from onnxruntime.quantization import (
    CalibrationDataReader,
    QuantFormat,
    QuantType,
    quantize_dynamic,
    quantize_static,
)
from onnxruntime.quantization.shape_inference import quant_pre_process
from race import between_markers, machine, markdown_table, save
from torch import nn

import rankfold
from rankfold.measure import latencies

HERE = Path(__file__).parent
RESULTS = HERE / "quantized.json"
DOCUMENT = HERE.parent / "docs" / "recovery.md"

Batch = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Case:
    dense: nn.Module
    small: nn.Module
    example: Batch
    timed: list[Batch]
    score: Callable[[nn.Module], float]
    calibration: list[Batch] | None  # None: activations are scaled as they come
    dynamic: dict[str, dict[int, Any]]


class Deployed(nn.Module):
    """An ONNX file, called as the network that it was made of."""

    def __init__(self, path: Path, names: list[str]) -> None:
        super().__init__()
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        self.session = onnxruntime.InferenceSession(
            path, options, providers=["CPUExecutionProvider"]
        )
        self.names, self.bytes = names, path.stat().st_size

    def forward(self, *given: torch.Tensor, **named: torch.Tensor) -> torch.Tensor:
        feed = dict(zip(self.names, given, strict=False)) | named
        (found,) = self.session.run(None, {name: one.numpy() for name, one in feed.items()})
        return torch.from_numpy(found)


class Images(CalibrationDataReader):
    """What the quantizer asks for: one batch after the other."""

    def __init__(self, batches: list[Batch]) -> None:
        self.left: Iterator[Batch] = iter(batches)

    def get_next(self) -> dict[str, np.ndarray] | None:
        batch = next(self.left, None)
        return None if batch is None else {name: one.numpy() for name, one in batch.items()}


def demo() -> Case:
    from rankfold.demo import accuracy, make_data, make_model, make_test

    model, data, test = make_model(), make_data(), make_test()
    small = rankfold.factorize(model, rankfold.analyze(model, data).plan(macs=0.3))
    rankfold.recover(small, data, teacher=model, epochs=3, learning_rate=1e-3)
    networks = [rankfold.fold_batch_norms(one.eval(), data[0]) for one in (model, small)]
    batches = [{"images": batch} for batch in data[:32]]
    return Case(
        *networks,
        batches[0],
        [{"images": data[0][:1]}, batches[0]],
        lambda m: accuracy(m, test),
        batches,
        {"images": {0: torch.export.Dim("batch", min=1, max=1024)}},
    )


def sentences() -> Case:
    import minilm
    import recovery
    import sentence_embeddings

    model = minilm.make_model()
    small = rankfold.load(recovery.KEPT / f"MiniLM-{recovery.MINUTES[-1]}", model)
    texts = sentence_embeddings.texts()[300:332]
    timed = [minilm.encode(texts[:1]), minilm.encode(texts)]
    sizes = {0: torch.export.Dim("batch", min=1, max=512), 1: torch.export.Dim("tokens", max=512)}
    dynamic = {"input_ids": sizes, "attention_mask": sizes}
    return Case(model, small, timed[1], timed, lambda m: minilm.scores(m)[0], None, dynamic)


CASES = {"demo": demo, "MiniLM": sentences}


def deployed(network: nn.Module, case: Case, folder: Path) -> dict[str, Deployed]:
    """In float32 and in int8."""
    names = list(case.example)
    plain, ready, small = (folder / f"{name}.onnx" for name in ("float", "ready", "int8"))
    program = torch.onnx.export(
        network.eval(),
        (),
        kwargs=case.example,
        dynamic_shapes=case.dynamic,
        input_names=names,
        dynamo=True,
        verbose=False,
        external_data=False,
    )
    program.save(plain)
    quant_pre_process(plain, ready, skip_symbolic_shape=True)
    if case.calibration is None:
        quantize_dynamic(ready, small, per_channel=True, weight_type=QuantType.QInt8)
    else:
        quantize_static(
            ready,
            small,
            Images(case.calibration),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            reduce_range=True,  # processors without VNNI add pairs of products in 16 bits
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
        )
    return {"float32": Deployed(plain, names), "int8": Deployed(small, names)}


def compare(case: Case) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        networks: dict[str, Deployed] = {}
        for rank, network in (("dense", case.dense), ("low rank", case.small)):
            place = Path(folder, rank)
            place.mkdir()
            for precision, one in deployed(network, case, place).items():
                networks[f"{rank}, {precision}"] = one
        times = [
            latencies(
                [lambda m=m, batch=batch: m(**batch) for m in networks.values()],
                torch.device("cpu"),
                seconds=2,
            )
            for batch in case.timed
        ]
        rows = []
        for place, (name, one) in enumerate(networks.items()):
            row = {"network": name, "bytes": one.bytes, "score": case.score(one)}
            rows.append(row | {"milliseconds": [series[place] for series in times]})
            print(rows[-1], flush=True)
    return rows


def main(
    only: Annotated[list[str] | None, typer.Option(help="demo, MiniLM")] = None,
    only_write: bool = False,
    threads: int = 2,
) -> None:
    torch.set_num_threads(threads)
    facts: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    found, machines = facts.setdefault("networks", {}), facts.setdefault("machines", {})
    for name in [] if only_write else only or CASES:
        torch.manual_seed(0)
        machines[name] = machine() | {"onnxruntime": onnxruntime.__version__}
        found[name] = compare(CASES[name]())
        save(RESULTS, facts)
    lines = [
        (
            f"{name}: {row['network']}",
            f"{row['bytes'] / 1e6:.2f} MB",
            f"{100 * row['score']:.1f}",
            *(
                f"{ours:.2f} ms ({dense / ours:.1f}x)"
                for ours, dense in zip(row["milliseconds"], rows[0]["milliseconds"], strict=True)
            ),
        )
        for name, rows in found.items()
        for row in rows
    ]
    header = ("network", "file", "score", "batch 1", "batch 32")
    on = "; ".join(
        f"{network} on " + ", ".join(f"{name} {value}" for name, value in known.items())
        for network, known in machines.items()
    )
    text = f"{markdown_table(header, lines)}\nMeasured: {on}.\n"
    between_markers(DOCUMENT, "quantized", text)


if __name__ == "__main__":
    typer.run(main)
