"""Factors fitted again to what the original did, on the inputs that they really get.

A layer is factorized for the inputs of the original network; in the compressed one it gets those
that the layers before it give. In forward order, the last factor of each layer is regressed on what
reaches it in the compressed network, towards the response of the original: the asymmetric
reconstruction of Zhang et al. 2016 (section 3.3), in closed form and without labels or gradients.
With the nonlinearity (their section 3.2) what is fitted is the response after the ReLU.
"""

import contextlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from rankfold.analysis.divergence import Judge
from rankfold.batches import (
    Data,
    Forward,
    all_finite,
    device_of,
    first_batches,
    held_out_first,
    run,
    run_or_explain,
    running,
)
from rankfold.errors import CalibrationError, ModelError
from rankfold.progress import Progress, silent

# Towards the factor as it is: this share of the features' mean square.
_RIDGE = 1e-3
# Positions of one layer that count at most: so many times the features, and at least so many.
_TIMES_FEATURES, _POSITIONS = 20, 8192
# Weights of the tie between response and its stand-in, one round each (Zhang et al.: 0.01 to 1).
_TIES = (0.01, 0.03, 0.1, 0.3, 1.0)


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

    `teacher` is the original, `data` unlabelled batches, of which, from all over a sequence,
    `held_out` judge (of few, a fifth; one alone serves for both) and so many `batches` are fitted
    to. A layer whose refit
    brings the outputs no nearer to the teacher's there stays as it was, so the divergence never
    grows. With `through_relu` layers that a ReLU follows, after a batch norm or not, are fitted
    through it. Layers whose form does not end in a linear layer or a convolution of one place are
    passed over. Raises CalibrationError for data that yields nothing, ModelError for a model that
    does not run or lacks a layer.
    """
    ordered, kept, count = held_out_first(data, batches, held_out)
    found = list(first_batches(ordered, kept + count, device_of(model)))
    held, used = found[:kept] or found, found[kept:]
    places = _places(model, teacher, layers)
    calls = _calls(model, {name: last for name, (last, _) in places.items()}, used[0], forward)
    relus = _read_by_relu(teacher, layers, used[0], forward) if through_relu else {}
    judge = Judge.of(teacher, forward, held, None)
    sampler = torch.Generator().manual_seed(seed)
    divergence = judge.divergence_of(model)
    done = []
    for name in progress(calls, "refitting"):
        last, dense = places[name]
        rows = _Rows(last, dense, calls[name], sampler, len(used))
        rows.collect(model, teacher, used, forward)
        before = {key: value.clone() for key, value in last.state_dict().items()}
        _assign(last, *_regress(rows, last, relus.get(name)))
        after = judge.divergence_of(model)
        better = after < divergence
        done.append(Refitted(name, divergence, after, better))
        if better:
            divergence = after
        else:
            last.load_state_dict(before)
    return Refit(tuple(done))


def _places(
    model: nn.Module, teacher: nn.Module, layers: Sequence[str]
) -> dict[str, tuple[nn.Module, nn.Module]]:
    """By layer the last factor in `model`, where there is one to fit, and the dense layer."""
    ours, theirs = dict(model.named_modules()), dict(teacher.named_modules())
    found = {}
    for name in layers:
        if name not in ours or name not in theirs:
            raise ModelError(f"there is no layer '{name}' to refit")
        form = ours[name]
        last = form[-1] if isinstance(form, nn.Sequential) else None
        if last is not None and _is_pointwise(last):
            found[name] = (last, theirs[name])
    return found


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

    _run_watched(model, batch, 0, forward, {f: partial(count, name) for name, f in factors.items()})
    return called


def _run_watched(
    model: nn.Module,
    batch: Any,
    index: int,
    forward: Forward,
    watched: Mapping[nn.Module, Callable[..., None]],
) -> None:
    """One forward pass that shows each of these modules' calls: module, inputs, output."""
    hooks = [module.register_forward_hook(show) for module, show in watched.items()]
    try:
        with running(model), torch.no_grad():
            run_or_explain(forward, model, batch, index)
    finally:
        for hook in hooks:
            hook.remove()


