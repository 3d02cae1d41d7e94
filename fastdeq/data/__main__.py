"""``python -m fastdeq.data NAME key=value ...``: prepare a data set and show what it holds."""

import sys

from fastdeq.data.command import main

sys.exit(main(sys.argv[1:]))
