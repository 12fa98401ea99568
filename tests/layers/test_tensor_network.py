"""Linear layers whose weight is a tensor network."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensors import tensor_of
from torch import nn

import rankfold
from rankfold.decompose import tensor_train_matrix
from rankfold.errors import RankError
from rankfold.layers import (
    BlockTermLinear,
    CPLinear,
    KroneckerLinear,
    TensorRingLinear,
    TensorTrainLinear,
    TuckerLinear,
    modes_of,
    paired_modes,
)
from rankfold.layers.modes import balanced_modes

FORMS = {
    "train": lambda i, o, **more: TensorTrainLinear(i, o, 3, **more),
    "ring": lambda i, o, **more: TensorRingLinear(i, o, 2, **more),
    "block term": lambda i, o, **more: BlockTermLinear(i, o, 2, 2, **more),
    "cp": lambda i, o, **more: CPLinear(i, o, 5, **more),
    "tucker": lambda i, o, **more: TuckerLinear(i, o, 3, **more),
    "kronecker": lambda i, o, **more: KroneckerLinear(i, o, 3, **more),
}
forms = pytest.mark.parametrize("make", FORMS.values(), ids=FORMS)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(list(FORMS)),
    st.integers(1, 40),
    st.integers(1, 40),
    st.lists(st.integers(0, 5), max_size=2),
    st.booleans(),
)
def test_a_layer_is_the_dense_one_that_it_represents(name, given, made, leading, bias) -> None:
    """Of any lengths, primes and 1 among them, and any shape of inputs, empty ones among them."""
    layer = FORMS[name](given, made, bias=bias, dtype=torch.float64)
    inputs = tensor_of((*leading, given))
    dense = layer.to_dense()
    assert (dense.bias is not None) == bias
    outputs = layer(inputs)
    assert outputs.shape == (*leading, made)
    torch.testing.assert_close(outputs, dense(inputs))
    layer.eval().use_weight(True)
    torch.testing.assert_close(layer(inputs), dense(inputs))


def test_a_train_is_a_tt_matrix() -> None:
    """The decomposition's own form, core by core (Novikov et al. 2015, equation 4)."""
    matrix = tensor_of((24, 30))
    train = tensor_train_matrix(matrix, (4, 3, 2), (2, 3, 5), 4)
    layer = TensorTrainLinear(30, 24, 4, (2, 3, 5), (4, 3, 2), dtype=torch.float64)
    for factor, core in zip(layer, train.cores, strict=True):
        factor.weight = nn.Parameter(core.reshape(factor.weight.shape))
    torch.testing.assert_close(layer.to_weight(), train.to_tensor())


def test_two_terms_are_a_sum_of_kronecker_products() -> None:
    layer = KroneckerLinear(12, 10, 2, dtype=torch.float64)
    left, right = layer.factors
    expected = torch.kron(left[0], right[0]) + torch.kron(left[1], right[1])
    torch.testing.assert_close(layer.to_weight(), expected)


