"""`nn.MultiheadAttention` with its projections as linear layers of their own."""

import math
from typing import Any

import torch
from torch import nn
from torch.nn import functional

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "out_proj")


class UnfusedAttention(nn.Module):
    """What `nn.MultiheadAttention` computes, by four linear layers that can be factorized.

    Torch's own reads the weights of its projections past any forward. Called as that one, with the
    same shapes, masks and results (Vaswani et al. 2017): batched or not, `batch_first` or not, with
    keys and values of other widths, `add_bias_kv`, `add_zero_attn`, dropout, with weights or
    without. Nested tensors, which torch's takes on its fast path, are not taken.

    Heads may be narrower than the dense layer's: the scale of the products of queries and keys is
    kept from it.
    """

    bias_k: nn.Parameter | None
    bias_v: nn.Parameter | None

    def __init__(self, attention: nn.MultiheadAttention) -> None:
        """With copies of the parameters of `attention`, trainable where they are, in its mode."""
        super().__init__()
        self.embed_dim, self.num_heads = attention.embed_dim, attention.num_heads
        self.kdim, self.vdim = attention.kdim, attention.vdim
        self.head_dim = attention.head_dim
        self.dropout, self.batch_first = attention.dropout, attention.batch_first
        self.add_zero_attn = attention.add_zero_attn
        self.scale = 1 / math.sqrt(self.head_dim)
        biases: Any = (None, None, None)
        if attention.in_proj_bias is not None:
            biases = attention.in_proj_bias.chunk(3)
        projections = zip(_weights(attention), biases, strict=True)
        self.q_proj, self.k_proj, self.v_proj = (_linear(*both) for both in projections)
        self.out_proj = _linear(attention.out_proj.weight, attention.out_proj.bias)
        for name in ("bias_k", "bias_v"):
            given = getattr(attention, name)
            self.register_parameter(name, None if given is None else _copy(given))
        self.train(attention.training)

    # Asked by torch's transformer layers before they take their fast path.
    _qkv_same_embed_dim = False

    @property
    def in_proj_weight(self) -> torch.Tensor | None:
        """A copy of torch's packed weight, (3 embed_dim, embed_dim); None for other widths."""
        if self.kdim != self.embed_dim or self.vdim != self.embed_dim:
            return None
        weights = tuple(_dense(one).weight for one in (self.q_proj, self.k_proj, self.v_proj))
        return torch.cat(weights)

    @property
    def in_proj_bias(self) -> torch.Tensor | None:
        """A copy of torch's packed bias, (3 embed_dim,), or None."""
        biases = tuple(_dense(one).bias for one in (self.q_proj, self.k_proj, self.v_proj))
        return None if biases[0] is None else torch.cat(biases)

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        key_padding_mask: torch.Tensor | None = None,
        need_weights: bool = True,
        attn_mask: torch.Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Outputs, and the weights of the attention or None: see `nn.MultiheadAttention`."""
        if is_causal and attn_mask is None:
            raise RuntimeError("is_causal=True is a hint of what attn_mask is: give attn_mask too")
        batched = query.dim() == 3
        if not batched:
            query, key, value = query[None], key[None], value[None]
            key_padding_mask = None if key_padding_mask is None else key_padding_mask[None]
        elif not self.batch_first:
            query, key, value = (one.transpose(0, 1) for one in (query, key, value))
        queries = self._heads(self.q_proj(query))
        keys, values = self._with_added(self.k_proj(key), self.v_proj(value))
        causal = is_causal and key_padding_mask is None and not need_weights
        added = keys.shape[2] - key.shape[1]
        mask = _mask(None if causal else attn_mask, key_padding_mask, queries, added)
        dropout = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            scores = (queries * self.scale) @ keys.mT
            weights = (scores if mask is None else scores + mask).softmax(-1)
            weights = functional.dropout(weights, dropout) if dropout > 0 else weights
            mixed = weights @ values
            weights = weights.mean(1) if average_attn_weights else weights
        else:
            mixed = functional.scaled_dot_product_attention(
                queries, keys, values, mask, dropout, causal, scale=self.scale
            )
        made = self.out_proj(mixed.transpose(1, 2).flatten(2))
        if not batched:
            return made[0], None if weights is None else weights[0]
        return made if self.batch_first else made.transpose(0, 1), weights

    def to_dense(self) -> nn.MultiheadAttention:
        """The `nn.MultiheadAttention` that this represents."""
        projections = [_dense(getattr(self, name)) for name in PROJECTIONS]
        first = projections[0]
        dense = nn.MultiheadAttention(
            self.embed_dim,
            self.num_heads,
            self.dropout,
            bias=first.bias is not None,
            add_bias_kv=self.bias_k is not None,
            add_zero_attn=self.add_zero_attn,
            kdim=self.kdim,
            vdim=self.vdim,
            batch_first=self.batch_first,
            device=first.weight.device,
            dtype=first.weight.dtype,
        )
        with torch.no_grad():
            for own, one in zip(
                (*_weights(dense), dense.out_proj.weight), projections, strict=True
            ):
                own.copy_(one.weight)
            if first.bias is not None:
                dense.in_proj_bias.copy_(torch.cat([one.bias for one in projections[:3]]))
                dense.out_proj.bias.copy_(projections[3].bias)
            for name in ("bias_k", "bias_v"):
                if getattr(self, name) is not None:
                    getattr(dense, name).copy_(getattr(self, name))
        return dense.train(self.training)

    def extra_repr(self) -> str:
        return f"embed_dim={self.embed_dim}, num_heads={self.num_heads}"

    def _heads(self, tensor: torch.Tensor) -> torch.Tensor:
        """(batch, positions, features) as (batch, heads, positions, features of a head)."""
        return tensor.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def _with_added(
        self, keys: torch.Tensor, values: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Heads of keys and values, with those behind them that are no positions of the input."""
        if self.bias_k is not None and self.bias_v is not None:
            shape = (len(keys), -1, -1)
            keys = torch.cat([keys, self.bias_k.expand(*shape)], 1)
            values = torch.cat([values, self.bias_v.expand(*shape)], 1)
        keys, values = self._heads(keys), self._heads(values)
        if self.add_zero_attn:
            keys, values = (functional.pad(one, (0, 0, 0, 1)) for one in (keys, values))
        return keys, values


