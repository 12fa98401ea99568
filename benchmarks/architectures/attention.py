"""Transformers by hand and by torch's own modules, mixers, mixtures of experts."""

import math
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from architectures.architecture import Architecture, batches, images, noise, tokens

ROUTED = "which expert a token goes to depends on values"


class Attention(nn.Module):
    """Queries, keys and values by one linear layer."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, given: torch.Tensor) -> torch.Tensor:
        samples, length, width = given.shape
        parts = self.qkv(given).reshape(samples, length, 3, self.heads, -1)
        query, key, value = parts.permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(query, key, value)
        return self.proj(mixed.transpose(1, 2).reshape(samples, length, width))


class Block(nn.Module):
    def __init__(self, width: int, feed: nn.Module) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention, self.feed = Attention(width, 4), feed

    def forward(self, given: torch.Tensor) -> torch.Tensor:
        given = given + self.attention(self.norm1(given))
        return given + self.feed(self.norm2(given))


def feed_forward(width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))


class VisionTransformer(nn.Module):
    """Dosovitskiy et al. 2021: patches, a class token, positions that are parameters."""

    def __init__(self, width: int = 48) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 8, 8)
        self.token = nn.Parameter(torch.randn(1, 1, width))
        self.positions = nn.Parameter(torch.randn(1, 17, width) / 10)
        self.blocks = nn.Sequential(*(Block(width, feed_forward(width)) for _ in range(2)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, given: torch.Tensor) -> torch.Tensor:
        rows = self.patches(given).flatten(2).mT
        rows = torch.cat([self.token.expand(len(rows), -1, -1), rows], 1) + self.positions
        return self.head(self.norm(self.blocks(rows))[:, 0])


class MixerBlock(nn.Module):
    """Tolstikhin et al. 2021: linear layers over positions and over channels in turn."""

    def __init__(self, length: int, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.tokens, self.channels = feed_forward(length), feed_forward(width)

    def forward(self, given: torch.Tensor) -> torch.Tensor:
        given = given + self.tokens(self.norm1(given).mT).mT
        return given + self.channels(self.norm2(given))


def mixer() -> nn.Module:
    patches = [nn.Conv2d(3, 48, 8, 8), nn.Flatten(2), Transposed()]
    blocks = (MixerBlock(16, 48), MixerBlock(16, 48))
    return nn.Sequential(*patches, *blocks, nn.LayerNorm(48), nn.Flatten(), nn.Linear(768, 10))


class Transposed(nn.Module):
    def forward(self, given: torch.Tensor) -> torch.Tensor:
        return given.mT


class Experts(nn.Module):
    """Shazeer et al. 2017: the best two of the experts for each token; some may get none."""

    def __init__(self, width: int, count: int = 4) -> None:
        super().__init__()
        self.router = nn.Linear(width, count, bias=False)
        self.experts = nn.ModuleList(feed_forward(width) for _ in range(count))

    def forward(self, given: torch.Tensor) -> torch.Tensor:
        rows = given.reshape(-1, given.shape[-1])
        weights, chosen = self.router(rows).softmax(-1).topk(2, -1)
        out = torch.zeros_like(rows)
        for index, expert in enumerate(self.experts):
            places, which = torch.where(chosen == index)
            if len(places):
                out.index_add_(0, places, expert(rows[places]) * weights[places, which, None])
        return out.view_as(given)


class Unused(Experts):
    """One of the experts is never chosen."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.router.bias = nn.Parameter(torch.tensor([0.0, 0.0, 0.0, -1e4]))


def mixture(experts: type[Experts]) -> nn.Module:
    return nn.Sequential(nn.Embedding(100, 32), Block(32, experts(32)), nn.Linear(32, 100))


