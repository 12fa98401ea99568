import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tensors import seeds, tensor_of, weight_of

from rankfold.decompose import svd, tall_skinny_svd
from rankfold.errors import RankError, TensorError

TOLERANCE = {torch.float32: 5e-6, torch.float64: 1e-12}
dtypes = st.sampled_from(list(TOLERANCE))


@given(st.integers(1, 60), st.integers(1, 12), dtypes, seeds, st.integers(1, 70))
def test_it_is_the_svd_whatever_the_blocks(long, short, dtype, seed, block_rows) -> None:
    for shape in ((long, short), (short, long)):
        matrix = tensor_of(shape, dtype, seed)
        found = tall_skinny_svd(matrix, block_rows=block_rows)
        full = min(shape)
        assert found.ranks == (full,) and found.u.dtype == dtype
        assert found.relative_error(matrix) < 2 * TOLERANCE[dtype]
        exact = torch.linalg.svdvals(matrix.double())
        torch.testing.assert_close(found.singular_values.double(), exact, rtol=1e-4, atol=1e-5)
        identity = torch.eye(full, dtype=dtype)
        good = exact > 1e-3 * exact[0]
        for gram in (found.u.mT @ found.u, found.vh @ found.vh.mT):
            torch.testing.assert_close(
                gram[good][:, good], identity[good][:, good], rtol=0, atol=1e-3
            )


def sources(matrix: torch.Tensor, tmp_path) -> dict[str, object]:
    """The same matrix in every way in which it can be given."""
    array = matrix.numpy()
    saved = tmp_path / "matrix.npy"
    np.save(saved, array)
    raw = tmp_path / "matrix.bin"
    array.tofile(raw)
    mapped = np.memmap(raw, array.dtype, "r", shape=array.shape)
    return {
        "tensor": matrix,
        "columns first": matrix.mT.contiguous().mT,
        "array": array,
        "npy": np.load(saved, mmap_mode="r"),
        "memmap": mapped,
        "part of a memmap": np.memmap(raw, array.dtype, "r", shape=array.shape)[3:],
        "list": list(matrix.split(7)),
        "iterator": iter(matrix.split(7)),
        "arrays": [array[:30], array[30:]],
    }


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_every_source_gives_the_same(dtype, tmp_path) -> None:
    matrix = tensor_of((50, 6), dtype)
    for name, source in sources(matrix, tmp_path).items():
        expected = matrix[3:] if name == "part of a memmap" else matrix
        assert tall_skinny_svd(source, block_rows=9).relative_error(expected) < 1e-5, name
    for name, source in sources(matrix, tmp_path).items():
        expected = matrix[3:] if name == "part of a memmap" else matrix
        found = tall_skinny_svd(source, 4, block_rows=9, u_file=tmp_path / "u.bin")
        best = svd(expected, 4)
        torch.testing.assert_close(found.to_tensor(), best.to_tensor(), rtol=1e-3, atol=1e-4)
        written = np.fromfile(tmp_path / "u.bin", found.u.numpy().dtype).reshape(-1, 4)
        np.testing.assert_array_equal(written, found.u)
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".bin", ".bin", ".npy"]


def test_a_wide_file_is_read_by_columns(tmp_path) -> None:
    matrix = tensor_of((5, 40), torch.float32)
    matrix.numpy().tofile(tmp_path / "wide.bin")
    mapped = np.memmap(tmp_path / "wide.bin", np.float32, "r", shape=(5, 40))
    found = tall_skinny_svd(mapped, block_rows=7, u_file=tmp_path / "v.bin")
    assert found.u.shape == (5, 5) and found.vh.shape == (5, 40)
    assert found.relative_error(matrix) < 1e-5


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_vectors_of_an_ill_conditioned_matrix_are_orthonormal(dtype) -> None:
    spread = -4 if dtype == torch.float32 else -11
    left = torch.linalg.qr(tensor_of((300, 8))).Q
    right = torch.linalg.qr(tensor_of((8, 8), seed=1)).Q
    matrix = ((left * torch.logspace(0, spread, 8)) @ right).to(dtype)
    found = tall_skinny_svd(matrix, block_rows=50)
    gram = found.u.double().mT @ found.u.double()
    atol = 1e-5 if dtype == torch.float32 else 1e-12
    torch.testing.assert_close(gram, torch.eye(8, dtype=torch.float64), rtol=0, atol=atol)


