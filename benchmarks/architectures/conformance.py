"""What has to hold of a network of any kind that is compressed, tried on one architecture."""

import copy
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch.utils import _pytree

import rankfold
from architectures.architecture import Architecture
from rankfold.analysis import Analysis
from rankfold.batches import all_finite, running, tensors_of
from rankfold.copies import copy_of
from rankfold.cost import count_parameters
from rankfold.errors import BudgetError, CheckpointError, ModelError, RankfoldError
from rankfold.fingerprint import weights_sha256
from rankfold.measure import output_error
from rankfold.plan import Cost, LayerPlan, Plan

SHARE = 0.5  # of the parameters that are kept
_CLOSE = {torch.float64: 1e-9, torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 1e-2}


class InapplicableError(Exception):
    """A check that says nothing of this network: the dense one cannot do it either."""


@dataclass(frozen=True)
class Outcome:
    """How an architecture did."""

    status: str  # "passed", "refused" (a typed error, as it should), "failed", "not installed"
    seconds: float = 0.0
    layers: int = 0  # with a weight
    factorized: int = 0
    before: int = 0  # parameters
    after: int = 0
    least: float | None = None  # of the parameters, where SHARE cannot be reached
    error: float | None = None  # of the outputs, relative, before recovery
    checks: dict[str, str] = field(default_factory=dict)  # "yes", "no: ..." or "-: ..."
    reasons: dict[str, int] = field(default_factory=dict)  # why layers were left alone
    said: str = ""  # the error

    @property
    def failures(self) -> list[str]:
        """What went wrong, in words."""
        wrong = [f"{name} {said}" for name, said in self.checks.items() if said.startswith("no")]
        return [self.said, *wrong] if self.status == "failed" and self.said else wrong


@dataclass(frozen=True)
class Subject:
    """A network and what was made of it."""

    architecture: Architecture
    model: nn.Module
    data: Any
    outputs: Any  # of the model on the first batch
    analysis: Analysis
    plan: Plan
    small: nn.Module
    folder: Path

    @property
    def batch(self) -> Any:
        return self.data[0]

    def run(self, network: nn.Module) -> Any:
        """In eval mode, on the first batch."""
        with running(network), torch.no_grad():
            return self.architecture.forward(network, copy.deepcopy(self.batch))


def examine(architecture: Architecture, checks: list[str] | None = None) -> Outcome:
    """Compress it and see what holds; `checks` are names of `CHECKS`, by default all."""
    if not architecture.is_installed:
        return Outcome("not installed", said=f"{architecture.package} is not installed")
    start = time.perf_counter()
    # What is timed matters to nothing here.
    quick = mock.patch("rankfold.measure._ROUNDS", (2, 2))
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(), quick:
        warnings.simplefilter("ignore")
        try:
            outcome = _examine(architecture, checks or list(CHECKS), Path(folder))
        except Exception as error:
            outcome = Outcome("failed", said=_told(error))
    return replace(outcome, seconds=round(time.perf_counter() - start, 1))


def _examine(architecture: Architecture, checks: list[str], folder: Path) -> Outcome:
    model, data = architecture.make(), architecture.make_data()
    forward = architecture.forward
    try:
        outputs, state = None, {}
        if architecture.refusal is None:
            with running(model), torch.no_grad():
                outputs = forward(model, copy.deepcopy(data[0]))
            state = _state_of(model)
        analysis = rankfold.analyze(model, data, forward=forward, metric=architecture.metric)
        plan, least = _plan(analysis)
        small = rankfold.factorize(model, plan)
    except RankfoldError as error:
        said = f"{type(error).__name__}: {error}"
        expected = architecture.refusal is not None and architecture.refusal in said
        return Outcome("refused" if expected else "failed", said=said)
    if architecture.refusal is not None:
        return Outcome("failed", said=f"not refused: {architecture.refusal}")
    subject = Subject(architecture, model, data, outputs, analysis, plan, small, folder)
    found = {"original untouched": _said(lambda: _check_untouched(subject, state))}
    found |= {name: _said(lambda name=name: CHECKS[name](subject)) for name in checks}
    found["original untouched at the end"] = _said(lambda: _check_untouched(subject, state))
    wrong = any(said.startswith("no") for said in found.values())
    return Outcome(
        "failed" if wrong else "passed",
        layers=len(plan.layers),
        factorized=len(plan.factorized),
        before=count_parameters(model),
        after=count_parameters(small),
        least=least,
        error=_error_of(subject),
        checks=found,
        reasons=dict(Counter(layer.reason for layer in plan.layers if layer.reason)),
    )


