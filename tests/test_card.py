from networks import make_data, make_labelled, make_model

import rankfold
from rankfold.card import model_card


def test_a_card_says_what_was_measured() -> None:
    small = rankfold.compress(
        make_model(),
        make_data(),
        macs=0.5,
        epochs=2,
        loss_metric="weight",
        test=make_labelled(),
        metric=rankfold.accuracy,
    )
    record = rankfold.record_of(small)
    card = model_card(record, "small", "make-model")
    front, _, text = card.removeprefix("---\n").partition("---\n")
    assert front.splitlines()[:2] == ["base_model: make-model", "library_name: rankfold"]
    assert text.strip().startswith("# make-model, factorized")
    assert 'rankfold.load("small")' in text and "macs 0.5" in text
    assert record.comparison is not None
    after = record.comparison.after
    assert f"| {after.parameters / 1e6:.4g} M |" in text and f"{after.metric:.4f}" in text
    assert "Recovered in 2 epochs" in text


def test_a_plan_alone_has_a_card_too() -> None:
    model = make_model()
    plan = rankfold.analyze(model, make_data(), metric="weight").plan(fraction=0.25)
    card = model_card(rankfold.record_of(rankfold.factorize(model, plan)), "small")
    assert "base_model" not in card and "# A network, factorized" in card
    assert f"| {plan.after.macs / 1e6:.4g} M |" in card and "Not trained" in card
