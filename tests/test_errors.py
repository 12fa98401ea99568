from rankfold.errors import BudgetError, RankfoldError


def test_what_is_said_can_be_printed_and_is_not_endless() -> None:
    error = RankfoldError("no layer '\x1b[2J\ud800'\nhere")
    error.add_note("while reading \u202ethat")
    assert str(error) == "no layer '\\x1b[2J\\ud800'\nhere; while reading \\u202ethat"
    long = RankfoldError("a" * 10_000)
    long.add_note("while factorizing layer 'b'")
    assert len(str(long)) < 1000 and str(long).endswith("layer 'b'")
    assert str(BudgetError("too small", {"macs": 0.5})) == "too small"