def _plan(analysis: Analysis) -> tuple[Plan, float | None]:
    """Of half of the parameters, or of as few as there can be."""
    try:
        return analysis.plan(params=SHARE), None
    except BudgetError as error:
        least = error.smallest["params"]
        least = least / analysis.parameters if least > 1 else least
        return analysis.plan(params=min(1.0, least)), least


def _error_of(subject: Subject) -> float | None:
    try:
        return output_error(subject.outputs, subject.run(subject.small))
    except Exception:
        return None


def _said(check: Callable[[], None]) -> str:
    try:
        check()
    except InapplicableError as reason:
        return f"-: {reason}"
    except Exception as error:
        return f"no: {_told(error)}"
    return "yes"


def _told(error: BaseException) -> str:
    place = traceback.extract_tb(error.__traceback__)[-1]
    lines = (str(error) or "no message").strip().splitlines()
    where = f"{Path(place.filename).name}:{place.lineno}"
    return f"{type(error).__name__}: {' '.join(lines[:3]):.300} ({where})"


def _state_of(model: nn.Module) -> dict[str, Any]:
    """Everything of a network that an analysis has to leave as it was."""
    return {
        "weights": weights_sha256(model),
        "modules": [(name, id(one)) for name, one in model.named_modules(remove_duplicate=False)],
        "parameters": [(name, id(one)) for name, one in model.named_parameters()],
        "modes": [one.training for one in model.modules()],
        "trainable": [one.requires_grad for one in model.parameters()],
        "gradients": [one.grad for one in model.parameters()],
        "hooks": [
            (len(one._forward_hooks), len(one._forward_pre_hooks), len(one._backward_hooks))
            for one in model.modules()
        ],
        "fast path": torch.backends.mha.get_fastpath_enabled(),
    }


def _check_untouched(subject: Subject, state: dict[str, Any]) -> None:
    for name, now in _state_of(subject.model).items():
        assert now == state[name], f"its {name} changed"
    _same(subject.outputs, subject.run(subject.model))


def _same(first: Any, second: Any, close: float | None = None) -> None:
    """The same nesting, types, shapes and dtypes; to the bit, or close."""
    (ones, structure), (others, other) = (_pytree.tree_flatten(one) for one in (first, second))
    assert structure == other, f"outputs are nested otherwise: {structure} and {other}"
    for one, two in zip(ones, others, strict=True):
        assert type(one) is type(two), f"{type(one)} became {type(two)}"
        if isinstance(one, torch.Tensor):
            assert one.shape == two.shape, f"a shape {one.shape} became {two.shape}"
            assert one.dtype == two.dtype, f"a dtype {one.dtype} became {two.dtype}"
            if close is None:
                assert torch.equal(one, two), "outputs are not the same to the bit"
    if close is not None:
        error = output_error(first, second)
        assert error <= close, f"outputs differ by {error:.2g}"


def _tolerance(subject: Subject) -> float:
    tensors = (*subject.model.parameters(), *tensors_of(subject.outputs))
    dtypes = [one.dtype for one in tensors if one.is_floating_point()]
    return max(_CLOSE[dtype] for dtype in dtypes)


def check_outputs(subject: Subject) -> None:
    """Finite, and nested as the original's."""
    outputs = subject.run(subject.small)
    _same(subject.outputs, outputs, close=float("inf"))
    assert all_finite(outputs), "outputs are not finite"


def check_counts(subject: Subject) -> None:
    """As many parameters and MACs as the plan says, and within the budget."""
    plan, small = subject.plan, subject.small
    counted, planned = count_parameters(small), plan.after.parameters
    right = counted <= planned if _merges_readouts(plan) else counted == planned
    assert right, f"{counted}, planned {planned}"
    assert plan.before.parameters == count_parameters(subject.model)
    budget = float(plan.request["params"]) * plan.before.parameters
    assert counted <= budget + 0.5, f"{counted} parameters, the budget is {budget}"


