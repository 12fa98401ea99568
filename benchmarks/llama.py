"""Synthetic checkpoints of the shapes of a Llama, and what compressing them from disk takes."""

import math
import threading
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

_STRONG = 64  # directions that hold most of a weight


@dataclass(frozen=True)
class Llama:
    """The sizes of a network, but for how many blocks it has."""

    features: int = 4096
    between: int = 14336
    heads: int = 32
    key_heads: int = 8
    tokens: int = 128256

    def configuration(self, blocks: int) -> Any:
        from transformers import LlamaConfig

        return LlamaConfig(
            hidden_size=self.features,
            intermediate_size=self.between,
            num_hidden_layers=blocks,
            num_attention_heads=self.heads,
            num_key_value_heads=self.key_heads,
            vocab_size=self.tokens,
            tie_word_embeddings=False,
            dtype="bfloat16",
            architectures=["LlamaForCausalLM"],
        )

    @property
    def of_a_block(self) -> int:
        """Parameters of the linear layers of a block."""
        keys = self.features * self.key_heads // self.heads
        return 2 * self.features * (self.features + keys) + 3 * self.features * self.between

    def write(self, directory: Path, blocks: int) -> None:
        """Weights with a few strong directions and noise in bfloat16, a shard at a time."""
        from rankfold.pretrained import empty_pretrained
        from rankfold.shards import grouped, shard_name, write_index, write_shard

        directory.mkdir()
        (directory / "config.json").write_text(self.configuration(blocks).to_json_string())
        generator = torch.Generator().manual_seed(0)
        empty = empty_pretrained(directory).state_dict()
        sizes = {name: 2 * tensor.numel() for name, tensor in empty.items()}
        groups = list(grouped(sizes, 2**30))
        shards = {shard_name(place, len(groups)): names for place, names in enumerate(groups)}
        for file, names in shards.items():
            tensors = {n: make_weight(tuple(empty[n].shape), generator) for n in names}
            write_shard(tensors, directory / file)
        write_index(directory, shards, sum(sizes.values()))


def make_weight(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    rows, columns = shape
    noise = torch.randn(rows, columns, generator=generator)
    left = torch.randn(rows, _STRONG, generator=generator)
    right = torch.randn(_STRONG, columns, generator=generator) / math.sqrt(_STRONG)
    return ((0.5 * noise + left @ right) / math.sqrt(columns)).bfloat16()


class Watched:
    """Bytes of memory of this process alone, the most at any time.

    Pages of its files are the system's to take back.
    """

    def __init__(self) -> None:
        self.peak, self._done = 0, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._done.wait(0.02):
            status = Path("/proc/self/status").read_text()
            (line,) = (one for one in status.splitlines() if one.startswith("RssAnon"))
            self.peak = max(self.peak, 1024 * int(line.split()[1]))

    def end(self) -> int:
        self._done.set()
        self._thread.join()
        return self.peak


def compress(
    source: Path, target: Path, params: float, sequences: int, length: int
) -> dict[str, Any]:
    """From disk to disk, in this process: seconds of each layer and of planning, peak of memory.

    On so many sequences of random tokens; on none by weights alone.
    """
    from rankfold.analysis import Analysis
    from rankfold.from_disk import compress_from_disk
    from rankfold.from_disk.factors import FiledFactors
    from rankfold.pretrained import empty_pretrained

    layers: dict[str, list[float]] = defaultdict(list)
    planning: list[float] = []
    decompose, plan_of = FiledFactors._decompose, Analysis.plan

    def decomposed(self: Any, module: Any, *rest: Any) -> None:
        start = time.perf_counter()
        decompose(self, module, *rest)
        layers[str(tuple(module.weight.shape))].append(time.perf_counter() - start)

    def planned(*given: Any, **options: Any) -> Any:
        start = time.perf_counter()
        plan = plan_of(*given, **options)
        planning.append(time.perf_counter() - start)
        return plan

    FiledFactors._decompose = decomposed  # type: ignore[method-assign]
    Analysis.plan = planned  # type: ignore[method-assign]
    tokens = empty_pretrained(source).config.vocab_size
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, tokens, (sequences, length), generator=generator)
    watched, start = Watched(), time.perf_counter()
    plan = compress_from_disk(
        source,
        target,
        params=params,
        data=[{"input_ids": ids}] if sequences else None,
        layers="model.layers.*",
        force=True,
    )
    return {
        "seconds": time.perf_counter() - start,
        "peak": watched.end(),
        "layers": dict(layers),
        "planning": sum(planning),
        "parameters": [plan.before.parameters, plan.after.parameters],
        "factorized": len(plan.factorized),
    }
