"""Text in columns."""

from collections.abc import Sequence


def aligned(rows: Sequence[Sequence[str]], left: int = 1) -> list[str]:
    """Rows as lines with columns of equal width: the first `left` columns flush left, the others
    flush right.

    >>> print(*aligned([["name", "size"], ["a", "10"]]), sep="\\n")
    name  size
    a       10
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = []
        for index, (cell, width) in enumerate(zip(row, widths, strict=True)):
            pad = cell.ljust if index < left else cell.rjust
            cells.append(pad(width))
        lines.append("  ".join(cells).rstrip())
    return lines
