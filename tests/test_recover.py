import copy
import math

import pytest
import torch
from networks import make_data, make_labelled, make_model
from torch import nn

import rankfold
import rankfold.errors
from rankfold.distances import Cosine, Divergence
from rankfold.errors import CalibrationError, CheckpointError, RankfoldError
from rankfold.measure import output_error
from rankfold.recover import _SCHEDULES, recover, reestimate_batch_norm


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
            if description == "recovering, epoch 3" and done == 4:
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
    cosine, step = _SCHEDULES["cosine"], _SCHEDULES["step"]
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
