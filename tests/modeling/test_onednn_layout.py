import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from detectron2.layers import FrozenBatchNorm2d

from oanet_d2.modeling.onednn_layout import dense, frozen_norm_in_onednn, is_for_onednn

without = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="PyTorch was built without oneDNN"
)
pytestmark = [without, pytest.mark.usefixtures("two_threads")]


def frozen_norm(channels, generator):
    def between(low, high):
        return low + (high - low) * torch.rand(channels, generator=generator)

    norm = FrozenBatchNorm2d(channels, eps=1e-5)
    norm.weight, norm.bias = between(-2, 2), between(-3, 3)
    norm.running_mean, norm.running_var = between(-5, 5), between(0, 4)
    return norm


@given(
    seed=st.integers(0, 2**20),
    batch=st.integers(1, 2),
    channels=st.sampled_from([1, 3, 16, 20, 64, 100]),
    size=st.tuples(st.integers(1, 30), st.integers(1, 40)),
    scale=st.sampled_from([1e-3, 1.0, 1e4]),
)
def test_frozen_norm_equals_detectron2s_to_the_bit(seed, batch, channels, size, scale):
    generator = torch.Generator().manual_seed(seed)
    norm = frozen_norm(channels, generator)
    x = scale * torch.randn(batch, channels, *size, generator=generator)
    with torch.no_grad():
        result = frozen_norm_in_onednn(norm, x.to_mkldnn())
        assert result.is_mkldnn
        assert torch.equal(result.to_dense(), norm(x))


def test_dense():
    x = torch.randn(1, 16, 3, 5)
    assert dense(x) is x
    assert torch.equal(dense(x.to_mkldnn()), x)


@torch.no_grad()
def test_what_a_convolution_would_bring_there():
    x = torch.zeros(1, 16, 4, 6)
    assert is_for_onednn(x) and is_for_onednn(x.to_mkldnn())
    assert not is_for_onednn(x.contiguous(memory_format=torch.channels_last))
    assert not is_for_onednn(x.bfloat16()) and not is_for_onednn(x.double())
    assert not is_for_onednn(x.to("meta"))
    with torch.autocast("cpu", torch.bfloat16):
        assert not is_for_onednn(x)
    with torch.backends.mkldnn.flags(enabled=False):
        assert not is_for_onednn(x)
    with torch.enable_grad():
        assert not is_for_onednn(x)
    torch.set_num_threads(1)
    assert not is_for_onednn(x)


@torch.no_grad()
def test_an_older_pytorch_is_asked_for_autocast_in_its_own_way(monkeypatch):
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda: False)
    monkeypatch.setattr(torch, "is_autocast_cpu_enabled", lambda: True)
    assert not is_for_onednn(torch.zeros(1, 16, 4, 6))
    monkeypatch.setattr(torch, "is_autocast_cpu_enabled", lambda: False)
    assert is_for_onednn(torch.zeros(1, 16, 4, 6))
