import pytest
import torch
from geometry import relative
from tensors import tensor_of, weight_of
from torch import nn

from rankfold.cost import count_layer_macs, count_parameters
from rankfold.demo import make_model
from rankfold.layers import CPConvolution
from rankfold.methods import METHODS, WEIGHT_METRIC, Moments

METHOD = {False: METHODS["cp"](), True: METHODS["cp-separable"]()}
both = pytest.mark.parametrize("separable", [False, True])


def of_terms(layer: nn.Module, rank: int, separable: bool) -> nn.Module:
    """The layer in float64, with a weight of exactly this rank."""
    form = CPConvolution(layer.double(), rank, separable)
    with torch.no_grad():
        for seed, one in enumerate(form):
            one.weight.copy_(tensor_of(one.weight.shape, seed=seed))
    return form.to_dense()


@both
@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("layer", [nn.Conv2d(10, 12, 3), nn.Conv3d(8, 9, (2, 3, 2))], ids=str)
def test_a_kernel_of_few_terms_is_recovered(layer, separable, known) -> None:
    exact = of_terms(layer, 5, separable)
    moments = WEIGHT_METRIC
    if known:
        moments = Moments(weight_of(exact.weight[0].numel(), 1), weight_of(len(exact.weight), 2))
    family = METHOD[separable].fit(exact, moments)
    assert relative(family.build((5,)).to_dense().weight, exact.weight) < 1e-3
    assert relative(family.build((4,)).to_dense().weight, exact.weight) > 1e-2


def test_the_terms_are_as_good_as_descents_from_many_starts() -> None:
    layer = make_model().features[3]
    tensor = layer.weight.detach()[:16, :16].double()
    layer = nn.Conv2d(16, 16, 3, dtype=torch.float64)
    layer.weight = nn.Parameter(tensor)
    ends = []
    for seed in range(3):
        factors = [
            tensor_of((n, 12), seed=seed + 10 * k).mul_(0.3).requires_grad_()
            for k, n in enumerate((16, 16, 9))
        ]
        optimizer = torch.optim.LBFGS(factors, max_iter=80, line_search_fn="strong_wolfe")

        def error(factors=factors, optimizer=optimizer) -> torch.Tensor:
            optimizer.zero_grad()
            found = torch.einsum("or,ir,pr->oip", *factors)
            lost = (found - tensor.flatten(2)).square().sum() / tensor.square().sum()
            lost.backward()
            return lost

        optimizer.step(error)
        ends.append(error().item())
    form = METHOD[False].fit(layer, WEIGHT_METRIC).build((12,))
    assert relative(form.to_dense().weight, tensor) ** 2 < 1.03 * sorted(ends)[1]


def test_terms_do_not_grow_to_cancel_each_other() -> None:
    """x∘x∘y + x∘y∘x + y∘x∘x has rank 3, and approximations of rank 2 of any error whose terms
    grow without bound (de Silva and Lim 2008)."""
    x, y = torch.eye(9, dtype=torch.float64)[:2]
    parts = [(x, x, y), (x, y, x), (y, x, x)]
    tensor = sum(torch.einsum("o,i,p->oip", *part) for part in parts)
    tensor = tensor + 0.05 * tensor_of((9, 9, 9)) / 9
    layer = nn.Conv2d(9, 9, 3, dtype=torch.float64, bias=False)
    layer.weight = nn.Parameter(tensor.reshape(layer.weight.shape))
    form = METHODS["cp"](alignment=1).fit(layer, WEIGHT_METRIC).build((2,))
    first, filters, last = (one.weight.flatten(1) for one in form)
    terms = first.norm(dim=1) * filters.norm(dim=1) * last.norm(dim=0)
    assert terms.square().sum() < 40 * tensor.square().sum()
    assert relative(form.to_dense().weight, layer.weight) < 0.35


