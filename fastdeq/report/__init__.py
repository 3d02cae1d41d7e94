"""Tables, plots and pages about runs. Reads run folders and never trains."""

from fastdeq.extras import extra_for

with extra_for("fastdeq.report"):
    from fastdeq.report.columns import Group, fit, groups, heading, row
    from fastdeq.report.published import published_row
    from fastdeq.report.rows import Row, make_rows
    from fastdeq.report.runs import find_runs
    from fastdeq.report.sweeps import SweepJob, SweepTable, read_jobs

__all__ = [
    "Group",
    "Row",
    "SweepJob",
    "SweepTable",
    "find_runs",
    "fit",
    "groups",
    "heading",
    "make_rows",
    "published_row",
    "read_jobs",
    "row",
]
