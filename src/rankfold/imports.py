"""Objects named on the command line: `package.module:name`, models also as others name them."""

import importlib
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from rankfold.batches import Data
from rankfold.errors import CalibrationError, ModelError, RankfoldError
from rankfold.pretrained import is_pretrained, load_pretrained, text_batches


def _of_timm(name: str) -> nn.Module:
    import timm

    return timm.create_model(name, pretrained=True).eval()


def _of_torchvision(name: str) -> nn.Module:
    from torchvision.models import get_model

    return get_model(name, weights="DEFAULT").eval()


_ZOOS: dict[str, Callable[[str], nn.Module]] = {"timm": _of_timm, "torchvision": _of_torchvision}


def resolve(path: str, what: str) -> Any:
    """The object at `package.module:name`; the working directory is searched, as by `python -m`.

    Raises RankfoldError, saying what failed.
    """
    module_name, colon, name = path.partition(":")
    if not (module_name and colon and name):
        raise RankfoldError(f"{what} '{path}' is not of the form package.module:name")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        found: Any = importlib.import_module(module_name)
    except Exception as error:
        raise RankfoldError(
            f"{what} '{path}': importing {module_name} failed: {type(error).__name__}: {error}"
        ) from error
    for part in name.split("."):
        if not hasattr(found, part):
            raise RankfoldError(f"{what} '{path}': {module_name} has no '{name}'")
        found = getattr(found, part)
    return found


def resolve_model(path: str) -> nn.Module:
    """The module at the path, or what the factory there returns, or that of a directory.

    A directory is one of a model of transformers (`rankfold.pretrained`). `timm:name` and
    `torchvision:name` are the pretrained models of these packages. Raises ModelError.
    """
    if is_pretrained(path):
        return load_pretrained(path)
    package, _, name = path.partition(":")
    if package in _ZOOS:
        return _made_by(partial(_ZOOS[package], name), path, ModelError)
    if ":" not in path and Path(path).is_dir():
        raise ModelError(f"{path} is a directory without the config.json of a model")
    found = resolve(path, "model")
    if not isinstance(found, nn.Module):
        found = _made_by(found, path, ModelError)
    if not isinstance(found, nn.Module):
        raise ModelError(f"model '{path}' gives a {type(found).__name__}, not an nn.Module")
    return found


def resolve_text(path: str, model: str) -> Data:
    """A plain text file as batches for the model of a directory; raises CalibrationError."""
    if not is_pretrained(model):
        raise CalibrationError(f"a text needs the tokenizer of a model's directory, not '{model}'")
    return text_batches(model, path)


def resolve_data(path: str) -> Data:
    """The batches at the path, or what the function there returns; raises CalibrationError."""
    found = resolve(path, "data")
    return _made_by(found, path, CalibrationError) if callable(found) else found


def resolve_function(path: str, what: str) -> Callable[..., Any]:
    """The function at the path; raises RankfoldError for anything else."""
    found = resolve(path, what)
    if not callable(found):
        raise RankfoldError(f"{what} '{path}' is a {type(found).__name__}, not a function")
    return found


def _made_by(factory: Any, path: str, error_type: type[RankfoldError]) -> Any:
    if not callable(factory):
        raise error_type(f"'{path}' is a {type(factory).__name__}, not a factory")
    try:
        return factory()
    except Exception as error:
        # What a torchvision that was built for another torch says of itself helps nobody.
        unmatched = "operator torchvision::" in str(error)
        what_to_do = "; install the torchvision that goes with this torch" if unmatched else ""
        raise error_type(f"'{path}' failed: {type(error).__name__}: {error}{what_to_do}") from error
