"""Clusters of one size, each near a subspace of its own.

K-subspaces with balanced clusters: subspaces are the leading singular vectors of their members, and
members are assigned anew by a linear assignment, the best there is. Of vectors only the inner
products are needed, so that these may be those of any metric.
"""

import scipy
import torch

_ROUNDS = 20
_RANDOM_STARTS = 8
_SMALL = 0.1  # share of the mean eigenvalue, at which a direction counts half
_DIMENSIONS = 1 / 4  # of a subspace, as a share of the vectors in its cluster


def balanced_clusters(grams: torch.Tensor, clusters: int) -> torch.Tensor:
    """An order of n vectors in which the first n / clusters are the first cluster, and so on.

    `grams` (views, n, n), float64, are the inner products of n vectors in one view or more, in each
    of which a cluster has a subspace; `clusters` divides n. Deterministic; finds a local optimum,
    the best from a few starts. The order is (n,), int64; within a cluster it is ascending.
    """
    count = grams.shape[1]
    size = count // clusters
    generator = torch.Generator().manual_seed(0)
    shuffled = [torch.randperm(count, generator=generator) for _ in range(_RANDOM_STARTS)]
    starts = [torch.arange(count), _by_affinity(grams.sum(0), clusters).cpu(), *shuffled]
    found = [_alternate(grams, start.to(grams.device).reshape(clusters, size)) for start in starts]
    members = min(found, key=lambda one: one[1])[0]
    return members.sort(1).values.flatten()


def _by_affinity(gram: torch.Tensor, clusters: int) -> torch.Tensor:
    """The order of balanced clusters of vectors that are in one subspace: spectral clustering.

    The projection onto the space of all vectors is block diagonal where subspaces are independent
    (Costeira and Kanade 1998); here small eigenvalues count less instead of not at all.
    """
    squares, vectors = torch.linalg.eigh(gram)
    squares = squares.clamp_min(0)
    shares = squares / (squares + (_SMALL * squares.mean()).clamp_min(torch.finfo(gram.dtype).tiny))
    affinity = ((vectors * shares) @ vectors.mT).square()
    scales = affinity.sum(0).clamp_min(torch.finfo(gram.dtype).tiny).rsqrt()
    ordered = torch.linalg.eigh(scales[:, None] * affinity * scales).eigenvectors
    rows = torch.nn.functional.normalize(ordered[:, -clusters:], dim=1)
    centres, rest = [], rows
    for _ in range(clusters):  # each row the farthest from the span of those before
        centres.append(rows[int(rest.square().sum(1).argmax())])
        away = torch.nn.functional.normalize(rest[rest.square().sum(1).argmax()], dim=0)
        rest = rest - (rest @ away)[:, None] * away
    likeness = (rows @ torch.stack(centres).mT).square().mT
    return _assigned(-likeness, len(gram) // clusters).flatten()


def _assigned(distances: torch.Tensor, size: int) -> torch.Tensor:
    """The members (clusters, size) of the least sum of distances (clusters, n)."""
    places = distances.repeat_interleave(size, 0)  # each cluster once for each of its members
    members = scipy.optimize.linear_sum_assignment(places.cpu().numpy())[1]
    return torch.from_numpy(members).to(distances.device).reshape(-1, size)


def _alternate(grams: torch.Tensor, members: torch.Tensor) -> tuple[torch.Tensor, float]:
    """Members (clusters, size) that no assignment improves, and their distance squared."""
    distances = _distances(grams, members)
    least = distances.gather(1, members).sum().item()
    for _ in range(_ROUNDS):
        candidate = _assigned(distances, members.shape[1])
        distances = _distances(grams, candidate)
        reached = distances.gather(1, candidate).sum().item()
        if not reached < least * (1 - 1e-6):
            break
        members, least = candidate, reached
    return members, least


def _distances(grams: torch.Tensor, members: torch.Tensor) -> torch.Tensor:
    """Squared, of every vector from the subspace of every cluster: (clusters, n)."""
    dimension = max(1, int(_DIMENSIONS * members.shape[1]))
    own = grams[:, members[:, :, None], members[:, None, :]]  # (views, clusters, size, size)
    squares, vectors = torch.linalg.eigh(own)
    squares, vectors = squares[..., -dimension:], vectors[..., -dimension:]
    inverse = torch.where(squares > 0, squares.rsqrt(), 0)
    towards = grams[:, members]  # (views, clusters, size, n)
    explained = ((vectors * inverse[..., None, :]).mT @ towards).square().sum((0, 2))
    return (grams.diagonal(dim1=1, dim2=2).sum(0) - explained).clamp_min(0)