class _Rows:
    """Pairs of what reaches the last factor in one network and what the dense layer gives."""

    def __init__(
        self,
        last: nn.Module,
        dense: nn.Module,
        calls: int,
        sampler: torch.Generator,
        batches: int,
    ) -> None:
        self.last, self.dense, self.calls, self.sampler = last, dense, calls, sampler
        features = cast(Any, last).weight.shape[1]
        self.most = math.ceil(max(_POSITIONS, _TIMES_FEATURES * features) / batches / calls)
        self.features: list[torch.Tensor] = []
        self.responses: list[torch.Tensor] = []

    def collect(
        self, model: nn.Module, teacher: nn.Module, batches: Sequence[Any], forward: Forward
    ) -> None:
        for index, batch in enumerate(batches):
            seen = []
            for network, layer in ((model, self.last), (teacher, self.dense)):
                wanted = self.calls, network is model
                seen.append(_seen(network, layer, batch, index, forward, *wanted))
            for ours, theirs in zip(*seen, strict=True):
                self._add(_as_rows(ours, self.last), _as_rows(theirs, self.dense))

    def _add(self, features: torch.Tensor, responses: torch.Tensor) -> None:
        if not all_finite((features, responses)):
            raise CalibrationError("a layer gives NaN or infinity while it is refitted")
        if len(features) > self.most:
            chosen = torch.randint(len(features), (self.most,), generator=self.sampler)
            chosen = chosen.to(features.device)
            features, responses = features[chosen], responses[chosen]
        self.features.append(features.double())
        self.responses.append(responses.double())


class _Enough(Exception):  # noqa: N818  (no error)
    """The rest of a forward pass is not needed."""


def _seen(
    network: nn.Module,
    layer: nn.Module,
    batch: Any,
    index: int,
    forward: Forward,
    calls: int,
    inputs: bool,
) -> list[torch.Tensor]:
    """What a layer is given, or gives, in each of its calls; what comes after is not run."""
    found: list[torch.Tensor] = []

    def note(module: nn.Module, given: tuple[Any, ...], output: Any) -> None:
        # A copy: what follows may work in place.
        found.append((given[0] if inputs else output).detach().clone())
        if len(found) == calls:
            raise _Enough

    with contextlib.suppress(_Enough):
        _run_watched(network, batch, index, forward, {layer: note})
    return found


def _as_rows(tensor: torch.Tensor, layer: nn.Module) -> torch.Tensor:
    """(positions, channels)."""
    if not isinstance(layer, nn.Linear):
        batched = tensor if tensor.dim() == cast(Any, layer).weight.dim() else tensor[None]
        tensor = batched.movedim(1, -1)
    return tensor.reshape(-1, tensor.shape[-1])


