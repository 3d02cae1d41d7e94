"""Tables of text as Markdown."""

from collections.abc import Sequence


def aligned(table: Sequence[Sequence[str]]) -> str:
    """A Markdown table, headings first, with columns aligned for a terminal."""
    # An unescaped bar would end the cell.
    lines = [[cell.replace("|", "\\|") for cell in line] for line in table]
    widths = [max(len(line[place]) for line in lines) for place in range(len(lines[0]))]
    rows = [
        "| " + " | ".join(f"{cell:<{w}}" for cell, w in zip(line, widths, strict=True)) + " |"
        for line in lines
    ]
    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return "\n".join([rows[0], rule, *rows[1:]])
