"""``python -m fastdeq.report PATH ... key=value ...``: a table of runs."""

from fastdeq.report.command import main
from fastdeq.streams import run_command

run_command(main)
