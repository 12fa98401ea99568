import copy

import pytest
import torch
from geometry import CONVOLUTIONS, convolutions, relative
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import make_data, make_model
from tensors import seeds, tensor_of
from torch import nn

from rankfold.analysis import statistics
from rankfold.analysis.curvature import Identity, Labels, Softmax
from rankfold.analysis.statistics import gather
from rankfold.batches import run
from rankfold.errors import CalibrationError, ModelError
from rankfold.layers import TiedLayers


def of_one_layer(layer: nn.Module, *batches: torch.Tensor, **options):
    """The statistics of a model that is one layer."""
    return gather(layer, {"": layer}, list(batches), run, [Identity()], **options)[""]


def same(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """To the precision of the products, float32."""
    return found.dtype == torch.float64 and relative(found, expected) < 1e-6


def unbiased(layer: nn.Module) -> nn.Module:
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


def response_moment(layer: nn.Module, *inputs: torch.Tensor) -> torch.Tensor:
    """The mean of y yᵀ over all positions of the layer's outputs."""
    with torch.no_grad():
        outputs = [layer(given) for given in inputs]
    if not isinstance(layer, nn.Linear):
        batched = layer.weight.dim()
        outputs = [(y if y.dim() == batched else y[None]).movedim(1, -1) for y in outputs]
    rows = torch.cat([y.reshape(-1, y.shape[-1]) for y in outputs]).double()
    return rows.mT @ rows / len(rows)


def predicted_response(layer: nn.Module, inputs: torch.Tensor) -> torch.Tensor:
    """W A Wᵀ."""
    flat = layer.weight.detach().double().flatten(1)
    return flat @ inputs @ flat.mT


@settings(max_examples=60)
@given(convolutions(channels=st.integers(1, 5), dtype=torch.float64), seeds, st.booleans())
def test_inputs_of_a_convolution_explain_its_responses(drawn, seed, has_batch) -> None:
    """In every geometry: E[y yᵀ] = W E[x xᵀ] Wᵀ for y = W x."""
    layer, shape = drawn
    unbiased(layer)
    given_inputs = tensor_of(shape if has_batch else shape[1:], seed=seed)
    found = of_one_layer(layer, given_inputs)
    assert found.inputs.shape == (layer.weight[0].numel(),) * 2
    expected = response_moment(layer, given_inputs)
    assert relative(predicted_response(layer, found.inputs), expected) < 1e-6
    assert same(found.inputs, found.inputs.mT)


@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize("dimensions", [1, 2, 3])
def test_inputs_of_a_convolution_are_its_patches(dimensions, mode) -> None:
    """Read off with a convolution whose kernels are the units: one entry of a patch each."""
    layer = CONVOLUTIONS[dimensions](2, 3, 3, stride=2, padding=2, dilation=1, padding_mode=mode)
    entries = layer.weight[0].numel()
    reader = copy.deepcopy(layer)
    reader.weight = nn.Parameter(torch.eye(entries).reshape(entries, *layer.weight.shape[1:]))
    reader.bias = None
    batch = tensor_of((2, 2, *(5 for _ in range(dimensions))), torch.float32)
    with torch.no_grad():
        patches = reader(batch).movedim(1, -1).reshape(-1, entries).double()
    found = of_one_layer(layer, batch)
    assert same(found.inputs, patches.mT @ patches / len(patches))
    assert same(found.magnitudes, patches.abs().mean(0))
    assert found.inputs.dtype == found.magnitudes.dtype == torch.float64


@pytest.mark.parametrize("padding", [0, 1, (2, 1)])
@pytest.mark.parametrize("stride", [1, (2, 3)])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_patches_are_those_that_torch_unfolds(padding, stride, memory_format) -> None:
    layer = nn.Conv2d(3, 4, (3, 2), stride=stride, padding=padding, dilation=(1, 2))
    batch = tensor_of((2, 3, 7, 8), torch.float32).contiguous(memory_format=memory_format)
    unfolded = nn.functional.unfold(batch, (3, 2), (1, 2), padding, stride)
    patches = unfolded.movedim(1, -1).reshape(-1, 18).double()
    found = of_one_layer(layer, batch)
    assert same(found.inputs, patches.mT @ patches / len(patches))
    assert found.positions == len(patches) / 2


def test_inputs_that_are_part_of_a_larger_tensor() -> None:
    layer = unbiased(nn.Conv2d(2, 3, 2))
    whole = tensor_of((3, 4, 7, 9), torch.float32)
    for part in (whole[1:, 1:3], whole[:, ::2, 1:, ::2], whole.transpose(2, 3)[:, :2]):
        found = of_one_layer(layer, part)
        expected = response_moment(layer, part)
        assert relative(predicted_response(layer, found.inputs), expected) < 1e-5


@pytest.mark.parametrize("shape", [(6,), (5, 6), (5, 4, 6), (5, 3, 4, 6)])
def test_inputs_of_a_linear_layer_with_any_leading_modes(shape) -> None:
    layer = nn.Linear(6, 4)
    batch = tensor_of(shape, torch.float32)
    rows = batch.reshape(-1, 6).double()
    found = of_one_layer(layer, batch)
    assert same(found.inputs, rows.mT @ rows / len(rows))
    assert same(found.magnitudes, rows.abs().mean(0))
    if len(shape) > 1:
        assert found.positions == len(rows) / 5


def test_batches_of_different_sizes_are_averaged_over_all_positions() -> None:
    layer = nn.Linear(6, 4)
    batches = [tensor_of((size, 3, 6), torch.float32, seed=size) for size in (1, 5, 2)]
    found = of_one_layer(layer, *batches)
    expected = of_one_layer(layer, torch.cat(batches))
    assert same(found.inputs, expected.inputs)
    assert same(found.magnitudes, expected.magnitudes)
    assert found.positions == expected.positions == 3


class Repeated(nn.Module):
    """One layer called twice in one forward, then another."""

    def __init__(self) -> None:
        super().__init__()
        self.twice, self.once = nn.Linear(4, 4, bias=False), nn.Linear(4, 3, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.once(self.twice(self.twice(x)))


def layers_of(model: nn.Module) -> dict[str, nn.Module]:
    kinds = (nn.Linear, *CONVOLUTIONS.values())
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, kinds)}


