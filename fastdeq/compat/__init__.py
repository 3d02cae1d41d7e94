"""Interfaces of other libraries, computed by fastdeq."""
