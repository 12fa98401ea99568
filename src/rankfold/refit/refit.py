"""Factors fitted again to what the original did, on the inputs that they really get.

A layer is factorized for the inputs of the original network; in the compressed one it gets those
that the layers before it give. In forward order, the factors of each layer are regressed on what
reaches them in the compressed network, towards the response of the original: the asymmetric
reconstruction of Zhang et al. 2016 (section 3.3), in closed form and without labels or gradients.
With the nonlinearity (their section 3.2) what is fitted is the response after the ReLU.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from rankfold.analysis.divergence import Judge
from rankfold.batches import (
    Data,
    Forward,
    device_of,
    first_batches,
    held_out_first,
    run,
    uncompiled,
)
from rankfold.errors import ModelError
from rankfold.layers import TwoFactorConvolution, TwoFactorLinear, is_transposed_linear
from rankfold.methods.refit import solve
from rankfold.progress import Progress, silent
from rankfold.refit.positions import Watch, collect, run_watched
from rankfold.refit.regression import Regression
from rankfold.refit.threshold import Threshold, read_by_relu
from rankfold.unfusing import unfused


@dataclass(frozen=True)
class Refitted:
    """What one layer's refit did to the divergence of the outputs on batches held out."""

    layer: str
    before: float
    after: float
    kept: bool


@dataclass(frozen=True)
class Refit:
    layers: tuple[Refitted, ...]

    @property
    def gain(self) -> float:
        """The divergence before all refits over that after."""
        if not self.layers:
            return 1.0
        last = self.layers[-1]
        after = last.after if last.kept else last.before
        return self.layers[0].before / after if after > 0 else math.inf


def refit(
    model: nn.Module,
    teacher: nn.Module,
    data: Data,
    layers: Sequence[str],
    *,
    forward: Forward = run,
    through_relu: bool = False,
    batches: int = 16,
    held_out: int = 4,
    seed: int = 0,
    progress: Progress = silent,
) -> Refit:
    """Refit the last factor, and its bias, of the named factorized layers of `model`, in place.

    Where there are only two factors, both are also fitted together (the generalized SVD of Zhang et
    al. 2016), and what brings the outputs nearer to the teacher's is kept. `teacher` is the
    original, `data` unlabelled batches, of which, from all over a sequence, `held_out` judge (of
    few, a fifth; one alone serves for both) and so many `batches` are fitted to. A layer whose
    refit brings the outputs no nearer there stays as it was, so the divergence never grows. With
    `through_relu` layers that a ReLU follows, after a batch norm or not, are fitted through it.
    Layers whose form does not end in a linear layer or a convolution of one place are passed over.
    Raises CalibrationError for data that yields nothing, ModelError for a model that does not run
    or lacks a layer.
    """
    ordered, kept, count = held_out_first(data, batches, held_out)
    found = list(first_batches(ordered, kept + count, device_of(model)))
    held, used = found[:kept] or found, found[kept:]
    with uncompiled(), unfused(teacher) as opened:
        return _refit(model, opened, held, used, layers, forward, through_relu, seed, progress)


def _refit(
    model: nn.Module,
    teacher: nn.Module,
    held: Sequence[Any],
    used: Sequence[Any],
    layers: Sequence[str],
    forward: Forward,
    through_relu: bool,
    seed: int,
    progress: Progress,
) -> Refit:
    places = _places(model, teacher, layers)
    calls = _calls(model, {name: one.last for name, one in places.items()}, used[0], forward)
    relus = read_by_relu(teacher, layers, used[0], forward) if through_relu else {}
    judge = Judge.of(teacher, forward, held, None)
    sampler = torch.Generator().manual_seed(seed)
    divergence = judge.divergence_of(model)
    done = []
    for name in progress(calls, "refitting"):
        place = places[name]
        seen = collect(place.watch(calls[name]), model, teacher, used, forward, sampler)
        if seen is None:
            done.append(Refitted(name, divergence, divergence, kept=False))
            continue
        best, least = place.values(), divergence
        for values in place.fits(*seen, relus.get(name)):
            place.assign(values)
            if (reached := judge.divergence_of(model)) < least:
                best, least = place.values(), reached
        place.assign(best)
        done.append(Refitted(name, divergence, least, least < divergence))
        divergence = least
    return Refit(tuple(done))


