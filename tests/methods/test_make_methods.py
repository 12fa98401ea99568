"""Which methods an analysis tries."""

import pytest

from rankfold.errors import RankfoldError
from rankfold.methods import DEFAULT_METHODS, METHODS, LowRank, SeparableBasis, make_methods


def names(*methods) -> list[str]:
    return [method.name for method in make_methods(*methods)]


def test_by_default_the_quick_ones_in_the_order_of_the_table() -> None:
    assert names() == names(None) == list(DEFAULT_METHODS)
    assert [name for name in METHODS if name in DEFAULT_METHODS] == names()


def test_all_or_by_name_or_the_methods_themselves() -> None:
    assert names("all") == names(["all"]) == list(METHODS)
    assert names("svd") == ["svd"]
    assert names(["cp", "svd"]) == ["cp", "svd"]
    shared = SeparableBasis(shared=True)
    assert make_methods([shared, "svd"]) == [shared, LowRank()]
    assert make_methods([]) == []


@pytest.mark.parametrize(
    ("methods", "words"),
    [
        ("sdv", "no method 'sdv'; there are all, tucker2, svd"),
        (["svd", "all"], "no method 'all'"),
        (["svd", LowRank(alignment=4)], "the method 'svd' is given twice"),
    ],
)
def test_what_is_no_choice_is_refused(methods, words) -> None:
    with pytest.raises(RankfoldError, match=words):
        make_methods(methods)
