"""Parameters and MACs of every method's form by hand: what its paper says that it costs.

A function for each method gives the links of its chain for one plain convolution (a linear layer
is one without a kernel), without the bias: of each the parameters, how many axes of the map have
been walked along behind it, and of a link that slices of the channels share, how many do. A link
costs its parameters at every position of its output, for each slice.
"""

import math
from dataclasses import dataclass
from functools import cache
from itertools import combinations

import torch
from torch import nn

Links = list[tuple[int, ...]]


@dataclass(frozen=True)
class Plain:
    """A plain convolution of inputs to outputs."""

    outputs: int
    inputs: int
    kernel: tuple[int, ...]

    @property
    def places(self) -> int:
        return math.prod(self.kernel)

    @property
    def axes(self) -> int:
        return len(self.kernel)

    @property
    def longer(self) -> list[tuple[int, int]]:
        """Of each axis that the kernel is longer than 1 along: its length, and the axes walked.

        An axis that it is 1 long along goes with the one before.
        """
        longer = [axis for axis, length in enumerate(self.kernel) if length > 1]
        ends = [*longer[1:], self.axes]
        return [(self.kernel[axis], end) for axis, end in zip(longer, ends, strict=True)]

    @property
    def column(self) -> tuple[int, int]:
        """The first of these: what a separable convolution does first."""
        return self.longer[0]

    @property
    def row(self) -> int:
        return self.places // self.column[0]


def svd(of: Plain, r: int) -> Links:
    """Denton et al. 2014."""
    return [(of.inputs * of.places * r, of.axes), (r * of.outputs, of.axes)]


def tucker2(of: Plain, r_out: int, r_in: int) -> Links:
    """Kim et al. 2016, equations 4 to 7."""
    core = (r_in * r_out * of.places, of.axes)
    return [(of.inputs * r_in, 0), core, (r_out * of.outputs, of.axes)]


def interpolative(of: Plain, channels: int) -> Links:
    return [(channels * of.places * of.outputs, of.axes)]


def separable(of: Plain, r: int) -> Links:
    """Jaderberg et al. 2014."""
    length, walked = of.column
    return [(of.inputs * length * r, walked), (r * of.row * of.outputs, of.axes)]


def separable3(of: Plain, r: int, q: int) -> Links:
    """Zhang et al. 2016."""
    length, walked = of.column
    last = (q * of.outputs, of.axes)
    return [(of.inputs * length * r, walked), (r * of.row * q, of.axes), last]


def separable_basis(of: Plain, m: int) -> Links:
    """Jaderberg et al. 2014."""
    length, walked = of.column
    features = of.inputs * m
    return [(features * length, walked), (features * (of.row + of.outputs), of.axes)]


def fixed_basis(of: Plain, m: int) -> Links:
    return [(of.inputs * m * (of.places + of.outputs), of.axes)]


def flattened(of: Plain, _: int) -> Links:
    """Jin et al. 2015."""
    return [(of.inputs * of.outputs, 0), *((of.outputs * n, walked) for n, walked in of.longer)]


def monochromatic(of: Plain, colours: int) -> Links:
    """Denton et al. 2014, section 3.1."""
    return [(of.inputs * colours, 0), (of.outputs * of.places, of.axes)]


def cp(of: Plain, r: int) -> Links:
    return [(of.inputs * r, 0), (r * (of.places + of.outputs), of.axes)]


def cp_separable(of: Plain, r: int) -> Links:
    """Lebedev et al. 2015."""
    filters = [(r * n, walked) for n, walked in of.longer]
    return [(of.inputs * r, 0), *filters, (r * of.outputs, of.axes)]


def tucker_cp(of: Plain, r: int, width: int) -> Links:
    """Phan et al. 2020."""
    w_in, w_out = min(width, of.inputs), min(width, of.outputs)
    behind = r * (of.places + w_out) + w_out * of.outputs
    return [((of.inputs + r) * w_in, 0), (behind, of.axes)]


def tensor_train(of: Plain, *ranks: int) -> Links:
    cores = zip(ranks[:-1], ranks[1:], of.longer, strict=True)
    between = [(before * after * n, walked) for before, after, (n, walked) in cores]
    return [(of.inputs * ranks[0], 0), *between, (ranks[-1] * of.outputs, of.axes)]


def block_term(of: Plain, blocks: int, width: int) -> Links:
    w_in, w_out = min(width, of.inputs), min(width, of.outputs)
    core = (blocks * w_in * w_out * of.places, of.axes)
    return [(of.inputs * blocks * w_in, 0), core, (blocks * w_out * of.outputs, of.axes)]


def bicluster(of: Plain, r_out: int, r_in: int) -> Links:
    """Denton et al. 2014, section 3.2; of two groups on both sides."""
    core = (4 * r_in * r_out * of.places, of.axes)
    return [(of.inputs * 2 * r_in, 0), core, (2 * r_out * of.outputs, of.axes)]


