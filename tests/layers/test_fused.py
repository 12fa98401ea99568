import pytest
import torch
from torch import nn

from rankfold.errors import RankError
from rankfold.layers import FusedTwoFactorLinear


@pytest.mark.parametrize("bias", [True, False])
def test_it_is_the_parts_side_by_side(bias: bool) -> None:
    layer = nn.Linear(6, 12, bias, dtype=torch.float64).eval()
    form = FusedTwoFactorLinear(layer, (2, 4, 1))
    dense, tensor = form.eval().to_dense(), torch.randn(2, 3, 6, dtype=torch.float64)
    assert repr(dense) == repr(layer) and not dense.training
    torch.testing.assert_close(form(tensor), dense(tensor))
    form(tensor).sum().backward()
    assert all(parameter.grad is not None for parameter in form.parameters())
    for ranks in ((2, 5, 1), (0, 1, 1)):
        with pytest.raises(RankError):
            FusedTwoFactorLinear(layer, ranks)
