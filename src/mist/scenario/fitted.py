"""A table that fits any terminal: with one line of heads, with two, or as a list, but never with a figure cut short.

Between the figures of `result_table` and rich, which crops what is too wide. It never leaves anything out.
"""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text


class Fitted:
    """Rows of figures: the first column says what a row is, the others are numbers under their heads.

    A column without a head holds the unit of the figures to its left.
    """

    def __init__(self, title: str, heads: Sequence[str]) -> None:
        self.title = title
        self.heads = heads
        self.rows: list[tuple[str, Sequence[str | Text]]] = []

    def add_row(self, label: str, *cells: str | Text) -> None:
        """A row; one cell per head."""
        self.rows.append((label, cells))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        wide = options.update(width=10_000)
        for table in (self._table(), self._table(two_lines=True)):
            if console.measure(table, options=wide).maximum <= options.max_width:
                yield table
                return
        yield self._list()

    def _table(self, *, two_lines: bool = False) -> Table:
        """No lines but under the heads; `two_lines` breaks heads of two words."""
        table = Table(box=None, pad_edge=False, padding=(0, 1), header_style="bold")
        table.add_column(self.title, min_width=0 if two_lines else 14, no_wrap=True, vertical="bottom")
        for head in self.heads:
            shown = head.replace(" ", "\n", 1) if two_lines else head
            narrow = 0 if two_lines or not head else 7
            table.add_column(shown, justify="right" if head else "left", no_wrap=True, min_width=narrow)
        for label, cells in self.rows:
            table.add_row(
                Text(label), *(_dim(cell) if not head else cell for head, cell in zip(self.heads, cells, strict=True))
            )
        return table

    def _list(self) -> Table:
        """A line for every figure, below the name of its row; names fold where they must."""
        table = Table.grid(padding=(0, 1))
        table.add_column(overflow="fold")
        table.add_row(Text(self.title, "bold", overflow="fold"))
        for label, cells in self.rows:
            table.add_row(Text(label, overflow="fold"))
            for i, (head, cell) in enumerate(zip(self.heads, cells, strict=True)):
                if head:
                    unit = next((c for h, c in zip(self.heads[i:], cells[i:], strict=True) if not h), "")
                    has_unit = unit and str(cell) not in ("-", "0")
                    table.add_row(Text.assemble(f"  {head} ", cell, f" {unit}" if has_unit else "", overflow="fold"))
        return table


def _dim(unit: str | Text) -> Text:
    return Text(str(unit), style="dim")
