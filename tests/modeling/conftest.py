import pytest
import torch


@pytest.fixture
def threads_as_before():
    """A test may set PyTorch's number of threads."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def two_threads(threads_as_before):
    """With one, PyTorch convolves in another way, and maps do not stay in oneDNN's layout."""
    torch.set_num_threads(2)
