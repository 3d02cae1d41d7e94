"""Docstrings as Markdown, for the API pages of the docs.

fastdeq's docstrings describe arguments in lines of the form `name: meaning`, indented where they
continue. These become lists, and what begins with `Raises:` a paragraph of its own.
"""

import re

_ARGUMENT = re.compile(r"(\w+(?:, \w+)*): \S")
_PARAGRAPH = re.compile(r"(Raises|Returns|Warns|Departures?)\b.*:")


def as_markdown(docstring: str) -> str:
    """The same text with lists for arguments and numbered departures."""
    lines: list[str] = []
    in_list = False
    for line in _plain(docstring).splitlines():
        argument = _ARGUMENT.match(line)
        if argument and line[0].islower():
            lines += [""] if not in_list else []
            lines.append(f"- **{argument[1]}**{line[argument.end(1) :]}")
            in_list = True
        elif in_list and line and not line.startswith(" "):
            lines += ["", _bold(line)]
            in_list = False
        elif re.match(r"1\. |- ", line):
            lines += ["", line]
        else:
            lines.append(_bold(line))
            in_list = in_list and line.startswith("    ")
    return "\n".join(lines)


def _bold(line: str) -> str:
    word = re.match(r"(Raises|Warns|Returns)(?= |:)", line)
    return f"\n**{word[0]}**{line[word.end() :]}" if word and _PARAGRAPH.match(line) else line


def _plain(docstring: str) -> str:
    """Without links: a bracket outside of code is a bracket."""
    parts = re.split(r"(`[^`]*`)", docstring)
    return "".join(part if i % 2 else part.replace("[", "\\[") for i, part in enumerate(parts))