def test_a_layer_that_is_called_twice_adds_up_its_calls() -> None:
    model = Repeated().double()
    batch = tensor_of((50, 4))
    found = gather(model, layers_of(model), [batch], run, [Softmax()])
    with torch.no_grad():
        middle = model.twice(batch)
        rows = torch.cat([batch, middle])
    torch.testing.assert_close(found["twice"].inputs, rows.mT @ rows / 100, rtol=1e-5, atol=1e-6)
    assert found["twice"].positions == 2 and found["once"].positions == 1
    # Backward the second call's gradients come from `once`, the first's through the second.
    outer = found["once"].gradients["softmax"]
    second = model.once.weight.mT @ outer @ model.once.weight
    first = model.twice.weight.mT @ second @ model.twice.weight
    expected = ((first + second) / 2).detach()
    torch.testing.assert_close(found["twice"].gradients["softmax"], expected, rtol=1e-4, atol=1e-6)


def test_gradients_of_values_are_an_identity_in_the_unit_of_the_outputs() -> None:
    """Half the squared error, relative to the squared norm of a sample's outputs."""
    layer = nn.Linear(5, 3)
    batch = tensor_of((20000, 2, 5), torch.float32)
    with torch.no_grad():
        scale = 20000 / layer(batch).double().square().sum().item()
    found = gather(layer, {"": layer}, [batch], run, [Identity()])[""].gradients["identity"]
    assert relative(found.diagonal(), torch.full((3,), scale)) < 1e-6  # signs have no variance
    assert (found - found.diagonal().diag()).abs().max() < 0.05 * scale


@pytest.mark.parametrize("dimensions", [1, 2, 3])
def test_gradients_of_a_convolution_are_those_of_its_channels(dimensions) -> None:
    """Read by one map of the channels v, all positions alike, they are v vᵀ."""
    convolution = CONVOLUTIONS[dimensions]
    model = nn.Sequential(convolution(2, 4, 3), convolution(4, 1, 1, bias=False))
    batch = tensor_of((5, 2, *(6 for _ in range(dimensions))), torch.float32)
    for given_inputs in (batch, batch[0]):
        found = gather(model, layers_of(model), [given_inputs], run, [Identity()])
        readout = model[1].weight.detach().double().flatten()
        expected = found["1"].gradients["identity"].item() * torch.outer(readout, readout)
        assert relative(found["0"].gradients["identity"], expected) < 1e-6


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_gradients_of_logits_are_the_curvature_of_their_softmax(temperature) -> None:
    layer = nn.Linear(5, 4)
    batch = 3 * tensor_of((4000, 5), torch.float32)
    curvature = Softmax(temperature)
    found = gather(layer, {"": layer}, [batch], run, [curvature], probes=10)[""]
    with torch.no_grad():
        p = (layer(batch).double() / temperature).softmax(-1)
    expected = (p.diag_embed() - p[:, :, None] * p[:, None]).mean(0)
    assert relative(found.gradients[curvature.name], expected) < 0.03
    # What raises all logits alike changes nothing.
    assert found.gradients[curvature.name].sum(0).abs().max() < 1e-6


