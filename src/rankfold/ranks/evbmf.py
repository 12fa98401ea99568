"""Empirical variational Bayesian matrix factorization: the rank above the noise, analytically.

Nakajima, Sugiyama, Babacan, Tomioka: Global analytic solution of fully-observed variational
Bayesian matrix factorization. Journal of Machine Learning Research 14 (2013).
"""

import math

import numpy as np
import scipy
import torch

_SCAN_POINTS = 400


def evbmf_rank(
    singular_values: torch.Tensor, shape: tuple[int, int], noise_variance: float | None = None
) -> int:
    """The number of singular values of a noisy matrix that are signal.

    `singular_values` is (min(shape),), descending, of a matrix of `shape`. The noise variance is
    estimated from the spectrum (theorem 2 and corollary 1 of the paper: a bounded search in one
    dimension) unless it is given. May be 0: all is noise. Raises ValueError if the number of
    singular values does not fit the shape.
    """
    short, long = sorted(shape)
    values = singular_values.detach().double().cpu().numpy()
    if values.shape != (short,):
        raise ValueError(
            f"a matrix {shape[0]}x{shape[1]} has {short} singular values, not {values.size}"
        )
    squared = np.sort(values**2)[::-1]
    if squared[0] == 0:
        return 0
    ratio = short / long
    threshold = _detection_threshold(ratio)
    if noise_variance is None:
        noise_variance = _noise_variance(squared, short, long)
    return int(np.count_nonzero(squared > noise_variance * long * threshold))


def _detection_threshold(ratio: float) -> float:
    """x̄: a squared singular value over (long side x noise variance) above this is signal."""
    tau = 2.5129 * math.sqrt(ratio)
    return (1 + tau) * (1 + ratio / tau)


def _noise_variance(squared: np.ndarray, short: int, long: int) -> float:
    """The global minimum of the free energy over the noise variance.

    The objective has several local minima, one kink per singular value, so it is scanned on a
    logarithmic grid that also holds the kinks, and the best bracket is refined.
    """
    ratio = short / long
    threshold = _detection_threshold(ratio)
    most_signal = min(math.ceil(short / (1 + ratio)) - 1, short - 1)
    tail = squared[most_signal:]
    upper = squared.sum() / (short * long)
    lower = max(tail[0] / (long * threshold), tail.mean() / long)
    floor = upper * np.finfo(np.float64).eps  # an exactly low-rank matrix has no noise
    lower = min(max(lower, floor), upper)
    if lower == upper:
        return float(upper)

    def free_energy(variance: float) -> float:
        return _free_energy(squared / (long * variance), ratio, threshold)

    kinks = squared / (long * threshold)
    grid = np.concatenate(
        [np.geomspace(lower, upper, _SCAN_POINTS), kinks[(kinks > lower) & (kinks < upper)]]
    )
    grid = np.unique(np.clip(grid, lower, upper))
    energies = np.array([free_energy(variance) for variance in grid])
    best = int(energies.argmin())
    refined = scipy.optimize.minimize_scalar(
        free_energy,
        bounds=(grid[max(best - 1, 0)], grid[min(best + 1, len(grid) - 1)]),
        method="bounded",
        options={"xatol": lower * 1e-9},
    )
    return float(refined.x if refined.fun < energies[best] else grid[best])


def _free_energy(x: np.ndarray, ratio: float, threshold: float) -> float:
    """Free energy, up to constants, as a function of x = squared / (long x noise variance)."""
    x = np.maximum(x, np.finfo(np.float64).tiny)
    total = np.sum(x - np.log(x))
    signal = x[x > threshold]
    centred = signal - (1 + ratio)
    tau = 0.5 * (centred + np.sqrt(np.maximum(centred**2 - 4 * ratio, 0)))
    total += np.sum(np.log(tau + 1) + ratio * np.log(tau / ratio + 1) - tau)
    return float(total)
