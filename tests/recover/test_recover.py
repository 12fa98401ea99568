import copy
import math
import sys

import pytest
import torch
from networks import make_data, make_labelled, make_model
from torch import nn

import rankfold
import rankfold.errors
from rankfold.distances import Cosine, Divergence
from rankfold.errors import CalibrationError, CheckpointError, ModelError, RankfoldError
from rankfold.measure import output_error
from rankfold.recover import recover, reestimate_batch_norm
from rankfold.recover.trainer import SCHEDULES, _groups


def factorized(**budget: float) -> nn.Module:
    model = make_model()
    return rankfold.factorize(
        model, rankfold.analyze(model, make_data(), metric="weight").plan(**budget)
    )


def error(model: nn.Module) -> float:
    batch = torch.cat(make_data())
    with torch.no_grad():
        return output_error(make_model()(batch), model.eval()(batch))


def test_recovery_without_labels_brings_the_outputs_back() -> None:
    small = factorized(macs=0.5)
    before = error(small)
    found = recover(small, make_data(), teacher=make_model(), epochs=6, learning_rate=1e-3)
    assert error(small) < 0.7 * before
    assert [epoch.index for epoch in found.epochs] == list(range(7))
    assert found.epochs[found.best].score == max(epoch.score for epoch in found.epochs)


def test_recovery_with_labels_lowers_the_loss() -> None:
    small, data = factorized(fraction=0.15), make_labelled()
    found = recover(small, data, loss_fn=nn.functional.cross_entropy, epochs=4, schedule="step")
    assert found.epochs[4].loss < found.epochs[1].loss


def test_best_weights_are_kept_and_training_stops_early() -> None:
    small = factorized(macs=0.5)
    scores = iter([0.3, 0.4, 0.9, 0.5, 0.5, 0.5])  # as made, batch norm, then epochs 1 to 4
    weights = []

    def metric(model: nn.Module, data: object) -> float:
        weights.append(copy.deepcopy(model.state_dict()))
        return next(scores)

    found = recover(
        small,
        make_data(),
        teacher=make_model(),
        validation=make_labelled(),
        metric=metric,
        epochs=9,
        patience=2,
    )
    assert (found.best, len(found.epochs), found.ended) == (1, 4, "no better score for 2 epochs")
    for name, value in small.state_dict().items():
        assert torch.equal(value, weights[2][name])


def test_never_worse_on_validation_than_before() -> None:
    small = factorized(macs=0.5)
    before = error(small)
    found = recover(
        small,
        make_data(),
        teacher=make_model(),
        validation=make_data(),
        epochs=2,
        learning_rate=10.0,
    )
    assert found.best == 0
    assert error(small) <= before


def test_interrupted_and_resumed_is_the_same_as_uninterrupted(tmp_path) -> None:
    whole, parts = factorized(macs=0.5), factorized(macs=0.5)
    teacher = make_model()
    expected = recover(whole, make_data(), teacher=teacher, epochs=5)

    def stop_in_third_epoch(work, description, total=None):
        for done, item in enumerate(work):
            if description.startswith("recovering, epoch 3") and done == 4:
                raise KeyboardInterrupt
            yield item

    fresh = copy.deepcopy(parts)
    state = tmp_path / "state.pt"
    with pytest.raises(KeyboardInterrupt):
        recover(
            parts,
            make_data(),
            teacher=teacher,
            epochs=5,
            checkpoint=state,
            progress=stop_in_third_epoch,
        )
    found = recover(fresh, make_data(), teacher=teacher, epochs=5, checkpoint=state)
    assert str(found.epochs) == str(expected.epochs)
    for name, value in fresh.state_dict().items():
        assert torch.equal(value, whole.state_dict()[name])
    again = recover(factorized(macs=0.5), make_data(), teacher=teacher, epochs=5, checkpoint=state)
    assert str(again.epochs) == str(expected.epochs)  # nothing left to do