def _merges_readouts(plan: Plan) -> bool:
    """Whether a readout of fewer units goes into the layer that reads it.

    That it gets smaller by it, the plan does not count.
    """
    return any(entry.reader is not None for entry in plan.factorized)


def check_measure(subject: Subject) -> None:
    """What `measure` counts while both run is what the plan counted beforehand."""
    if subject.architecture.uneven is not None:
        raise InapplicableError(subject.architecture.uneven)
    table = rankfold.measure(
        subject.model, subject.small, subject.data[:1], forward=subject.architecture.forward
    )
    pairs = ((table.before, subject.plan.before), (table.after, subject.plan.after))
    for measured, planned in pairs:
        gap = measured.macs - planned.macs
        gap = gap if _merges_readouts(subject.plan) else abs(gap)
        assert gap <= 1 + 1e-3 * planned.macs, f"MACs {measured.macs}, planned {planned.macs}"


def check_loaded(subject: Subject) -> None:
    """Saved and loaded, the outputs are the same to the bit."""
    target = subject.folder / "saved"
    if not subject.architecture.saved:
        try:
            rankfold.save(subject.small, target)
        except CheckpointError as reason:
            raise InapplicableError(str(reason)) from reason
    rankfold.save(subject.small, target)
    loaded = rankfold.load(target, like=subject.architecture.make)
    _same(subject.run(subject.small), subject.run(loaded))
    if (target / "config.json").exists():
        _same(subject.run(subject.small), subject.run(rankfold.load(target)))
    again = rankfold.load(target, like=subject.model)
    _same(subject.run(subject.small), subject.run(again))


def check_state_dict(subject: Subject) -> None:
    """The state dict fills a second copy; a deep copy is the same."""
    expected = subject.run(subject.small)
    other = rankfold.factorize(subject.model, subject.plan)
    with torch.no_grad():
        for parameter in other.parameters():
            if parameter.is_floating_point() and parameter.layout == torch.strided:
                parameter.data = torch.zeros_like(parameter)
    other.load_state_dict(subject.small.state_dict())
    _same(expected, subject.run(other))
    _same(expected, subject.run(copy_of(subject.small)))


def check_compress(subject: Subject) -> None:
    """`compress` in one call makes the same plan from the same seed, and the original's outputs."""
    architecture = subject.architecture
    budget = float(subject.plan.request["params"])
    small = rankfold.compress(
        subject.model,
        subject.data,
        params=budget,
        forward=architecture.forward,
        loss_metric=architecture.metric,
        epochs=1 if architecture.recovered else 0,
    )
    outputs = subject.run(small)
    _same(subject.outputs, outputs, close=float("inf"))
    assert all_finite(outputs), "outputs are not finite after a recovery"
    made = rankfold.record_of(small).plan
    assert made == subject.plan.bare(), "the same seed made another plan"


def check_gradients(subject: Subject) -> None:
    """In training mode every factor gets a gradient whose dense weight gets one."""
    if not subject.architecture.trained:
        raise InapplicableError("its outputs have no gradients")
    dense, small = copy_of(subject.model), copy_of(subject.small)
    if not any(parameter.requires_grad for parameter in dense.parameters()):
        raise InapplicableError("none of its parameters is trained")
    for network in (dense, small):
        _backward(subject, network)
    modules = dict(dense.named_modules())
    for entry in subject.plan.factorized:
        layer = modules.get(entry.name)  # projections of attention are none of their own
        own = [] if layer is None else list(layer.parameters())
        if layer is not None and all(one.grad is None for one in own):
            continue
        for name, factor in small.get_submodule(entry.name).named_parameters():
            # Of a recurrent layer's readouts some are of outputs, some of states that nobody reads.
            unread = isinstance(layer, nn.RNNBase) and name.startswith(("states", "readout"))
            if not factor.requires_grad or (unread and factor.grad is None):
                continue
            assert factor.grad is not None, f"'{entry.name}.{name}' gets no gradient"
            assert all_finite(factor.grad), f"the gradient of '{entry.name}.{name}' is not finite"


