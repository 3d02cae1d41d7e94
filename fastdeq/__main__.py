"""``python -m fastdeq``: the same as ``fastdeq``."""

from fastdeq.cli import main

main()