class StackedExperts(nn.Module):
    """The weights of all experts in one parameter of three modes: no layer of torch's."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.randn(4, 32, 64) / 6)
        self.second = nn.Parameter(torch.randn(4, 64, 32) / 8)
        self.router, self.out = nn.Linear(32, 4), nn.Linear(32, 64)

    def forward(self, given: torch.Tensor) -> torch.Tensor:
        weights = self.router(given).softmax(-1)
        hidden = torch.einsum("bti,eio->bteo", given, self.first).relu()
        mixed = torch.einsum("bteo,eoi,bte->bti", hidden, self.second, weights)
        return self.out(mixed)


class LanguageModel(nn.Module):
    """An output layer that shares the embedding's weight, a causal mask, torch's own layers."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(200, 48)
        layer = nn.TransformerEncoderLayer(48, 4, 128, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.out = nn.Linear(48, 200, bias=False)
        self.out.weight = self.embedding.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(ids.shape[1])
        hidden = self.embedding(ids) * math.sqrt(48)
        return self.out(self.encoder(hidden, mask=mask, is_causal=True))


class FunctionallyTied(nn.Module):
    """The embedding's weight is multiplied by hand: it is read past the layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(200, 48)
        self.body = nn.Linear(48, 48)
        self.bias = nn.Parameter(torch.zeros(200))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        hidden = torch.tanh(self.body(self.embedding(ids)))
        return functional.linear(hidden, self.embedding.weight, self.bias)


class Padded(nn.Module):
    """An encoder with a padding mask: torch's fast path with nested tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(100, 48, padding_idx=0)
        layer = nn.TransformerEncoderLayer(48, 4, 96, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.head = nn.Linear(48, 3)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        padding = ids == 0
        hidden = self.encoder(self.embedding(ids), src_key_padding_mask=padding)
        return self.head(hidden[:, 0])


class Translator(nn.Module):
    """`nn.Transformer`, sequences first."""

    def __init__(self) -> None:
        super().__init__()
        self.transformer = nn.Transformer(32, 4, 1, 1, 64)
        self.out = nn.Linear(32, 50)

    def forward(self, source: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return self.out(self.transformer(source, target))


class CrossAttention(nn.Module):
    """Jaegle et al. 2021: few queries that are parameters, keys and values of other widths."""

    def __init__(self) -> None:
        super().__init__()
        self.latents = nn.Parameter(torch.randn(6, 1, 48))
        self.attention = nn.MultiheadAttention(48, 4, kdim=40, vdim=24, add_bias_kv=True)
        self.out = nn.Linear(48, 10)

    def forward(self, given: torch.Tensor, **others: Any) -> Any:
        steps = given.transpose(0, 1)
        latents = self.latents.expand(-1, len(given), -1)
        mixed, weights = self.attention(latents, steps, steps[..., :24])
        return self.out(mixed), weights


class WindowAttention(nn.Module):
    """Liu et al. 2021: windows, a table of relative positions looked up by a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 32, 4, 4)
        self.attention = Attention(32, 4)
        self.table = nn.Parameter(torch.randn(49, 32) / 10)
        self.register_buffer("places", torch.randint(49, (16,)), persistent=False)
        self.merge, self.head = nn.Linear(128, 64, bias=False), nn.Linear(64, 10)

    def forward(self, given: torch.Tensor) -> torch.Tensor:
        hidden = self.patches(given)  # 8 x 8
        windows = hidden.unflatten(2, (2, 4)).unflatten(4, (2, 4)).permute(0, 2, 4, 3, 5, 1)
        rows = windows.reshape(-1, 16, 32) + self.table[self.places]
        rows = rows + self.attention(torch.roll(rows, 2, 1))
        return self.head(self.merge(rows.reshape(len(given), 16, 128)).mean(1))


class StateSpace(nn.Module):
    """Gu, Dao 2023, the plain loop: a scan whose matrices depend on the input."""

    def __init__(self, width: int = 32, states: int = 8) -> None:
        super().__init__()
        self.into, self.out = nn.Linear(width, 4 * width), nn.Linear(2 * width, width)
        self.conv = nn.Conv1d(2 * width, 2 * width, 3, padding=2, groups=2 * width)
        self.parts = nn.Linear(2 * width, 2 * states + 1, bias=False)
        self.decay = nn.Parameter(torch.rand(2 * width, states))

    def forward(self, given: torch.Tensor) -> torch.Tensor:
        hidden, gate = self.into(given).chunk(2, -1)
        hidden = functional.silu(self.conv(hidden.mT)[..., : given.shape[1]].mT)
        step, into, out = self.parts(hidden).split([1, 8, 8], -1)
        state, found = torch.zeros(len(given), *self.decay.shape), []
        for t in range(given.shape[1]):
            size = functional.softplus(step[:, t, :, None])
            state = state * torch.exp(-size * self.decay)
            state = state + size * hidden[:, t, :, None] * into[:, t, None]
            found.append((state * out[:, t, None]).sum(-1))
        return given + self.out(torch.stack(found, 1) * functional.silu(gate))


def words() -> dict[str, torch.Tensor]:
    ids = torch.randint(1, 100, (4, 12))
    ids[0, 8:] = 0
    return {"ids": ids}


ARCHITECTURES = (
    Architecture("ViT by hand", VisionTransformer, images()),
    Architecture("MLP-Mixer", mixer, images()),
    Architecture("Mixture of experts", lambda: mixture(Experts), tokens(100), uneven=ROUTED),
    Architecture(
        "Mixture with an unused expert", lambda: mixture(Unused), tokens(100), uneven=ROUTED
    ),
    Architecture("Experts in one parameter", StackedExperts, noise(4, 6, 32)),
    Architecture("Language model, tied weights", LanguageModel, tokens(200)),
    Architecture("Embedding multiplied by hand", FunctionallyTied, tokens(200)),
    Architecture("TransformerEncoder, padding mask", Padded, batches(words)),
    Architecture(
        "nn.Transformer",
        Translator,
        batches(lambda: ((torch.randn(7, 3, 32), torch.randn(5, 3, 32)),)),
    ),
    Architecture(
        "MultiheadAttention, other widths",
        CrossAttention,
        batches(lambda: {"given": torch.randn(3, 9, 40), "unused": None}),
    ),
    Architecture("Windows with relative positions", WindowAttention, images()),
    Architecture(
        "State space model",
        lambda: nn.Sequential(StateSpace(), StateSpace(), nn.Linear(32, 16)),
        noise(2, 10, 32),
    ),
)
