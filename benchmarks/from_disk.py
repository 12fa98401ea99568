"""The SVD of a matrix that lies on disk, in a process of its own so that its memory can be seen.

Prints one line of JSON: seconds of reading the file and of one product with it, seconds of the SVD
without and with the long singular vectors, and the peak of the process's memory.
"""

import json
import resource
import tempfile
from pathlib import Path

import numpy as np
import torch
import typer
from race import timed

from rankfold.decompose import tall_skinny_svd

BLOCK = 16384


def write_matrix(path: Path, rows: int, columns: int) -> None:
    """Random rows with singular values that fall from 1 to 0.01."""
    generator = torch.Generator().manual_seed(0)
    scales = torch.logspace(0, -2, columns)
    turn = torch.linalg.qr(torch.randn(columns, columns, generator=generator)).Q
    with path.open("wb") as file:
        for start in range(0, rows, BLOCK):
            count = min(BLOCK, rows - start)
            block = torch.randn(count, columns, generator=generator)
            (block * scales @ turn).numpy().tofile(file)


def read_and_multiply(path: Path, columns: int, out: Path | None = None) -> torch.Tensor:
    """Read all rows and multiply them by a square matrix; write the product if asked to."""
    square = torch.eye(columns)
    last = square
    with path.open("rb") as file, (out or Path("/dev/null")).open("wb") as written:
        while (numbers := np.fromfile(file, np.float32, BLOCK * columns)).size:
            last = torch.from_numpy(numbers).reshape(-1, columns) @ square
            if out is not None:
                last.numpy().tofile(written)
    return last


def singular_values(matrix: np.memmap) -> torch.Tensor:
    """All of them, from the Gram matrix in float64."""
    gram = torch.zeros(matrix.shape[1], matrix.shape[1], dtype=torch.float64)
    for start in range(0, matrix.shape[0], BLOCK):
        block = torch.from_numpy(np.array(matrix[start : start + BLOCK])).double()
        gram += block.mT @ block
    return torch.linalg.eigvalsh(gram).flip(0).sqrt()


def main(rows: int = 2_000_000, columns: int = 256, threads: int = 2, rounds: int = 3) -> None:
    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as folder:
        file, u_file = Path(folder, "matrix"), Path(folder, "u")
        write_matrix(file, rows, columns)
        matrix = np.memmap(file, np.float32, "r", shape=(rows, columns))
        work = {
            "product": lambda: read_and_multiply(file, columns),
            "values": lambda: tall_skinny_svd(matrix, long_vectors=False),
            "product written": lambda: read_and_multiply(file, columns, u_file),
            "vectors written": lambda: tall_skinny_svd(matrix, u_file=u_file),
        }
        times: dict[str, list[float]] = {name: [] for name in work}
        for _ in range(rounds):
            for name, call in work.items():
                times[name].append(timed(call)[0])
        # Before the check below, which maps the whole file.
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        found = tall_skinny_svd(matrix, long_vectors=False).singular_values.double()
        exact = singular_values(matrix)
    error = ((found - exact) / exact).abs().max().item()
    seconds = {name: sorted(series)[rounds // 2] for name, series in times.items()}
    print(json.dumps({"seconds": seconds, "peak_bytes": 1024 * peak, "worst_value": error}))


if __name__ == "__main__":
    typer.run(main)