@given(seeds, st.floats(0.05, 0.9))
def test_truncation_is_that_of_svd(seed, share) -> None:
    matrix = tensor_of((40, 6), seed=seed)
    for arguments in ({"rank": 3}, {"tolerance": share}, {"energy": share}):
        found, expected = tall_skinny_svd(matrix, **arguments), svd(matrix, **arguments)
        assert found.ranks == expected.ranks
        torch.testing.assert_close(found.to_tensor(), expected.to_tensor())


@given(seeds)
def test_weights_of_the_short_side(seed) -> None:
    matrix = tensor_of((40, 6), seed=seed)
    weights = {1: weight_of(6, seed)}
    found = tall_skinny_svd(matrix, 3, weights=weights, block_rows=11)
    expected = svd(matrix, 3, weights=weights)
    torch.testing.assert_close(found.to_tensor(), expected.to_tensor(), rtol=1e-5, atol=1e-5)
    wide = tall_skinny_svd(matrix.mT, 3, weights={0: weights[1]})
    torch.testing.assert_close(wide.to_tensor(), expected.to_tensor().mT, rtol=1e-5, atol=1e-5)


def test_without_the_long_vectors_one_pass_is_enough() -> None:
    matrix = tensor_of((50, 6))
    found = tall_skinny_svd(iter(matrix.split(7)), 3, long_vectors=False)
    expected = svd(matrix, 3)
    torch.testing.assert_close(found.singular_values, expected.singular_values)
    torch.testing.assert_close(found.vh.abs(), expected.vh.abs())
    assert found.u.shape == (0, 3)
    assert tall_skinny_svd(matrix.mT, long_vectors=False).vh.shape == (6, 0)


def test_rank_deficient_and_single_rows() -> None:
    low = tensor_of((60, 2)) @ tensor_of((2, 8), seed=1)
    for dtype in TOLERANCE:
        matrix = low.to(dtype)
        assert tall_skinny_svd(matrix, block_rows=13).relative_error(matrix) < 1e-5
    row = tensor_of((1, 5))
    assert tall_skinny_svd([row]).ranks == (1,)
    assert tall_skinny_svd([row]).relative_error(row) < 1e-12


def test_what_does_not_fit_is_refused() -> None:
    matrix = tensor_of((30, 4))
    with pytest.raises(ValueError, match="block 1 has 5 columns"):
        tall_skinny_svd([matrix, tensor_of((3, 5))])
    with pytest.raises(ValueError, match="float32"):
        tall_skinny_svd([matrix, matrix.float()])
    with pytest.raises(TensorError, match="NaN"):
        tall_skinny_svd([matrix, matrix * torch.nan])
    with pytest.raises(ValueError, match="long side"):
        tall_skinny_svd(matrix, weights={0: torch.eye(30)})
    with pytest.raises(ValueError, match="at most one"):
        tall_skinny_svd(matrix, 2, tolerance=0.1)
    assert tall_skinny_svd([matrix[:0], matrix]).relative_error(matrix) < 1e-12
    for source in ([], iter([]), [matrix[:0]]):
        with pytest.raises(RankError, match="no rows"):
            tall_skinny_svd(source)
    with pytest.raises(RankError, match="no rows of a matrix"):
        tall_skinny_svd([torch.randn(3)])
    with pytest.raises(RankError, match="3x4x5"):
        tall_skinny_svd(torch.randn(3, 4, 5))
    for rank in (0, 5):
        with pytest.raises(RankError, match=r"outside 1\.\.4"):
            tall_skinny_svd(matrix, rank)


def test_of_denormal_numbers_the_vectors_are_finite() -> None:
    drawn = torch.randn(40, 12, generator=torch.Generator().manual_seed(5)).double()
    matrix = (drawn * 1e-40).float()
    found = tall_skinny_svd(matrix)
    assert found.u.isfinite().all() and found.vh.isfinite().all()
    difference = found.to_tensor().double() - matrix.double()
    assert difference.norm() < 1e-3 * matrix.double().norm()  # of the products' own rounding
