import torch
from hypothesis import given
from hypothesis import strategies as st
from tensors import tensor_of

from rankfold.layers import squared_norm_of_chain
from rankfold.layers.chain import kernel_of

widths = st.integers(1, 4)


@st.composite
def chains(draw):
    """Links of one axis each or none, of any groups that fit, the first of `copies` of them."""
    copies = draw(st.integers(1, 3))
    channels = copies * draw(widths)
    links, axes = [], draw(st.integers(1, 4))
    for axis in range(axes):
        divisors = [g for g in range(copies, channels + 1, copies) if channels % g == 0]
        groups = draw(st.sampled_from(divisors))
        outputs = groups * draw(widths)
        kernel = [1] * axes
        kernel[axis] = draw(st.integers(1, 3))
        links.append((tensor_of((outputs, channels // groups, *kernel), seed=axis), groups))
        channels = outputs
    return links, copies


@given(chains())
def test_it_is_the_norm_of_the_product(drawn) -> None:
    links, copies = drawn
    whole = kernel_of(links, copies)
    torch.testing.assert_close(squared_norm_of_chain(links), whole.square().sum())


@given(chains())
def test_its_gradient_is_that_of_the_norm_of_the_product(drawn) -> None:
    links, copies = drawn
    weights = [weight.requires_grad_() for weight, _ in links]
    expected = torch.autograd.grad(kernel_of(links, copies).square().sum(), weights)
    found = torch.autograd.grad(squared_norm_of_chain(links), weights)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_linear_layers_have_no_kernel() -> None:
    first, last = tensor_of((3, 50)), tensor_of((40, 3), seed=1)
    expected = (last @ first).square().sum()
    torch.testing.assert_close(squared_norm_of_chain([(first, 1), (last, 1)]), expected)
    torch.testing.assert_close(squared_norm_of_chain([(first, 1)]), first.square().sum())
