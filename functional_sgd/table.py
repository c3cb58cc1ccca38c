"""Text in columns."""

from collections.abc import Sequence


def aligned(rows: Sequence[Sequence[str]], gap: str = "  ") -> str:
    """The rows as lines, every column as wide as its widest cell.

    >>> print(aligned([("rule", "reads"), ("sgd_step", "param")]))
    rule      reads
    sgd_step  param
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        lines.append(gap.join(cells).rstrip())
    return "\n".join(lines)
