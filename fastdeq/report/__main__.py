"""L7: ``python -m fastdeq.report PATH ... key=value ...``: a table of runs."""

import sys

from fastdeq.report.command import main

sys.exit(main(sys.argv[1:]))
