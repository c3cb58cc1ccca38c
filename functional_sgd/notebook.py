"""What a notebook shows in place of lines of text: tables in HTML."""

import sys
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

_MOST = 60  # rows of a table; of a longer one, the middle is left out
_FIRST = 5  # rows of a longer one that stand before the gap

_LEFT = ' style="text-align: left"'
_RIGHT = ' style="text-align: right; font-variant-numeric: tabular-nums"'


def notebook() -> Any:
    """IPython's module for display if this runs in a notebook's kernel, else None.

    IPython is never imported for it: whoever is in a notebook has loaded it.

    >>> notebook() is None  # a script, a terminal
    True
    """
    ipython = sys.modules.get("IPython")
    shell = None if ipython is None else ipython.get_ipython()
    return None if getattr(shell, "kernel", None) is None else sys.modules["IPython.display"]


def show(text: str, html: str) -> None:
    """Print the text; in a notebook, show the HTML in its place.

    >>> show("1 leaf", "<p>1 leaf</p>")
    1 leaf
    """
    display = notebook()
    if display is None:
        print(text)
    else:
        display.display({"text/plain": text, "text/html": html}, raw=True)


def html_table(
    rows: Sequence[Sequence[str]],
    titles: Sequence[str] = (),
    left: int | None = None,
    caption: str = "",
) -> str:
    """The rows as an HTML table under their titles; of more than 60 rows, the middle is left out.

    The first `left` columns are flush left (all, if None), the others flush right, as numbers are.
    Cells are text: what would be markup is escaped.

    >>> html_table([("a<b", "10")], left=2).count("a&lt;b")
    1
    """
    columns = max(map(len, (titles, *rows)), default=0)
    count = columns if left is None else left
    styles = [_LEFT] * count + [_RIGHT] * (columns - count)
    left_out = max(len(rows) - _MOST, 0)
    first, last = (rows[:_FIRST], rows[_FIRST + left_out :]) if left_out else (rows, [])
    body = [_line(row, "td", styles) for row in first]
    if left_out:
        body.append(f'<tr><td colspan="{columns}"{_LEFT}>… {left_out} rows …</td></tr>')
    body += [_line(row, "td", styles) for row in last]
    head = f"<thead>{_line(titles, 'th', styles)}</thead>" if titles else ""
    above = ""
    if caption:
        above = f'<caption style="caption-side: top; text-align: left">{escape(caption)}</caption>'
    return f"<table>{above}{head}<tbody>{''.join(body)}</tbody></table>"


def html_facts(facts: Mapping[str, str], caption: str = "") -> str:
    """Names and what is said of them, a line for each.

    >>> html_facts({"seed": "0"}).count("<tr>")
    1
    """
    return html_table([*facts.items()], caption=caption)


def _line(cells: Sequence[str], tag: str, styles: Sequence[str]) -> str:
    inner = ""
    for cell, style in zip(cells, styles, strict=False):
        inner += f"<{tag}{style}>{escape(cell)}</{tag}>"
    return f"<tr>{inner}</tr>"
