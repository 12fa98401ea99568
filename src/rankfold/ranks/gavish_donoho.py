"""The optimal hard threshold for singular values under white noise.

Gavish, Donoho: The optimal hard threshold for singular values is 4/√3. IEEE Transactions on
Information Theory 60 (2014).
"""

import math
from functools import cache

import scipy
import torch


def gavish_donoho_rank(
    singular_values: torch.Tensor, shape: tuple[int, int], noise: float | None = None
) -> int:
    """The number of singular values that lie above the threshold of least mean squared error.

    `singular_values` is (min(shape),), of a matrix of `shape` that is low rank plus independent
    noise of standard deviation `noise`; without it, the noise is judged by the median singular
    value (equations 3 and 4 of the paper). May be 0: all is noise. Raises ValueError if the number
    of singular values does not fit the shape.
    """
    short, long = sorted(shape)
    if singular_values.shape != (short,):
        raise ValueError(
            f"a matrix {shape[0]}x{shape[1]} has {short} singular values, "
            f"not {singular_values.numel()}"
        )
    ratio = short / long
    values = singular_values.double()
    if noise is not None:
        threshold = _threshold(ratio) * math.sqrt(long) * noise
    else:
        median = values.quantile(0.5).item()
        threshold = _threshold(ratio) / math.sqrt(_median_of_noise(ratio)) * median
    return int((values > threshold).sum())


def _threshold(ratio: float) -> float:
    """λ*(β), equation 11: in units of √(long side) times the noise."""
    root = math.sqrt(ratio**2 + 14 * ratio + 1)
    return math.sqrt(2 * (ratio + 1) + 8 * ratio / ((ratio + 1) + root))


@cache
def _median_of_noise(ratio: float) -> float:
    """μ_β: the median of the Marchenko-Pastur distribution of squared singular values."""
    low, high = (1 - math.sqrt(ratio)) ** 2, (1 + math.sqrt(ratio)) ** 2

    def density(x: float) -> float:
        return math.sqrt(max((high - x) * (x - low), 0)) / (2 * math.pi * ratio * x)

    def beyond_half(x: float) -> float:
        return scipy.integrate.quad(density, low, x, limit=200)[0] - 0.5

    return scipy.optimize.brentq(beyond_half, low + 1e-12, high)