@both
def test_the_outputs_are_best_in_the_metric_of_patches(separable) -> None:
    layer = nn.Conv2d(10, 12, (3, 2), dtype=torch.float64)
    weight = layer.weight.detach()
    moments = Moments(weight_of(weight[0].numel(), 1), weight_of(len(weight), 2))
    form = METHOD[separable].fit(layer, moments).build((8,))
    last = form[-1].weight.detach()

    def error() -> float:
        return moments.squared_error(form.to_dense().weight.detach() - weight)

    least = error()
    for seed in range(10):
        step = 0.1 * tensor_of(last.shape, seed=seed) * last.norm() / last.numel() ** 0.5
        with torch.no_grad():
            form[-1].weight.add_(step)
            ahead = error()
            form[-1].weight.sub_(2 * step)
            behind = error()
            form[-1].weight.add_(step)
        assert min(ahead, behind) > least
        assert ahead - least == pytest.approx(behind - least, rel=1e-4)


@both
def test_the_loss_of_a_real_kernel_is_no_less_than_its_error(separable) -> None:
    layer = nn.Conv2d(32, 32, 3)
    layer.weight = nn.Parameter(make_model().features[3].weight.detach()[:32, :32])
    family = METHOD[separable].fit(layer, WEIGHT_METRIC)
    for rank in (8, 24, 64):
        error = relative(family.build((rank,)).to_dense().weight, layer.weight) ** 2
        assert 0.999 * error <= family.loss((rank,)) <= 2 * error + 0.01


def test_each_axis_has_its_stride_padding_and_dilation() -> None:
    layer = nn.Conv2d(8, 6, (5, 3), stride=(2, 1), padding=(0, 2), dilation=(1, 2))
    first, vertical, horizontal, last = METHOD[True].skeleton(layer, (4,))
    assert vertical.kernel_size == (5, 1) and horizontal.kernel_size == (1, 3)
    assert vertical.stride == (2, 1) and horizontal.stride == (1, 1)
    assert vertical.padding == (0, 0) and horizontal.padding == (0, 2)
    assert vertical.dilation == (1, 1) and horizontal.dilation == (1, 2)
    assert vertical.groups == horizontal.groups == 4
    assert first.bias is None and last.bias is not None
    _, both_axes, _ = METHOD[False].skeleton(layer, (4,))
    assert both_axes.kernel_size == (5, 3) and both_axes.groups == 4


def test_costs_by_hand() -> None:
    layer = nn.Conv2d(8, 6, 3, stride=2, padding=1, bias=False)
    shape = [(1, 8, 10, 10)]  # 5x5 outputs
    merged, separable = (METHOD[one].skeleton(layer, (4,)) for one in (False, True))
    assert count_parameters(merged) == 4 * (8 + 9 + 6)
    assert count_layer_macs(merged, shape) == 4 * (8 * 100 + 9 * 25 + 6 * 25)
    assert count_parameters(separable) == 4 * (8 + 3 + 3 + 6)
    assert count_layer_macs(separable, shape) == 4 * (8 * 100 + 3 * 50 + 3 * 25 + 6 * 25)


@both
def test_compiles_exports_and_round_trips_like_any_module(separable) -> None:
    layer = nn.Conv2d(8, 16, 3, padding=1)
    form = METHOD[separable].fit(layer, WEIGHT_METRIC).build((8,)).eval()
    inputs = torch.randn(2, 8, 5, 5)
    torch.testing.assert_close(torch.export.export(form, (inputs,)).module()(inputs), form(inputs))
    other = CPConvolution(layer, 8, separable).eval()
    other.load_state_dict(form.state_dict())
    assert torch.equal(other(inputs), form(inputs))


@both
def test_the_same_layer_gives_the_same_factors(separable) -> None:
    layer = nn.Conv2d(8, 16, 3)
    one, other = (METHOD[separable].fit(layer, WEIGHT_METRIC).build((16,)) for _ in range(2))
    assert all(torch.equal(a.weight, b.weight) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize(
    ("name", "layer", "words"),
    [
        ("cp", nn.Conv2d(16, 16, 1), "svd serves it"),
        ("cp", nn.Conv2d(1, 16, 3), "only 1 channel on a side"),
        ("cp-separable", nn.Linear(16, 16), "no factorization for Linear"),
        ("cp-separable", nn.Conv2d(16, 16, (1, 3)), "along one axis alone"),
        ("cp-separable", nn.Conv1d(16, 16, 3), "along one axis alone"),
    ],
)
def test_layers_that_others_serve(name, layer, words) -> None:
    assert words in METHODS[name]().why_not(layer)
