"""Orders of products of several tensors."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensors import tensor_of

from rankfold.layers.contraction import plan_contraction

EQUATIONS = [
    "zab,Aal,lBb->zAB",
    "zabc,Aal,lBbm,mCc->zABC",
    "zab,Ak,Bk,ak,bk->zAB",
    "zab,lmno,Al,Bm,an,bo->zAB",
    "zab,klm,kAal,kBbm->zAB",
    "zab,lAm,mBn,nao,obl->zAB",
    "Aal,lBbm,mCc->ABCabc",
    "za,Aa->zA",
    "al,bm->ablm",  # two that do not hang together
]


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(EQUATIONS), st.integers(0, 300), st.data())
def test_every_order_gives_the_sum(equation, rows, data) -> None:
    """Of all that may be taken, whatever the lengths; einsum is the oracle."""
    terms, _, _ = equation.partition("->")
    lengths = {i: data.draw(st.integers(1, 4)) for i in sorted(set(terms) - set(",z"))}
    contraction = plan_contraction(equation, lengths)
    tensors = [
        tensor_of([rows if i == "z" else lengths[i] for i in term], seed=place)
        for place, term in enumerate(terms.split(","))
    ]
    expected = torch.einsum(equation, *tensors)
    torch.testing.assert_close(contraction(*tensors), expected)
    for _, order in contraction.orders:
        torch.testing.assert_close(order.run(tensors, len(tensors[0])), expected)


@pytest.mark.parametrize("equation", [one for one in EQUATIONS if one.startswith("z")])
def test_the_orders_are_the_envelope_of_the_best(equation) -> None:
    """Each is the cheapest of them where it is taken, and none is better for any number of rows."""
    lengths = {i: 2 + ord(i) % 5 for i in set(equation) - set(",->z")}
    contraction = plan_contraction(equation, lengths)
    limits = [most for most, _ in contraction.orders]
    assert limits == sorted(limits)
    for rows in (1, 2, 5, 30, 200, 10_000):
        costs = [order.cost[0] + order.cost[1] * rows for _, order in contraction.orders]
        taken = contraction.order_for(rows)
        assert taken.cost[0] + taken.cost[1] * rows == min(costs)


def test_many_rows_are_multiplied_by_the_whole_weight() -> None:
    """A train of three cores of 10 x 10: rows by one after the other, or by all at once."""
    lengths = {**dict.fromkeys("abcABC", 10), "l": 8, "m": 8}
    contraction = plan_contraction("zabc,Aal,lBbm,mCc->zABC", lengths)
    few, many = contraction.orders[0][1], contraction.orders[-1][1]
    assert few.macs == (0, 2 * 10**4 * 8 + 10**4 * 8**2)
    assert not few.weight_first and many.weight_first
    assert many.macs[1] == 10**6
    assert contraction.order_for(1) is few and contraction.order_for(100_000) is many


def test_products_of_rows_are_not_moved_where_they_need_not_be() -> None:
    """One after the other the two cores of a train find what they multiply where it is."""
    contraction = plan_contraction("zab,Aal,lBb->zAB", {**dict.fromkeys("abAB", 32), "l": 8})
    ((_, order),) = contraction.orders
    assert order.macs == (0, 2 * 32**3 * 8)
    assert sorted(step.kind for step in order.steps) == ["bmm", "mm"]
    rows = [
        operand
        for step in order.steps
        for operand in (step.first, step.second)
        if operand.laid_out.marked is not None
    ]
    assert len(rows) == 2 and all(operand.order is None for operand in rows)
    assert order.result.order is None


@pytest.mark.parametrize("equation", [one for one in EQUATIONS if one.startswith("z")])
def test_rows_in_parts_give_the_same_and_the_same_gradients(equation, monkeypatch) -> None:
    lengths = {i: 2 + ord(i) % 3 for i in set(equation) - set(",->z")}
    terms = equation.partition("->")[0].split(",")
    contraction = plan_contraction(equation, lengths)
    for rows in (0, 1, 7, 30):
        tensors = [
            tensor_of([rows if i == "z" else lengths[i] for i in term], seed=place)
            for place, term in enumerate(terms)
        ]
        found = []
        for cached in (2**19, 1):
            monkeypatch.setattr("rankfold.layers.contraction._CACHED", cached)
            monkeypatch.setattr("rankfold.layers.contraction._FEWEST", 4)
            own = [tensor.clone().requires_grad_() for tensor in tensors]
            result = contraction.orders[0][1].run(own, rows)
            result.square().sum().backward()
            found.append([result, *(one.grad for one in own)])
        for ours, theirs in zip(*found, strict=True):
            torch.testing.assert_close(ours, theirs)
