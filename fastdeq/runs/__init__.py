"""The run folder: file names (`folder`), atomic writes and seals (`files`), which runs are the same
(`identity`), `lock`, `status`, `log`, `provenance`, resuming and reading a run back.
"""
