import json
from dataclasses import replace

import pytest
from networks import make_data, make_model

import rankfold
from rankfold.analysis import Overrides
from rankfold.errors import PlanError
from rankfold.outlook import Outlook, look_ahead


@pytest.fixture(scope="module")
def analysis() -> rankfold.Analysis:
    return rankfold.analyze(make_model(), make_data(), metric="response")


@pytest.fixture(scope="module")
def outlook(analysis) -> Outlook:
    return look_ahead(analysis, points=8)


def test_points_are_the_plans_of_their_budgets(analysis, outlook) -> None:
    assert set(outlook.curves) == {"macs", "params"}  # it was not timed
    for cost, points in outlook.curves.items():
        assert 2 <= len(points) <= 8 and points[-1].budget == 1.0
        budgets = [point.budget for point in points]
        assert budgets == sorted(budgets)
        for point in points:
            plan = analysis.plan(**{cost: point.budget})
            assert (plan.after, plan.loss) == (point.cost, pytest.approx(point.loss))
            for layer, place, entry in zip(outlook.layers, point.options, plan.layers, strict=True):
                option = layer.options[place]
                assert layer.name == entry.name
                assert (option.method, option.rank) == (entry.method, entry.rank or ())
                assert (option.cost, option.loss) == (entry.after, entry.loss)


def test_it_knows_spectra_and_checks(analysis, outlook) -> None:
    assert outlook.checks == analysis.checks != ()
    for layer, analysed in zip(outlook.layers, analysis.layers, strict=True):
        assert bool(layer.spectrum) == bool(analysed.spectra)
        if layer.spectrum:
            assert layer.spectrum[0] == 1 and len(layer.spectrum) <= 64
            assert list(layer.spectrum) == sorted(layer.spectrum, reverse=True)


def test_layers_that_are_kept_stay_dense(analysis) -> None:
    kept = look_ahead(analysis, points=4, overrides=Overrides(keep=["body*"]))
    (body,) = (layer for layer in kept.layers if layer.name == "body")
    assert [option.method for option in body.options] == [None]


def test_a_timed_analysis_has_a_curve_of_latency() -> None:
    analysis = rankfold.analyze(make_model(), make_data(), metric="weight", timed=True)
    points = look_ahead(analysis, points=4).curves["latency"]
    assert points and all(point.cost.latency_ms is not None for point in points)


def test_a_network_that_cannot_be_factorized_has_its_dense_point() -> None:
    model = make_model()
    analysis = rankfold.analyze(model, make_data(), metric="weight", layers="depth*")
    (point,) = look_ahead(analysis).curves["macs"]
    assert point.loss == 0 and point.cost.macs == round(analysis.macs / analysis.batch_size)


def test_json_and_what_is_none(outlook) -> None:
    document = json.loads(json.dumps(outlook.to_json()))
    assert Outlook.from_json(document) == outlook
    for point in ([], [99] * len(outlook.layers), [-1] * len(outlook.layers)):
        wrong = json.loads(json.dumps(outlook.to_json()))
        wrong["curves"]["macs"][0]["options"] = point
        with pytest.raises(PlanError, match="options that are not there"):
            Outlook.from_json(wrong)
    for wrong in (None, [], {}, {**document, "layers": 3}, {**document, "more": 1}):
        with pytest.raises(PlanError, match="outlook"):
            Outlook.from_json(wrong)


def test_saved_models_remember_it(tmp_path) -> None:
    model, data = make_model(), make_data()
    small = rankfold.compress(model, data, macs=0.5, epochs=1, loss_metric="weight")
    record = rankfold.record_of(small)
    assert record.outlook is not None and record.outlook.curves["macs"]
    rankfold.save(small, tmp_path / "small")
    found = rankfold.read_record(tmp_path / "small")
    assert found.outlook == record.outlook
    assert found.comparison == record.comparison and found.recovery == record.recovery
    again = rankfold.record_of(rankfold.load(tmp_path / "small", make_model))
    assert again == replace(record, plan=again.plan) and again.plan == found.plan
