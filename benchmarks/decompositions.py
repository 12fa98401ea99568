"""rankfold's decompositions beside those of other libraries: time and error of the same work.

Writes benchmarks/decompositions.json, the tables of docs/decompositions.md and its picture. The
kernels are those of a real network, the text detector of examples/. Takes about twenty minutes.
"""

import json
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from growth import draw, growth_rows, measure_growth
from race import (
    Finish,
    Race,
    Runner,
    between_markers,
    machine,
    markdown_table,
    run_race,
    save,
    timed,
)
from scipy.optimize import linear_sum_assignment

warnings.filterwarnings("ignore")  # torchtt's, about its missing extension

import itertools

import tensorly
import tntorch
import torchtt
from sklearn.utils.extmath import randomized_svd as sklearn_randomized_svd
from tensorly.cp_tensor import cp_to_tensor
from tensorly.decomposition import parafac, partial_tucker
from tensorly.tenalg import multi_mode_dot

from rankfold.decompose import CP, cp, randomized_svd, tensor_train, tucker

HERE = Path(__file__).parent
DOCUMENT = HERE.parent / "docs" / "decompositions.md"
HEADER = ("work", "by", "median time", "relative error", "of rankfold's time", "aim")


def kernel(name: str) -> torch.Tensor:
    """A convolution's weight from the text detector CRAFT."""
    sys.path.append(str(HERE.parent / "examples"))
    from ocr_models import make_detector

    return make_detector().get_submodule(name).weight.detach()


def error_to(tensor: torch.Tensor, made: Callable[[Any], torch.Tensor]) -> Callable[[Any], float]:
    """The relative Frobenius error of what `made` makes of a library's result."""

    def error(result: Any) -> float:
        difference = torch.as_tensor(made(result)).double() - tensor.double()
        return (difference.norm() / tensor.double().norm()).item()

    return error


def ours(tensor: torch.Tensor, run: Callable[[], Any], rounds: int = 5) -> Runner:
    return Runner("rankfold", run, error_to(tensor, lambda found: found.to_tensor()), rounds)


def race_tucker() -> Iterator[Race]:
    generator = torch.Generator().manual_seed(0)
    kernels = {
        "a kernel of CRAFT": kernel("basenet.slice3.27"),
        "white noise": torch.randn(512, 512, 3, 3, generator=generator),
    }
    for what, tensor in kernels.items():
        peer = Runner(
            "tensorly partial_tucker",
            lambda tensor=tensor: partial_tucker(tensor, [170, 170], modes=[0, 1])[0],
            error_to(tensor, lambda found: multi_mode_dot(found[0], found[1], modes=[0, 1])),
        )
        mine = ours(tensor, lambda tensor=tensor: tucker(tensor, (170, 170), (0, 1)))
        yield run_race(f"Tucker-2 of 512x512x3x3, ranks 170, {what}", "10x", (mine, peer))


def race_cp() -> Iterator[Race]:
    tensor = kernel("basenet.slice2.17")
    peer = Runner(
        "tensorly parafac, 50 iterations",
        lambda: parafac(tensor, 200, n_iter_max=50, tol=0, random_state=0),
        error_to(tensor, cp_to_tensor),
        rounds=2,
    )
    reached = peer.error(peer.run())
    iterations = 1
    while _als(tensor, iterations).relative_error(tensor) > reached:
        iterations += 1
    mine = ours(tensor, lambda: _als(tensor, iterations))
    remark = f"alternating least squares, {iterations} iterations"
    yield run_race("CP of 256x256x3x3, rank 200, a kernel of CRAFT", "20x", (mine, peer), remark)


def _als(tensor: torch.Tensor, iterations: int) -> CP:
    return cp(tensor, 200, algorithm="als", iterations=iterations, improvement=0)


def race_swamps() -> Iterator[Race]:
    """The peer has ten times our time; both runs of one round, on three tensors each."""
    for congruence in (0.9, 0.95, 0.99):
        for seed in range(3):
            factors = [collinear(60, 8, congruence, 10 * seed + mode) for mode in range(3)]
            tensor = torch.einsum("ir,jr,kr->ijk", *factors)
            noise = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(seed))
            tensor += 1e-6 * tensor.norm() / noise.norm() * noise
            yield _race_swamp(tensor, factors, f"congruence {congruence}, tensor {seed}")


