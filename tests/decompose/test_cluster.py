import os
import sys

import dask.array as da
import numpy as np
import pytest
import torch
from dask.distributed import Client, LocalCluster
from tensors import tensor_of

from rankfold.decompose import cluster_svd, svd
from rankfold.errors import RankError, TensorError


@pytest.fixture(scope="module")
def cluster():
    """Two processes on this machine."""
    with (
        LocalCluster(
            n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None
        ) as local,
        Client(local) as client,
    ):
        yield client


@pytest.mark.parametrize("shape", [(200, 6), (6, 200)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_it_is_the_svd_on_a_cluster_of_processes(cluster, shape, dtype) -> None:
    matrix = tensor_of(shape, dtype)
    blocks = da.from_array(matrix.numpy(), chunks=tuple(min(40, n) for n in shape))
    found = cluster_svd(blocks, 4)
    expected = svd(matrix, 4)
    assert found.ranks == (4,) and found.n_parameters == expected.n_parameters
    torch.testing.assert_close(found.singular_values, expected.singular_values)
    product = (found.u * found.singular_values.numpy()) @ found.vh
    np.testing.assert_allclose(product.compute(), expected.to_tensor(), atol=1e-4)
    assert len(set(cluster.run(os.getpid).values()) - {os.getpid()}) == 2


def test_energy_and_tolerance_without_a_cluster() -> None:
    matrix = tensor_of((90, 5))
    blocks = da.from_array(matrix.numpy(), chunks=(30, 2))  # rechunked along the short side
    for arguments in ({"tolerance": 0.5}, {"energy": 0.8}, {}):
        found = cluster_svd(blocks, **arguments)
        assert found.ranks == svd(matrix, **arguments).ranks


def test_what_makes_no_sense_is_refused() -> None:
    blocks = da.ones((20, 3), chunks=(5, 3))
    with pytest.raises(RankError, match=r"outside 1\.\.3"):
        cluster_svd(blocks, 4)
    with pytest.raises(RankError, match="non-empty matrix"):
        cluster_svd(da.ones((2, 3, 4)))
    with pytest.raises(ValueError, match="at most one"):
        cluster_svd(blocks, 2, energy=0.5)
    with pytest.raises(TensorError, match="NaN"):
        cluster_svd(da.full((20, 3), np.nan, chunks=(5, 3)))


def test_without_dask_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "dask", None)
    with pytest.raises(ImportError, match=r"pip install 'rankfold\[dask\]'"):
        cluster_svd(np.ones((5, 3)))
