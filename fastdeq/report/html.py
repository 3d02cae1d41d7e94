"""A page about runs: one file of HTML without links to the network."""

import base64
import os
import re
from collections.abc import Iterable, Sequence
from datetime import datetime
from html import escape
from pathlib import Path
from urllib.parse import quote

from fastdeq.extras import install
from fastdeq.report.configuration import NONE
from fastdeq.report.drawing import plots
from fastdeq.report.notes import footnotes
from fastdeq.report.records import Record, read_found
from fastdeq.report.rows import Row, make_rows
from fastdeq.report.runs import Found, find_runs
from fastdeq.report.tables import cells
from fastdeq.runs.identity import Leaf, without_seeds

PARTS = Path(__file__).parent / "page"
_LONG = 40  # letters from which a cell of the table may have several lines


def page(paths: Sequence[Path], out: Path) -> tuple[str, list[str]]:
    """The page for the runs below some paths, and what is missing in it, one line each.

    out: where it will be written; links to run folders are relative to it.

    Raises: OSError or ValueError for paths without runs, and files that cannot be read.
    """
    found = find_runs(paths)
    rows = make_rows(found.runs.values())
    records, missing = read_found(found, paths)
    missing = [note for note in missing if note not in found.failed.values()]
    if plots is None:
        missing.append(f"the page is without plots: {install('plots')}")
    sections = [
        _section("Runs", _table(rows, out), rows),
        _section("Plots", _plots(records), plots is not None),
        _section("Settings", _settings(rows), rows),
        _section("Notes", _notes([*footnotes(rows, found), *missing]), True),
    ]
    content = {
        "title": escape(_title(paths)),
        "subtitle": escape(_subtitle(found, rows)),
        "main": "\n".join(filter(None, sections)),
        "style": (PARTS / "style.css").read_text(encoding="utf-8"),
        "script": (PARTS / "script.js").read_text(encoding="utf-8"),
    }
    template = (PARTS / "page.html").read_text(encoding="utf-8")
    # In one pass: what is inserted is not searched again.
    return re.sub(r"\{\{(\w+)\}\}", lambda match: content[match[1]], template), missing


def _title(paths: Sequence[Path]) -> str:
    return f"Runs of {', '.join(path.name or str(path) for path in paths)}"


def _subtitle(found: Found, rows: Sequence[Row]) -> str:
    now = datetime.now().astimezone().isoformat(sep=" ", timespec="minutes")
    done = len(found.runs)
    counts = [f"{done} finished run{'s' * (done != 1)} in {len(rows)} row{'s' * (len(rows) != 1)}"]
    counts += [f"{len(found.unfinished)} unfinished"] if found.unfinished else []
    counts += [f"{len(found.failed)} failed"] if found.failed else []
    return f"{', '.join(counts)}; made by fastdeq report html, {now}"


def _section(title: str, content: str, shown: object) -> str:
    return f"<section>\n<h2>{title}</h2>\n{content}\n</section>" if shown and content else ""


def _table(rows: Sequence[Row], out: Path) -> str:
    """The columns of the report, and the folders of the runs as links."""
    if not rows:
        return ""
    headings, *lines = zip(*cells(rows).values(), strict=True)
    head = "".join(
        f'<th scope="col"><button type="button">{escape(each)}</button></th>'
        for each in [*headings, "folders"]
    )
    body = "\n".join(
        f"<tr>{''.join(map(_cell, line))}<td>{_links(row, out)}</td></tr>"
        for row, line in zip(rows, lines, strict=True)
    )
    return (
        '<div class="bar"><input id="filter" type="search" placeholder="filter rows" '
        'aria-label="filter rows"><span id="count" class="faint"></span></div>\n'
        f'<div class="scroll"><table id="runs"><thead><tr>{head}</tr></thead>\n'
        f"<tbody>\n{body}\n</tbody></table></div>"
    )


def _cell(text: str) -> str:
    long = ' class="long"' if len(text) > _LONG else ""
    return f"<td{long}>{escape(text)}</td>"


def _links(row: Row, out: Path) -> str:
    return " ".join(
        f'<a href="{quote(os.path.relpath(run.folder, out.parent))}">s{run.seed}</a>'
        for run in row.runs
    )


def _plots(records: Sequence[Record]) -> str:
    if plots is None:
        return ""
    blocks = []
    for name, draw in plots.PLOTS.items():
        light, dark = (_image(name, records, dark=dark) for dark in (False, True))
        if light is None:
            continue
        text = escape(" ".join((draw.__doc__ or name).split()))
        blocks.append(
            f'<div class="plot" id="{name}"><p>{text}</p><picture>'
            f'<source media="(prefers-color-scheme: dark)" srcset="{dark}">'
            f'<img src="{light}" alt="{text}"></picture></div>'
        )
    joined = "\n".join(blocks)
    return f'<div class="plots">\n{joined}\n</div>' if blocks else ""


def _image(name: str, records: Sequence[Record], *, dark: bool) -> str | None:
    assert plots is not None
    plot = plots.draw(name, records, dark=dark, narrow=True)
    if plot is None:
        return None
    content = base64.b64encode(plots.png(plot, dark=dark)).decode()
    return f"data:image/png;base64,{content}"


def _settings(rows: Sequence[Row]) -> str:
    """The settings of every row; values that differ from those of the first are marked."""
    if not rows:
        return ""
    known = [without_seeds(row.runs[0].identity) for row in rows]
    keys = sorted({key for settings in known for key in settings})
    lines = [_setting(key, [settings.get(key, NONE) for settings in known]) for key in keys]
    differing = sum("differs" in line for line in lines)
    head = "".join(f'<th scope="col">{escape(_name(row))}</th>' for row in rows)
    bar = (
        f'<div class="bar"><label><input id="all" type="checkbox"> all {len(keys)} settings</label>'
        f'<span class="faint">{differing} differ between the rows; marked: unlike the first'
        "</span></div>\n"
        if len(rows) > 1
        else ""
    )
    only = " only" if len(rows) > 1 else ""
    body = "\n".join(lines)
    table = (
        f'<div class="scroll"><table class="settings{only}"><thead><tr><th></th>{head}</tr></thead>'
        f"<tbody>\n{body}\n</tbody></table></div>"
    )
    if len(rows) > 1:
        return bar + table
    return f"<details><summary>all {len(keys)} settings</summary>\n{table}</details>"


def _setting(key: str, values: Sequence[Leaf]) -> str:
    kind = "same" if len(set(map(str, values))) == 1 else "differ"
    found = "".join(
        f'<td class="differs">{escape(str(value))}</td>'
        if str(value) != str(values[0])
        else f"<td>{escape(str(value))}</td>"
        for value in values
    )
    return f'<tr class="{kind}"><th scope="row">{escape(key)}</th>{found}</tr>'


def _name(row: Row) -> str:
    parts = [row.label.model, row.label.solver, row.settings]
    return " ".join(part for part in parts if part and part != NONE)


def _notes(notes: Iterable[str]) -> str:
    lines = "\n".join(f"<li>{escape(note)}</li>" for note in notes)
    return f'<ul class="notes">\n{lines}\n</ul>' if lines else ""
