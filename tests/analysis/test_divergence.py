import copy
import math

import pytest
import torch
from networks import make_data, make_model
from tensors import tensor_of
from torch import nn

from rankfold.analysis.divergence import Judge
from rankfold.batches import run
from rankfold.errors import CalibrationError, ModelError


def changed(layer: nn.Module, size: float = 0.1) -> nn.Module:
    """A copy with other weights."""
    other = copy.deepcopy(layer)
    with torch.no_grad():
        other.weight.add_(size * tensor_of(other.weight.shape, other.weight.dtype))
    return other


class Outputs(nn.Module):
    """A linear layer whose outputs come as a user's model may give them."""

    def __init__(self, pack, out: int = 3) -> None:
        super().__init__()
        self.inner = nn.Linear(4, out, dtype=torch.float64)
        self.pack = pack

    def forward(self, x: torch.Tensor):
        return self.pack(self.inner(x))


BATCHES = [tensor_of((5, 4), seed=1), tensor_of((3, 4), seed=2)]
SHAPES = {
    "logits of classes": lambda y: y,
    "logits of steps": lambda y: torch.stack([y, 2 * y], 1),
    "logits of pixels": lambda y: torch.stack([y, 2 * y], 2)[..., None],
}


@pytest.mark.parametrize("kind", ["logits", "values", None])
def test_no_replacement_is_no_divergence(kind) -> None:
    judge = Judge.of(make_model(), run, make_data()[:2], kind)
    assert judge.divergence({}) == 0
    same = copy.deepcopy(judge.model.body)
    assert judge.divergence({judge.model.body: same}) == 0


@pytest.mark.parametrize("pack", SHAPES.values(), ids=SHAPES)
def test_of_logits_it_is_kullback_leiblers_per_sample(pack) -> None:
    model = Outputs(pack)
    other = changed(model.inner)
    found = Judge.of(model, run, BATCHES, "logits").divergence({model.inner: other})
    total = 0.0
    for batch in BATCHES:
        with torch.no_grad():
            ours, theirs = pack(other(batch)), pack(model.inner(batch))
        axis = 1 if theirs.dim() == 4 else -1
        total += nn.functional.kl_div(
            ours.log_softmax(axis), theirs.log_softmax(axis), log_target=True, reduction="sum"
        ).item()
    assert found == pytest.approx(total / 8, rel=1e-9)
    assert found > 1e-4


def test_of_values_it_is_half_the_squared_error_relative_to_each_output() -> None:
    """Whatever its unit: the second is of another size by far."""
    model = Outputs(lambda y: {"a": (y, [1e4 * y.square()]), "ids": torch.arange(3)})
    other = changed(model.inner)
    found = Judge.of(model, run, BATCHES, "values").divergence({model.inner: other})
    with torch.no_grad():
        theirs, ours = (layer(torch.cat(BATCHES)) for layer in (model.inner, other))
    shares = [
        ((a - b).square().sum() / b.square().sum()).item()
        for a, b in ((ours, theirs), (ours.square(), theirs.square()))
    ]
    assert found == pytest.approx(sum(shares) / 2 / 2, rel=1e-9)


def test_of_logits_only_the_first_output_counts() -> None:
    plain, more = Outputs(lambda y: y), Outputs(lambda y: (y, 100 * y))
    more.load_state_dict(plain.state_dict())
    found = [
        Judge.of(model, run, BATCHES, "logits").divergence({model.inner: changed(model.inner)})
        for model in (plain, more)
    ]
    assert found[0] == found[1]


def test_the_kind_is_as_it_looks_unless_it_is_said() -> None:
    model = Outputs(lambda y: 100 * y)
    assert Judge.of(model, run, BATCHES, None).kind == "logits"
    assert Judge.of(model, run, BATCHES, "values").kind == "values"
    near_uniform = Outputs(lambda y: y / 100)
    assert Judge.of(near_uniform, run, BATCHES, None).kind == "values"
    assert Judge.of(near_uniform, run, BATCHES, "logits").kind == "logits"


