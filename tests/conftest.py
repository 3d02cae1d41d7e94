"""What holds for every test."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Each test starts from the same random state, whichever ran before it."""
    torch.manual_seed(0)
