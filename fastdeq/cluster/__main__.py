"""``python -m fastdeq.cluster ACTION ...``: the jobs of a sweep in Slurm's queue."""

import sys
from importlib.util import find_spec

if find_spec("submitit") is None or find_spec("hydra_plugins.hydra_submitit_launcher") is None:
    sys.exit('error: fastdeq.cluster needs submitit: pip install "fastdeq[cluster]"')

from fastdeq.cluster.command import main
from fastdeq.streams import run_command

run_command(main)
