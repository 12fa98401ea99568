import pytest
import torch
from networks import make_model
from torch import nn

from rankfold.replacement import put_in_place, swapped


class Shared(nn.Module):
    """One layer in three places, one of them in a block that itself is in two."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.block = nn.Sequential(nn.ReLU(), self.first)
        self.again = self.block
        self.table = nn.ModuleDict({"same": self.first, "other": nn.Linear(4, 4)})
        self.listed = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])


def places(model: nn.Module) -> dict[str, nn.Module]:
    return dict(model.named_modules(remove_duplicate=False))


def test_every_place_of_a_shared_layer_is_taken() -> None:
    model, new = Shared(), nn.Sequential(nn.Linear(4, 2), nn.Linear(2, 4))
    old, before = model.first, places(model)
    assert put_in_place(model, {old: new}) is model
    assert model.first is model.block[1] is model.again[1] is model.table["same"] is new
    after = places(model)
    assert old not in after.values()
    assert all(after[path] is before[path] for path in before if before[path] is not old)


def test_several_layers_at_once_and_in_every_kind_of_container() -> None:
    model = Shared()
    old = [model.first, model.table["other"], model.listed[1]]
    new = [nn.Identity() for _ in old]
    put_in_place(model, dict(zip(old, new, strict=True)))
    assert [model.first, model.table["other"], model.listed[1]] == new
    assert list(model.table) == ["same", "other"] and len(model.listed) == 2
    assert list(model._modules) == ["first", "block", "again", "table", "listed"]


def test_layers_that_are_not_in_the_model_are_not_missed() -> None:
    model = Shared()
    before = places(model)
    assert put_in_place(model, {nn.Linear(4, 4): nn.ReLU()}) is model
    assert put_in_place(model, {}) is model
    assert places(model) == before


def test_layers_may_change_places() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    first, _, last = model
    put_in_place(model, {first: last, last: first})
    assert model[0] is last and model[2] is first


def test_the_model_itself_may_be_replaced() -> None:
    model, new = nn.Linear(4, 4), nn.ReLU()
    assert put_in_place(model, {model: new}) is new
    with swapped(model, {model: new}) as network:
        assert network is new
    assert put_in_place(model, {}) is model


def test_swapped_layers_come_back() -> None:
    model, new = Shared(), nn.Identity()
    before = places(model)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    with swapped(model, {model.first: new, model.listed[0]: new}) as network:
        assert network is model
        assert model.first is model.again[1] is model.table["same"] is model.listed[0] is new
    assert places(model) == before
    assert list(places(model)) == list(before)
    assert list(state) == list(model.state_dict())
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_swapped_layers_come_back_after_an_error() -> None:
    model = make_model()
    before = places(model)
    with (
        pytest.raises(RuntimeError, match="in between"),
        swapped(model, {model.body: nn.Identity(), model.out: nn.Identity()}),
    ):
        assert isinstance(model.body, nn.Identity)
        raise RuntimeError("in between")
    assert places(model) == before


def test_swaps_may_be_nested() -> None:
    model = make_model()
    body, head = model.body, model.head
    with swapped(model, {body: nn.Identity()}):
        with swapped(model, {head: nn.Identity()}):
            assert isinstance(model.body, nn.Identity) and isinstance(model.head, nn.Identity)
        assert isinstance(model.body, nn.Identity) and model.head is head
    assert model.body is body and model.head is head


def test_within_a_swap_the_network_computes_with_the_others() -> None:
    model, batch = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3)), torch.ones(2, 4)
    other = nn.Linear(4, 4)
    with torch.no_grad():
        outputs = model(batch)
        with swapped(model, {model[0]: other}) as network:
            assert torch.equal(network(batch), model[1](other(batch)))
        assert torch.equal(model(batch), outputs)


def test_a_replacement_answers_for_the_layer() -> None:
    """Models that pad by a layer's dilation, or ask for its width, still can."""
    model = nn.Sequential(nn.Conv1d(2, 4, 3, dilation=2), nn.Linear(4, 6), nn.Embedding(5, 3))
    new = [nn.Sequential(nn.Conv1d(2, 4, 1)), nn.Sequential(), nn.Sequential()]
    put_in_place(model, dict(zip(list(model), new, strict=True)))
    assert model[0].dilation == (2,) and model[0].kernel_size == (3,)
    assert (model[1].in_features, model[1].out_features) == (4, 6)
    assert (model[2].num_embeddings, model[2].embedding_dim) == (5, 3)
    assert not any(one.state_dict() for one in model[1:])


def test_what_replaces_a_replacement_answers_too() -> None:
    """As a chain does that has lost a factor by merging."""
    model = nn.Sequential(nn.Conv1d(2, 4, 3, dilation=2))
    for _ in range(2):
        put_in_place(model, {model[0]: nn.Sequential(nn.Conv1d(2, 4, 1))})
    assert model[0].dilation == (2,)
