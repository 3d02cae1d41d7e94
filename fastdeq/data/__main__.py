"""``python -m fastdeq.data NAME key=value ...``: prepare a data set and show what it holds."""

from fastdeq.data.command import main
from fastdeq.streams import run_command

run_command(main)
