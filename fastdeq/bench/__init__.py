"""The command ``fastdeq bench``: solvers, adjoints and precisions compared on one training step."""
