"""``python -m fastdeq.report``: the same as ``fastdeq report``."""

from fastdeq.report.command import main
from fastdeq.streams import run_command

run_command(main)
