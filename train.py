"""Train what conf/ composes: `python train.py model=skip_deq data=digits solver.tol=1e-3`.

The same as `fastdeq train`; `python train.py --help` says what can be chosen.
"""

import sys

from fastdeq.cli import main

if __name__ == "__main__":
    main(["train", *sys.argv[1:]])
