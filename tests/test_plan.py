import dataclasses
import json

import pytest
from networks import make_data, make_model

import rankfold
from rankfold.errors import BudgetError, PlanError
from rankfold.plan import Plan


@pytest.fixture(scope="module")
def plan() -> Plan:
    return rankfold.analyze(make_model(), make_data()).plan(macs=0.5)


def test_survives_json(plan: Plan, tmp_path) -> None:
    assert Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan
    plan.save(str(tmp_path / "plan.json"))
    assert Plan.load(str(tmp_path / "plan.json")) == plan


def changed(plan: Plan, path: list, value: object) -> dict:
    document = json.loads(json.dumps(plan.to_json()))
    place = document
    for key in path[:-1]:
        place = place[key]
    if value is None:
        del place[path[-1]]
    else:
        place[path[-1]] = value
    return document


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (["format_version"], 99, "format version 99"),
        (["layers"], None, "'layers' is missing"),
        (["layers", 1, "method"], "os.system", "no method 'os.system'"),
        (["layers", 1, "rank"], [8, -1], "not a list of positive integers"),
        (["layers", 1, "rank"], [8, True], "not a list of positive integers"),
        (["layers", 0, "rank"], [8], "a method comes with a rank"),
        (["layers", 1, "settings"], {"alignment": 8, "colour": 1}, "no method"),
        (["layers", 1, "settings"], {"alignment": "8"}, "no method"),
        (["layers", 1, "settings"], {"alignment": 0}, "no method"),
        (["layers", 1, "loss"], float("nan"), "not finite"),
        (["layers", 1, "before", "macs"], -5, "not negative"),
        (["layers", 1, "name"], 7, "wrong type"),
        (["before"], [], "wrong type"),
    ],
)
def test_refuses_what_is_no_plan(plan: Plan, path: list, value: object, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        Plan.from_json(changed(plan, path, value))


def test_refuses_a_file_that_is_none(tmp_path) -> None:
    (tmp_path / "plan.json").write_text("{")
    with pytest.raises(PlanError, match=r"plan\.json"):
        Plan.load(str(tmp_path / "plan.json"))
    with pytest.raises(PlanError, match="absent"):
        Plan.load(str(tmp_path / "absent"))


def test_ranks_beyond_the_layer_are_refused_when_applied(plan: Plan) -> None:
    huge = [
        dataclasses.replace(e, rank=tuple(10**9 for _ in e.rank)) if e.rank else e
        for e in plan.layers
    ]
    with pytest.raises(PlanError, match=r"1000000000.*is outside.*while factorizing layer"):
        rankfold.factorize(make_model(), dataclasses.replace(plan, layers=tuple(huge)))


def test_budget_error_is_also_a_value_error() -> None:
    assert BudgetError("", {"macs": 0.5}).smallest == {"macs": 0.5}
    assert issubclass(BudgetError, ValueError)
