"""Numbers that are hard to compute with, and what has to hold of what is made of them."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import nn

import rankfold
from rankfold import decompose
from rankfold.errors import RankfoldError
from rankfold.knapsack import choose, choose_least_greatest
from rankfold.methods import WEIGHT_METRIC, Method, Moments, reduction


@dataclass(frozen=True)
class Case:
    """A weight made of one of independent normal entries, float32 or float64."""

    name: str
    make: Callable[[torch.Tensor], torch.Tensor]
    alike: bool = False
    """Whether it is the weight itself up to scale and rounding: the same errors at all ranks."""
    is_finite: bool = True
    """Or else a typed error is due."""


def _to(dtype: torch.dtype, scale: float = 1.0) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda weight: (weight.double() * scale).to(dtype)


def _to_greatest(dtype: torch.dtype, greatest: float) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda weight: (weight.double() * (greatest / weight.abs().max().item())).to(dtype)


def _of_low_rank(weight: torch.Tensor) -> torch.Tensor:
    """Of rank 3 in every unfolding."""
    found = torch.zeros_like(weight)
    for term in range(3):
        outer = torch.ones(())
        for length in weight.shape:
            generator = torch.Generator().manual_seed(term)
            outer = outer[..., None] * torch.randn(length, generator=generator)
        found += outer
    return found


def _nearly_equal(weight: torch.Tensor) -> torch.Tensor:
    rows = weight.flatten(1).double()
    found = torch.linalg.qr(rows.mT).Q.mT if rows.shape[0] < rows.shape[1] else rows
    found = torch.linalg.qr(rows).Q if rows.shape[0] >= rows.shape[1] else found
    return (found + 1e-7 * rows).float().reshape(weight.shape)


def _dead(weight: torch.Tensor) -> torch.Tensor:
    found = weight.clone()
    found[::2] = 0
    found[:, 1::3] = 0
    return found


def _with(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def make(weight: torch.Tensor) -> torch.Tensor:
        found = weight.clone()
        found.view(-1)[7] = value
        return found

    return make


float16, bfloat16, float32, float64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
CASES = (
    Case("as drawn", _to(float32), alike=True),
    Case("times 1e20", _to(float32, 1e20), alike=True),
    Case("times 1e-20", _to(float32, 1e-20), alike=True),
    Case("up to the greatest float32", _to_greatest(float32, 3.4e38), alike=True),
    Case("denormal, about 1e-40", _to(float32, 1e-40)),
    Case("float64, times 1e150", _to(float64, 1e150), alike=True),
    Case("float64, times 1e-150", _to(float64, 1e-150), alike=True),
    Case("float16", _to(float16), alike=True),
    Case("float16, up to its greatest", _to_greatest(float16, 65504.0), alike=True),
    Case("float16, about 1e-6", _to(float16, 1e-6)),
    Case("bfloat16", _to(bfloat16), alike=True),
    Case("bfloat16, times 1e30", _to(bfloat16, 1e30), alike=True),
    Case("rank 3", _of_low_rank),
    Case("zero", torch.zeros_like),
    Case("singular values nearly equal", _nearly_equal),
    Case("all outputs alike", lambda weight: weight[:1].expand_as(weight).clone()),
    Case("half of the channels zero", _dead),
    Case("one entry of 1e10", _with(1e10)),
    Case("one NaN", _with(torch.nan), is_finite=False),
    Case("one infinity", _with(torch.inf), is_finite=False),
)
# Relative errors of weights that are stored in a dtype: its rounding, and some for the products.
ROUNDING = {float16: 5e-3, bfloat16: 4e-2, float32: 2e-5, float64: 1e-10}
LAYERS = (nn.Linear(40, 24), nn.Conv2d(16, 12, 3, padding=1), nn.LSTM(24, 16), nn.Embedding(60, 16))


def layers_of(method: Method) -> Iterator[nn.Module]:
    for layer in LAYERS:
        if reduction.why_not(method, layer) is None:
            yield layer


def stressed(layer: nn.Module, case: Case) -> nn.Module:
    """A layer of this kind and shape, all of whose weights are those of the case."""
    arguments: dict[type, Callable[[], nn.Module]] = {
        nn.Linear: lambda: nn.Linear(40, 24, bias=False),
        nn.Conv2d: lambda: nn.Conv2d(16, 12, 3, padding=1, bias=False),
        nn.LSTM: lambda: nn.LSTM(24, 16, bias=False),
        nn.Embedding: lambda: nn.Embedding(60, 16),
    }
    made = arguments[type(layer)]()
    generator = torch.Generator().manual_seed(3)
    for name, parameter in list(made.named_parameters()):
        drawn = torch.randn(parameter.shape, generator=generator)
        setattr(made, name, nn.Parameter(case.make(drawn)))
    return made.eval()


@dataclass(frozen=True)
class Outcome:
    """What a method made of a layer: the error of its weight by rank, or a refusal, or a fault."""

    errors: tuple[float, ...] = ()  # relative, at the least, a middle and the greatest rank
    refused: str | None = None
    wrong: str | None = None


def outcome_of(method: Method, layer: nn.Module, moments: Moments = WEIGHT_METRIC) -> Outcome:
    """Fit a method and build forms of three ranks; check what has to hold whatever the weights."""
    try:
        family = reduction.fit(method, layer, moments)
        ranks = family.ranks()
        picked = list(dict.fromkeys((ranks[0], ranks[len(ranks) // 2], ranks[-1])))
        losses = [family.loss(rank) for rank in picked]
        forms = [family.build(rank) for rank in picked]
    except (RankfoldError, ValueError) as error:
        return Outcome(refused=type(error).__name__)
    except Exception as error:
        return Outcome(wrong=f"{type(error).__name__}: {error!s:.80}")
    for loss in losses:
        if not 0 <= loss < torch.inf:
            return Outcome(wrong=f"a loss of {loss}")
    for before, after in pairwise(losses):
        if after > before * (1 + 1e-6) + 1e-12 and method.name not in FITTED_ONE_BY_ONE:
            return Outcome(wrong=f"the loss grows with the rank: {before:.3g}, {after:.3g}")
    kind = next(layer.parameters()).dtype
    for form in forms:
        for name, value in form.state_dict().items():
            if value.is_floating_point() and value.dtype != kind:
                return Outcome(wrong=f"'{name}' is {value.dtype}")
            if not value.isfinite().all():
                return Outcome(wrong=f"'{name}' is not finite")
    return Outcome(tuple(_error(form, layer) for form in forms))


# Each rank is a fit of its own, which finds a local optimum.
FITTED_ONE_BY_ONE = {
    *("cp", "cp-separable", "tucker-cp", "block-term", "tensor-ring", "block-diagonal"),
    *(
        "bicluster",
        "tensorized-train",
        "tensorized-tucker",
        "kronecker",
        "toeplitz-like",
        "monarch",
    ),
    *("monochromatic", "flattened", "separable-basis", "separable3", "tensor-train-embedding"),
}


def _error(form: nn.Module, layer: nn.Module) -> float:
    """Of the dense weight that the form stands for, multiplied out in float64; NaN for none."""
    to_dense = getattr(form.double(), "to_dense", None)
    if to_dense is None:
        return float("nan")
    exact, found = (_flat(one) for one in (layer, to_dense()))
    unit = exact.abs().max().clamp_min(1e-300)
    return (((found - exact) / unit).norm() / (exact / unit).norm().clamp_min(1e-300)).item()


def _flat(layer: nn.Module) -> torch.Tensor:
    return torch.cat([one.detach().double().flatten() for one in layer.parameters()])


def what_is_wrong(
    outcome: Outcome, case: Case, base: Outcome, kind: torch.dtype, method: str
) -> str | None:
    """With what became of a case, where `base` became of the weight as it was drawn."""
    if outcome.wrong is not None:
        return outcome.wrong
    if outcome.refused is not None:
        return None
    if not case.is_finite:
        return "not refused"
    rounding = ROUNDING[kind] + ROUNDING[float32]
    if any(error > 1 + rounding for error in outcome.errors):
        return f"worse than zeros: {outcome.errors}"
    pairs = list(zip(outcome.errors, base.errors, strict=False))
    # Of two fits that end in other local optima neither is wrong; at full rank there is one alone.
    for error, usual in pairs[-1:] if method in FITTED_ONE_BY_ONE else pairs:
        if case.alike and abs(error - usual) > 0.02 * usual + 2 * rounding:
            return f"errors of {outcome.errors}, not {base.errors}"
    return None


# Decompositions: of a tensor, at a rank from 1 to a full one.


@dataclass(frozen=True)
class Decomposed:
    """A decomposition, on tensors of a shape, at ranks up to one that is exact."""

    shape: tuple[int, ...]
    ranks: tuple[int, ...]
    find: Callable[[torch.Tensor, int], decompose.Decomposition]
    nests: bool = True  # error does not grow with rank; else each is a local optimum
    is_exact: bool = True  # the last rank


MATRIX, TENSOR = (12, 20), (6, 5, 4)
DECOMPOSITIONS = {
    "svd": Decomposed(MATRIX, (1, 4, 12), decompose.svd),
    "randomized_svd": Decomposed(MATRIX, (1, 4, 12), decompose.randomized_svd),
    "tall_skinny_svd": Decomposed((40, 12), (1, 4, 12), decompose.tall_skinny_svd),
    "interpolative": Decomposed(MATRIX, (1, 4, 12), decompose.interpolative),
    "pivoted_qr": Decomposed(MATRIX, (12,), lambda one, rank: decompose.pivoted_qr(one)),
    "plu": Decomposed((12, 12), (12,), lambda one, rank: decompose.plu(one)),
    "full_rank": Decomposed(MATRIX, (12,), lambda one, rank: decompose.full_rank(one)),
    "tucker": Decomposed(TENSOR, (1, 3, 6), lambda one, rank: decompose.tucker(one, _most(rank))),
    "tensor_train": Decomposed(
        TENSOR, (1, 3, 6), lambda one, rank: decompose.tensor_train(one, (rank, min(rank, 4)))
    ),
    "tensor_ring": Decomposed(TENSOR, (1, 2, 3), decompose.tensor_ring, False, False),
    "block_term": Decomposed(
        TENSOR, (1, 2), lambda one, rank: decompose.block_term(one, (2, 2, 2), rank), False, False
    ),
    "cp": Decomposed(TENSOR, (1, 3, 20), decompose.cp, False, False),
    "rank_one_terms": Decomposed(TENSOR, (1, 3, 9), decompose.rank_one_terms, True, False),
}


def _most(rank: int) -> tuple[int, ...]:
    return tuple(min(rank, length) for length in TENSOR)


def decomposed(about: Decomposed, case: Case) -> Outcome:
    """Decompose a tensor of a case at each rank, and check what has to hold."""
    drawn = torch.randn(about.shape, generator=torch.Generator().manual_seed(5))
    tensor = case.make(drawn)
    unit = tensor.double().abs().max().clamp_min(1e-300)
    exact = tensor.double() / unit
    try:
        found = [about.find(tensor, rank).to_tensor().double() / unit for rank in about.ranks]
    except (RankfoldError, ValueError) as error:
        return Outcome(refused=type(error).__name__)
    except Exception as error:
        return Outcome(wrong=f"{type(error).__name__}: {error!s:.80}")
    norm = exact.norm().clamp_min(1e-300)
    errors = tuple(((one - exact).norm() / norm).item() for one in found)
    rounding = ROUNDING[tensor.dtype]
    if not all(error <= 1 + rounding for error in errors):
        return Outcome(wrong=f"errors of {errors}")
    if about.nests and any(b > a + rounding for a, b in pairwise(errors)):
        return Outcome(wrong=f"the error grows with the rank: {errors}")
    if about.is_exact and errors[-1] > rounding and case.name != "denormal, about 1e-40":
        return Outcome(wrong=f"an error of {errors[-1]:.3g} at full rank")
    return Outcome(errors)


# Metrics: moments of the inputs and gradients of a linear layer of 40 inputs and 24 outputs.


def _moment(size: int, seed: int, samples: int = 100) -> torch.Tensor:
    rows = torch.randn(samples, size, generator=torch.Generator().manual_seed(seed)).double()
    return rows.mT @ rows / samples


def _outlying(moment: torch.Tensor) -> torch.Tensor:
    moment[0] *= 1e10
    moment[:, 0] *= 1e10
    return moment


MOMENTS: dict[str, tuple[Moments, bool]] = {  # and whether they are finite
    "inputs and gradients": (Moments(_moment(40, 1), _moment(24, 2), 1.0), True),
    "times 1e30": (Moments(1e30 * _moment(40, 1), 1e30 * _moment(24, 2), 1.0), True),
    "times 1e-30": (Moments(1e-30 * _moment(40, 1), 1e-30 * _moment(24, 2), 1.0), True),
    "of two samples": (Moments(_moment(40, 1, 2), _moment(24, 2, 2), 1.0), True),
    "zero inputs": (Moments(torch.zeros(40, 40).double(), _moment(24, 2), 1.0), True),
    "zero gradients": (Moments(_moment(40, 1), torch.zeros(24, 24).double(), 1.0), True),
    "constant inputs": (Moments(torch.ones(40, 40).double(), None, 1.0), True),
    "one input times 1e10": (Moments(_outlying(_moment(40, 1)), _moment(24, 2), 1.0), True),
    "scale 0": (Moments(_moment(40, 1), _moment(24, 2), 0.0), True),
    "NaN": (Moments(_moment(40, 1) * torch.nan, _moment(24, 2), 1.0), False),
    "infinity": (Moments(_moment(40, 1), _moment(24, 2) * torch.inf, 1.0), False),
}


# Whole networks: analysed, planned, factorized.


class Odd(nn.Module):
    """Convolution, ReLU, two linear layers; of numbers as `name` says."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self.body = nn.Conv2d(3, 32, 3)
        self.middle = nn.Linear(32, 64)
        self.out = nn.Linear(64, 10)
        with torch.no_grad():
            if name == "dead ReLU":
                self.body.weight.abs_().neg_()
                self.body.bias.fill_(-1)
            elif name == "exploding activations":
                self.body.weight.mul_(1e15)
            elif name == "vanishing activations":
                self.body.weight.mul_(1e-15)
                self.body.bias.zero_()
            elif name == "activations that overflow":
                self.body.weight.mul_(1e38)
            elif name == "zero weights":
                for parameter in self.parameters():
                    parameter.zero_()
            elif name == "NaN in a weight":
                self.middle.weight[0, 0] = torch.nan

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        hidden = torch.relu(self.body(images)).mean((2, 3))
        if self.name == "no gradients":
            hidden = hidden.detach()
        return self.out(torch.relu(self.middle(hidden)))


