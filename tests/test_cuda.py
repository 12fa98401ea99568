"""The whole way on a CUDA device, beside the same on the processor. Skipped where there is none."""

import copy

import pytest
import torch
from networks import make_data, make_labelled, make_model

import rankfold
from rankfold.batches import device_of

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture(autouse=True)
def full_precision():
    """Convolutions would be rounded to 10 bits otherwise."""
    allowed = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = allowed


@pytest.mark.parametrize("metric", ["weight", "response", "fisher", "auto"])
def test_what_a_plan_comes_to_is_that_of_the_processor(metric) -> None:
    found = []
    for device in ("cpu", "cuda"):
        model = make_model().to(device)
        analysis = rankfold.analyze(model, make_data(), metric=metric)
        found.append(analysis.plan(macs=0.5))
        assert device_of(rankfold.factorize(model, found[-1])).type == device
    of_cpu, of_cuda = found
    assert of_cuda.after.macs == pytest.approx(of_cpu.after.macs, rel=0.05)
    assert of_cuda.loss == pytest.approx(of_cpu.loss, rel=0.05)


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_recovery_lessens_the_distance_to_the_original(precision) -> None:
    model, data = make_model().cuda(), make_data()
    small = rankfold.factorize(model, rankfold.analyze(model, data).plan(macs=0.3))
    before = distance(model, small)
    rankfold.recover(small, data, teacher=model, epochs=5, precision=precision)
    assert device_of(small).type == "cuda"
    assert distance(model, small) < before


def test_the_processor_is_trained_on_after_the_device() -> None:
    data = make_data()
    for device in ("cuda", "cpu", "cuda"):
        model = make_model().to(device)
        small = rankfold.factorize(model, rankfold.analyze(model, data).plan(macs=0.5))
        rankfold.recover(small, data, teacher=model, epochs=1)
        assert device_of(small).type == device


def test_refitting_lessens_it_too() -> None:
    model, data = make_model().cuda(), make_data()
    small = rankfold.factorize(model, rankfold.analyze(model, data).plan(macs=0.3))
    refitted = copy.deepcopy(small)
    rankfold.refit(
        refitted, model, data, [e.name for e in rankfold.record_of(small).plan.factorized]
    )
    assert distance(model, refitted) <= distance(model, small)


@pytest.mark.parametrize("runtime", ["eager", "cuda-graph"])
def test_the_devices_own_clock(runtime) -> None:
    model, data = make_model().cuda(), make_data()
    analysis = rankfold.analyze(model, data, timed=True, runtime=runtime)
    assert analysis.timing is not None
    assert analysis.timing.device == torch.cuda.get_device_name()
    assert analysis.timing.dense_ms > 0
    small = rankfold.compress(model, data, macs=0.5, epochs=0, test=data)
    found = rankfold.measure(model, small, data, runtime=runtime)
    assert found.before.latency_ms > 0 and found.after.latency_ms > 0


def test_saved_there_and_loaded_here(tmp_path) -> None:
    model, data = make_model().cuda(), make_data()
    small = rankfold.factorize(model, rankfold.analyze(model, data).plan(macs=0.5))
    rankfold.save(small, tmp_path / "small")
    loaded = rankfold.load(tmp_path / "small", make_model())
    with torch.no_grad():
        ours, theirs = loaded(data[0]), small(data[0].cuda()).cpu()
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


def test_accuracy_is_of_any_device() -> None:
    labelled = make_labelled()
    assert rankfold.accuracy(make_model().cuda(), labelled) == 1.0


def distance(model, small) -> float:
    with torch.no_grad():
        return sum(
            float((small(batch.cuda()) - model(batch.cuda())).square().sum())
            for batch in make_data()
        )
