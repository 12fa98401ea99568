"""Products by factors or by the whole weight, whichever is faster."""

import torch
from torch import nn

import rankfold
from rankfold import choose_products
from rankfold.layers import TensorTrainLinear


def network() -> nn.Sequential:
    return nn.Sequential(TensorTrainLinear(24, 36, 3), nn.ReLU(), TensorTrainLinear(36, 24, 3))


def test_both_ways_are_timed_and_the_faster_one_is_taken() -> None:
    model, batch = network(), torch.randn(5, 24)
    expected = model(batch)
    found = choose_products(model, batch, seconds=0.01)
    assert [one.name for one in found] == ["0", "2"]
    for one in found:
        layer = model[int(one.name)]
        assert one.by_factors > 0 and one.by_weight > 0
        assert layer.uses_weight == (one.by_weight < one.by_factors)
        assert f"{one.by_factors:.3g} ms by factors, {one.by_weight:.3g} ms by weight" in repr(
            layer
        )
    assert model.training
    torch.testing.assert_close(model.eval()(batch), expected)


def test_the_table_states_both_times() -> None:
    model, batch = network(), torch.randn(5, 24)
    dense = nn.Sequential(*(getattr(one, "to_dense", lambda one=one: one)() for one in model))
    choose_products(model, batch, seconds=0.01)
    table = str(rankfold.measure(dense, model, [batch]))
    assert table.count("ms by weight") == 2


def test_networks_without_such_layers_and_layers_out_of_reach_are_left() -> None:
    assert choose_products(nn.Linear(4, 4), torch.randn(2, 4)) == ()

    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = TensorTrainLinear(4, 4, 2), TensorTrainLinear(4, 4, 2)

        def forward(self, tensor: torch.Tensor) -> torch.Tensor:
            return self.used(tensor)

    model = Half()
    (found,) = choose_products(model, torch.randn(2, 4), seconds=0.01)
    assert found.name == "used" and model.unused.product_times is None


def test_the_choice_is_saved_and_loaded(tmp_path) -> None:
    dense = nn.Sequential(nn.Linear(24, 36), nn.ReLU(), nn.Linear(36, 24))
    data = [torch.randn(16, 24) for _ in range(2)]
    analysis = rankfold.analyze(dense, data, methods=["tensorized-train"], metric="weight")
    small = rankfold.factorize(dense, analysis.plan(params=0.6)).eval()
    chosen = [one for one in small.modules() if isinstance(one, TensorTrainLinear)]
    for layer in chosen:
        layer.use_weight(True)
    rankfold.save(small, tmp_path / "small")
    loaded = rankfold.load(tmp_path / "small", dense)
    assert [one.uses_weight for one in loaded.modules() if isinstance(one, TensorTrainLinear)] == [
        True for _ in chosen
    ]
    with torch.no_grad():
        assert torch.equal(loaded(data[0]), small(data[0]))


def test_compress_chooses() -> None:
    dense = nn.Sequential(nn.Linear(24, 36), nn.ReLU(), nn.Linear(36, 24))
    data = [torch.randn(16, 24) for _ in range(2)]
    small = rankfold.compress(
        dense, data, params=0.6, methods=["tensorized-train"], loss_metric="weight", epochs=0
    )
    chosen = [one for one in small.modules() if isinstance(one, TensorTrainLinear)]
    assert chosen and all(one.product_times is not None for one in chosen)
