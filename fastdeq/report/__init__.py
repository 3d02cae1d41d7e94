"""Tables about runs. Reads run folders and never trains."""

from fastdeq.report.columns import Group, groups, heading, row
from fastdeq.report.rows import Row, make_rows
from fastdeq.report.runs import Run, find_runs, job_records, read_run
from fastdeq.report.sweeps import SweepTable, read_jobs

__all__ = [
    "Group",
    "Row",
    "Run",
    "SweepTable",
    "find_runs",
    "groups",
    "heading",
    "job_records",
    "make_rows",
    "read_jobs",
    "read_run",
    "row",
]