def _mask(
    attention: torch.Tensor | None, padding: torch.Tensor | None, queries: torch.Tensor, added: int
) -> torch.Tensor | None:
    """What is added to the scores, (batch or 1, heads or 1, positions or 1, keys), or None.

    The keys `added` behind those of the input are seen by all.
    """
    whole = None
    if attention is not None:
        additive = _additive(attention, queries.dtype)
        heads = (1, 1) if attention.dim() == 2 else queries.shape[:2]
        whole = additive.reshape(*heads, *attention.shape[-2:])
    if padding is not None:
        additive = _additive(padding, queries.dtype)[:, None, None]
        whole = additive if whole is None else whole + additive
    return whole if whole is None or added == 0 else functional.pad(whole, (0, added))


def _additive(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Of a mask that is True where nothing is seen, or is added already."""
    if mask.dtype != torch.bool:
        if not mask.is_floating_point():
            raise TypeError(f"a mask is of booleans or of real numbers, not of {mask.dtype}")
        return mask.to(dtype)
    return torch.zeros_like(mask, dtype=dtype).masked_fill(mask, -torch.inf)


def _weights(attention: nn.MultiheadAttention) -> tuple[torch.Tensor, ...]:
    """Of queries, keys and values: views of one parameter, or three."""
    if attention._qkv_same_embed_dim:
        return attention.in_proj_weight.chunk(3)
    return tuple(getattr(attention, f"{name}_weight") for name in PROJECTIONS[:3])


def _linear(weight: torch.Tensor, bias: torch.Tensor | None) -> nn.Linear:
    outputs, inputs = weight.shape
    linear = nn.Linear(inputs, outputs, bias is not None, "meta", weight.dtype)
    linear.weight = _copy(weight)
    linear.bias = None if bias is None else _copy(bias)  # type: ignore[assignment]
    return linear


def _copy(tensor: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(tensor.detach().clone(), tensor.requires_grad)


def _dense(projection: Any) -> nn.Linear:
    return projection if isinstance(projection, nn.Linear) else projection.to_dense()
