"""What is shown as a table: in a terminal, as text, and in a notebook."""

from html import escape

from rich.console import Console
from rich.table import Table
from rich.text import Text

_WIDTH = 100


class Shown:
    """Of a class with `__rich__`, which gives a table: its text, and its HTML for notebooks."""

    def __rich__(self) -> Table:
        raise NotImplementedError

    def __str__(self) -> str:
        console = Console(width=_WIDTH)
        with console.capture() as capture:
            console.print(self.__rich__())
        return capture.get()

    def _repr_html_(self) -> str:
        return html_of(self.__rich__())


def html_of(table: Table) -> str:
    """A table of the terminal in HTML: its title, header, rows and caption."""
    columns = [list(column.cells) for column in table.columns]
    header = "".join(f"<th>{_escaped(column.header)}</th>" for column in table.columns)
    styles = ["left" if column.justify == "left" else "right" for column in table.columns]
    rows = "".join(
        "<tr>"
        + "".join(
            f'<td style="text-align: {style}">{_escaped(cell)}</td>'
            for style, cell in zip(styles, row, strict=True)
        )
        + "</tr>"
        for row in zip(*columns, strict=True)
    )
    title = f"<caption>{_escaped(table.title)}</caption>" if table.title else ""
    note = f"<p>{_escaped(table.caption).replace(chr(10), '<br>')}</p>" if table.caption else ""
    return f"<table>{title}<thead><tr>{header}</tr></thead><tbody>{rows}</tbody></table>{note}"


def _escaped(text: object) -> str:
    """Without the terminal's markup."""
    plain = text.plain if isinstance(text, Text) else Text.from_markup(str(text)).plain
    return escape(plain)


def shortened(number: float) -> str:
    """A count in thousands or millions."""
    return f"{number / 1e6:.2f} M" if number >= 1e6 else f"{number / 1e3:.1f} k"