@dataclass(frozen=True)
class _Place:
    """What is fitted of one layer: its last factor, and the first if there is no other."""

    form: nn.Module
    first: Any | None
    last: Any  # a linear layer or a convolution of one place
    dense: Any  # of the original

    def watch(self, calls: int) -> Watch:
        """Both factors are a map of what the dense layer would make of the form's inputs."""
        if self.first is None:
            return Watch(self.last, None, self.dense, self.last.weight.shape[1], calls)
        return Watch(self.form, self.dense, self.dense, len(self.dense.weight), calls)

    def values(self) -> list[torch.Tensor]:
        return [parameter.detach().clone() for parameter in self._parameters()]

    def assign(self, values: Sequence[torch.Tensor]) -> None:
        with torch.no_grad():
            for parameter, value in zip(self._parameters(), values, strict=True):
                parameter.copy_(value.reshape(parameter.shape))

    def fits(
        self, features: torch.Tensor, responses: torch.Tensor, relu: Threshold | None
    ) -> Iterator[list[torch.Tensor]]:
        """New values of the parameters: of both factors if they are fitted, of the last alone."""
        last, has_bias = self.last.weight.detach().flatten(1).double(), self.last.bias is not None
        rank = last.shape[1]
        if self.first is None:
            found = Regression(features, responses, last, has_bias).solve(relu)
            yield [found.weight, *found.biases]
            return
        first, dense = (one.weight.detach().flatten(1).double() for one in (self.first, self.dense))
        mixture = solve(dense @ dense.mT, first @ dense.mT)  # first = mixture @ dense
        both = Regression(features, responses, last @ mixture, has_bias).solve(relu, rank)
        left, right = both.factors
        yield [left, *both.biases, right @ dense]
        alone = Regression(features @ mixture.mT, responses, last, has_bias).solve(relu)
        yield [alone.weight, *alone.biases, first]

    def _parameters(self) -> list[nn.Parameter]:
        found = [self.last.weight] if self.last.bias is None else [self.last.weight, self.last.bias]
        return found if self.first is None else [*found, self.first.weight]


def _places(model: nn.Module, teacher: nn.Module, layers: Sequence[str]) -> dict[str, _Place]:
    """By layer, where there is a last factor to fit."""
    ours, theirs = dict(model.named_modules()), dict(teacher.named_modules())
    found = {}
    for name in layers:
        if name not in ours or name not in theirs:
            raise ModelError(f"there is no layer '{name}' to refit")
        form = ours[name]
        if isinstance(form, nn.Sequential) and _is_pointwise(form[-1]):
            both = isinstance(form, TwoFactorLinear | TwoFactorConvolution)
            both = both and _read_alike(form[0], theirs[name])
            found[name] = _Place(form, form[0] if both else None, form[-1], theirs[name])
    return found


def _read_alike(first: nn.Module, dense: nn.Module) -> bool:
    """Whether the dense layer can be given what a form is given, in the same order of its weight.

    One that has taken in the readout of fewer units is given these.
    """
    if is_transposed_linear(dense):
        return False
    width = "in_features" if isinstance(first, nn.Linear) else "in_channels"
    return bool(getattr(first, width) == getattr(dense, width))


def _is_pointwise(layer: Any) -> bool:
    if isinstance(layer, nn.Linear):
        return True
    return (
        isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d)
        and layer.groups == 1
        and layer.weight[0, 0].numel() == 1
    )


def _calls(
    model: nn.Module, factors: Mapping[str, nn.Module], batch: Any, forward: Forward
) -> dict[str, int]:
    """How often the model calls each layer it calls at all, in the order of the first calls."""
    called: dict[str, int] = {}

    def count(name: str, *_: Any) -> None:
        called[name] = called.get(name, 0) + 1

    run_watched(model, batch, 0, forward, {f: partial(count, name) for name, f in factors.items()})
    return called