@pytest.mark.parametrize("kind", ["logits", "values"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_outputs_that_are_not_finite_are_infinitely_far(kind, bad) -> None:
    model = Outputs(lambda y: y)
    other = changed(model.inner)
    with torch.no_grad():
        other.bias[1] = bad
    assert Judge.of(model, run, BATCHES, kind).divergence({model.inner: other}) == math.inf


def test_classes_that_the_model_rules_out_do_not_count() -> None:
    mask = torch.tensor([0.0, -torch.inf, 0.0])
    model = Outputs(lambda y: y + mask)
    other = changed(model.inner)
    found = Judge.of(model, run, BATCHES, "logits").divergence({model.inner: other})
    fewer = Outputs(lambda y: y[:, ::2])
    fewer.load_state_dict(model.state_dict())
    expected = Judge.of(fewer, run, BATCHES, "logits").divergence({fewer.inner: other})
    assert found == pytest.approx(expected)


def test_a_change_of_values_that_are_zero_is_a_divergence() -> None:
    model = Outputs(torch.relu)
    with torch.no_grad():
        model.inner.bias.fill_(-100)
    judge = Judge.of(model, run, BATCHES, "values")
    other = copy.deepcopy(model.inner)
    with torch.no_grad():
        other.bias.fill_(100)
    assert judge.divergence({model.inner: other}) > 0


def test_an_output_of_zeros_is_compared_with_all_of_them() -> None:
    model = Outputs(lambda y: (y[:, :2], torch.relu(y[:, 2:] - 100)))
    other = copy.deepcopy(model.inner)
    with torch.no_grad():
        other.bias[2] += 103
        theirs, ours = (layer(torch.cat(BATCHES)) for layer in (model.inner, other))
    expected = (ours[:, 2] - 100).relu().square().sum() / theirs[:, :2].square().sum() / 2 / 2
    found = Judge.of(model, run, BATCHES, "values").divergence({model.inner: other})
    assert found == pytest.approx(expected.item(), rel=1e-9) and found > 0


def test_values_that_were_zero_and_are_not_finite_are_infinitely_far() -> None:
    model = Outputs(lambda y: y)
    with torch.no_grad():
        model.inner.weight.zero_()
        model.inner.bias.zero_()
    other = copy.deepcopy(model.inner)
    with torch.no_grad():
        other.bias[1] = torch.nan
    judge = Judge.of(model, run, BATCHES, "values")
    assert judge.divergence({model.inner: other}) == math.inf


def test_a_larger_change_is_a_larger_divergence() -> None:
    model = make_model()
    for kind in ("logits", "values"):
        judge = Judge.of(model, run, make_data()[:2], kind)
        found = [judge.divergence({model.head: changed(model.head, s)}) for s in (0.01, 0.1, 1)]
        assert 0 < found[0] < found[1] < found[2] < math.inf


@pytest.mark.parametrize(
    ("shape", "kind", "batches", "expected"),
    [
        ((32, 3), "logits", 1, 2),  # 32 outputs a batch, 64 are needed
        ((32, 3), "logits", 3, 3),
        ((32, 3), "values", 0, 1),  # 96 numbers
        ((2, 3), "logits", 1, 4),  # never enough
        ((2, 40, 3), "logits", 1, 1),  # 80 positions
    ],
)
def test_the_first_batches_are_so_many_that_one_can_judge_by_them(
    shape, kind, batches, expected
) -> None:
    judge = Judge.of(nn.Linear(3, 3), run, [torch.randn(shape) for _ in range(4)], kind)
    found = judge.first(batches)
    assert len(found.batches) == len(found.targets) == expected
    assert all(ours is theirs for ours, theirs in zip(found.targets, judge.targets, strict=False))


def test_several_replacements_act_together() -> None:
    model = make_model()
    judge = Judge.of(model, run, make_data()[:2], "values")
    replacements = {layer: changed(layer) for layer in (model.body, model.out)}
    both = judge.divergence(replacements)
    model.body, model.out = replacements.values()
    with torch.no_grad():
        targets = torch.cat(list(judge.targets))
        outputs = torch.cat([model(batch) for batch in make_data()[:2]])
    expected = (outputs - targets).double().square().sum() / targets.double().square().sum() / 2
    assert both == pytest.approx(expected.item(), rel=1e-5)


def test_the_model_and_the_replacement_are_left_as_they_were() -> None:
    model = make_model().train()
    model.norm.eval()
    before = copy.deepcopy(model.state_dict())
    modules = dict(model.named_modules())
    judge = Judge.of(model, run, make_data()[:2], None)
    other = changed(model.body).train()
    assert judge.divergence({model.body: other}) > 0
    assert other.training and model.training and model.body.training and not model.norm.training
    assert dict(model.named_modules()) == modules
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    with pytest.raises(ModelError):
        judge.divergence({model.body: nn.Linear(7, 7)})
    assert dict(model.named_modules()) == modules and model.training


def test_it_is_judged_in_eval_mode_and_without_gradients() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5)).train()
    judge = Judge.of(model, run, [torch.ones(2, 4)], "values")
    assert not judge.targets[0].requires_grad
    assert judge.divergence({}) == 0
    assert model.training


def test_the_whole_model_may_be_replaced() -> None:
    model = nn.Linear(4, 3, dtype=torch.float64)
    other = changed(model)
    judge = Judge.of(model, run, BATCHES, "values")
    wrapped = nn.Sequential(model)
    expected = Judge.of(wrapped, run, BATCHES, "values").divergence({model: other})
    assert judge.divergence({model: other}) == expected > 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_compared_in_double(dtype) -> None:
    model = make_model().to(dtype)
    batch = make_data()[0].to(dtype)
    for kind in ("logits", "values"):
        judge = Judge.of(model, run, [batch], kind)
        assert judge.divergence({}) == 0
        assert 0 < judge.divergence({model.head: changed(model.head)}) < math.inf


def test_outputs_without_numbers_cannot_be_judged() -> None:
    model = Outputs(lambda y: y.argmax(1))
    with pytest.raises(CalibrationError, match="no tensor of real numbers"):
        Judge.of(model, run, BATCHES, None)


def test_a_batch_that_the_model_refuses_is_named() -> None:
    with pytest.raises(ModelError, match="batch 1"):
        Judge.of(make_model(), run, [make_data()[0], torch.zeros(2, 5, 8, 8)], None)
