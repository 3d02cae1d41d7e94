"""``python -m fastdeq.data``: the same as ``fastdeq data``."""

from fastdeq.data.command import main
from fastdeq.streams import run_command

run_command(main)
