import json
import sys
from pathlib import Path

import pytest
import torch

import rankfold
from rankfold import demo
from rankfold.cli import main
from rankfold.cost import count_macs

PACKAGE_DATA = Path(demo.__file__).parent


def test_the_dense_network_is_what_it_is_said_to_be() -> None:
    test = demo.make_test()
    assert sum(len(labels) for _, labels in test) == 5000
    model = demo.make_model()
    image = test[0][0][:1]
    assert count_macs(lambda: model(image)) == 116_353_280


def test_calibration_images_are_not_test_images() -> None:
    calibration = {image.numpy().tobytes() for batch in demo.make_data() for image in batch}
    held_out = {image.numpy().tobytes() for batch, _ in demo.make_test() for image in batch}
    assert len(calibration) == 5000 and not calibration & held_out


def test_package_data_is_small_and_its_licence_is_there() -> None:
    size = sum(path.stat().st_size for path in PACKAGE_DATA.iterdir() if path.is_file())
    assert size < 8_000_000
    assert "Zalando" in (PACKAGE_DATA / "LICENSE-fashion-mnist").read_text()


def test_demo_keeps_its_promise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["rankfold", "demo", "--json", "--epochs", "1"])
    with pytest.raises(SystemExit) as exited:
        main()
    assert not exited.value.code
    told = json.loads(capsys.readouterr().out)
    assert told["before"]["metric"] == pytest.approx(0.944, abs=0.001)
    assert told["after"]["macs"] <= 0.3 * told["before"]["macs"]
    assert told["after"]["metric"] >= told["before"]["metric"] - 0.005
    loaded = rankfold.load("rankfold-demo", demo.make_model)
    assert demo.accuracy(loaded, demo.make_test()) == told["after"]["metric"]


def test_evbmf_on_the_demo_network_without_recovery() -> None:
    model = demo.make_model()
    plan = rankfold.analyze(model, demo.make_data(), metric="weight").plan(evbmf=True)
    small = rankfold.factorize(model, plan)
    assert plan.after.macs < 0.3 * plan.before.macs
    assert demo.accuracy(small, demo.make_test()) > 0.85
    assert not torch.equal(small(demo.make_data()[0]), model(demo.make_data()[0]))
