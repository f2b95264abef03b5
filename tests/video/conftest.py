"""Shared fixtures of the tests of the video package."""

import pytest
import torch


@pytest.fixture(autouse=True)
def same_threads():
    """A run that sets the number of threads does not set it for the tests after it."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