def test_a_checkpoint_of_another_run_or_of_nothing_is_refused(tmp_path) -> None:
    state, teacher = tmp_path / "state.pt", make_model()
    recover(factorized(macs=0.5), make_data(), teacher=teacher, epochs=1, checkpoint=state)
    with pytest.raises(CheckpointError, match="another run"):
        recover(factorized(macs=0.4), make_data(), teacher=teacher, epochs=1, checkpoint=state)
    state.write_bytes(state.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="damaged"):
        recover(factorized(macs=0.5), make_data(), teacher=teacher, epochs=1, checkpoint=state)


def test_the_same_seed_gives_the_same_weights_and_another_does_not() -> None:
    results = []
    for seed in (0, 0, 1):
        small = factorized(macs=0.5)
        recover(small, make_data(), teacher=make_model(), epochs=1, seed=seed)
        results.append(small.stem.weight)
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


def test_global_randomness_and_modes_are_left_alone() -> None:
    small = factorized(macs=0.5)
    state = torch.get_rng_state()
    recover(small, make_data(), teacher=make_model().train(), epochs=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert not small.training


def test_frozen_parameters_stay_as_they_are() -> None:
    model = make_model()
    model.body.requires_grad_(False)
    small = rankfold.factorize(
        model, rankfold.analyze(model, make_data(), metric="weight").plan(fraction=0.3)
    )
    before = [parameter.clone() for parameter in small.body.parameters()]
    recover(small, make_data(), teacher=model, epochs=1)
    assert all(torch.equal(a, b) for a, b in zip(before, small.body.parameters(), strict=True))
    small.requires_grad_(False)
    with pytest.raises(RankfoldError, match="no parameter"):
        recover(small, make_data(), teacher=model, epochs=1)


def test_any_iterable_of_batches_will_do() -> None:
    dataset = torch.utils.data.TensorDataset(torch.cat(make_data()))
    loader = torch.utils.data.DataLoader(dataset, batch_size=16, shuffle=True)
    small = factorized(macs=0.5)
    before = error(small)
    found = recover(small, loader, teacher=make_model(), epochs=3, learning_rate=1e-3)
    assert error(small) < before
    assert found.best == 3 and found.epochs[3].score is None  # no validation: the last


def test_batch_norm_statistics_become_those_of_the_data() -> None:
    model = nn.Sequential(nn.BatchNorm1d(4, momentum=0.01), nn.Dropout(0.5))
    data = [torch.randn(64, 4) * 3 + 5 for _ in range(10)]
    reestimate_batch_norm(model, data)
    norm = model[0]
    torch.testing.assert_close(norm.running_mean, torch.stack([b.mean(0) for b in data]).mean(0))
    torch.testing.assert_close(norm.running_var, torch.stack([b.var(0) for b in data]).mean(0))
    assert norm.momentum == 0.01 and model.training


def test_schedules() -> None:
    cosine, step = SCHEDULES["cosine"], SCHEDULES["step"]
    rates = [cosine(100, s) for s in range(100)]
    assert max(rates) == 1 and rates[0] == 0.2 and rates[-1] < 0.001
    assert rates[5:] == sorted(rates[5:], reverse=True)
    assert [step(100, s) for s in (0, 49, 50, 75)] == pytest.approx([1, 1, 0.1, 0.01])


@pytest.mark.parametrize("distance", [Divergence(2.0), Cosine()], ids=str)
def test_recovery_lowers_the_distance_that_it_is_given(distance) -> None:
    recovery = recover(
        factorized(macs=0.4), make_data(), teacher=make_model(), distance=distance, epochs=3
    )
    scores = [epoch.score for epoch in recovery.epochs]
    assert recovery.best > 0 and scores[recovery.best] > scores[0]


def test_a_checkpoint_of_a_recovery_with_another_distance_is_refused(tmp_path) -> None:
    teacher, state = make_model(), tmp_path / "state.pt"
    recover(factorized(macs=0.5), make_data(), teacher=teacher, epochs=1, checkpoint=state)
    with pytest.raises(CheckpointError, match="another run"):
        recover(
            factorized(macs=0.5),
            make_data(),
            teacher=teacher,
            distance=Divergence(),
            epochs=1,
            checkpoint=state,
        )


@pytest.mark.parametrize(
    ("data", "message"),
    [([], "no batch"), ([torch.full((2, 3, 8, 8), torch.nan)], "NaN"), (iter([]), "only once")],
)
def test_bad_data_is_named(data: object, message: str) -> None:
    with pytest.raises(CalibrationError, match=message):
        recover(factorized(macs=0.5), data, teacher=make_model(), epochs=1)


def test_what_to_recover_from_must_be_said() -> None:
    with pytest.raises(RankfoldError, match="teacher"):
        recover(factorized(macs=0.5), make_data())
    with pytest.raises(RankfoldError, match="no schedule"):
        recover(factorized(macs=0.5), make_data(), teacher=make_model(), schedule="sudden")


def test_labels_that_the_loss_cannot_use_are_named() -> None:
    with pytest.raises(CalibrationError, match="batch 0 has no label"):
        recover(factorized(macs=0.5), make_data(), loss_fn=nn.functional.cross_entropy)
    wrong = [(images, labels[:3]) for images, labels in make_labelled()]
    with pytest.raises(RankfoldError, match="loss function fails on batch"):
        recover(factorized(macs=0.5), wrong, loss_fn=nn.functional.cross_entropy)


def test_divergence_ends_training_with_the_best_weights() -> None:
    small = factorized(macs=0.5)
    calls = 0

    def loss_fn(output: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return output.square().mean() * (math.nan if calls > 12 else 1)

    found = recover(small, make_labelled(), loss_fn=loss_fn, validation=make_labelled(), epochs=3)
    assert found.ended == "the loss became nan in epoch 1"
    assert all(torch.isfinite(parameter).all() for parameter in small.parameters())


def test_features_of_the_teacher_are_matched_too() -> None:
    data, teacher = make_data(), make_model()
    plain, featured = factorized(macs=0.4), factorized(macs=0.4)
    recover(plain, data, teacher=teacher, epochs=3)
    found = recover(featured, data, teacher=teacher, features=["body", "head"], epochs=3)
    assert found.epochs[3].loss < found.epochs[1].loss

    def body_error(model: nn.Module) -> float:
        outputs = []
        for one in (teacher, model.eval()):
            hook = one.body.register_forward_hook(lambda m, i, output: outputs.append(output))
            one(data[0])
            hook.remove()
        return output_error(*outputs)

    assert body_error(featured) < body_error(plain)
    with pytest.raises(RankfoldError, match="no module 'nowhere'"):
        recover(plain, data, teacher=teacher, features=["nowhere"])
    with pytest.raises(RankfoldError, match="features are those of a teacher"):
        recover(plain, make_labelled(), loss_fn=nn.functional.cross_entropy, features=["body"])


def test_features_that_are_not_called_or_of_another_shape_are_named() -> None:
    teacher, small, data = make_model(), make_model(), make_data()
    teacher.unused = small.unused = nn.Linear(2, 2)
    with pytest.raises(ModelError, match="never calls 'unused'"):
        recover(small, data, teacher=teacher, features=["unused"])
    small.body = nn.Conv2d(32, 40, 3, stride=2, padding=1)
    small.depthwise = nn.Conv2d(40, 48, 3, padding=1)
    with pytest.raises(ModelError, match=r"feature 'body': .*same shapes"):
        recover(small, data, teacher=teacher, features=["body"])


def test_a_step_of_more_batches_is_that_of_one_larger_batch() -> None:
    torch.manual_seed(0)
    teacher = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    small = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    large = copy.deepcopy(small)
    batches = list(torch.randn(64, 6).double().split(8))
    pairs = [torch.cat(batches[place : place + 2]) for place in range(0, 8, 2)]

    def mean_square(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return (output - target).square().mean()

    class Stream:
        """Not a sequence, and so not shuffled."""

        def __init__(self, held: list) -> None:
            self.held = held

        def __iter__(self):
            return iter(self.held)

    options = {"teacher": teacher, "distance": mean_square, "epochs": 3, "validation": batches}
    before = [parameter.clone() for parameter in small.parameters()]
    recover(small, Stream(batches), accumulation=2, **options)
    recover(large, Stream(pairs), **options)
    for ours, theirs, was in zip(small.parameters(), large.parameters(), before, strict=True):
        torch.testing.assert_close(ours, theirs)
        assert not torch.equal(ours, was)


def test_a_last_group_is_filled_up() -> None:
    assert list(_groups("abcde", 2)) == [["a", "b"], ["c", "d"], ["e", "a"]]
    assert list(_groups("ab", 4)) == [["a", "b", "a", "b"]]
    assert list(_groups("", 3)) == []


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_lower_precision_recovers_too_and_weights_stay_float32(precision) -> None:
    small = factorized(macs=0.5)
    before = error(small)
    recover(
        small,
        make_data(),
        teacher=make_model(),
        epochs=4,
        learning_rate=1e-3,
        precision=precision,
    )
    assert error(small) < 0.8 * before
    assert all(parameter.dtype is torch.float32 for parameter in small.parameters())


def test_penalties_and_what_is_done_around_a_step() -> None:
    seen: list[tuple[str, float]] = []
    small, data = factorized(macs=0.5), make_data()
    plain = copy.deepcopy(small)

    def size(model: nn.Module) -> torch.Tensor:
        return sum(parameter.square().sum() for parameter in model.parameters())

    def after(model: nn.Module, rate: float) -> None:
        assert model is small and not torch.is_grad_enabled()
        seen.append(("after", rate))

    def penalty(model: nn.Module) -> torch.Tensor:
        return 0.1 * size(model)

    options = {"teacher": make_model(), "epochs": 2, "validation": data, "patience": 9}
    recover(
        small,
        data,
        penalty=penalty,
        before_step=lambda model, step: seen.append(("before", step)),
        after_step=after,
        metric=lambda model, data: float(len(seen)),  # the last weights are the best
        **options,
    )
    recover(plain, data, metric=lambda model, data: 0.0, **options)
    assert size(small) < size(plain)
    assert [what for what, _ in seen] == ["before", "after"] * 24
    assert [step for what, step in seen if what == "before"] == list(range(24))
    rates = [rate for what, rate in seen if what == "after"]
    assert max(rates) == pytest.approx(3e-4) and rates[-1] < 1e-5


def test_tensorboard_has_losses_rates_and_scores(tmp_path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    small = factorized(macs=0.5)
    found = recover(
        small, make_data(), teacher=make_model(), epochs=2, tensorboard=tmp_path / "log"
    )
    events = EventAccumulator(str(tmp_path / "log")).Reload()
    assert sorted(events.Tags()["scalars"]) == ["learning_rate", "loss", "score"]
    losses = [event.value for event in events.Scalars("loss")]
    assert len(losses) == 2 * 11  # every tenth of twelve batches is held out
    assert sum(losses[:11]) / 11 == pytest.approx(found.epochs[1].loss, rel=1e-5)
    scores = [event.value for event in events.Scalars("score")]
    assert scores == pytest.approx([epoch.score for epoch in found.epochs[1:]], rel=1e-5)


def test_without_tensorboard_the_extra_is_named(monkeypatch, tmp_path) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(RankfoldError, match=r"rankfold\[tensorboard\]"):
        recover(
            factorized(macs=0.5), make_data(), teacher=make_model(), tensorboard=tmp_path / "log"
        )


def test_the_last_weights_are_kept_where_that_is_asked_for() -> None:
    scores = iter([5.0, 5.0, 1.0, 2.0, 0.0, 0.0, 0.0])
    small, data = factorized(macs=0.5), make_data()
    before = copy.deepcopy(small.state_dict())
    options = {"metric": lambda model, data: next(scores), "validation": data, "patience": 1}
    found = recover(small, data, teacher=make_model(), epochs=4, keep="last", **options)
    assert found.best == 4 and found.ended == "all epochs done"
    assert any(not torch.equal(value, before[name]) for name, value in small.state_dict().items())


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"keep": "first"}, "keep='first'"),
        ({"precision": "int8"}, "no precision 'int8'"),
        ({"accumulation": 0}, "accumulation=0"),
        ({"schedule": "linear"}, "no schedule 'linear'"),
    ],
    ids=str,
)
def test_wrong_settings_are_refused(wrong, message) -> None:
    with pytest.raises(RankfoldError, match=message):
        recover(make_model(), make_data(), teacher=make_model(), **wrong)
