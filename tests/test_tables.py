from dataclasses import dataclass

from rich.table import Table
from rich.text import Text

from rankfold.tables import Shown, html_of, shortened


@dataclass(frozen=True)
class Counted(Shown):
    name: str

    def __rich__(self) -> Table:
        table = Table(title="so [bold]many[/]", caption=Text("a <b>\nand more [x]"))
        table.add_column("what")
        table.add_column("how many", justify="right")
        table.add_row(self.name, "3")
        table.add_row("[red]rest[/]", "12")
        return table


def test_a_table_is_text_and_html() -> None:
    counted = Counted("a<b>")
    text = str(counted)
    assert "so many" in text and "how many" in text and "12" in text and "rest" in text
    html = counted._repr_html_()
    assert html == html_of(counted.__rich__())
    assert "<caption>so many</caption>" in html
    assert "<th>what</th><th>how many</th>" in html
    assert '<td style="text-align: left">a&lt;b&gt;</td>' in html
    assert '<td style="text-align: right">12</td>' in html and "[red]" not in html
    assert "<p>a &lt;b&gt;<br>and more [x]</p>" in html
    assert repr(counted) == "Counted(name='a<b>')"


def test_counts_are_shortened() -> None:
    assert shortened(1_234_567) == "1.23 M" and shortened(950) == "0.9 k"
