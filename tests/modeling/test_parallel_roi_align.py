import copy

import pytest
import torch
from torch import nn

from detectron2.layers import ROIAlign
from detectron2.modeling import build_model

from oanet_d2.modeling.parallel_roi_align import ParallelROIAlign, make_roi_align_parallel


@pytest.fixture(autouse=True)
def three_threads(threads_as_before):
    torch.set_num_threads(3)


def random_case(num_boxes, batch=2):
    generator = torch.Generator().manual_seed(num_boxes)
    maps = torch.randn(batch, 8, 20, 30, generator=generator)
    first = torch.rand(num_boxes, 2, generator=generator) * 60
    sizes = torch.rand(num_boxes, 2, generator=generator) * 60
    images = torch.randint(batch, (num_boxes, 1), generator=generator)
    return maps, torch.cat([images, first, first + sizes], dim=1)


def both(**kwargs):
    theirs = ROIAlign((7, 5), 0.25, 0, **kwargs)
    ours = copy.deepcopy(theirs)
    assert make_roi_align_parallel(ours) is ours and type(ours) is ParallelROIAlign
    return ours, theirs


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("num_boxes", [0, 1, 2, 3, 50, 130])
def test_equals_detectron2s_to_the_bit(num_boxes, aligned, memory_format):
    maps, boxes = random_case(num_boxes)
    maps = maps.contiguous(memory_format=memory_format)
    ours, theirs = both(aligned=aligned)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert torch.equal(ours(maps, boxes), theirs(maps, boxes))


@pytest.mark.parametrize("num_boxes, expected", [(50, [16, 17, 17]), (130, [2, 32, 32, 32, 32])])
def test_every_thread_gets_a_few_boxes_at_a_time(monkeypatch, num_boxes, expected):
    parts = []
    align = ROIAlign.forward
    monkeypatch.setattr(ROIAlign, "forward", lambda *args: parts.append(len(args[2])) or align(*args))
    maps, boxes = random_case(num_boxes)
    ours, theirs = both()
    with torch.no_grad():
        result = ours(maps, boxes)
    assert sorted(parts) == expected
    assert torch.equal(result, theirs(maps, boxes))


def test_gradients_are_detectron2s():
    maps, boxes = random_case(20)
    found = []
    for align in both():
        x = maps.clone().requires_grad_()
        align(x, boxes).square().sum().backward()
        found.append(x.grad)
    assert torch.equal(*found) and found[0].any()


def test_autocast():
    maps, boxes = random_case(20)
    ours, theirs = both()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(ours(maps.bfloat16(), boxes), theirs(maps.bfloat16(), boxes))


def test_a_class_of_ones_own_stays_what_it_is():
    class Mine(ROIAlign):
        pass

    model = nn.Sequential(Mine((7, 7), 1.0, 0))
    make_roi_align_parallel(model)
    assert type(model[0]) is Mine


def test_every_oanet_has_it(tiny_cfg):
    kinds = {type(m) for m in build_model(tiny_cfg).modules() if isinstance(m, ROIAlign)}
    assert kinds == {ParallelROIAlign}