def _backward(subject: Subject, network: nn.Module) -> None:
    torch.manual_seed(0)
    outputs = subject.architecture.forward(network.train(), copy.deepcopy(subject.batch))
    tensors = [one for one in tensors_of(outputs) if one.requires_grad]
    assert tensors, "no output has a gradient"
    sum((one * torch.randn_like(one)).sum() for one in tensors if one.numel()).backward()


def check_full_rank(subject: Subject) -> None:
    """With every layer dense nothing changes; at full rank no more than by rounding."""
    nothing = rankfold.factorize(subject.model, subject.analysis.plan(params=1.0))
    if not subject.analysis.plan(params=1.0).factorized:
        _same(subject.outputs, subject.run(nothing))
    whole = at_full_rank(subject.analysis, subject.plan)
    if not whole.factorized:
        raise InapplicableError("no layer can be factorized")
    small = rankfold.factorize(subject.model, whole)
    _same(subject.outputs, subject.run(small), close=_tolerance(subject))


def at_full_rank(analysis: Analysis, plan: Plan) -> Plan:
    """Every layer that can be, factorized at the greatest rank of its first method."""
    entries = []
    for layer in analysis.layers:
        cost = Cost(layer.parameters, layer.macs)
        if layer.reason is not None:
            entries.append(LayerPlan(layer.name, layer.layer, cost, cost, reason=layer.reason))
            continue
        name, method = next(iter(layer.methods.items()))
        entries.append(
            LayerPlan(
                layer.name,
                layer.layer,
                cost,
                cost,
                method=name,
                settings=asdict(method),
                rank=tuple(entry[-1] for entry in layer.grids[name]),
                reader=layer.reader if name == "fewer-units" else None,
                tied=layer.tied,
            )
        )
    return replace(plan, layers=tuple(entries), metric="weight", moments={})


def check_merged(subject: Subject) -> None:
    """Batch norms folded and adjacent layers multiplied, the outputs stay."""
    merged = rankfold.merge_adjacent(
        subject.small, subject.batch, forward=subject.architecture.forward
    )
    _same(subject.run(subject.small), subject.run(merged), close=_tolerance(subject))
    if not subject.architecture.saved:
        return
    target = subject.folder / "merged"
    rankfold.save(merged, target)
    loaded = rankfold.load(target, like=subject.architecture.make)
    _same(subject.run(merged), subject.run(loaded))


def check_refit(subject: Subject) -> None:
    """Factors regressed again on what reaches them."""
    small = copy_of(subject.small)
    names = [entry.name for entry in subject.plan.factorized]
    rankfold.refit(
        small, subject.model, subject.data[:2], names, forward=subject.architecture.forward
    )
    outputs = subject.run(small)
    _same(subject.outputs, outputs, close=float("inf"))
    assert all_finite(outputs), "outputs are not finite"


def check_exported(subject: Subject) -> None:
    """A file of torch.export gives the same, if one of the dense network does."""
    _check_file(subject, "small.pt2")


def check_onnx(subject: Subject) -> None:
    """A file of ONNX Runtime gives the same, if one of the dense network does."""
    _check_file(subject, "small.onnx")


def _check_file(subject: Subject, name: str) -> None:
    if not subject.architecture.exported:
        raise InapplicableError("the dense network has no such file")
    forward = subject.architecture.forward

    def write(network: nn.Module) -> None:
        rankfold.export(network, subject.folder / name, subject.batch, forward=forward)

    try:
        write(subject.small)
    except RankfoldError as reason:
        with _refused_by_the_dense_one(reason):
            write(subject.model)
        raise


@contextmanager
def _refused_by_the_dense_one(reason: RankfoldError) -> Iterator[None]:
    try:
        yield
    except ModelError:
        raise InapplicableError(f"nor of the dense network: {reason!s:.160}") from reason


CHECKS: dict[str, Callable[[Subject], None]] = {
    "outputs": check_outputs,
    "counts": check_counts,
    "loaded": check_loaded,
    "state dict": check_state_dict,
    "gradients": check_gradients,
    "full rank": check_full_rank,
    "measure": check_measure,
    "merged": check_merged,
    "refit": check_refit,
    "compress": check_compress,
    "exported": check_exported,
    "ONNX": check_onnx,
}