def test_the_quadratic_model_predicts_the_divergence_of_small_changes() -> None:
    """What the statistics are for: ½ T tr(G Δ A Δᵀ) against the divergence itself."""
    layer = nn.Linear(6, 4, dtype=torch.float64)
    batch = tensor_of((3000, 6))
    found = gather(layer, {"": layer}, [batch], run, [Softmax()], probes=5)[""]
    difference = 1e-3 * tensor_of((4, 6), seed=1)
    predicted = found.gradients["softmax"] @ difference @ found.inputs @ difference.mT
    with torch.no_grad():
        logits = layer(batch)
        changed = logits + batch @ difference.mT
    exact = nn.functional.kl_div(
        changed.log_softmax(-1), logits.log_softmax(-1), log_target=True, reduction="batchmean"
    )
    assert found.positions / 2 * predicted.trace() == pytest.approx(exact.item(), rel=0.1)


def test_gradients_with_labels_are_those_of_single_samples() -> None:
    layer = nn.Linear(5, 3, dtype=torch.float64)
    batch, labels = tensor_of((40, 5)), torch.arange(40) % 3
    curvature = Labels(nn.functional.cross_entropy)
    found = gather(layer, {"": layer}, [(batch, labels)], run, [curvature])[""]
    with torch.no_grad():
        errors = layer(batch).softmax(-1) - nn.functional.one_hot(labels, 3)
    torch.testing.assert_close(
        found.gradients["labels"], errors.mT @ errors / 40, rtol=1e-5, atol=1e-7
    )


def test_more_probes_and_more_curvatures() -> None:
    model = make_model()
    curvatures = [Softmax(), Softmax(4.0), Identity()]
    found = gather(model, layers_of(model), make_data()[:2], run, curvatures, probes=2)
    assert list(found) == ["stem", "body", "depthwise", "head", "out"]
    for name, layer in layers_of(model).items():
        assert set(found[name].gradients) == {"softmax", "softmax@4", "identity"}
        for gradients in found[name].gradients.values():
            outputs = len(layer.weight)
            stacked = (outputs, 1, 1)
            assert gradients.shape == (stacked if name == "depthwise" else (outputs, outputs))
            assert (gradients.diagonal(dim1=-2, dim2=-1) > 0).any()
    assert found["stem"].positions == 64 and found["body"].positions == 16
    assert found["head"].positions == 1


def test_of_large_kernels_the_moment_of_the_channels_is_kept(monkeypatch) -> None:
    monkeypatch.setattr(statistics, "PATCH_LIMIT", 26)
    layer = nn.Conv2d(3, 4, 3, stride=2, padding=1)
    batch = tensor_of((2, 3, 6, 5), torch.float32)
    pixels = batch.movedim(1, -1).reshape(-1, 3).double()
    expected = pixels.mT @ pixels / len(pixels)
    for given_inputs in (batch, batch.to(memory_format=torch.channels_last)):
        found = of_one_layer(layer, given_inputs)
        assert same(found.inputs, expected)
        assert same(found.magnitudes, pixels.abs().mean(0))
    assert found.positions == 9
    monkeypatch.setattr(statistics, "PATCH_LIMIT", 27)
    assert len(of_one_layer(layer, batch).inputs) == 27
    monkeypatch.setattr(statistics, "PATCH_LIMIT", 26)
    single = of_one_layer(layer, batch[0])
    pixels = pixels[:30]
    assert same(single.inputs, pixels.mT @ pixels / 30)


