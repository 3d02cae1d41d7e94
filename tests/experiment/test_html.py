"""`fastdeq report html`: one file about some runs, as a browser shows it."""

import json
import re
import shutil
import subprocess
import sys
from html import escape
from pathlib import Path
from typing import Any

import pytest

from fastdeq import cli
from fastdeq.report import html
from tests.experiment.run_folders import MNIST, unfinished_run, write_job, write_run

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser")


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    outputs = tmp_path / "outputs"
    for seed, share in enumerate((0.979, 0.982), start=1):
        metrics = {"test/accuracy": share}
        settings: dict[str, Any] = {"seed": seed}
        write_run(outputs / f"deq_{seed}", settings=settings, metrics=metrics, reference=MNIST)
    settings = {"loss.jacobian": 1.0, "name": "<b>/deq"}
    write_run(outputs / "jacobian", settings=settings, metrics={"test/accuracy": 0.5})
    choices = {"model": "skip_deq"}
    write_run(outputs / "skip", choices=choices, metrics={"test/accuracy": 0.9712})
    unfinished_run(outputs / "under_way")
    write_job(outputs / "multirun" / "1", 0, None, error="out of <memory>", model="deq")
    return outputs


def write(monkeypatch: pytest.MonkeyPatch, out: Path, *paths: Path) -> int:
    monkeypatch.setattr(sys, "argv", ["fastdeq"])
    return cli.dispatch(["report", "html", *map(str, paths), "--out", str(out)])


def test_the_page_is_one_file_with_links_to_the_run_folders(tmp_path, runs, monkeypatch, capsys):
    out = tmp_path / "pages" / "report.html"
    assert write(monkeypatch, out, runs) == 0
    text = out.read_text()
    assert capsys.readouterr().out == f"see {out}\n"
    assert not re.search(r"(?:src|href|srcset|url)\s*[=(]\s*[\"']?(?:https?:)?//", text)
    assert "@import" not in text
    links = re.findall(r'<a href="([^"]+)">', text)
    assert links
    assert all((out.parent / link / "summary.json").is_file() for link in links)
    assert "98.05 ± 0.21 [97.93 ± 0.11]" in text
    assert '<td class="differs">1</td>' in text  # loss.jacobian
    assert "out of &lt;memory&gt;" in text
    assert "out of <memory>" not in text


def test_runs_that_are_not_finished_have_a_page_without_a_table(tmp_path, monkeypatch, capsys):
    unfinished_run(tmp_path / "runs" / "new")
    out = tmp_path / "report.html"
    assert write(monkeypatch, out, tmp_path / "runs") == 0
    assert "0 finished runs in 0 rows, 1 unfinished" in out.read_text()
    assert "new is unfinished" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert write(monkeypatch, out, tmp_path / "empty") == 1
    assert "no run folder here or below" in capsys.readouterr().err


def test_without_matplotlib_the_page_has_no_plots_and_names_the_extra(runs, monkeypatch):
    monkeypatch.setattr(html, "plots", None)
    text, missing = html.page([runs], runs / "report.html")
    assert "<img" not in text
    assert "98.05 ± 0.21" in text
    (note,) = [note for note in missing if note.startswith("the page is without plots")]
    assert note.endswith('[plots]"')


PROBE = """
const heads = [...document.querySelectorAll("#runs thead th")];
const place = heads.findIndex((head) => head.textContent.includes("accuracy"));
const column = () => [...document.querySelectorAll("#runs tbody tr")]
  .filter((row) => !row.hidden).map((row) => parseFloat(row.cells[place].textContent));
heads[place].querySelector("button").click();
const up = column();
heads[place].querySelector("button").click();
const down = column();
const search = document.querySelector("#filter");
search.value = "skip";
search.dispatchEvent(new Event("input"));
const filtered = column();
const settings = () => [...document.querySelectorAll(".settings tbody tr")]
  .filter((row) => getComputedStyle(row).display !== "none").length;
const differing = settings();
document.querySelector("#all").click();
parent.document.querySelector("pre").textContent = JSON.stringify({
  up, down, filtered, differing, all: settings(),
  count: document.querySelector("#count").textContent,
  overflow: document.documentElement.scrollWidth - innerWidth, width: innerWidth,
  back: getComputedStyle(document.body).backgroundColor,
});
"""


def in_browser(path: Path, width: int, *, dark: bool) -> dict[str, Any]:
    """What the probe finds in the page at this width and colour scheme."""
    probed = path.with_name("probed.html")
    inner = path.read_text().replace("</body>", f"<script>{PROBE}</script></body>")
    # In a frame: a window of the browser is at least 500 pixels wide.
    frame = f'<iframe width="{width}" height="900" srcdoc="{escape(inner)}"></iframe>'
    probed.write_text(f'<meta name="color-scheme" content="light dark">{frame}<pre></pre>')
    assert BROWSER is not None
    command = [
        *(BROWSER, "--headless=new", "--no-sandbox", "--disable-gpu", "--dump-dom"),
        f"--user-data-dir={path.parent / 'profile'}",
        f"--blink-settings=preferredColorScheme={0 if dark else 1}",
        *("--window-size=1700,1000", probed.as_uri()),
    ]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    found = re.search("<pre>(.+)</pre>", shown, re.DOTALL)
    assert found, shown[:2000]
    answer: dict[str, Any] = json.loads(found[1])
    return answer


@pytest.mark.browser
@pytest.mark.skipif(BROWSER is None, reason="no chromium here")
def test_the_page_works_in_a_browser_at_both_widths_light_and_dark(tmp_path, runs, monkeypatch):
    out = tmp_path / "report.html"
    assert write(monkeypatch, out, runs) == 0
    for width, dark in ((400, True), (1600, False)):
        seen = in_browser(out, width, dark=dark)
        assert seen["width"] == width
        assert seen["overflow"] <= 0, "wide tables scroll in their frame, the page does not"
        assert seen["up"] == [50, 97.12, 98.05]
        assert seen["down"] == [98.05, 97.12, 50]
        assert seen["filtered"] == [97.12]
        assert seen["count"] == "1 of 3 rows"
        assert 0 < seen["differing"] < seen["all"]
        assert seen["back"] == ("rgb(16, 18, 22)" if dark else "rgb(255, 255, 255)")
