import shutil

import pytest
import torch
from torch import nn

from detectron2.modeling import FPN, build_model
from detectron2.utils.analysis import FlopCountAnalysis
from detectron2.utils.events import EventStorage

from oanet_d2.modeling.execution import Execution
from oanet_d2.modeling.lean import LeanMaskHead
from tests.conftest import make_input, panoptic_fpn_cfg

SIZE = (64, 96)


def batch():
    return [make_input(SIZE, [[8, 8, 40, 60], [20, 20, 28, 44]], [0, 1], 2)]


def build(cfg, *opts, like=None):
    """A model with random weights, or those of `like`."""
    cfg = cfg.clone()
    cfg.merge_from_list(["MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.0", *opts])
    torch.manual_seed(0)
    model = build_model(cfg)
    if like is not None:
        model.load_state_dict(like.state_dict())
    return model


def infer(model):
    with torch.no_grad():
        return model.eval()(batch())[0]


def assert_same_results(ours, expected):
    torch.testing.assert_close(ours["sem_seg"], expected["sem_seg"], rtol=1e-3, atol=1e-3)
    for name in ("scores", "pred_classes"):
        torch.testing.assert_close(
            ours["instances"].get(name), expected["instances"].get(name), rtol=1e-3, atol=1e-3
        )
    same = ours["panoptic_seg"][0] == expected["panoptic_seg"][0]
    assert same.float().mean() > 0.99


def test_nothing_is_changed_by_default(tiny_cfg):
    assert Execution.from_config(tiny_cfg) == Execution()
    result = infer(build(tiny_cfg))
    assert not result["sem_seg"].is_inference() and result["sem_seg"].dtype == torch.float32


def test_channels_last(tiny_cfg):
    plain = build(tiny_cfg)
    model = build(tiny_cfg, "MODEL.OANET.CHANNELS_LAST", "True", like=plain)
    formats = []
    for layer in (model.backbone.bottom_up.stem.conv1, model.sem_seg_head.predictor):
        assert layer.weight.is_contiguous(memory_format=torch.channels_last)
        layer.register_forward_hook(
            lambda m, x, y: formats.append(y.is_contiguous(memory_format=torch.channels_last))
        )
    assert_same_results(infer(model), infer(plain))
    assert formats == [True, True]


def test_channels_last_in_training(tiny_cfg):
    tiny_cfg.MODEL.SRM_HEAD.TRAIN_MASKS = ("gt",)
    plain = build(tiny_cfg).train()
    model = build(tiny_cfg, "MODEL.OANET.CHANNELS_LAST", "True", like=plain).train()
    all_losses = []
    for m in (model, plain):
        torch.manual_seed(0)
        with EventStorage():
            all_losses.append(m(batch()))
        sum(all_losses[-1].values()).backward()
    for name, expected in all_losses[1].items():
        torch.testing.assert_close(all_losses[0][name], expected, rtol=1e-3, atol=1e-4)
    gradient = model.backbone.bottom_up.stem.conv1.weight.grad
    expected = plain.backbone.bottom_up.stem.conv1.weight.grad
    assert (gradient - expected).norm() <= 0.01 * expected.norm()


def test_inference_mode(tiny_cfg):
    model = build(tiny_cfg, "MODEL.OANET.INFERENCE_MODE", "True")
    result = model.eval()(batch())[0]  # no torch.no_grad() around it
    assert result["sem_seg"].is_inference()
    assert_same_results(result, infer(build(tiny_cfg)))
    with EventStorage():  # training is not touched
        assert sum(model.train()(batch()).values()).requires_grad


def test_autocast(tiny_cfg):
    model = build(tiny_cfg, "MODEL.OANET.AUTOCAST", "bfloat16")
    used = []
    model.backbone.fpn_output2.register_forward_hook(lambda m, x, y: used.append(y.dtype))
    result, expected = infer(model), infer(build(tiny_cfg))
    assert torch.bfloat16 in used
    seg, info = result["panoptic_seg"]
    assert seg.dtype == torch.int32 and seg.shape == SIZE
    assert {s["id"] for s in info} == set(seg.unique().tolist()) - {0}
    # the network in bfloat16, nothing after it
    scale = expected["sem_seg"].abs().max()
    assert (result["sem_seg"].float() - expected["sem_seg"]).abs().max() < 0.1 * scale
    used.clear()
    with EventStorage():  # training is SOLVER.AMP's
        model.train()(batch())
    assert torch.bfloat16 not in used