def tensor_ring(of: Plain, r_out: int, r_in: int) -> Links:
    """Wang et al. 2018, section 3.2; of four slices, or fewer channels."""
    slices = min(4, of.outputs, of.inputs)
    core = (r_in * r_out * of.places, of.axes, slices)
    return [(of.inputs * slices * r_in, 0), core, (slices * r_out * of.outputs, of.axes)]


def tensorized_train(of: Plain, rank: int) -> Links:
    """Garipov et al. 2016, equation 9; of fewer than 2¹⁵ pairs of channels, hence two modes."""
    (i, j), (p, o) = nearest_factors(of.inputs), nearest_factors(of.outputs)[::-1]
    first = min(rank, of.places, p * i * o * j)
    second = min(rank, of.places * p * i, o * j)
    cores = [(first * i * p * second, of.axes, j), (second * j * o, of.axes, p)]
    return [(of.places * first, of.axes, of.inputs), *cores]


def nearest_factors(length: int) -> tuple[int, int]:
    """The two that make it, the smaller one first."""
    smaller = max(n for n in range(1, math.isqrt(length) + 1) if length % n == 0)
    return smaller, length // smaller


def block_diagonal(of: Plain, width: int, r: int) -> Links:
    return [(of.outputs * width * of.places, of.axes), *svd(of, r)]


