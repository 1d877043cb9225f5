"""
Every stage on another device gives what it gives on the CPU: on CUDA (`pytest -m gpu`), and on a
device of pretence where there is none. The tensors of that say that they are on "mps" and live on
the CPU. As on a real device they do not meet CPU tensors, and as on Apple's GPUs there is no
float64. So a forgotten `.to(device)` fails everywhere.
"""

import copy
import tempfile
from contextlib import nullcontext

import benchmark
import pytest
import torch
from panopticapi.utils import id2rgb
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from detectron2.modeling import build_model
from detectron2.structures import ImageList
from detectron2.utils.events import EventStorage

from oanet_d2.evaluation import PanopticEvaluator
from oanet_d2.modeling import OANetWithTTA
from oanet_d2.modeling.false_positives import with_false_positives
from oanet_d2.modeling.grid import GridInstances
from oanet_d2.modeling.pair_head import EVIDENCE
from oanet_d2.painting import BoxedMasks, combine, order_from_margins
from oanet_d2.painting.matching import match_to_segments, visible_margins
from oanet_d2.painting.semantic import resized_semantic_labels
from tests.conftest import load_config, make_grid_instances, make_input, random_scene, trainer_of

SIZE, NUM, CLASSES = (30, 42), 6, 3
LIMITS = {"overlap_threshold": 0.5, "stuff_area_thresh": 8, "instances_score_thresh": 0.3}
DEVICE = torch.device("mps:0")
COPY = torch.ops.aten.copy_.default
INDEXING = (torch.ops.aten.index.Tensor, torch.ops.aten.index_put_.default)


class PretendTensor(torch.Tensor):
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner):
        if inner.dtype == torch.float64:
            raise TypeError("The device of pretence has no float64.")
        # PyTorch's C++ wants a device that every build has: "meta".
        layout = {"strides": inner.stride(), "storage_offset": inner.storage_offset()}
        kind = {"dtype": inner.dtype, "device": "meta"}
        tensor = torch.Tensor._make_wrapper_subclass(cls, inner.shape, **layout, **kind)
        tensor.inner = inner
        return tensor

    @classmethod
    def __torch_dispatch__(cls, op, types, args=(), kwargs=None):
        return run(op, args, kwargs or {})

    @property
    def device(self):
        return DEVICE

    def tolist(self):
        return self.cpu().tolist()

    def new_tensor(self, data, **kwargs):
        return torch.tensor(data, **{"dtype": self.dtype, "device": DEVICE, **kwargs})


class PretendDevice(TorchDispatchMode):
    """In here `device=DEVICE` and `.to(DEVICE)` work."""

    def __enter__(self):
        torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(x, device=DEVICE) comes here then
        return super().__enter__()

    def __exit__(self, *error):
        torch._C._set_only_lift_cpu_tensors(False)
        return super().__exit__(*error)

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        return run(op, args, kwargs or {})


def run(op, args, kwargs):
    # As on a real device, indices may be on the CPU.
    checked = args[:1] + args[2:] if op in INDEXING and isinstance(args[0], PretendTensor) else args
    tensors = [x for x in tree_leaves((checked, kwargs)) if isinstance(x, torch.Tensor)]
    devices = {x.device.type for x in tensors if x.dim() > 0 or isinstance(x, PretendTensor)}
    if len(devices) > 1 and op is not COPY:
        raise RuntimeError(f"{op}: tensors of the CPU and of the device of pretence meet.")
    on_device = isinstance(args[0], PretendTensor) if op is COPY else DEVICE.type in devices
    if kwargs.get("device") is not None:
        on_device = torch.device(kwargs["device"]).type in ("mps", "meta")
        kwargs = {**kwargs, "device": "cpu"}
    same = {id(x.inner): x for x in tensors if isinstance(x, PretendTensor)}
    args, kwargs = tree_map_only(PretendTensor, lambda x: x.inner, (args, kwargs))
    result = op(*args, **kwargs)
    if not on_device:
        return result

    def wrap(x):  # an operation in place gives back the tensor itself
        return same[id(x)] if id(x) in same else PretendTensor(x)

    return tree_map_only(torch.Tensor, wrap, result)


def scene():
    masks, classes, scores, ids, segments = random_scene(0, NUM, SIZE, num_classes=CLASSES)
    segments[0]["iscrowd"] = 1
    return masks, classes, scores.float(), ids, segments


