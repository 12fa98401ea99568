import json
import math
from dataclasses import asdict

import pytest
import torch
from networks import make_data, make_labelled, make_model
from torch import nn

import rankfold
from rankfold.errors import CalibrationError, ModelError, RankfoldError
from rankfold.measure import (
    _times,
    evaluate,
    in_fastest_memory_format,
    latencies,
    memory_format_of,
    output_error,
    peak_activations,
)


def test_measure_tells_costs_metric_and_error_of_both() -> None:
    model, data = make_model(), make_labelled()
    small = rankfold.factorize(model, rankfold.analyze(model, data).plan(macs=0.5))
    found = rankfold.measure(model, small, data, metric=rankfold.accuracy)
    plan = rankfold.record_of(small).plan
    assert (found.before.parameters, found.after.parameters) == (
        plan.before.parameters,
        plan.after.parameters,
    )
    assert (found.before.macs, found.after.macs) == (plan.before.macs, plan.after.macs)
    assert found.before.metric == 1.0  # the labels are the model's own answers
    assert 0 <= found.after.metric <= 1
    assert found.before.latency_ms > 0 and found.after.latency_ms > 0
    assert found.speedup == found.before.latency_ms / found.after.latency_ms
    assert found.batch_size == 8 and found.device == "cpu"
    with torch.no_grad():
        ours, theirs = small(data[0][0]).double(), model(data[0][0]).double()
    assert found.output_error == pytest.approx(float((ours - theirs).norm() / theirs.norm()))
    json.dumps(asdict(found))
    assert "MACs per sample" in str(found) and "metric" in str(found)


def test_a_network_against_itself() -> None:
    model = make_model()
    found = rankfold.measure(model, model, make_data())
    assert found.output_error == 0
    assert found.before.metric is None and "metric" not in str(found)
    assert found.before.peak_memory_bytes == found.after.peak_memory_bytes


def test_modes_are_put_back() -> None:
    model = make_model().train()
    rankfold.measure(model, model, make_data())
    assert model.training


def test_peak_memory_counts_what_is_alive_at_once() -> None:
    x = torch.ones(250)

    def chain() -> torch.Tensor:
        for _ in range(10):  # each result replaces the one before
            y = x + 1
            y = y * 2
        return y.view(5, 50)[0]  # a view makes no memory

    assert peak_activations(chain) in (2 * 1000, 3 * 1000)
    assert peak_activations(lambda: x[:10].view(2, 5)) == 0
    assert peak_activations(lambda: [x + 1, x + 2, x + 3]) == 3000


def test_latencies_take_turns() -> None:
    order = []
    latencies([lambda: order.append("a"), lambda: order.append("b")], torch.device("cpu"))
    turns = order[6:]  # after the warm-up
    assert turns[:4] == ["a", "b", "b", "a"]
    assert turns.count("a") == turns.count("b") >= 7


def test_fastest_memory_format_keeps_the_function() -> None:
    model, batch = make_model(), make_data()[0]
    chosen = in_fastest_memory_format(model, batch)
    assert memory_format_of(model) == "contiguous"
    torch.testing.assert_close(chosen(batch), model(batch))
    linear = nn.Linear(3, 3)
    assert in_fastest_memory_format(linear, torch.randn(2, 3)) is linear


def test_output_error_of_nested_outputs() -> None:
    first = {"a": torch.tensor([3.0, 4.0]), "b": [torch.zeros(2), torch.tensor(7)]}
    second = {"a": torch.tensor([3.0, 4.0]), "b": [torch.tensor([0.0, 1.0]), torch.tensor(8)]}
    # What is zero is compared with all of it.
    assert output_error(first, second) == pytest.approx(0.2 / 2**0.5)
    with pytest.raises(ModelError, match="different shapes"):
        output_error(torch.zeros(2), torch.zeros(3))
    with pytest.raises(ModelError, match="a list, holds no tensor"):
        output_error([3], [3])


def test_the_unit_of_an_output_does_not_matter() -> None:
    outputs, others = ([torch.randn(3, 4), torch.randn(5)] for _ in range(2))
    found = output_error(outputs, others)
    (a, b), (c, d) = outputs, others
    assert output_error([a, 1e4 * b], [c, 1e4 * d]) == pytest.approx(found)
    shares = [float((x - y).norm() / x.norm()) for x, y in zip(outputs, others, strict=True)]
    assert found == pytest.approx((sum(share**2 for share in shares) / 2) ** 0.5)


@pytest.mark.parametrize("zeros", [[torch.zeros(4)], [torch.zeros(3), torch.zeros(2)]])
def test_of_nothing_but_zeros_it_is_the_norm(zeros) -> None:
    assert output_error(zeros, zeros) == 0
    assert output_error(zeros, [tensor + 3 for tensor in zeros]) == pytest.approx(
        3 * sum(tensor.numel() for tensor in zeros) ** 0.5
    )


def test_a_metric_must_be_a_finite_number() -> None:
    def broken(model: nn.Module, data: object) -> float:
        return math.nan

    with pytest.raises(RankfoldError, match="broken gives nan"):
        evaluate(broken, make_model(), make_data())
    with pytest.raises(CalibrationError, match=r"\(input, label\)"):
        rankfold.accuracy(make_model(), make_data())


def test_bad_data_is_named() -> None:
    with pytest.raises(CalibrationError, match="no batch"):
        rankfold.measure(make_model(), make_model(), [])
    with pytest.raises(ModelError, match="2x5x8x8"):
        rankfold.measure(make_model(), make_model(), [torch.randn(2, 5, 8, 8)])


def test_what_grew_is_said_to_be_more() -> None:
    assert _times(3.0, 2.0) == "1.50x less" and _times(2.0, 2.0) == "1.00x less"
    assert _times(2.0, 3.0) == "1.50x more" and _times(2.0, 0.0) == _times(0.0, 2.0) == "-"