def network_terms(method: str, layer: nn.Linear, rank: int) -> tuple[list[str], dict[str, int]]:
    """The indices of a linear layer's factors and their lengths; one block is one number wide."""

    def split(length: int, count: int) -> list[int]:
        if count == 1:
            return [length]
        ways = [
            sorted([n, *split(length // n, count - 1)])
            for n in range(1, length + 1)
            if length % n == 0
        ]
        return min(ways, key=lambda way: (sum(way), way))

    count = {"cp": 2, "kronecker": 2, "tensorized-tucker": 2}.get(method, 3)
    given, made = split(layer.in_features, count), split(layer.out_features, count)
    in_pairs = method in ("tensorized-train", "block-term", "kronecker")
    if in_pairs:
        made = made[::-1]
    lengths = dict(zip("abc", given, strict=False)) | dict(zip("ABC", made, strict=False))
    pairs = [g * m for g, m in zip(given, made, strict=True)]
    names = "ABC"[:count] + "abc"[:count]
    if method == "cp":
        return [name + "k" for name in names], lengths | {"k": rank}
    if method == "kronecker":
        return ["kAa", "kBb"], lengths | {"k": rank}
    if method == "block-term":
        ones = {"l": 1, "m": 1, "n": 1}
        return ["klmn", "kAal", "kBbm", "kCcn"], lengths | ones | {"k": rank}
    if method == "tensorized-tucker":
        ranks = {bond: min(rank, lengths[name]) for bond, name in zip("lmno", names, strict=True)}
        return ["lmno", "Al", "Bm", "an", "bo"], lengths | ranks
    if method == "tensorized-train":
        ranks = {"l": min(rank, pairs[0], pairs[1] * pairs[2])}
        ranks["m"] = min(rank, pairs[0] * pairs[1], pairs[2])
        return ["Aal", "lBbm", "mCc"], lengths | ranks
    slices, whole = min(4, *layer.weight.shape), [*made, *given]
    bounds = [min(math.prod(whole[:bond]), math.prod(whole[bond:])) for bond in range(1, 6)]
    ranks = [slices, *(min(rank, slices * bound, max(bounds)) for bound in bounds)]
    terms = ["lAm", "mBn", "nCo", "oap", "pbq", "qcl"]
    return terms, lengths | dict(zip("lmnopq", ranks, strict=True))


def cheapest(terms: list[str], lengths: dict[str, int], rows: int) -> set[int]:
    """MACs of the orders of products of a network with rows that cost least, all orders tried.

    A cost is the multiply-accumulates, none of products of single entries, and 64 for each number
    that is read or written.
    """
    sides = [index for index in lengths if index in "abcABC"]
    kept = frozenset("z" + "".join(index for index in sides if index.isupper()))
    inputs = frozenset("z" + "".join(index for index in sides if index.islower()))
    sizes = lengths | {"z": rows}

    def volume(indices: frozenset[str]) -> int:
        return math.prod(sizes[index] for index in indices)

    @cache
    def tried(tensors: tuple[frozenset[str], ...]) -> tuple[int, frozenset[int]]:
        if len(tensors) == 1:
            return 0, frozenset([0])
        best, found = math.inf, frozenset()
        for one, other in combinations(range(len(tensors)), 2):
            first, second = tensors[one], tensors[other]
            if not first & second:
                continue
            rest = [t for place, t in enumerate(tensors) if place not in (one, other)]
            made = (first | second) & kept.union(*rest)
            macs = volume(first | second) if made != first | second else 0
            cost = macs + 64 * (volume(first) + volume(second) + volume(made))
            after, behind = tried(tuple(sorted([made, *rest], key=sorted)))
            if cost + after < best:
                best, found = cost + after, frozenset()
            if cost + after == best:
                found |= {macs + more for more in behind}
        return best, found

    return set(tried((inputs, *map(frozenset, terms)))[1])


NETWORKS = {"tensorized-train", "tensor-ring", "block-term", "cp", "kronecker", "tensorized-tucker"}

BY_HAND = {
    "svd": svd,
    "full-rank": svd,
    "tucker2": tucker2,
    "interpolative": interpolative,
    "separable": separable,
    "separable3": separable3,
    "separable-basis": separable_basis,
    "fixed-basis": fixed_basis,
    "flattened": flattened,
    "monochromatic": monochromatic,
    "cp": cp,
    "cp-separable": cp_separable,
    "tucker-cp": tucker_cp,
    "tensor-train": tensor_train,
    "tensorized-train": tensorized_train,
    "block-term": block_term,
    "bicluster": bicluster,
    "tensor-ring": tensor_ring,
    "block-diagonal": block_diagonal,
}


def circulant(of: Plain, rows: int, _: int) -> tuple[int, int]:
    return _diagonals(of, rows, max(of.outputs, of.inputs))


def toeplitz(of: Plain, rows: int, _: int) -> tuple[int, int]:
    return _diagonals(of, rows, of.outputs + of.inputs - 1)


def _diagonals(of: Plain, rows: int, numbers: int) -> tuple[int, int]:
    """Each row there and back, and the numbers there."""
    length = numbers
    if length != _fast(length):
        length = _fast(of.outputs + of.inputs - 1)
    return numbers, (2 * _real(rows, length) + _real(1, length)) // 2


def toeplitz_like(of: Plain, rows: int, r: int) -> tuple[int, int]:
    """Sindhwani et al. 2015; skew-circulant products by transforms of half the length."""
    half = _fast(-(-max(of.outputs, of.inputs) // 2))
    skew = _complex(r, half) + _complex(rows, half) + _complex(rows * r, half)
    circulant = _real(r, 2 * half) + _real(rows * r, 2 * half) + _real(rows, 2 * half)
    return 2 * r * 2 * half, (skew + circulant) // 2


def monarch(of: Plain, rows: int, r: int) -> tuple[int, int]:
    """Dao et al. 2022; blocks padded where they do not divide a side."""
    blocks = max(1, round(math.sqrt(min(of.outputs, of.inputs))))
    lengths = math.ceil(of.inputs / blocks) + math.ceil(of.outputs / blocks)
    return r * blocks**2 * lengths, rows * r * blocks**2 * lengths


def _complex(count: int, length: int) -> int:
    """Floating-point operations of so many transforms."""
    return round(5 * count * length * math.log2(length))


def _real(count: int, length: int) -> int:
    return _complex(count, length) // 2


def _fast(length: int) -> int:
    """The next number without prime factors above 5."""
    powers = [2**a * 3**b * 5**c for a in range(13) for b in range(8) for c in range(6)]
    return min(number for number in powers if number >= length)


# Of linear layers alone, that are no chains: parameters, and MACs of so many rows.
OF_ROWS = {
    "circulant": circulant,
    "toeplitz": toeplitz,
    "hankel": toeplitz,
    "toeplitz-like": toeplitz_like,
    "monarch": monarch,
}


def network_cost(method: str, layer: nn.Linear, rank: int, rows: int) -> tuple[int, set[int]]:
    """Parameters of a linear layer's network, and the MACs that it may have."""
    terms, lengths = network_terms(method, layer, rank)
    parameters = sum(math.prod(lengths[index] for index in term) for term in terms)
    bias = 0 if layer.bias is None else len(layer.bias)
    return parameters + bias, cheapest(terms, lengths, rows)


def cost_by_hand(
    method: str, layer: nn.Module, rank: tuple[int, ...], given: torch.Size, made: torch.Size
) -> tuple[int, int]:
    """Parameters and MACs for inputs and outputs of these shapes; blocks of one channel.

    Those of a grouped convolution are those of a plain one for each group; those of a transposed
    one those of the convolution of its outputs to its inputs.
    """
    groups = getattr(layer, "groups", 1)
    rows, columns, *kernel = layer.weight.shape
    if getattr(layer, "transposed", False):
        given, made = made, given
    maps = given[2:], made[2:]
    samples = given[0]
    if isinstance(layer, nn.Linear):
        maps, samples = (torch.Size(), torch.Size()), given[:-1].numel()
    of = Plain(rows // groups, columns, tuple(kernel))
    if method in OF_ROWS:
        parameters, macs = OF_ROWS[method](of, samples, *rank)
        return parameters + (0 if layer.bias is None else len(layer.bias)), macs
    links = BY_HAND[method](of, *rank, *((1,) if method == "block-term" else ()))
    macs = 0
    for parameters, walked, *slices in links:
        before, behind = maps
        positions = math.prod((*behind[:walked], *before[walked:]))
        macs += parameters * samples * positions * math.prod(slices)
    bias = 0
    if layer.bias is not None:
        bias = len(layer.bias)
    return groups * sum(parameters for parameters, *_ in links) + bias, groups * macs
