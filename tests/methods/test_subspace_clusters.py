import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tensors import seeds, tensor_of

from rankfold.methods.subspace_clusters import balanced_clusters


def in_subspaces(clusters: int, size: int, dimension: int, seed: int) -> torch.Tensor:
    """Vectors of one cluster after the other."""
    length = clusters * dimension + 3
    parts = [
        tensor_of((size, dimension), seed=seed + k) @ tensor_of((dimension, length), seed=50 + k)
        for k in range(clusters)
    ]
    return torch.cat(parts)


@given(st.integers(1, 4), st.integers(1, 5), seeds)
def test_an_order_of_all_ascending_within_each_cluster_and_the_same_again(
    clusters, size, seed
) -> None:
    vectors = tensor_of((clusters * size, 6), seed=seed)
    gram = (vectors @ vectors.mT)[None]
    order = balanced_clusters(gram, clusters)
    assert order.sort().values.tolist() == list(range(clusters * size))
    assert all(one.tolist() == sorted(one.tolist()) for one in order.reshape(clusters, size))
    assert torch.equal(order, balanced_clusters(gram, clusters))


@pytest.mark.parametrize("clusters", [2, 3])
@pytest.mark.parametrize("views", [1, 2])
def test_vectors_of_two_lines_or_planes_are_told_apart(clusters, views) -> None:
    size, dimension = 12, 3
    shuffled = torch.randperm(clusters * size, generator=torch.Generator().manual_seed(1))
    vectors = [in_subspaces(clusters, size, dimension, 100 * v)[shuffled] for v in range(views)]
    order = balanced_clusters(torch.stack([one @ one.mT for one in vectors]), clusters)
    found = {frozenset(one) for one in (shuffled[order] // size).reshape(clusters, size).tolist()}
    assert found == {frozenset([k]) for k in range(clusters)}


def test_vectors_of_nothing_are_clustered_too() -> None:
    assert balanced_clusters(torch.zeros(1, 6, 6, dtype=torch.float64), 2).tolist() == [*range(6)]