def _race_swamp(tensor: torch.Tensor, factors: list[torch.Tensor], what: str) -> Race:
    found: dict[str, list[torch.Tensor]] = {}

    def mine() -> CP:
        result = cp(tensor, 8, iterations=1000, improvement=0)
        found["rankfold"] = list(result.factors)
        return result

    def theirs() -> Any:
        result = parafac(tensor, 8, n_iter_max=iterations, tol=0, init="svd")
        found["tensorly"] = list(result[1])
        return result

    mine()
    seconds = timed(mine)[0]
    short, long = (
        timed(lambda count=count: parafac(tensor, 8, n_iter_max=count, tol=0, init="svd"))[0]
        for count in (100, 500)
    )
    iterations = int(400 * 10 * seconds / (long - short))
    peer = Runner(
        f"tensorly parafac, {iterations} iterations", theirs, error_to(tensor, cp_to_tensor), 1
    )
    work = f"CP of 60x60x60, 8 terms, {what}"
    race = run_race(work, "smaller error in a tenth of the time", (ours(tensor, mine, 1), peer))
    shares = {name: recovered(factors, result) for name, result in found.items()}
    remark = "; ".join(f"{name}: {count} of 8 terms found" for name, count in shares.items())
    return Race(race.work, race.asked, race.finishes, remark)


def collinear(length: int, rank: int, congruence: float, seed: int) -> torch.Tensor:
    """Unit columns, any two of them with this inner product."""
    generator = torch.Generator().manual_seed(seed)
    inner = torch.full((rank, rank), congruence, dtype=torch.float64)
    inner.diagonal().fill_(1)
    basis = torch.randn(length, rank, dtype=torch.float64, generator=generator)
    return torch.linalg.qr(basis).Q @ torch.linalg.cholesky(inner).mT


def recovered(true: list[torch.Tensor], found: list[torch.Tensor]) -> int:
    """How many terms are found: the cosine to the true one above 0.999 in every mode."""
    cosines = torch.ones(true[0].shape[1], found[0].shape[1], dtype=torch.float64)
    for left, right in zip(true, found, strict=True):
        unit = right.double() / right.double().norm(dim=0)
        cosines = torch.minimum(cosines, (left.mT @ unit).abs())
    rows, columns = linear_sum_assignment(cosines.nan_to_num(), maximize=True)
    return int((cosines[rows, columns] > 0.999).sum())


def race_trains() -> Iterator[Race]:
    for rank in (16, 48):
        tensor = noisy_train(rank)
        runners = (
            ours(tensor, lambda tensor=tensor: tensor_train(tensor, tolerance=1e-2)),
            Runner(
                "torchtt",
                lambda tensor=tensor: torchtt.TT(tensor, eps=1e-2),
                error_to(tensor, lambda found: found.full()),
            ),
            Runner(
                "tntorch",
                lambda tensor=tensor: tntorch.round_tt(tntorch.Tensor(tensor), eps=1e-2),
                error_to(tensor, lambda found: found.torch()),
                rounds=3,
            ),
        )
        work = f"TT-SVD of 4096x4096 as 8 modes of 8, rank {rank} and noise, tolerance 1e-2"
        yield run_race(work, "3x", runners)


def noisy_train(rank: int) -> torch.Tensor:
    """A random train of this rank, 8 modes of 8, and half a percent of noise."""
    generator = torch.Generator().manual_seed(0)
    ranks = [min(rank, 8 ** min(cut, 8 - cut)) for cut in range(9)]
    tensor = torch.ones(1, 1)
    for left, right in itertools.pairwise(ranks):
        core = torch.randn(left, 8, right, generator=generator)
        tensor = torch.tensordot(tensor, core, 1)
    tensor = tensor.reshape([8] * 8)
    noise = torch.randn(tensor.shape, generator=generator)
    return tensor / tensor.norm() + 0.005 * noise / noise.norm()


