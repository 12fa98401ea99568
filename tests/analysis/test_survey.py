import pytest
import torch
from networks import make_data, make_model
from torch import nn
from torch.nn.utils import parametrizations
from torch.nn.utils import prune as prune_by_mask

from rankfold.analysis.survey import survey
from rankfold.batches import run
from rankfold.errors import CalibrationError, ModelError
from rankfold.layers import TiedLayers
from rankfold.unfusing import unfused


def reasons(model: nn.Module, batch: object) -> dict[str, str | None]:
    return {s.name: s.reason for s in survey(model, [batch], run, 1).layers}


def test_calls_shapes_and_macs_of_the_first_batch() -> None:
    found = survey(make_model(), make_data(), run, 3)
    body = next(layer for layer in found.layers if layer.name == "body")
    assert body.input_shapes == ((8, 32, 8, 8),)
    assert found.batch_size == 8
    macs = 64 * 27 * 32 + 16 * 288 * 48 + 16 * 9 * 48 + 768 * 64 + 640
    assert found.macs == 8 * macs


def test_model_is_left_as_it_was() -> None:
    model = make_model().train()
    model.norm.eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    survey(model, make_data(), run, 2)
    assert model.training and not model.norm.training
    assert not any(module._forward_hooks for module in model.modules())
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(16, 16)
        self.same = self.first
        self.unused = nn.Linear(16, 16)
        self.tied = nn.Linear(16, 16)
        self.tied.weight = self.unused.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.tied(self.same(self.first(x)))


def test_shared_modules_are_one_layer_with_two_calls() -> None:
    found = survey(Twice(), [torch.randn(2, 16)], run, 1)
    assert [layer.name for layer in found.layers] == ["first", "unused", "tied"]
    assert len(found.layers[0].input_shapes) == 2


def test_layers_to_leave_alone_and_why() -> None:
    assert reasons(Twice(), torch.randn(2, 16)) == {
        "first": None,
        "unused": "its weight is also that of 'tied'",
        "tied": "its weight is also that of 'unused'",
    }
    hooked = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    hooked[0].register_forward_hook(lambda *_: None)
    parametrizations.weight_norm(hooked[1])
    found = reasons(hooked, torch.randn(2, 4))
    assert "hooks" in found["0"] and "parametrized" in found["1"]
    unused = nn.ModuleDict({"used": nn.Linear(4, 4), "unused": nn.Linear(4, 4)})
    unused.forward = lambda x: unused["used"](x)
    assert reasons(unused, torch.randn(2, 4))["unused"] == "the forward pass never calls it"


@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
def test_layers_whose_weight_a_parent_reads_directly() -> None:
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 1)
    found = reasons(encoder.eval(), torch.randn(2, 5, 16))
    assert {name for name in found if "linear" in name} == {"layers.0.linear1", "layers.0.linear2"}
    assert found["layers.0.linear1"] is found["layers.0.linear2"] is None
    assert "reads its weight directly" in found["layers.0.self_attn.out_proj"]
    with unfused(encoder):
        opened = reasons(encoder, torch.randn(2, 5, 16))
    assert len(opened) == 6 and set(opened.values()) == {None}


def test_layers_that_share_a_weight_are_one_layer() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.hidden = nn.Embedding(9, 4), nn.Linear(4, 4)
            self.spare, self.out = nn.Embedding(9, 4), nn.Linear(4, 9)
            self.spare.weight = self.out.weight = self.table.weight

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.out(self.hidden(self.table(ids)))

    model, ids = Model(), torch.randint(9, (2, 5))
    first, _, *others = survey(model, [ids], run, 1).layers
    assert isinstance(first.module, TiedLayers)
    assert list(first.module) == [model.table, model.spare, model.out]
    assert (first.name, first.tied, first.reason) == ("table", ("spare", "out"), None)
    assert first.input_shapes == ((2, 5, 1), (2, 5, 4))
    assert [one.reason for one in others] == [
        "it shares the weight of 'table' and is factorized with it"
    ] * 2
    # All or none of them.
    model.out.register_forward_hook(lambda *_: None)
    found = reasons(model, ids)
    assert found["table"] == "its weight is also that of 'spare'" and "hooks" in found["out"]

    class Reads(Model):
        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return super().forward(ids) + self.table.weight.sum()

    assert "also that of" in reasons(Reads(), ids)["table"]
    part = Model()
    part.out.weight = nn.Parameter(part.table.weight.detach())  # the same memory alone
    assert "also that of" in reasons(part, ids)["out"]


def test_layers_whose_weight_the_model_reads_past_their_forward() -> None:
    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.uses, self.asks, self.calls = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.uses(x) + x @ self.uses.weight.T
            return self.calls(self.asks(x.to(self.asks.weight.dtype)))

    found = reasons(Reads(), torch.randn(2, 4))
    assert found["uses"] == found["asks"] == "the model reads its weight directly"
    assert found["calls"] is None


def test_a_parameter_of_the_model_that_is_asked_for_its_dtype_is_no_read_weight() -> None:
    class Asks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            first = next(self.parameters())
            assert first.is_floating_point()
            return self.first(x.to(first.device, first.dtype))

    assert reasons(Asks(), torch.randn(2, 4)) == {"first": None}


def test_weights_of_unusual_kinds_are_left_alone() -> None:
    complex_layer = nn.Linear(4, 4, dtype=torch.complex64)
    found = reasons(nn.Sequential(complex_layer), torch.randn(2, 4, dtype=torch.complex64))
    assert found["0"] == "its weight is complex64"