NETWORKS = {  # and whether their outputs are finite
    "as drawn": True,
    "dead ReLU": True,
    "no gradients": True,
    "exploding activations": True,
    "vanishing activations": True,
    "zero weights": True,
    "constant inputs": True,
    "zero inputs": True,
    "one input of 1e15": True,
    "activations that overflow": False,
    "NaN in a weight": False,
    "NaN in the data": False,
}


def network_and_data(name: str) -> tuple[nn.Module, list[torch.Tensor]]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Odd(name).eval()
        data = [torch.rand(6, 3, 6, 6) for _ in range(3)]
    if name == "constant inputs":
        data = [torch.ones_like(one) for one in data]
    elif name == "zero inputs":
        data = [torch.zeros_like(one) for one in data]
    elif name == "one input of 1e15":
        data[1][0, 0, 0, 0] = 1e15
    elif name == "NaN in the data":
        data[1][0, 0, 0, 0] = torch.nan
    return model, data


def network_outcome(name: str, metric: str) -> Outcome:
    """Analyse, plan for 70 % of the MACs, factorize; the errors of the outputs by batch."""
    model, data = network_and_data(name)
    try:
        analysis = rankfold.analyze(model, data, metric=metric, methods=["svd", "tucker2"])
        plan = analysis.plan(macs=0.7)
        small = rankfold.factorize(model, plan)
    except RankfoldError as error:
        return Outcome(refused=type(error).__name__)
    except Exception as error:
        return Outcome(wrong=f"{type(error).__name__}: {error!s:.80}")
    if not 0 <= plan.loss < torch.inf:
        return Outcome(wrong=f"a loss of {plan.loss}")
    if plan.after.macs > 0.7 * plan.before.macs:
        return Outcome(wrong=f"{plan.after.macs} of {plan.before.macs} MACs")
    errors = []
    with torch.no_grad():
        for batch in data:
            exact, found = model(batch).double(), small(batch).double()
            errors.append(((found - exact).norm() / exact.norm().clamp_min(1e-300)).item())
    if not all(error < torch.inf for error in errors):
        return Outcome(wrong="outputs that are not finite")
    return Outcome(tuple(errors))