class Activated(nn.Module):
    """Layers each followed by a ReLU, in place or not."""

    def __init__(self, layers: list[nn.Module], in_place: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.in_place = in_place

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = nn.functional.relu(layer(x), inplace=self.in_place)
        return x


@pytest.mark.parametrize(
    ("kind", "shape"),
    [
        (lambda: nn.Linear(4, 4), (5, 4)),
        (lambda: nn.Linear(4, 4), (5, 3, 4)),
        (lambda: nn.Conv2d(4, 4, 3, padding=1), (5, 4, 3, 3)),
        (lambda: nn.Conv2d(4, 4, 3, padding=1), (4, 3, 3)),
        (lambda: nn.Conv1d(4, 4, 1), (5, 4, 6)),
    ],
)
def test_what_follows_a_layer_may_work_in_place(kind, shape) -> None:
    layers = [kind() for _ in range(3)]
    batch = tensor_of(shape, torch.float32)
    found = [
        gather(model, layers_of(model), [batch], run, [Identity()])
        for model in (Activated(layers, False), Activated(layers, True))
    ]
    assert found[0].keys() == found[1].keys()
    for plain, in_place in zip(found[0].values(), found[1].values(), strict=True):
        assert torch.equal(plain.inputs, in_place.inputs)
        assert plain.gradients.keys() == in_place.gradients.keys() == {"identity"}
        assert torch.equal(plain.gradients["identity"], in_place.gradients["identity"])


def test_the_model_is_left_as_it_was() -> None:
    model = make_model().train()
    model.norm.eval()
    model.head.weight.requires_grad_(False)
    trained = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    before = copy.deepcopy(model.state_dict())
    gather(model, layers_of(model), make_data()[:2], run, [Softmax()])
    assert model.training and model.body.training and not model.norm.training
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == trained[name] and parameter.grad is None
    for module in model.modules():
        assert not module._forward_hooks and not module._backward_hooks
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_the_model_is_left_as_it_was_after_an_error() -> None:
    model = make_model().train()
    with pytest.raises(CalibrationError):
        gather(model, layers_of(model), [torch.full((2, 3, 8, 8), torch.inf)], run, [Softmax()])
    assert model.training and all(p.requires_grad for p in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


def test_frozen_models_and_callers_without_gradients_get_the_same() -> None:
    model = make_model()
    expected = gather(model, layers_of(model), make_data()[:1], run, [Softmax()])
    frozen = make_model().requires_grad_(False)
    with torch.no_grad():
        found = gather(frozen, layers_of(frozen), make_data()[:1], run, [Softmax()])
        assert not torch.is_grad_enabled()
    assert not any(parameter.requires_grad for parameter in frozen.parameters())
    for name, one in expected.items():
        assert torch.equal(one.inputs, found[name].inputs)
        assert torch.equal(one.gradients["softmax"], found[name].gradients["softmax"])


def test_the_same_seed_gives_the_same(monkeypatch) -> None:
    monkeypatch.setattr(statistics, "_POSITIONS", 64)
    model = make_model()

    def gathered(seed: int):
        return gather(model, layers_of(model), make_data()[:2], run, [Softmax()], seed=seed)

    first = gathered(3)
    torch.manual_seed(99)
    again, other = gathered(3), gathered(4)
    for name, one in first.items():
        assert torch.equal(one.inputs, again[name].inputs)
        assert torch.equal(one.magnitudes, again[name].magnitudes)
        assert torch.equal(one.gradients["softmax"], again[name].gradients["softmax"])
        assert not torch.equal(one.gradients["softmax"], other[name].gradients["softmax"])
    assert not torch.equal(first["stem"].inputs, other["stem"].inputs)


def test_the_random_state_of_the_caller_is_not_touched() -> None:
    model, before = make_model(), torch.get_rng_state()
    gather(model, layers_of(model), make_data()[:1], run, [Softmax(), Identity()])
    assert torch.equal(torch.get_rng_state(), before)


def test_what_is_not_finite_is_named() -> None:
    class Overflows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fine, self.hit = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.hit(self.fine(x) / (x.sum() != 0))

    model, good = Overflows(), torch.ones(2, 4)
    for bad in (torch.zeros(2, 4), torch.tensor([[1.0, -1.0, 2.0, -2.0]])):
        with pytest.raises(CalibrationError, match=r"'hit' is given .*batch 1"):
            gather(model, layers_of(model), [good, bad], run, [Identity()])


def test_one_position_that_is_not_finite_is_found_among_very_many() -> None:
    batch = torch.ones(100_000, 2)
    batch[54_321, 1] = torch.nan
    with pytest.raises(CalibrationError, match="batch 0"):
        of_one_layer(nn.Linear(2, 2), batch)


def test_gradients_that_are_not_finite_are_named() -> None:
    class Root(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(4, 4, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(x).abs().sqrt() + 1

    model = Root()
    with pytest.raises(CalibrationError, match=r"'inner' gets gradients NaN .*batch 1"):
        gather(model, layers_of(model), [torch.ones(2, 4), torch.zeros(2, 4)], run, [Identity()])


class Guarded(nn.Module):
    """Runs its first layer in a context of its own."""

    def __init__(self, context) -> None:
        super().__init__()
        self.context = context
        self.inner, self.outer = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with self.context():
            hidden = self.inner(x)
        return self.outer(hidden.clone())


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_layers_that_forbid_gradients_have_none(context) -> None:
    model = Guarded(context)
    batches = [tensor_of((8, 4), torch.float32, seed=seed) for seed in range(2)]
    found = gather(model, layers_of(model), batches, run, [Softmax(), Identity()])
    assert found["inner"].gradients == {} and len(found["outer"].gradients) == 2
    rows = torch.cat(batches).double()
    assert same(found["inner"].inputs, rows.mT @ rows / 16)


def test_a_layer_may_be_called_in_and_out_of_inference_mode() -> None:
    model = Guarded(torch.inference_mode)
    model.outer = model.inner
    found = gather(model, {"inner": model.inner}, [torch.ones(8, 4)] * 2, run, [Identity()])
    assert found["inner"].positions == 2 and set(found["inner"].gradients) == {"identity"}


def test_a_model_that_forbids_all_gradients_still_has_inputs() -> None:
    model = make_model()

    def forward(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return model(batch)

    found = gather(model, layers_of(model), make_data()[:1], forward, [Softmax(), Identity()])
    assert len(found) == 5 and all(one.gradients == {} for one in found.values())
    plain = gather(model, layers_of(model), make_data()[:1], run, [])
    assert all(torch.equal(found[name].inputs, plain[name].inputs) for name in found)


def test_layers_that_are_never_called_have_no_statistics() -> None:
    model = nn.ModuleDict({"used": nn.Linear(4, 4), "unused": nn.Linear(4, 4)})
    model.forward = lambda x: model["used"](x)
    assert set(gather(model, layers_of(model), [torch.ones(2, 4)], run, [Identity()])) == {"used"}


def test_a_layer_may_be_called_by_keyword() -> None:
    class ByKeyword(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(input=self.inner(x))

    model = ByKeyword()
    found = gather(model, layers_of(model), [torch.ones(2, 4)], run, [Identity()])
    assert found["inner"].positions == 2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_models_of_every_precision(dtype) -> None:
    model = make_model()
    expected = gather(model, layers_of(model), make_data()[:1], run, [Identity()])
    model = model.to(dtype)
    batch = make_data()[0].to(dtype)
    found = gather(model, layers_of(model), [batch], run, [Softmax(), Identity()])
    for name, one in expected.items():
        assert found[name].inputs.dtype == found[name].gradients["softmax"].dtype == torch.float64
        tolerance = {torch.float16: 5e-3, torch.bfloat16: 5e-2, torch.float64: 1e-5}[dtype]
        assert relative(found[name].inputs, one.inputs) < tolerance
        ours, theirs = (
            of.gradients["identity"].diagonal(dim1=-2, dim2=-1).sum().item()
            for of in (found[name], one)
        )
        assert ours == pytest.approx(theirs, rel=0.5)


@pytest.mark.parametrize("size", [1e-30, 1e-3, 1e15, 1e30])
def test_inputs_of_any_size_neither_vanish_nor_overflow(size) -> None:
    layer = nn.Linear(6, 4)
    batch = tensor_of((50, 6), torch.float32)
    expected = of_one_layer(layer, batch).inputs
    found = gather(layer, {"": layer}, [size * batch], run, [])[""]
    assert relative(found.inputs / size**2, expected) < 1e-5


@pytest.mark.parametrize(
    ("layer", "shape", "most"),
    [(nn.Linear(3, 2), (1000, 3), 200), (nn.Conv2d(2, 3, 3, padding=1), (8, 2, 12, 12), 300)],
)
def test_very_many_positions_are_sampled_without_bias(monkeypatch, layer, shape, most) -> None:
    """Of inputs that grow from the first to the last."""
    growing = torch.linspace(0, 2, shape[0]).reshape(-1, *(1 for _ in shape[1:]))
    batches = [growing * (tensor_of(shape, torch.float32, seed) + 1) for seed in range(20)]
    whole = of_one_layer(layer, *batches)
    monkeypatch.setattr(statistics, "_POSITIONS", most)
    found = of_one_layer(layer, *batches)
    assert not torch.equal(found.inputs, whole.inputs)
    assert relative(found.inputs, whole.inputs) < 0.1
    assert relative(found.magnitudes, whole.magnitudes) < 0.05
    assert relative(found.gradients["identity"], whole.gradients["identity"]) < 0.05
    assert found.positions == whole.positions


def test_a_sampled_call_still_counts_by_all_its_positions(monkeypatch) -> None:
    monkeypatch.setattr(statistics, "_POSITIONS", 50)
    layer = nn.Linear(2, 2)
    batches = [torch.ones(1000, 2), torch.zeros(50, 2)]
    found = of_one_layer(layer, *batches)
    assert found.inputs[0, 0].item() == pytest.approx(1000 / 1050)


def test_of_a_grouped_convolution_each_group_has_its_moments() -> None:
    layer = nn.Conv2d(6, 4, 3, padding=1, stride=2, groups=2, bias=False, dtype=torch.float64)
    batch = tensor_of((3, 6, 7, 7), seed=1)
    found = of_one_layer(layer, batch)
    assert found.inputs.shape == (2, 27, 27) and found.magnitudes.shape == (2, 27)
    assert found.gradients["identity"].shape == (2, 2, 2)
    assert found.positions == 16
    for group, channels in enumerate(batch.split(3, dim=1)):
        plain = nn.Conv2d(3, 2, 3, padding=1, stride=2, bias=False, dtype=torch.float64)
        with torch.no_grad():
            plain.weight.copy_(layer.weight[2 * group : 2 * group + 2])
        alone = of_one_layer(plain, channels)
        assert same(found.inputs[group], alone.inputs)
        assert same(found.magnitudes[group], alone.magnitudes)


def test_of_a_large_grouped_convolution_the_channels_moments_are_kept(monkeypatch) -> None:
    monkeypatch.setattr(statistics, "PATCH_LIMIT", 8)
    batch = tensor_of((3, 6, 5, 5), seed=1)
    found = of_one_layer(nn.Conv2d(6, 4, 3, groups=2, dtype=torch.float64), batch).inputs
    rows = batch.movedim(1, -1).reshape(-1, 2, 3).movedim(1, 0)
    assert same(found, rows.mT @ rows / rows.shape[1])


@pytest.mark.parametrize("has_batch", [True, False])
def test_of_a_transposed_convolution_the_channels_moments_are_kept(has_batch) -> None:
    """Of the inputs, and of the gradients at the outputs; the weight works once per input."""
    layer = nn.ConvTranspose2d(3, 4, 2, stride=2, bias=False, dtype=torch.float64)
    batch = tensor_of((1, 3, 4, 5), seed=1)
    found = of_one_layer(layer, batch if has_batch else batch[0], seed=4)
    rows = batch.movedim(1, -1).reshape(-1, 3)
    assert same(found.inputs, rows.mT @ rows / 20)
    assert same(found.magnitudes, rows.abs().mean(0))
    assert found.gradients["identity"].shape == (4, 4)
    # Its kernels do not overlap, so the squared error of the response is T tr(Δ A Δᵀ).
    with torch.no_grad():
        error = layer(batch).square().sum().item()
    flat = layer.weight.detach().flatten(1)
    assert 20 * (flat.mT @ found.inputs @ flat).trace().item() == pytest.approx(error, rel=1e-6)
    if has_batch:
        assert found.positions == 20
        # Random signs of one size: the mean square of the gradients is theirs.
        squares = found.gradients["identity"].diagonal()
        assert same(squares, torch.full((4,), 1 / error, dtype=torch.float64))


def test_of_a_grouped_transposed_convolution_each_group_has_its_moments() -> None:
    layer = nn.ConvTranspose2d(6, 4, 3, groups=2, dtype=torch.float64)
    batch = tensor_of((3, 6, 5, 5), seed=1)
    found = of_one_layer(layer, batch)
    rows = batch.movedim(1, -1).reshape(-1, 2, 3).movedim(1, 0)
    assert same(found.inputs, rows.mT @ rows / rows.shape[1])
    assert found.gradients["identity"].shape == (2, 2, 2)


def test_frequencies_of_tokens_and_gradients_at_their_vectors() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 2)).eval()
    batches = [torch.tensor([[0, 1, 1], [4, 1, 0]]), torch.tensor([[0, 0, 0]])]
    found = gather(model, {"0": model[0], "1": model[1]}, batches, run, [Identity()])
    # As if each token had been there once more.
    torch.testing.assert_close(
        found["0"].inputs, torch.tensor([6, 4, 1, 1, 2], dtype=torch.float64) / 14
    )
    assert found["0"].positions == 3
    # What reaches the vectors is what leaves the linear layer, through its weight.
    weight = model[1].weight.detach().double()
    expected = weight.mT @ found["1"].gradients["identity"] @ weight
    torch.testing.assert_close(found["0"].gradients["identity"], expected, rtol=1e-5, atol=1e-8)


def test_of_very_many_outputs_the_diagonal(monkeypatch) -> None:
    model, batches = nn.Sequential(nn.Linear(3, 6)).eval(), [torch.randn(4, 3), torch.randn(4, 3)]
    whole = gather(model, {"0": model[0]}, batches, run, [Identity()])["0"]
    monkeypatch.setattr("rankfold.analysis.statistics.DIAGONAL_LIMIT", 5)
    found = gather(model, {"0": model[0]}, batches, run, [Identity()])["0"]
    torch.testing.assert_close(
        found.gradients["identity"], whole.gradients["identity"].diagonal().contiguous()
    )


@pytest.mark.parametrize("first", ["embedding", "linear"])
def test_a_shared_weight_costs_what_its_users_lose(first: str) -> None:
    """For errors of rank one in rows or columns alone: there the one product is the sum of two."""
    torch.manual_seed(0)
    embedding, linear = nn.Embedding(5, 3), nn.Linear(3, 5)
    linear.weight = embedding.weight
    model = nn.Sequential(embedding, nn.Tanh(), linear).eval()
    layers = [embedding, linear] if first == "embedding" else [linear, embedding]
    batches = [torch.randint(5, (4, 6))]
    apart = gather(model, {"0": embedding, "1": linear}, batches, run, [Identity()])
    found = gather(model, {"0": TiedLayers(layers)}, batches, run, [Identity()])["0"]
    together = [found.inputs, found.gradients["identity"]]
    lookups = [apart["0"].inputs, apart["0"].gradients["identity"]]
    products = [apart["1"].gradients["identity"].diagonal(), apart["1"].inputs]

    def loss(pair: list[torch.Tensor], positions: float, error: torch.Tensor) -> torch.Tensor:
        rows, columns = pair
        return positions / 2 * (rows[:, None] * error * (error @ columns)).sum()

    for place in range(5):  # the same error in every column's direction, in one row
        total = torch.zeros((), dtype=torch.float64)
        ours = torch.zeros((), dtype=torch.float64)
        for column in range(3):
            error = torch.zeros(5, 3, dtype=torch.float64)
            error[place, column] = 1
            total += loss(lookups, apart["0"].positions, error)
            total += loss(products, apart["1"].positions, error)
            ours += loss(together, found.positions, error)
        torch.testing.assert_close(ours, total)


def test_under_autocast_moments_are_as_exact_as_without() -> None:
    layer, given = nn.Linear(6, 5), torch.randn(40, 6)

    def autocast(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return model(batch)

    found = gather(layer, {"": layer}, [given], autocast, [Identity()])[""]
    assert same(found.inputs, given.T.double() @ given.double() / 40)


def test_what_only_runs_forward_is_told_how_to_go_without_gradients() -> None:
    class WrittenOver(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 5)

        def forward(self, given: torch.Tensor) -> torch.Tensor:
            hidden = self.layer(given).sigmoid_()
            hidden -= 1
            return hidden

    model, given = WrittenOver(), torch.randn(3, 6)
    with pytest.raises(ModelError, match=r"does not run backward on batch 0.*torch\.no_grad"):
        gather(model, {"layer": model.layer}, [given], run, [Identity()])
    found = gather(model, {"layer": model.layer}, [given], torch.no_grad()(run), [Identity()])
    assert not found["layer"].gradients and found["layer"].positions == 1


def test_what_has_no_derivative_gives_no_gradients() -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4))
    model = torch.ao.quantization.quantize_dynamic(model, {"1"}, torch.qint8)
    found = gather(model, {"0": model[0]}, [torch.randn(3, 6)], run, [Identity()])["0"]
    assert not found.gradients and found.positions == 1