def race_randomized() -> Iterator[Race]:
    size, rank = 8192, 64
    for what, values in {
        "1/k": 1 / torch.arange(1, 1025.0),
        "exp(-k/40)": torch.exp(-torch.arange(1024.0) / 40),
    }.items():
        generator = torch.Generator().manual_seed(0)
        left, right = (
            torch.linalg.qr(torch.randn(size, 1024, generator=generator)).Q for _ in range(2)
        )
        matrix = (left * values) @ right.mT
        numbers = matrix.numpy()

        def product(found: Any) -> torch.Tensor:
            u, s, vh = (torch.from_numpy(part.copy()) for part in found)
            return (u * s) @ vh

        runners = [
            ours(matrix, lambda matrix=matrix: randomized_svd(matrix, rank)),
            Runner(
                "torch.svd_lowrank",
                lambda matrix=matrix: torch.svd_lowrank(matrix, rank),
                error_to(matrix, lambda found: (found[0] * found[1]) @ found[2].mT),
            ),
            Runner(
                "rankfold, iterations=4",
                lambda matrix=matrix: randomized_svd(matrix, rank, iterations=4),
                error_to(matrix, lambda found: found.to_tensor()),
            ),
            Runner(
                "sklearn randomized_svd",
                lambda numbers=numbers: sklearn_randomized_svd(numbers, rank, random_state=0),
                error_to(matrix, product),
            ),
        ]
        if what == "1/k":
            runners.append(
                Runner(
                    "torch.linalg.svd",
                    lambda matrix=matrix: torch.linalg.svd(matrix, full_matrices=False),
                    error_to(matrix, lambda f: (f[0][:, :rank] * f[1][:rank]) @ f[2][:rank]),
                    rounds=1,
                )
            )
        work = f"rank {rank} of {size}x{size}, singular values {what}"
        aim = "not slower, smaller error; full SVD 50x"
        yield run_race(
            work, aim, runners, "the least possible error: " + f"{least(values, rank):.6g}"
        )


def least(values: torch.Tensor, rank: int) -> float:
    squares = values.double().square()
    return (squares[rank:].sum() / squares.sum()).sqrt().item()


def race_disk() -> Iterator[Race]:
    command = [
        sys.executable,
        str(HERE / "from_disk.py"),
        "--threads",
        str(torch.get_num_threads()),
    ]
    facts = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
    seconds = facts["seconds"]
    remark = f"peak memory {facts['peak_bytes'] / 1e9:.2f} GB"
    aim = "at most 3x the product's time, under 1 GB"
    for work, mine, peer in (
        ("singular values and right vectors", "values", "product"),
        ("all vectors, u into a file", "vectors written", "product written"),
    ):
        name = f"reading it and one {peer}"
        finishes = (
            Finish("rankfold", seconds[mine], facts["worst_value"], 3),
            Finish(name, seconds[peer], float("nan"), 3),
        )
        yield Race(f"SVD of 2000000x256 float32 on disk: {work}", aim, finishes, remark)


RACES = {
    "tucker": race_tucker,
    "cp": race_cp,
    "swamps": race_swamps,
    "trains": race_trains,
    "randomized": race_randomized,
    "disk": race_disk,
}


def main(
    only: Annotated[list[str] | None, typer.Option(help="tucker, cp, ... or growth")] = None,
    threads: int = 2,
    out: Path = HERE / "decompositions.json",
) -> None:
    """Run the races; those not run keep their place in the results."""
    torch.set_num_threads(threads)
    tensorly.set_backend("pytorch")
    facts = json.loads(out.read_text()) if out.exists() else {"races": {}, "growth": {}}
    facts["machine"] = machine()
    for name in only or [*RACES, "growth"]:
        print(f"== {name}", flush=True)
        if name == "growth":
            facts["growth"] = measure_growth()
            save(out, facts)
            continue
        finished = []
        for race in RACES[name]():
            finished.append(race)
            for row in race.rows():
                print(*row, sep=" | ", flush=True)
            print("   ", race.remark, flush=True)
            facts["races"][name] = finished
            save(out, facts)
    write_document(json.loads(out.read_text()))


def write_document(facts: dict[str, Any]) -> None:
    """The tables and the picture of the document, from the results."""
    races = [_race(entry) for name in RACES for entry in facts["races"].get(name, [])]
    table = markdown_table(HEADER, [row for race in races for row in race.rows()])
    remarks = "".join(f"- {race.work}: {race.remark}.\n" for race in races if race.remark)
    on = ", ".join(f"{name} {value}" for name, value in facts["machine"].items())
    between_markers(DOCUMENT, "races", f"{table}\n{remarks}\nMeasured on: {on}.\n")
    if facts["growth"]:
        draw(facts["growth"], DOCUMENT.with_suffix(".svg"))
        between_markers(DOCUMENT, "growth", growth_rows(facts["growth"]))


def _race(entry: dict[str, Any]) -> Race:
    finishes = tuple(Finish(**finish) for finish in entry["finishes"])
    return Race(entry["work"], entry["asked"], finishes, entry["remark"])


if __name__ == "__main__":
    typer.run(main)
