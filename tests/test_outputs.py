import pytest
import torch
from torch import nn

from rankfold.batches import run
from rankfold.errors import ModelError
from rankfold.outputs import check_same, outputs_of, references


def test_outputs_are_in_eval_mode_and_repeat() -> None:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5))

        def forward(self, tensor):
            return self.layers(tensor) + torch.randn(4)

    model, batch = Noisy().train(), torch.randn(5, 3)
    state = torch.get_rng_state()
    first, second = (outputs_of(model, batch, run) for _ in range(2))
    assert torch.equal(first, second) and torch.equal(torch.get_rng_state(), state)
    assert model.training and not first.requires_grad
    torch.manual_seed(0)
    torch.testing.assert_close(first, model.layers[0](batch) + torch.randn(4))


def test_each_tensor_is_compared_with_itself_unless_it_is_nothing_beside_the_others() -> None:
    assert references([4.0]) == [4.0]
    assert references([4.0, 1e9, 1e-3]) == [4.0, 1e9, 1e-3]
    assert references([4.0, 0.0, 1e-15]) == [4.0, 4.0 + 1e-15, 4.0 + 1e-15]
    assert references([0.0, 0.0]) == [0.0, 0.0]
    assert references([]) == []


PLACES = torch.backends.cudnn.conv, torch.backends.cudnn.rnn, torch.backends.cuda.matmul


def state() -> list[str]:
    return [place.fp32_precision for place in PLACES]


@pytest.fixture(params=[None, ("ieee", "tf32", "tf32")])
def _settings(request):
    """As they are, and of several kinds: then torch does not tell them in its older way."""
    before = state()
    for place, value in zip(PLACES, request.param or before, strict=True):
        place.fp32_precision = value
    yield
    for place, value in zip(PLACES, before, strict=True):
        place.fp32_precision = value


@pytest.mark.usefixtures("_settings")
def test_tf32_is_as_it_was_afterwards_and_off_within() -> None:
    seen = []

    def forward(model, batch):
        seen.append(state())
        raise ValueError("no")

    before = state()
    with pytest.raises(ModelError, match="no"):
        outputs_of(nn.Linear(2, 2), torch.randn(1, 2), forward)
    assert seen == [["ieee"] * 3] and state() == before


def test_rounding_is_allowed_and_no_more() -> None:
    one = {"a": torch.randn(20), "b": (torch.tensor([float("nan"), float("inf"), -2.0]),)}
    near = {"a": one["a"] * (1 + 1e-5), "b": one["b"]}
    check_same(one, near, 1 / 2, "others")
    for far in (
        {"a": one["a"] * (1 + 1e-2), "b": one["b"]},
        {"a": one["a"][:, None], "b": one["b"]},
        {"a": one["a"], "b": (torch.tensor([float("nan"), 5.0, -2.0]),)},
        {"a": one["a"].clone().index_fill_(0, torch.tensor(3), float("nan")), "b": one["b"]},
    ):
        with pytest.raises(ModelError, match="others"):
            check_same(one, far, 1 / 2, "others")
    check_same(torch.zeros(3), torch.zeros(3), 1 / 2, "others")
    with pytest.raises(ModelError):
        check_same(torch.zeros(3), torch.full((3,), 1e-6), 1 / 2, "others")
