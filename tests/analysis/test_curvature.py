import pytest
import torch
from geometry import relative
from hypothesis import given
from hypothesis import strategies as st
from tensors import seeds, tensor_of
from torch import nn

from rankfold.analysis.curvature import (
    Identity,
    Labels,
    Softmax,
    classes_last,
    first_tensor,
    kind_of,
)


def peaked(*shape: int, classes_at: int = -1) -> torch.Tensor:
    """Logits that are certain of a class."""
    return 20 * tensor_of(shape, torch.float32).movedim(-1, classes_at)


def gradient_of(curvature, outputs, *, leaf: torch.Tensor, batch=None, seed: int = 0):
    """What one draw sends back to a leaf."""
    leaf.grad = None
    batch = leaf.detach() if batch is None else batch
    curvature.backward(outputs, batch, torch.Generator().manual_seed(seed))
    return leaf.grad


def test_logits_are_far_from_uniform_and_values_are_not() -> None:
    assert kind_of(peaked(8, 10)) == "logits"
    assert kind_of(peaked(8, 5, 10)) == "logits"
    assert kind_of(peaked(2, 4, 5, 10, classes_at=1)) == "logits"
    assert kind_of(0.1 * torch.randn(8, 10)) == "values"
    assert kind_of(torch.zeros(8, 10)) == "values"


def test_one_output_per_sample_is_a_value() -> None:
    assert kind_of(peaked(8)) == "values"
    assert kind_of(peaked(8, 1)) == "values"
    assert kind_of(torch.tensor(3.0)) == "values"


def test_the_first_tensor_of_the_outputs_decides() -> None:
    logits, values = peaked(4, 10), torch.zeros(4, 10)
    assert kind_of({"logits": logits, "hidden": values}) == "logits"
    assert kind_of((values, logits)) == "values"
    assert kind_of([torch.arange(4), logits]) == "logits"  # integers are no outputs to compare
    assert first_tensor({"ids": torch.arange(4), "logits": logits}) is logits


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_outputs_of_every_precision_have_a_kind(dtype) -> None:
    assert kind_of(peaked(8, 10).to(dtype)) == "logits"
    assert kind_of((0.1 * torch.randn(8, 10)).to(dtype)) == "values"


def test_logits_may_rule_classes_out() -> None:
    logits = peaked(8, 10)
    logits[:, 3] = -torch.inf
    assert kind_of(logits) == "logits"


def test_classes_come_last_but_for_four_dimensions_and_more() -> None:
    for shape in [(5,), (2, 5), (2, 3, 5)]:
        assert classes_last(torch.zeros(shape)).shape == shape
    assert classes_last(torch.zeros(2, 5, 3, 4)).shape == (2, 3, 4, 5)
    assert classes_last(torch.zeros(2, 5, 3, 4, 6)).shape == (2, 3, 4, 6, 5)


@given(st.sampled_from([(6, 4), (2, 3, 4), (2, 4, 3, 2)]), seeds, st.sampled_from([1.0, 4.0]))
def test_softmax_draws_probabilities_less_a_label(shape, seed, temperature) -> None:
    logits = tensor_of(shape, seed=seed).requires_grad_()
    found = gradient_of(Softmax(temperature), logits, leaf=logits, seed=seed)
    probabilities = (classes_last(logits).detach() / temperature).softmax(-1)
    labels = probabilities - classes_last(found)
    torch.testing.assert_close(labels.sum(-1), torch.ones_like(labels[..., 0]))
    torch.testing.assert_close(labels.max(-1).values, torch.ones_like(labels[..., 0]))


def test_labels_are_drawn_with_the_probabilities_of_the_model() -> None:
    logits = torch.tensor([0.0, 1.0, 2.0]).repeat(30000, 1).requires_grad_()
    found = gradient_of(Softmax(), logits, leaf=logits)
    assert found.mean(0).abs().max() < 0.01


def test_names_tell_curvatures_apart() -> None:
    assert [c.name for c in (Softmax(), Softmax(4.0), Softmax(0.5))] == [
        "softmax",
        "softmax@4",
        "softmax@0.5",
    ]
    assert Identity().name == "identity"
    assert Labels(nn.functional.cross_entropy).name == "labels"


def test_identity_counts_every_tensor_the_same_and_every_place_of_it() -> None:
    outputs = [tensor_of((5, 3)), 1000 * tensor_of((5, 2, 4), seed=1), torch.zeros(5)]
    norms = [output.square().sum().item() for output in outputs]
    first, second, zeros = (output.requires_grad_() for output in outputs)
    signs = gradient_of(Identity(), {"a": first, "b": (second, zeros)}, leaf=first)
    # What is zero is compared with all of it.
    references = zip((first, second, zeros), (*norms[:2], sum(norms)), strict=True)
    for leaf, norm in references:
        expected = torch.full_like(leaf, (5 / norm / 3) ** 0.5)
        torch.testing.assert_close(leaf.grad.abs(), expected)
    assert len(signs.sign().unique()) == 2


def test_outputs_of_nothing_but_zeros_have_a_curvature() -> None:
    zeros = torch.zeros(4, 3, requires_grad=True)
    assert torch.equal(gradient_of(Identity(), zeros, leaf=zeros).abs(), torch.ones(4, 3))


@pytest.mark.parametrize("size", [1, 5])
def test_labels_are_those_of_the_data(size) -> None:
    """And the loss is a mean over the batch: each sample's gradient counts whole."""
    logits = tensor_of((size, 3)).requires_grad_()
    labels = torch.arange(size) % 3
    found = gradient_of(
        Labels(nn.functional.cross_entropy), logits, leaf=logits, batch=(logits.detach(), labels)
    )
    expected = logits.detach().softmax(-1) - nn.functional.one_hot(labels, 3)
    assert relative(found, expected) < 1e-12


def test_labels_of_a_mapping() -> None:
    values = tensor_of((4, 2)).requires_grad_()
    batch = {"pixels": torch.zeros(4, 2), "labels": tensor_of((4, 2), seed=1)}
    found = gradient_of(Labels(nn.functional.mse_loss), values, leaf=values, batch=batch)
    assert relative(found, values.detach() - batch["labels"]) < 1e-12  # 2 / (4 * 2), times 4


@pytest.mark.parametrize(
    "curvature", [Softmax(), Identity(), Labels(nn.functional.cross_entropy)], ids=lambda c: c.name
)
def test_the_graph_is_kept_for_the_next_draw(curvature) -> None:
    leaf = tensor_of((4, 3)).requires_grad_()
    outputs = (2 * leaf).exp().log()
    batch = (leaf.detach(), torch.arange(4) % 3)
    first = gradient_of(curvature, outputs, leaf=leaf, batch=batch).clone()
    assert torch.equal(gradient_of(curvature, outputs, leaf=leaf, batch=batch), first)
    assert first.abs().sum() > 0


@pytest.mark.parametrize(
    "curvature", [Softmax(), Identity(), Labels(nn.functional.cross_entropy)], ids=lambda c: c.name
)
def test_outputs_without_a_graph_give_nothing(curvature) -> None:
    outputs = tensor_of((4, 3))
    batch = (outputs, torch.arange(4) % 3)
    curvature.backward(outputs, batch, torch.Generator())
    assert outputs.grad is None