def test_models_and_batches_that_have_nothing_to_look_at() -> None:
    with pytest.raises(ModelError, match="no layer with a weight"):
        survey(nn.ReLU(), [torch.randn(2, 4)], run, 1)
    with pytest.raises(CalibrationError, match="no sample"):
        survey(nn.Linear(4, 4), [torch.randn(0, 4)], run, 1)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_torchscript_is_refused() -> None:
    with pytest.raises(ModelError, match="TorchScript"):
        survey(torch.jit.script(nn.Sequential(nn.Linear(4, 4))), [torch.randn(2, 4)], run, 1)


def test_what_is_not_finite_is_named() -> None:
    model = make_model()
    with torch.no_grad():
        model.body.weight[0, 0] = torch.nan
    with pytest.raises(ModelError, match=r"body\.weight.*'body'"):
        survey(model, make_data(), run, 1)
    data = make_data()
    data[1] = data[1].clone().fill_(torch.inf)
    with pytest.raises(CalibrationError, match="batch 1 of the data"):
        survey(make_model(), data, run, 4)

    class Overflow(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fine, self.divide = nn.Linear(4, 4), nn.Softplus(beta=0)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.divide(self.fine(x))

    with pytest.raises(CalibrationError, match=r"'divide' \(Softplus\).*batch 0"):
        survey(Overflow(), [torch.randn(2, 4)], run, 1)


def test_a_batch_that_the_model_refuses_is_named() -> None:
    with pytest.raises(ModelError, match=r"batch 1 \(2x5x8x8\): RuntimeError"):
        survey(make_model(), [make_data()[0], torch.randn(2, 5, 8, 8)], run, 4)


def test_weights_that_are_not_there() -> None:
    with pytest.raises(ModelError, match="lazily initialised"):
        survey(nn.Sequential(nn.LazyLinear(4)), [torch.randn(2, 4)], run, 1)
    with pytest.raises(ModelError, match="meta device"):
        survey(nn.Sequential(nn.Linear(4, 4, device="meta")), [torch.randn(2, 4)], run, 1)


@pytest.mark.parametrize(
    "make", [nn.utils.weight_norm, nn.utils.spectral_norm, lambda layer: prune(layer)]
)
def test_weights_that_a_hook_makes_are_left_alone(make) -> None:
    found = reasons(nn.Sequential(make(nn.Linear(6, 5)), nn.Linear(5, 4)), torch.randn(3, 6))
    assert "made by a hook" in found["0"] and "remove_weight_norm" in found["0"]
    assert found["1"] is None


def prune(layer: nn.Module) -> nn.Module:
    return prune_by_mask.l1_unstructured(layer, "weight", 0.5)


def test_a_layer_whose_forward_was_replaced_is_left_alone() -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4))
    model[0].forward = lambda given: 2 * nn.functional.linear(given, model[0].weight)
    found = reasons(model, torch.randn(3, 6))
    assert "forward was replaced" in found["0"] and found["1"] is None


def test_layers_that_an_attribute_also_holds_are_left_alone() -> None:
    class Listed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(6, 6), nn.Linear(6, 6)])
            self.out = nn.Linear(6, 4)
            self.order = {"first": [self.layers[1], (self.layers[0],)]}

        def forward(self, given: torch.Tensor) -> torch.Tensor:
            return self.out(self.order["first"][1][0](self.order["first"][0](given)))

    found = reasons(nn.Sequential(Listed()), torch.randn(3, 6))
    assert "also holds it as '0.order'" in found["0.layers.0"] == found["0.layers.1"]
    assert found["0.out"] is None


def test_layers_called_by_keyword_are_left_alone() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.out = nn.Linear(6, 5), nn.Linear(5, 4)

        def forward(self, given: torch.Tensor) -> torch.Tensor:
            return self.out(self.layer(input=given))

    found = reasons(Named(), torch.randn(3, 6))
    assert "names its input" in found["layer"] and found["out"] is None


@pytest.mark.parametrize("bias", [True, False])
def test_a_bias_that_is_asked_for_outside_keeps_the_layer(bias) -> None:
    class Asking(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.out = nn.Linear(6, 5, bias=bias), nn.Linear(5, 4)

        def forward(self, given: torch.Tensor) -> torch.Tensor:
            shift = 0 if self.layer.bias is None else 1
            return self.out(self.layer(given) + shift)

    found = reasons(Asking(), torch.randn(3, 6))
    assert "reads its weight directly" in found["layer"] and found["out"] is None


def test_scripted_parts_are_left_alone() -> None:
    model = nn.Sequential(torch.jit.script(nn.Linear(6, 5)), nn.Linear(5, 4))
    found = reasons(model, torch.randn(3, 6))
    assert "TorchScript" in found["0"] and found["1"] is None


def test_wrappers_that_know_their_own_layers_alone_are_refused(tmp_path) -> None:
    layer = nn.Linear(6, 5)
    compiled = torch.compile(layer, backend="eager")
    with pytest.raises(ModelError, match=r"pass the module it came from \(model._orig_mod\)"):
        reasons(compiled, torch.randn(3, 6))
    inside = reasons(nn.Sequential(compiled, nn.Linear(5, 4)), torch.randn(3, 6))
    assert "torch.compile" in inside["0._orig_mod"] and inside["1"] is None
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'meeting'}", rank=0, world_size=1
    )
    try:
        parallel = nn.parallel.DistributedDataParallel(layer)
        with pytest.raises(ModelError, match=r"pass model\.module"):
            reasons(parallel, torch.randn(3, 6))
    finally:
        torch.distributed.destroy_process_group()