def _regress(
    rows: _Rows, last: nn.Module, relu: "_Threshold | None"
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Weight (out, features) and bias of the last factor that are nearest to the responses."""
    features, responses = torch.cat(rows.features), torch.cat(rows.responses)
    solver = _LeastSquares(features, last)
    weight, bias = solver.solve(responses)
    if relu is None:
        return weight, bias
    target = relu.of(responses)
    for tie in _TIES:
        predicted = relu.before(features @ weight.mT + (0 if bias is None else bias))
        weight, bias = solver.solve(relu.undo(_stand_in(target, predicted, tie)))
    return weight, bias


def _stand_in(target: torch.Tensor, predicted: torch.Tensor, tie: float) -> torch.Tensor:
    """Z of least (target - relu(z))² + tie (z - predicted)², element by element.

    The better of the best z below 0 and the best above (Zhang et al. 2016, equations 9 and 10).
    """
    below = predicted.clamp_max(0)
    above = ((target + tie * predicted) / (1 + tie)).clamp_min(0)
    cost_below = target.square() + tie * (below - predicted).square()
    cost_above = (target - above).square() + tie * (above - predicted).square()
    return torch.where(cost_below < cost_above, below, above)


class _LeastSquares:
    """Regression on the same features, again and again, tied a little to the factor as it is."""

    def __init__(self, features: torch.Tensor, last: Any) -> None:
        self.features = features
        self.weight = last.weight.detach().flatten(1).double()
        self.bias = None if last.bias is None else last.bias.detach().double()
        self.mean = features.mean(0) if self.bias is not None else torch.zeros_like(features[0])
        centred = features - self.mean
        gram = centred.mT @ centred / len(features)
        ridge = _RIDGE * gram.diagonal().mean().clamp_min(torch.finfo(gram.dtype).tiny)
        self.gram = gram + ridge * torch.eye(len(gram)).to(gram)
        self.lower, self.failed = torch.linalg.cholesky_ex(self.gram)

    def solve(self, responses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        middle = responses.mean(0) if self.bias is not None else torch.zeros_like(responses[0])
        centred = self.features - self.mean
        left = (responses - middle) - centred @ self.weight.mT
        crossed = left.mT @ centred / len(centred)
        if self.failed:
            step = crossed @ torch.linalg.pinv(self.gram, hermitian=True)
        else:
            step = torch.cholesky_solve(crossed.mT, self.lower).mT
        weight = self.weight + step
        return weight, None if self.bias is None else middle - weight @ self.mean


def _assign(last: Any, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
    with torch.no_grad():
        last.weight.copy_(weight.reshape(last.weight.shape))
        if bias is not None:
            last.bias.copy_(bias)


@dataclass(frozen=True)
class _Threshold:
    """What follows a response: z = scale * y + shift (a batch norm, or 1 and 0), then relu(z)."""

    scale: torch.Tensor
    shift: torch.Tensor

    def before(self, responses: torch.Tensor) -> torch.Tensor:
        return responses * self.scale + self.shift

    def of(self, responses: torch.Tensor) -> torch.Tensor:
        return self.before(responses).clamp_min(0)

    def undo(self, before: torch.Tensor) -> torch.Tensor:
        """Responses of these values before the ReLU."""
        return (before - self.shift) / self.scale


def _read_by_relu(
    model: nn.Module, layers: Sequence[str], batch: Any, forward: Forward
) -> dict[str, _Threshold]:
    """Of the layers whose output an `nn.ReLU` takes, through a batch norm or not, what follows."""
    names = {module: name for name, module in model.named_modules() if name in set(layers)}
    made: dict[int, tuple[str, _BatchNorm | None]] = {}  # by tensor
    alive: list[Any] = []  # so that no tensor takes the place of another
    found: dict[str, _Threshold] = {}

    def note(module: nn.Module, given: tuple[Any, ...], output: Any) -> None:
        if not isinstance(output, torch.Tensor):
            return
        alive.append(output)
        if module in names:
            made[id(output)] = (names[module], None)
        elif given and id(given[0]) in made:
            name, norm = made[id(given[0])]
            if isinstance(module, _BatchNorm) and norm is None:
                made[id(output)] = (name, module)
            elif isinstance(module, nn.ReLU):
                threshold = _threshold(norm, cast(Any, model.get_submodule(name)))
                if threshold is not None:
                    found[name] = threshold

    leaves = [module for module in model.modules() if not any(module.children())]
    _run_watched(model, batch, 0, forward, dict.fromkeys(leaves, note))
    return found


def _threshold(norm: Any, layer: Any) -> _Threshold | None:
    """None for a batch norm that cannot be undone: of the batch's statistics, or a scale of 0."""
    outputs = layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
    ones = torch.ones(outputs, dtype=torch.float64, device=layer.weight.device)
    if norm is None:
        return _Threshold(ones, torch.zeros_like(ones))
    if norm.running_mean is None or norm.running_var is None:
        return None
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    shift = torch.zeros_like(scale)
    if norm.weight is not None:
        scale, shift = scale * norm.weight.detach().double(), norm.bias.detach().double()
    if not (scale != 0).all():
        return None
    return _Threshold(scale, shift - norm.running_mean.double() * scale)
