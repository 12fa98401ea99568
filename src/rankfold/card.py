"""The card of a saved model: what it is, what it was made from, and the figures."""

from collections import Counter
from collections.abc import Sequence

from rankfold.measure import Comparison
from rankfold.record import Record

_CARD = """---
{base}library_name: rankfold
tags:
- low-rank
- factorized
---

# {title}

{source} with {factorized} of {layers} layers factorized by rankfold ({methods}), for a budget of
{budget}.

```python
import rankfold

model = rankfold.load("{directory}")
```

{figures}
{recovery}"""


def model_card(record: Record, directory: str, base: str | None = None) -> str:
    """Markdown with the front matter that hubs of models read.

    `directory` is where the model is saved, `base` the name of the one that it was made from.
    """
    plan = record.plan
    used = Counter(str(entry.method) for entry in plan.factorized)
    return _CARD.format(
        base=f"base_model: {base}\n" if base else "",
        title=f"{base or 'A network'}, factorized",
        source=f"`{base}`" if base else "A network",
        factorized=len(plan.factorized),
        layers=len(plan.layers),
        methods=", ".join(f"{count} by {name}" for name, count in used.items()) or "none",
        budget=", ".join(f"{name} {value}" for name, value in plan.request.items()) or "nothing",
        directory=directory,
        figures=_figures(record),
        recovery=_recovery(record),
    )


def _figures(record: Record) -> str:
    if record.comparison is not None:
        return _measured(record.comparison)
    before, after = record.plan.before, record.plan.after
    rows = [
        ("parameters", _millions(before.parameters), _millions(after.parameters)),
        ("MACs per sample", _millions(before.macs), _millions(after.macs)),
    ]
    return _table(rows)


def _measured(comparison: Comparison) -> str:
    before, after = comparison.before, comparison.after
    rows = [
        ("parameters", _millions(before.parameters), _millions(after.parameters)),
        ("MACs per sample", _millions(before.macs), _millions(after.macs)),
        ("time per batch", f"{before.latency_ms:.4g} ms", f"{after.latency_ms:.4g} ms"),
    ]
    if before.metric is not None and after.metric is not None:
        rows.append(("metric", f"{before.metric:.4f}", f"{after.metric:.4f}"))
    where = (
        f"Measured side by side: batch {comparison.batch_size}, {comparison.threads} threads, "
        f"{comparison.device}, {comparison.runtime}.\n"
    )
    return f"{_table(rows)}\n{where}"


def _recovery(record: Record) -> str:
    if record.recovery is None:
        return "Not trained after the factorization.\n"
    epochs = len(record.recovery.epochs) - 1
    return f"Recovered in {epochs} epochs ({record.recovery.seconds:.0f} s).\n"


def _table(rows: Sequence[tuple[str, str, str]]) -> str:
    lines = ["| | before | after |", "|---|---|---|"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows), ""])


def _millions(number: int) -> str:
    return f"{number / 1e6:.4g} M"
