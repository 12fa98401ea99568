"""Which forms are chains, and that what is said of them is so."""

import pytest
import torch
from networks import make_model
from tensors import tensor_of
from torch import nn

import rankfold
from rankfold.layers import TiedLayers, UnfusedAttention, squared_norm_of_chain
from rankfold.methods import METHODS, WEIGHT_METRIC, reduction
from rankfold.nn import SeparableConv2d, TensorTrainLinear
from rankfold.training.chains import chains_of, dense_layers, factorized_layers

LAYERS = [
    nn.Linear(24, 72),
    nn.Embedding(40, 16),
    nn.Conv1d(16, 20, 3),
    nn.Conv2d(16, 20, (3, 2)),
    nn.Conv2d(16, 32, 3, groups=2),
    nn.ConvTranspose2d(20, 16, 3),
    nn.ConvTranspose1d(16, 32, 3, groups=2),
]
CHAINS = {
    *("svd", "tucker2", "separable", "separable3", "tensor-train", "cp", "cp-separable"),
    *("tucker-cp", "separable-basis", "fixed-basis", "block-term", "flattened", "split-svd"),
}
CASES = [
    pytest.param(name, layer, id=f"{name}-{type(layer).__name__}-{getattr(layer, 'groups', 1)}")
    for name, method in METHODS.items()
    for layer in LAYERS
    if reduction.why_not(method(), layer) is None
]


def random_form(name: str, layer: nn.Module) -> nn.Module:
    family_rank = next(iter(reduction.fit(METHODS[name](), layer, WEIGHT_METRIC).ranks()))
    form = reduction.skeleton(METHODS[name](), layer, family_rank).to_empty(device="cpu")
    with torch.no_grad():
        for seed, tensor in enumerate(form.parameters()):
            tensor.copy_(tensor_of(tensor.shape, seed=seed))
    return form


@pytest.mark.parametrize(("name", "layer"), CASES)
def test_the_norm_of_a_chain_is_that_of_the_dense_layer(name, layer) -> None:
    form = random_form(name, layer)
    chains = chains_of(form)
    if chains:
        found = sum(squared_norm_of_chain(chain.links) for chain in chains)
        expected = form.to_dense().weight.square().sum()
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=0)


def test_these_methods_make_chains_and_the_others_do_not() -> None:
    found = {case.values[0] for case in CASES if chains_of(random_form(*case.values))}
    assert found >= CHAINS
    # What else is one is so to the letter: convolutions one after the other.
    for name in found - CHAINS:
        forms = (random_form(*case.values) for case in CASES if case.values[0] == name)
        assert all(isinstance(form, nn.Sequential) for form in forms if chains_of(form))


def test_each_layer_of_a_network_is_one_or_the_other() -> None:
    model = make_model()
    data = [torch.randn(2, 3, 8, 8)]
    small = rankfold.factorize(
        model, rankfold.analyze(model, data, metric="weight").plan(fraction=0.3)
    )
    factorized = {name for name, _ in factorized_layers(small)}
    assert factorized == {entry.name for entry in rankfold.record_of(small).plan.factorized}
    dense = {name for name, _, _ in dense_layers(small)}
    assert factorized | dense == {"stem", "body", "depthwise", "head", "out"}
    assert factorized.isdisjoint(dense)
    assert {name for name, _ in factorized_layers(small, "b*")} <= {"body"}
    assert [name for name, _, groups in dense_layers(small, "depth*") if groups == 48]


def test_with_a_batch_norm_between_it_is_neither() -> None:
    network = nn.Sequential(SeparableConv2d(8, 8, 3, 4, batch_norm=True), nn.Conv2d(8, 8, 3))
    assert [name for name, _ in factorized_layers(network)] == []
    assert [name for name, _, _ in dense_layers(network)] == ["1"]


def test_layers_of_small_tensors_are_found_and_their_factors_are_not_dense_layers() -> None:
    network = nn.Sequential(TensorTrainLinear(16, 16, 2), nn.Linear(16, 4))
    assert [name for name, _ in factorized_layers(network)] == ["0"]
    assert [name for name, _, _ in dense_layers(network)] == ["1"]


def test_projections_of_an_attention_are_dense_until_they_are_factorized() -> None:
    attention = UnfusedAttention(nn.MultiheadAttention(16, 2))
    assert len(list(dense_layers(attention))) == 4
    form = reduction.fit(METHODS["svd"](), attention.q_proj, WEIGHT_METRIC).build((4,))
    attention.q_proj = form
    assert [name for name, _ in factorized_layers(attention)] == ["q_proj"]
    assert len(list(dense_layers(attention))) == 3


def test_tied_layers_count_once() -> None:
    embedding, readout = nn.Embedding(40, 16), nn.Linear(16, 40)
    readout.weight = embedding.weight
    form = METHODS["svd"]().fit(TiedLayers([embedding, readout]), WEIGHT_METRIC).build((8,))
    network = nn.ModuleDict({"embedding": form[0], "readout": form[1]})
    assert [name for name, _ in factorized_layers(network)] == ["embedding"]
    dense = nn.ModuleDict({"embedding": embedding, "readout": readout})
    assert [name for name, _, _ in dense_layers(dense)] == ["readout"]
