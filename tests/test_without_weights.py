"""Networks built with no memory for their parameters."""

import torch
from torch import nn

from rankfold.without_weights import without_weights


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.out = nn.Embedding(8, 4), nn.Linear(4, 8, bias=False)
        self.out.weight = self.table.weight
        self.norm = nn.BatchNorm1d(4)
        self.frozen = nn.Parameter(torch.ones(3), requires_grad=False)
        self.register_buffer("steps", torch.arange(3), persistent=False)


def test_parameters_have_shapes_alone_and_buffers_values() -> None:
    with without_weights():
        model = Network()
    expected = Network()
    assert all(parameter.is_meta for parameter in model.parameters())
    assert model.out.weight is model.table.weight
    for (name, own), (also, other) in zip(
        model.named_parameters(), expected.named_parameters(), strict=True
    ):
        assert (name, own.shape, own.dtype) == (also, other.shape, other.dtype)
        assert own.requires_grad == other.requires_grad
    for own, other in zip(model.buffers(), expected.buffers(), strict=True):
        assert torch.equal(own, other)
    assert not any(parameter.is_meta for parameter in Network().parameters())