def test_training_in_bfloat16(tiny_cfg):
    tiny_cfg.MODEL.SRM_HEAD.TRAIN_MASKS = ("gt",)
    plain = build(tiny_cfg).train()
    model = build(tiny_cfg, "SOLVER.AMP.ENABLED", "True", like=plain).train()
    used, all_losses = [], []
    model.backbone.fpn_output2.register_forward_hook(lambda m, x, y: used.append(y.dtype))
    for m in (model, plain):
        torch.manual_seed(0)
        with EventStorage():
            all_losses.append(m(batch()))
        sum(all_losses[-1].values()).backward()
    assert used == [torch.bfloat16]
    for name, expected in all_losses[1].items():
        torch.testing.assert_close(all_losses[0][name].float(), expected, rtol=0.05, atol=0.01)
    gradient = model.backbone.fpn_output2.weight.grad
    expected = plain.backbone.fpn_output2.weight.grad
    assert gradient.dtype == torch.float32  # as the weights are
    assert (gradient - expected).norm() <= 0.25 * expected.norm()
    assert infer(model)["sem_seg"].dtype == torch.float32 and used[-1] == torch.float32


def test_mixed_precision_on_a_gpu_is_the_trainers(tiny_cfg):
    tiny_cfg.SOLVER.AMP.ENABLED = True
    tiny_cfg.MODEL.DEVICE = "cuda"
    assert Execution.from_config(tiny_cfg) == Execution()


def test_compile_is_of_the_backbone_and_keeps_names(tiny_cfg, monkeypatch):
    compiled = []
    monkeypatch.setattr(nn.Module, "compile", lambda m, **kwargs: compiled.append(m))
    plain = build(tiny_cfg)
    model = build(tiny_cfg, "MODEL.OANET.COMPILE", "True", like=plain)
    assert compiled == [model.backbone]
    # which is Detectron2's own then; what is not compiled is lean
    assert type(model.backbone) is FPN and type(model.roi_heads.mask_head) is LeanMaskHead
    assert set(model.state_dict()) == set(plain.state_dict())


@pytest.mark.slow
def test_compiled(tiny_cfg):
    plain = build(tiny_cfg)
    model = build(tiny_cfg, "MODEL.OANET.COMPILE", "True", like=plain)
    assert set(model.state_dict()) == set(plain.state_dict())
    assert_same_results(infer(model), infer(plain))
    with EventStorage():
        losses = sum(model.train()(batch()).values())
    losses.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.backbone.parameters())


@pytest.mark.parametrize(
    "opts, words",
    [
        (["MODEL.OANET.AUTOCAST", "half"], "MODEL.OANET.AUTOCAST is 'half'; it must be one of"),
        (["MODEL.OANET.AUTOCAST", "float16"], "'float16'.*use 'bfloat16', or another MODEL.DEVICE"),
    ],
)
def test_refuses_what_cannot_work(tiny_cfg, opts, words):
    tiny_cfg.merge_from_list(opts)
    with pytest.raises(ValueError, match=words):
        build_model(tiny_cfg)


def test_refuses_to_compile_without_a_compiler(tiny_cfg, monkeypatch):
    tiny_cfg.MODEL.OANET.COMPILE = True
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(ValueError, match=r"MODEL.OANET.COMPILE is True.*no g\+\+ or clang\+\+"):
        Execution.from_config(tiny_cfg)
    tiny_cfg.MODEL.DEVICE = "cuda"
    assert Execution.from_config(tiny_cfg).compile


def test_detectron2_counts_the_operations_of_what_it_knows(two_threads, tiny_cfg):
    image = [{"image": torch.rand(3, 64, 96)}]
    ours, expected = (
        FlopCountAnalysis(build_model(cfg).eval(), image).by_module()
        for cfg in (tiny_cfg, panoptic_fpn_cfg(tiny_cfg))
    )
    for part in ("backbone", "proposal_generator"):
        assert ours["model." + part] == expected["model." + part] > 0
    assert ours["model.roi_heads"] > 0 and ours["model.sem_seg_head"] > 0
