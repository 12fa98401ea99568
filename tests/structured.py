"""What every linear layer whose weight is made of small tensors keeps: checks for their tests."""

import copy
import dataclasses
from pathlib import Path

import pytest
import torch
from geometry import relative
from tensors import tensor_of
from torch import nn
from torch.nn import functional

import rankfold
from rankfold.layers.structured_linear import StructuredLinear
from rankfold.methods import METHODS

ROUNDING = {
    torch.float16: 5e-3,
    torch.bfloat16: 4e-2,
    torch.float32: 1e-5,
    torch.float64: 1e-12,
}


def dense_product(layer: StructuredLinear, rows: torch.Tensor) -> torch.Tensor:
    """By the weight written out, in float64."""
    bias = None if layer[-1].bias is None else layer[-1].bias.double()
    return functional.linear(rows.double(), layer.to_weight().double(), bias)


def check_product(layer: StructuredLinear, dtype: torch.dtype, leading: tuple[int, ...]) -> None:
    """The layer is its weight: of any leading modes, empty ones too, in any precision."""
    layer = layer.to(dtype)
    with torch.no_grad():
        if layer[-1].bias is not None:
            layer[-1].bias.normal_()
        rows = tensor_of((*leading, layer.in_features), dtype)
        made = layer(rows)
    assert made.dtype == dtype and made.shape == (*leading, layer.out_features)
    assert relative(made, dense_product(layer, rows)) < ROUNDING[dtype]
    assert relative(layer.to_dense()(rows), made) < 2 * ROUNDING[dtype]


def check_gradients(layer: StructuredLinear) -> None:
    layer = layer.double()
    names, values = zip(*layer.named_parameters(), strict=True)

    def call(rows: torch.Tensor, *parameters: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(layer, dict(zip(names, parameters, strict=True)), rows)

    rows = tensor_of((3, layer.in_features)).requires_grad_()
    assert torch.autograd.gradcheck(call, (rows, *values))
    of_weight, of_product = (
        torch.autograd.grad(made.square().sum(), values)
        for made in (dense_product(layer, rows), layer(rows))
    )
    torch.testing.assert_close(of_weight, of_product)


def check_programs(layer: StructuredLinear) -> None:
    """Under autocast, compiled, and exported for any number of rows."""
    layer = layer.eval()
    rows = tensor_of((4, layer.in_features), torch.float32)
    expected = layer(rows)
    with torch.autocast("cpu", torch.bfloat16):
        assert relative(layer(rows), expected) < 4e-2
        assert relative(layer(rows.bfloat16()), expected) < 4e-2
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(rows), expected)
    shapes = ({0: torch.export.Dim("rows")},)
    exported = torch.export.export(layer, (rows,), dynamic_shapes=shapes).module()
    for count in (2, 7):
        given = tensor_of((count, layer.in_features), torch.float32)
        torch.testing.assert_close(exported(given), layer(given))


def check_initial_scale(
    make: type[StructuredLinear], *settings: int, relu: bool = False, layers: int = 10
) -> None:
    """Through so many layers the inputs' scale is kept; with a gain of √2 through those of ReLU."""
    torch.manual_seed(0)
    scales = []
    for _ in range(max(8, 400 // layers**2 if relu else 0)):
        tensor = torch.randn(32, 128)
        if relu:  # half of the energy, that the gain doubles
            tensor = 2**0.5 * tensor.relu()
        for _ in range(layers):
            layer = make(128, 128, *settings)
            layer.reset_parameters(2**0.5 if relu else 1)
            tensor = layer(tensor).detach()
            tensor = tensor.relu() if relu else tensor
        scales.append(tensor.square().mean())
    assert 0.8 < torch.stack(scales).mean() < 1.25


def check_initial_variance(make: type[StructuredLinear], sides: tuple[int, int], *settings) -> None:
    """Of the entries: gain² / in; their mean is 0, and so is the bias."""
    torch.manual_seed(0)
    weights = []
    for _ in range(400):
        layer = make(*sides, *settings)
        layer.reset_parameters(gain=1.5)
        weights.append(layer.to_weight().detach())
        assert not layer[-1].bias.any()
    found = torch.stack(weights)
    assert found.square().mean().item() == pytest.approx(1.5**2 / sides[0], rel=0.1)
    assert abs(found.mean().item()) < 0.1 * found.std().item()


def check_saved(method: str, rank: tuple[int, ...], directory: Path) -> None:
    """A network with such a layer, fitted, saved and loaded: the same outputs to the bit."""

    def make() -> nn.Module:
        return nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 8))

    torch.manual_seed(0)
    model, data = make().eval(), [torch.randn(16, 20) for _ in range(4)]
    analysis = rankfold.analyze(model, data, methods=[method], metric="weight")
    plan = analysis.plan(macs=1.0)
    small = rankfold.factorize(model, plan_with(plan, "0", method, rank))
    rankfold.save(small, directory / "small")
    again = rankfold.load(directory / "small", like=make)
    assert isinstance(again[0], type(METHODS[method]().skeleton(model[0], rank)))
    assert torch.equal(again(data[0]), small.eval()(data[0]))
    assert torch.equal(copy.deepcopy(again)(data[0]), again(data[0]))


def plan_with(plan: rankfold.Plan, name: str, method: str, rank: tuple[int, ...]) -> rankfold.Plan:
    """A plan in which one layer is approximated by a method, and all others are left."""
    entries = []
    for entry in plan.layers:
        if entry.name == name:
            changes = {"method": method, "settings": {}, "rank": rank, "reason": None}
        else:
            changes = {"method": None, "settings": None, "rank": None, "reason": "left as it is"}
        entries.append(dataclasses.replace(entry, **changes))
    return dataclasses.replace(plan, layers=tuple(entries))
