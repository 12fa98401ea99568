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
    """A train of two pairs, 32 x 32 each: rows by one core and the other, or by both at once."""
    lengths = {**dict.fromkeys("abAB", 32), "l": 8}
    contraction = plan_contraction("zab,Aal,lBb->zAB", lengths)
    (_, few), (_, many) = contraction.orders
    assert few.macs == (0, 2 * 32**3 * 8)
    assert many.macs == (32**4 * 8, 32**4)
