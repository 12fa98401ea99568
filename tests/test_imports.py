import sys
from types import ModuleType
from unittest.mock import Mock

import pytest
from networks import SmallConvolutional, make_data
from torch import nn

from rankfold.errors import CalibrationError, ModelError, RankfoldError
from rankfold.imports import resolve, resolve_data, resolve_function, resolve_model


def test_names_are_of_modules_and_what_is_in_them() -> None:
    assert resolve("networks:SmallConvolutional.forward", "x") is SmallConvolutional.forward
    assert isinstance(resolve_model("networks:make_model"), SmallConvolutional)
    assert len(resolve_data("networks:make_data")) == len(make_data())
    assert resolve_function("rankfold:accuracy", "metric").__name__ == "accuracy"


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("networks", "not of the form package.module:name"),
        (":make_model", "not of the form"),
        ("no_such:thing", "importing no_such failed: ModuleNotFoundError"),
        ("networks:nothing", "networks has no 'nothing'"),
    ],
)
def test_what_is_not_there_is_said(path, words) -> None:
    with pytest.raises(RankfoldError, match=words):
        resolve(path, "thing")


def test_things_of_another_kind_are_refused(tmp_path) -> None:
    with pytest.raises(ModelError, match="gives a list, not an"):
        resolve_model("networks:make_data")
    with pytest.raises(ModelError, match=r"'torch:pi' is a float, not a factory"):
        resolve_model("torch:pi")
    with pytest.raises(ModelError, match="without the config"):
        resolve_model(str(tmp_path))
    with pytest.raises(CalibrationError, match="failed: TypeError"):
        resolve_data("rankfold:accuracy")
    with pytest.raises(RankfoldError, match="is a float, not a function"):
        resolve_function("torch:pi", "metric")


def test_models_of_timm_and_torchvision_by_their_names(monkeypatch) -> None:
    asked = []

    def create_model(name: str, pretrained: bool) -> nn.Module:
        asked.append((name, pretrained))
        return nn.Linear(2, 2)

    def get_model(name: str, weights: str) -> nn.Module:
        if name != "known":
            raise ValueError(f"Unknown model {name}")
        asked.append((name, weights))
        return nn.Linear(2, 2)

    timm, zoo = ModuleType("timm"), ModuleType("torchvision.models")
    timm.create_model, zoo.get_model = create_model, get_model
    for name, module in (
        ("timm", timm),
        ("torchvision", ModuleType("torchvision")),
        ("torchvision.models", zoo),
    ):
        monkeypatch.setitem(sys.modules, name, module)
    assert not resolve_model("timm:resnet18").training
    assert not resolve_model("torchvision:known").training
    assert asked == [("resnet18", True), ("known", "DEFAULT")]
    with pytest.raises(ModelError, match="'torchvision:other' failed: ValueError: Unknown model"):
        resolve_model("torchvision:other")
    message = "operator torchvision::nms does not exist"
    monkeypatch.setattr(timm, "create_model", Mock(side_effect=RuntimeError(message)))
    with pytest.raises(ModelError, match=f"{message}; install the torchvision that goes with"):
        resolve_model("timm:resnet18")
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ModelError, match="'timm:resnet18' failed: ModuleNotFoundError"):
        resolve_model("timm:resnet18")