def painting(to):
    masks, classes, scores, ids, segments = scene()
    masks, classes, scores, ids = map(to, (masks, classes, scores, ids))
    boxes = torch.rand(NUM, 2, 2).sort(dim=1).values.flatten(1) * torch.tensor([42.0, 30.0] * 2)
    pasted = BoxedMasks.paste(to(torch.rand(NUM, 28, 28)), to(boxes), SIZE)
    labels = resized_semantic_labels(to(torch.randn(5, 8, 12)), 4, (29, 45), SIZE, False)
    results = [pasted.full(), pasted.cached().select([2, 0]).full()]
    for x in (masks, BoxedMasks.from_masks(masks), pasted):
        matched = match_to_segments(x, classes, ids, segments)
        order = order_from_margins(visible_margins(x, matched, ids), scores)
        fused = combine(x, scores, classes, order, labels, **LIMITS)
        results += [matched, visible_margins(x, matched, ids), order, fused]
    return results


def with_mistakes(to):
    real = GridInstances(*map(to, vars(make_grid_instances(*scene()[:3])).values()))
    found = with_false_positives(real, CLASSES, 1.0)
    return found.masks[:NUM], found.classes[:NUM], found.boxes[:NUM]  # the others are random


def on(device, stage, mode=None):
    torch.manual_seed(0)
    with mode or nullcontext():
        results = stage(lambda x: x.to(device))
        tensors = [x for x in tree_leaves(results) if isinstance(x, torch.Tensor)]
        assert {x.device.type for x in tensors} == {device.type}
        return tree_map_only(torch.Tensor, lambda x: x.cpu(), results)


def assert_same(found, expected, tolerance=1e-4):
    """Numbers added in another order differ by rounding; in a whole network, a few labels do too."""
    for x, y in zip(tree_leaves(found), tree_leaves(expected), strict=True):
        if not isinstance(y, torch.Tensor):
            is_number = type(y) in (int, float)  # an area, too
            assert x == (pytest.approx(y, rel=10 * tolerance, nan_ok=True) if is_number else y)
        elif y.is_floating_point():
            largest = max([1.0, *y.abs().flatten().tolist()])
            torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance * largest)
        else:
            assert x.dtype == y.dtype and (x != y).sum() <= 10 * tolerance * y.numel()


CPU, CUDA = torch.device("cpu"), torch.device("cuda")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
DEVICES = [
    pytest.param(DEVICE, PretendDevice, 1e-4, id="pretence"),
    pytest.param(CUDA, nullcontext, 1e-3, id="cuda", marks=[pytest.mark.gpu, needs_gpu]),
]


