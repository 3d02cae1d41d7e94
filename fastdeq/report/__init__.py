"""L7: tables about runs. Reads run folders and never trains."""

from fastdeq.report.columns import Group, groups, heading, row
from fastdeq.report.sweeps import SweepTable, read_jobs

__all__ = ["Group", "SweepTable", "groups", "heading", "read_jobs", "row"]