# The planner.

LOSSES = {
    "as drawn": lambda drawn: drawn,
    "times 1e100": lambda drawn: drawn * 1e100,
    "times 1e-100": lambda drawn: drawn * 1e-100,
    "over 80 orders": lambda drawn: 10.0 ** (80 * drawn - 40),
    "all zero": lambda drawn: drawn * 0,
    "all alike": lambda drawn: drawn * 0 + 1,
    "equal but for 1e-12": lambda drawn: 1 + 1e-12 * drawn,
}


def planned(make: Callable[[np.ndarray], np.ndarray], scale: float = 1.0) -> tuple[float, ...]:
    """What `choose` finds over the least sum there is, by trying all; the greatest likewise."""
    random = np.random.default_rng(0)
    worst = [1.0, 1.0]
    for _ in range(5):
        losses = [make(random.random(5)) for _ in range(4)]
        costs = [scale * random.integers(1, 50, (5, 1)).astype(float) for _ in range(4)]
        limit = 0.5 * sum(cost.mean() for cost in costs) + 0.5 * sum(cost.min() for cost in costs)
        picks = [tuple(pick) for pick in np.ndindex(5, 5, 5, 5)]
        sums = [sum(c[i, 0] for c, i in zip(costs, pick, strict=True)) for pick in picks]
        allowed = [p for p, spent in zip(picks, sums, strict=True) if spent <= limit]
        for place, (solve, over) in enumerate(((choose, sum), (choose_least_greatest, max))):
            best = min(over(one[i] for one, i in zip(losses, p, strict=True)) for p in allowed)
            pick = solve(losses, costs, [limit])
            assert sum(c[i, 0] for c, i in zip(costs, pick, strict=True)) <= limit
            found = over(one[i] for one, i in zip(losses, pick, strict=True))
            worst[place] = max(worst[place], found / best if best > 0 else 1.0 + found)
    return tuple(worst)