@pytest.fixture(autouse=True)
def single_precision(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # it rounds


@pytest.fixture
def model(tiny_cfg):
    """Its losses leave nothing to chance: every anchor and every proposal counts."""
    head = tiny_cfg.MODEL.SRM_HEAD
    head.GT_FALSE_POSITIVES, head.PAIRS.EVIDENCE = 0.0, tuple(EVIDENCE)
    tiny_cfg.MODEL.RPN.BATCH_SIZE_PER_IMAGE = tiny_cfg.MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE = 10**5
    tiny_cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST = 0.05  # random weights are never sure
    tiny_cfg.MODEL.PANOPTIC_FPN.COMBINE.INSTANCES_CONFIDENCE_THRESH = 0.05
    torch.manual_seed(0)
    return build_model(tiny_cfg)


BATCH = [  # unequal images
    make_input((64, 96), [[8, 8, 40, 60], [20, 20, 28, 44]], [0, 1], 2, seed=0),
    make_input((50, 130), [[8, 8, 90, 40], [60, 20, 120, 49]], [3, 3], 1, seed=1),
]


def training(model, amp=None):
    def stage(to):
        on_device, losses = to(copy.deepcopy(model)).train(), []
        for on_device.train_masks in ("gt", "detections"):
            with EventStorage(), amp or nullcontext():
                losses += on_device(BATCH).values()
        sum(losses).backward()
        assert all(torch.isfinite(p.grad).all() for p in on_device.parameters())
        return [x.detach() for x in losses]

    return stage


def inferring(model, amp=None, wrap=lambda model: model):
    @torch.no_grad()
    def stage(to):
        on_device = to(copy.deepcopy(model)).eval()
        with amp or nullcontext():
            wrapped = wrap(on_device)
            results = wrapped.inference(BATCH, return_fusion_inputs=True)
            on_device.outputs = ()
            smallest = [x["panoptic_seg"] for x in wrapped.inference(BATCH)]
        inputs = [x["fusion_inputs"] for x in results]
        orders = [x.order_inputs.order(rule) for x in inputs for rule in ("srm_mean", "srm_overlap")]
        detected = [(x["instances"].scores, x["instances"].pred_masks) for x in results]
        return orders, [(x["panoptic_seg"], x["sem_seg"]) for x in results], detected, smallest

    return stage


def evaluating(model, amp=None):
    @torch.no_grad()
    def stage(to):
        on_device, orders = to(copy.deepcopy(model)).eval(), ("score", "srm_pairs", "oracle", "class_order")
        margins = torch.arange(64.0).view(8, 8)
        evaluator = PanopticEvaluator(on_device, orders, class_margins=margins - margins.t())
        with tempfile.TemporaryDirectory() as folder, amp or nullcontext():
            outputs = on_device.inference(BATCH, return_fusion_inputs=True)
            for i, (x, output) in enumerate(zip(BATCH, outputs)):
                png = f"{folder}/{i}.png"
                Image.fromarray(id2rgb(x["panoptic_seg"][0].numpy())).save(png)
                truth = {"pan_seg_file_name": png, "segments_info": x["panoptic_seg"][1]}
                evaluator.process([truth], [output])
            results = evaluator.evaluate()
        del results["evaluation"]
        return results, [x["panoptic_seg"][0] for x in outputs]

    return stage


def augmented(model, amp=None):
    cfg = load_config("OcclusionScenes/oanet_R_18.yaml", "TEST.AUG.MIN_SIZES", "(56,)")

    def wrap(on_device):
        # Detectron2 makes a batch of one image by unsqueeze_(), which the pretence cannot do.
        several = on_device.preprocess_image

        def one(x):
            images = several([*x, *x])
            return ImageList(images.tensor[:1], images.image_sizes[:1])

        on_device.preprocess_image = one
        return OANetWithTTA(cfg, on_device)

    return inferring(model, amp, wrap)


@pytest.mark.parametrize("device, mode, tolerance", DEVICES)
@pytest.mark.parametrize("stage", [painting, with_mistakes])
def test_stages(stage, device, mode, tolerance):
    assert_same(on(device, stage, mode()), on(CPU, stage))


@pytest.mark.parametrize("device, mode, tolerance", DEVICES)
@pytest.mark.parametrize("stage", [training, inferring, evaluating, augmented])
def test_the_whole_model(model, stage, device, mode, tolerance):
    assert_same(on(device, stage(model), mode()), on(CPU, stage(model)), tolerance)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("stage", [training, inferring, evaluating, augmented])
def test_the_whole_model_in_half_precision_on_cuda(model, stage, dtype):
    found = on(CUDA, stage(model, torch.autocast("cuda", dtype)))
    assert all(torch.isfinite(x).all() for x in tree_leaves(found) if isinstance(x, torch.Tensor))


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("amp", [False, True])
def test_a_training_of_two_phases_on_cuda(train_cfg, few_scenes, amp):
    train_cfg.MODEL.DEVICE, train_cfg.SOLVER.AMP.ENABLED = "cuda", amp
    train_cfg.SOLVER.SRM_ONLY_SHARE, train_cfg.DATASETS.TEST = 0.5, few_scenes[1:]
    train_cfg.MODEL.SRM_HEAD.TRAIN_MASKS = "gt"  # with false positives
    train_cfg.TEST.ORDERS = "score", "srm_pairs", "oracle"
    trainer = trainer_of(train_cfg)
    trainer.train()
    assert {x.device.type for x in trainer.model.parameters()} == {"cuda"}
    assert trainer._last_eval_results["panoptic_seg/oracle"]["PQ"] >= 0


@pytest.mark.gpu
@needs_gpu
def test_waits_for_the_gpu_do_not_grow_with_instances():
    found, labels = [], torch.zeros(300, 400, dtype=torch.int64, device=CUDA)
    for n in (5, 100):
        x = benchmark.blobs((300, 400), "cuda")[:n]

        def paint(x=x):
            masks = BoxedMasks.paste(x.pred_masks[:, 0], x.pred_boxes.tensor, (300, 400))
            order = torch.arange(len(x), device=CUDA)
            return combine(masks, x.scores, x.pred_classes, order, labels, **LIMITS)

        paint()
        found.append(benchmark.waits_of(paint))
    assert 0 < found[0] == found[1] < 20


@pytest.mark.parametrize("name", ["add", "numpy", "double"])
def test_the_device_of_pretence_refuses_what_a_device_does(name):
    with PretendDevice(), pytest.raises((RuntimeError, TypeError)):
        getattr(torch.ones(2, device=DEVICE), name)(*[torch.ones(2)] * (name == "add"))