def test_blocks_are_tucker_decompositions() -> None:
    """Ye et al. 2018, equation 3, entry by entry."""
    layer = BlockTermLinear(6, 4, 2, 2, 2, 2, dtype=torch.float64)
    cores, first, second = layer.factors
    for o, i in [(0, 0), (3, 5), (1, 4)]:
        value = sum(
            left[o // 2, i // 3] @ core @ right[o % 2, i % 3]
            for core, left, right in zip(cores, first, second, strict=True)
        )
        torch.testing.assert_close(layer.to_weight()[o, i], value)


@forms
@pytest.mark.parametrize("rows", [1, 7, 500])
def test_gradients_are_those_of_finite_differences(make, rows) -> None:
    layer = make(6, 4, dtype=torch.float64)
    inputs = tensor_of((rows, 6)).requires_grad_()
    names = [name for name, _ in layer.named_parameters()]
    directions = tensor_of((4,), seed=3)

    def outputs(given, *parameters):
        made = torch.func.functional_call(layer, dict(zip(names, parameters, strict=True)), given)
        return (made @ directions).square().mean()

    assert torch.autograd.gradcheck(outputs, (inputs, *layer.parameters()), fast_mode=True)


WIDE = [
    lambda n: TensorTrainLinear(n, n, 16),
    lambda n: TensorRingLinear(n, n, 8),
    lambda n: BlockTermLinear(n, n, 4, 8),
    lambda n: CPLinear(n, n, 128),
    lambda n: TuckerLinear(n, n, 12),
    lambda n: KroneckerLinear(n, n, 8),
]


@pytest.mark.parametrize("make", WIDE, ids=FORMS)
@pytest.mark.parametrize(("gain", "between"), [(1.0, nn.Identity()), (2**0.5, nn.ReLU())])
def test_activations_keep_their_scale_through_ten_layers(make, gain, between) -> None:
    torch.manual_seed(0)
    tensor = torch.randn(64, 256)
    first = tensor.square().mean()
    for _ in range(10):
        layer = make(256)
        layer.reset_parameters(gain)
        tensor = between(layer(tensor).detach())
    assert 0.3 < tensor.square().mean() / first < 3


@forms
@pytest.mark.parametrize(("given", "made"), [(24, 36), (17, 5), (1, 3)])
def test_the_weight_has_the_mean_square_that_was_asked_for(make, given, made) -> None:
    layer = make(given, made)
    layer.reset_parameters(gain=3.0)
    torch.testing.assert_close(layer.to_weight().square().mean(), torch.tensor(9 / given))
    assert not layer.to_dense().bias.any()


def test_factors_start_alike() -> None:
    """Entries of mean 0 and one variance, whichever factor they are of."""
    torch.manual_seed(0)
    for factor in TensorTrainLinear(1024, 1024, 16).factors:
        assert abs(factor.mean()) < 0.1 * factor.std()


@forms
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(make, dtype) -> None:
    layer = make(24, 36, dtype=dtype)
    inputs = tensor_of((5, 24), dtype)
    outputs = layer(inputs)
    assert outputs.dtype == dtype
    torch.testing.assert_close(outputs, layer.to_dense()(inputs), rtol=0.1, atol=0.1)


@forms
def test_autocast_computes_in_its_precision_and_keeps_the_weight_in_its_own(make) -> None:
    layer = make(24, 36)
    inputs = torch.randn(5, 24)
    with torch.autocast("cpu", torch.bfloat16):
        outputs = layer(inputs)
        layer(inputs).float().sum().backward()
    torch.testing.assert_close(outputs.float(), layer(inputs), rtol=0.1, atol=0.1)
    assert layer.factors[0].grad.dtype == torch.float32
    layer.eval().use_weight(True)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        layer(inputs)
    assert layer.cached.dtype == torch.float32


@forms
def test_it_is_exported_for_any_number_of_rows(make) -> None:
    layer = make(24, 36).eval()
    inputs = torch.randn(6, 24)
    shapes = ({0: torch.export.Dim("rows", min=1)},)
    exported = torch.export.export(layer, (inputs,), dynamic_shapes=shapes).module()
    for other in (inputs, torch.randn(1, 24), torch.randn(400, 24)):
        torch.testing.assert_close(exported(other), layer(other))


def test_it_is_compiled() -> None:
    layer = TensorTrainLinear(24, 36, 3)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    for rows in (4, 9, 300):
        inputs = torch.randn(rows, 24)
        torch.testing.assert_close(compiled(inputs), layer(inputs))


@forms
def test_the_kept_weight_is_that_of_the_factors_at_all_times(make) -> None:
    layer, inputs = make(24, 36).eval(), torch.randn(5, 24)
    layer.use_weight(True)
    with torch.no_grad():
        before = layer(inputs)
        assert layer.cached is not None and "cached" not in layer.state_dict()
        other = make(24, 36)
        layer.load_state_dict(other.state_dict())
        torch.testing.assert_close(layer(inputs), other(inputs))
        assert not torch.allclose(layer(inputs), before)
        layer.train()
        for factor in layer.factors:
            factor.mul_(1.5)
        layer.eval()
        torch.testing.assert_close(layer(inputs), layer.to_dense()(inputs))
    layer(inputs).sum().backward()
    assert all(factor.grad is not None for factor in layer.factors)
    assert torch.equal(copy.deepcopy(layer)(inputs), layer(inputs))


def test_modes_are_given_or_balanced() -> None:
    assert modes_of(1024, 2) == (32, 32) and modes_of(12, (6, 2)) == (6, 2)
    assert paired_modes(784, 1024, 2, 2) == ((28, 28), (32, 32))
    assert paired_modes(17, 10, 2, 2) == ((1, 17), (5, 2))
    for wrong in (0, (3, 5), (-2, -6)):
        with pytest.raises(RankError):
            modes_of(12, wrong)
    with pytest.raises(RankError, match="no pairs"):
        paired_modes(12, 12, 2, 3)


@pytest.mark.parametrize(
    "make",
    [
        lambda: TensorTrainLinear(12, 12, 0),
        lambda: TensorTrainLinear(12, 12, (2, 200)),
        lambda: TensorTrainLinear(12, 12, (2,)),
        lambda: TensorRingLinear(12, 12, 0),
        lambda: TensorRingLinear(12, 12, (13, 1, 1, 1, 1, 1)),
        lambda: BlockTermLinear(12, 12, 0, 2),
        lambda: BlockTermLinear(12, 12, 2, 0),
        lambda: CPLinear(12, 12, 0),
        lambda: TuckerLinear(12, 12, (7, 7, 7, 7)),
        lambda: KroneckerLinear(12, 12, 0),
        lambda: KroneckerLinear(12, 12, 2, 1, 1),
    ],
)
def test_impossible_ranks_are_refused(make) -> None:
    with pytest.raises(RankError):
        make()


def test_what_a_plan_makes_of_it_is_saved_and_loaded(tmp_path) -> None:
    network = nn.Sequential(nn.Linear(24, 36), nn.ReLU(), nn.Linear(36, 24))
    data = [torch.randn(16, 24) for _ in range(2)]
    analysis = rankfold.analyze(network, data, methods=["tensorized-train"], metric="weight")
    small = rankfold.factorize(network, analysis.plan(params=0.6)).eval()
    assert any(isinstance(one, TensorTrainLinear) for one in small.modules())
    rankfold.save(small, tmp_path / "small")
    loaded = rankfold.load(tmp_path / "small", network)
    assert torch.equal(loaded(data[0]), small(data[0]))


def test_more_modes_than_any_length_has_are_refused() -> None:
    assert balanced_modes(96, 8) == (1, 1, 2, 2, 2, 2, 2, 3)
    assert balanced_modes(96, 64)[:58] == (1,) * 58
    for count in (65, 10**6, 2**62):
        with pytest.raises(RankError, match="64 are the most"):
            balanced_modes(96, count)