# Recovery.

RECOVERIES = (
    *("as drawn", "a learning rate of 1e30", "a teacher of 1e25", "zero weights", "dead ReLU"),
    *("exploding activations", "NaN in the data", "NaN in a weight", "an outlier of 1e30"),
)


def recovered(name: str) -> Outcome:
    """Recover a factorized network; what it leaves is finite and no worse, or it is refused."""
    known = name if name in NETWORKS else "as drawn"
    plain = "as drawn" if known.startswith("NaN") else known
    model, data = network_and_data(plain)
    analysis = rankfold.analyze(model, data, metric="weight", methods=["svd", "tucker2"])
    small = rankfold.factorize(model, analysis.plan(fraction=0.3))
    teacher, data = network_and_data(known)
    if name == "a teacher of 1e25":
        with torch.no_grad():
            teacher.out.weight.mul_(1e25)
    if name == "an outlier of 1e30":
        data[1][0, 0, 0, 0] = 1e30
    rate = 1e30 if name == "a learning rate of 1e30" else 1e-3
    try:
        done = rankfold.recover(small, data, teacher=teacher, epochs=2, learning_rate=rate)
    except RankfoldError as error:
        return Outcome(refused=type(error).__name__)
    except Exception as error:
        return Outcome(wrong=f"{type(error).__name__}: {error!s:.80}")
    if not all(value.isfinite().all() for value in small.state_dict().values()):
        return Outcome(wrong=f"weights that are not finite; {done.ended}")
    return Outcome((float(len(done.epochs)),))
