import json
from dataclasses import replace

import pytest
import torch
from networks import make_data, make_model
from safetensors.torch import load_file, save_file
from torch import nn

import rankfold
from rankfold.analysis.storage import DOCUMENT, TENSORS
from rankfold.errors import CheckpointError, PlanError
from rankfold.methods import Moments


@pytest.fixture(scope="module")
def analysis() -> rankfold.Analysis:
    return rankfold.analyze(make_model(), make_data(), timed=True)


@pytest.fixture
def saved(analysis, tmp_path):
    analysis.save(tmp_path / "there")
    return tmp_path / "there"


@pytest.mark.parametrize(
    "request_", [{"macs": 0.4}, {"params": 0.5, "memory": 0.6}, {"energy": 0.5}, {"evbmf": True}]
)
def test_the_same_plans_come_from_a_saved_analysis(analysis, saved, request_) -> None:
    again = rankfold.Analysis.load(saved)
    assert again.plan(**request_) == analysis.plan(**request_)
    assert again.checks == analysis.checks and again.trials == analysis.trials
    assert again.timing == analysis.timing and again.metric == analysis.metric


def test_its_plan_is_applied_in_the_same_metric(analysis, saved) -> None:
    again = rankfold.Analysis.load(saved)
    plan = again.plan(macs=0.4)
    networks = [
        rankfold.factorize(make_model(), plan),
        rankfold.factorize(make_model(), analysis.plan(macs=0.4)),
    ]
    states = [network.state_dict() for network in networks]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_the_moments_of_a_recurrent_layers_inputs_are_kept(tmp_path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.LSTM(40, 16, batch_first=True), _Outputs())
    data = [torch.randn(4, 5, 40) for _ in range(3)]
    analysis = rankfold.analyze(model, data, methods=["low-rank-inputs"])
    analysis.save(tmp_path)
    again = rankfold.Analysis.load(tmp_path)
    ours, theirs = again.layers[0].moments.given, analysis.layers[0].moments.given
    assert torch.equal(ours.inputs, theirs.inputs) and ours.scale == theirs.scale
    assert torch.equal(ours.gradients, theirs.gradients) and ours.given is None
    plan = again.plan(params=0.6)
    assert plan.factorized[0].method == "low-rank-inputs"
    states = [rankfold.factorize(model, p).state_dict() for p in (plan, analysis.plan(params=0.6))]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


class _Outputs(nn.Module):
    def forward(self, given):
        return given[0]


def test_a_plan_from_a_file_needs_the_analysis(analysis, tmp_path) -> None:
    assert analysis.metric != "weight"
    analysis.plan(macs=0.4).save(tmp_path / "plan.json")
    plan = rankfold.Plan.load(tmp_path / "plan.json")
    with pytest.raises(PlanError, match="give factorize the analysis"):
        rankfold.factorize(make_model(), plan)
    small = rankfold.factorize(make_model(), plan, analysis=analysis)
    expected = rankfold.factorize(make_model(), analysis.plan(macs=0.4))
    for name, value in small.state_dict().items():
        assert torch.equal(value, expected.state_dict()[name])


def test_what_is_missing_or_damaged_is_refused(saved, tmp_path) -> None:
    with pytest.raises(CheckpointError, match="holds no analysis"):
        rankfold.Analysis.load(tmp_path / "nowhere")
    document = json.loads((saved / DOCUMENT).read_text())
    for wrong in (
        {**document, "format_version": 99},
        {**document, "macs": -1},
        {**document, "layers": 3},
        {key: value for key, value in document.items() if key != "metric"},
    ):
        (saved / DOCUMENT).write_text(json.dumps(wrong))
        with pytest.raises(CheckpointError):
            rankfold.Analysis.load(saved)
    (saved / DOCUMENT).write_text(json.dumps(document))
    (saved / TENSORS).write_bytes(b"not tensors")
    with pytest.raises(CheckpointError, match="holds no analysis"):
        rankfold.Analysis.load(saved)


def test_tensors_that_fit_nothing_are_refused(analysis, saved) -> None:
    tensors = load_file(saved / TENSORS)
    method = next(name for name in tensors if name.endswith("svd.ranks")).removesuffix(".ranks")
    spectrum = f"{method}.spectrum.0"
    moment = next(name for name in tensors if name.endswith(".inputs"))
    for name, wrong in {
        spectrum: tensors[spectrum][:-1].clone(),
        f"{method}.ranks": tensors[f"{method}.ranks"] - 10**6,
        f"{method}.losses": tensors[f"{method}.losses"] * torch.nan,
        f"{method}.costs": tensors[f"{method}.costs"][:, :1].contiguous(),
        moment: tensors[moment][:-1].clone(),
    }.items():
        save_file({**tensors, name: wrong}, saved / TENSORS)
        with pytest.raises(CheckpointError, match="damaged"):
            rankfold.Analysis.load(saved)
    save_file(tensors, saved / TENSORS)
    assert rankfold.Analysis.load(saved).plan(macs=0.5) == analysis.plan(macs=0.5)


@pytest.mark.parametrize(
    ("name", "value"),
    [("batch_size", 0), ("metric", 3), ("trials", [{}]), ("timing", {"dense_ms": "x"})],
)
def test_fields_of_the_wrong_kind_are_refused(saved, name, value) -> None:
    document = json.loads((saved / DOCUMENT).read_text())
    (saved / DOCUMENT).write_text(json.dumps({**document, name: value}))
    with pytest.raises(CheckpointError, match="damaged"):
        rankfold.Analysis.load(saved)


def test_moments_of_other_layers_are_said_not_to_fit(analysis) -> None:
    layers = tuple(
        replace(layer, moments=Moments(torch.eye(7).double(), None, 1.0))
        for layer in analysis.layers
    )
    with pytest.raises(PlanError, match="do not fit"):
        rankfold.factorize(
            make_model(), analysis.plan(macs=0.5), analysis=replace(analysis, layers=layers)
        )
