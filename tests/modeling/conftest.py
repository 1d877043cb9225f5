import pytest
import torch


@pytest.fixture
def threads_as_before():
    """A test may set PyTorch's number of threads."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
