"""
Export an OANet to one ONNX file, which :mod:`oanet_d2.runtime` runs without PyTorch and Detectron2.

    oanet-d2 export --config-file OcclusionScenes/oanet_lite0.yaml \\
        --output model.onnx MODEL.WEIGHTS output/occlusion_scenes/model_final.pth

The file holds the network and the ranking, for one image of any size. docs/deploy.md describes it.
"""

import argparse
import copy
import json
import logging
import os
import sys
import time
import warnings
from types import SimpleNamespace
from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Tuple

import onnxscript
import torch
from onnxscript import BOOL, FLOAT, INT64, opset18
from torch import nn
from torch.nn import functional as F
from torchvision.ops import nms

from detectron2 import layers
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from detectron2.modeling.poolers import ROIPooler, assign_boxes_to_levels
from detectron2.modeling.proposal_generator import RPN
from detectron2.modeling.roi_heads import (
    BaseMaskRCNNHead,
    CascadeROIHeads,
    FastRCNNOutputLayers,
    StandardROIHeads,
)
from detectron2.projects.point_rend import PointRendSemSegHead
from detectron2.utils.logger import setup_logger

from .config import is_lazy
from .files import atomic_path
from .modeling import OANet, PairwiseRankingHead
from .modeling.grid import detections_on_grid
from .painting.masks import grid_size
from .painting.pairs import Pairs
from .painting.ranking import overlap_margins
from .predictor import PanopticPredictor
from .runtime import FORMAT_VERSION

__all__ = ["ExportError", "PanopticGraph", "export_onnx"]

logger = logging.getLogger("oanet_d2.export")  # also as __main__

OPSET = 18
op: Any = opset18  # its types know more about tensors than mypy can follow
# Orders that the runtime makes of comparisons. The graph applies every other rule itself.
MARGINS = {"srm_pairs": lambda inputs: inputs.pair_margins, "srm_overlap": overlap_margins}
OUTPUTS = "boxes", "scores", "classes", "masks", "semantic"


class ExportError(ValueError):
    """A model that cannot be exported. The message names the part and the reason."""


class PanopticGraph(nn.Module):
    """
    :meth:`OANet.inference` of one image up to the painting, for an exporter: tensors alone, and no
    decision that depends on their values.
    """

    def __init__(self, model: OANet):
        """
        Raises:
            ExportError: the model has a part that works otherwise than Detectron2's.
        """
        super().__init__()
        _check(model)
        self.model: Any = model
        self.backbone: Any = _with_constant_padding(model.backbone)

    def forward(self, image: torch.Tensor) -> Tuple[torch.Tensor, ...]:
        """
        Args:
            image: (H, W, 3) uint8, resized, channels as `INPUT.FORMAT` says.

        Returns:
            boxes (N, 4) float32, XYXY in pixels, within the image; scores (N,) float32, descending;
            classes (N,) int64; masks (N, M, M) float32, probabilities; semantic (1 + S, h, w) float32
            logits; and (N, N) float32 margins for :func:`order_from_margins` or an (N,) int64 order.
            The N instances are those that are painted.
        """
        model, size = self.model, (image.shape[0], image.shape[1])
        features = self.backbone(self._preprocess(image))
        semantic = model.semantic_branch.layers(features)
        boxes, scores, classes = self._detections(features, self._proposals(features, size), size)
        masks = self._masks(features, boxes, classes)
        order = self._order(semantic, features, (boxes, scores, classes, masks), size)
        return boxes, scores, classes, masks, model.semantic_branch.stuff_scores(semantic)[0], order

    def _preprocess(self, image: torch.Tensor) -> torch.Tensor:
        backbone, (height, width) = self.backbone, image.shape[:2]
        x = (image.permute(2, 0, 1).float() - self.model.pixel_mean) / self.model.pixel_std
        # As Detectron2's ImageList pads.
        divisor, side = max(backbone.size_divisibility, 1), backbone.padding_constraints.get("square_size")
        rows, columns = (n * divisor for n in grid_size((height, width), divisor))
        if side:
            rows = columns = side
        return F.pad(x, (0, columns - width, 0, rows - height))[None]

    def _proposals(self, features: Dict, size: Tuple) -> torch.Tensor:
        # As Detectron2's find_top_rpn_proposals, with NMS level by level.
        rpn = self.model.proposal_generator
        maps = [features[name] for name in rpn.in_features]
        boxes, scores = [], []
        for anchors, logits, deltas in zip(rpn.anchor_generator(maps), *rpn.rpn_head(maps)):
            logits = logits[0].permute(1, 2, 0).flatten()
            deltas = deltas[0].unflatten(0, (-1, 4)).permute(2, 3, 0, 1).reshape(-1, 4)
            best, indices = logits.topk(torch.sym_min(logits.shape[0], rpn.pre_nms_topk[False]))
            found = rpn.box2box_transform.apply_deltas(deltas[indices], anchors.tensor[indices])
            found = _clip(found, size)
            large = (found[:, 2:] - found[:, :2] > rpn.min_box_size).all(1).nonzero()[:, 0]
            found, best = found[large], best[large]
            kept = nms(found, best, rpn.nms_thresh)
            boxes.append(found[kept])
            scores.append(best[kept])
        order = torch.cat(scores).argsort(descending=True)[: rpn.post_nms_topk[False]]
        return torch.cat(boxes)[order]

    def _detections(self, features: Dict, boxes: torch.Tensor, size: Tuple):
        heads = self.model.roi_heads
        maps = [features[name] for name in heads.box_in_features]
        stages = [(heads.box_head, heads.box_predictor)]
        if isinstance(heads, CascadeROIHeads):
            stages = list(zip(heads.box_head, heads.box_predictor))
        probabilities: List[torch.Tensor] = []
        for box_head, predictor in stages:
            if probabilities:
                boxes = _clip(boxes, size)
            logits, deltas = predictor(box_head(_pool(heads.box_pooler, maps, boxes)))
            probabilities.append(logits.sigmoid() if predictor.use_sigmoid_ce else logits.softmax(1))
            boxes = predictor.box2box_transform.apply_deltas(deltas, boxes)

        # As fast_rcnn_inference of the last stage's predictor.
        scores = torch.stack(probabilities).mean(0)[:, :-1]
        rows, classes = (scores > predictor.test_score_thresh).nonzero().unbind(1)
        scores, boxes = scores[rows, classes], _clip(boxes.unflatten(1, (-1, 4)), size)
        boxes = boxes[rows, classes] if boxes.shape[1] > 1 else boxes[rows, 0]
        # Boxes of different classes do not meet when each class has a place of its own.
        offsets = classes.float() * (size[0] + size[1])
        kept = nms(boxes + offsets[:, None], scores, predictor.test_nms_thresh)
        kept = kept[: predictor.test_topk_per_image] if predictor.test_topk_per_image >= 0 else kept
        boxes, scores, classes = boxes[kept], scores[kept], classes[kept]
        painted = (scores >= self.model.combine_instances_score_thresh).nonzero()[:, 0]
        return boxes[painted], scores[painted], classes[painted]

    def _masks(self, features: Dict, boxes: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
        heads = self.model.roi_heads
        maps = [features[name] for name in heads.mask_in_features]
        logits = heads.mask_head.layers(_pool(heads.mask_pooler, maps, boxes))
        if logits.shape[1] == 1:  # one mask for all classes
            return logits[:, 0].sigmoid()
        return logits[torch.arange(logits.shape[0]), classes].sigmoid()

    def _order(self, semantic, features: Dict, detected: Tuple, size: Tuple) -> torch.Tensor:
        model, (boxes, scores, classes, masks) = self.model, detected
        if model.order == "score":
            return torch.arange(scores.shape[0])
        instances: Any = SimpleNamespace(
            image_size=size,
            pred_boxes=_Boxes(boxes),
            scores=scores,
            pred_classes=classes,
            pred_masks=masks[:, None],
        )
        on_grid = detections_on_grid(instances, model.srm_stride, 0)
        arguments = [on_grid], model.ranking_maps([size], semantic, features)
        if isinstance(model.srm_head, PairwiseRankingHead):
            (inputs,) = model.srm_head.order_inputs(*arguments, _appearance_means)
        else:
            (inputs,) = model.srm_head.order_inputs(*arguments)
        return MARGINS[model.order](inputs) if model.order in MARGINS else inputs.order(model.order)


class _Boxes(NamedTuple):
    """What is needed of Detectron2's Boxes, which ask how many they are."""

    tensor: torch.Tensor

    def area(self) -> torch.Tensor:
        sides = self.tensor[:, 2:] - self.tensor[:, :2]
        return sides[:, 0] * sides[:, 1]


def _clip(boxes: torch.Tensor, size: Tuple) -> torch.Tensor:
    x, y = boxes[..., 0::2].clamp(0, size[1]), boxes[..., 1::2].clamp(0, size[0])
    return torch.stack([x, y], dim=-1).flatten(-2)


def _pool(pooler: ROIPooler, maps: List[torch.Tensor], boxes: torch.Tensor) -> torch.Tensor:
    """Detectron2's :meth:`ROIPooler.forward` for the boxes (N, 4) of one image."""
    rois = F.pad(boxes, (1, 0))  # all of image 0
    if len(maps) == 1:
        return pooler.level_poolers[0](maps[0], rois)
    limits = pooler.min_level, pooler.max_level, pooler.canonical_box_size, pooler.canonical_level
    levels = assign_boxes_to_levels([_Boxes(boxes)], *limits)
    pooled = boxes.new_zeros(boxes.shape[0], maps[0].shape[1], *pooler.output_size)
    for level, (x, pool) in enumerate(zip(maps, pooler.level_poolers)):
        indices = (levels == level).nonzero()[:, 0]
        pooled = pooled.index_put((indices,), pool(x, rois[indices]))
    return pooled


def _appearance_means(features: torch.Tensor, pairs: Pairs) -> torch.Tensor:
    """:func:`oanet_d2.painting.pairs.appearance_means` by an operator that ONNX has a loop for."""
    sums = sums_in_overlaps(pairs.masks > 0, features.flatten(1).t())
    whole = sums.diagonal().t()
    of_both = torch.stack([whole[pairs.a], whole[pairs.b]])
    return torch.stack(pairs.mean_over_parts(of_both, sums[pairs.a, pairs.b]), dim=1)


@torch.library.custom_op("oanet_d2::sums_in_overlaps", mutates_args=())
def sums_in_overlaps(masks: torch.Tensor, by_cell: torch.Tensor) -> torch.Tensor:
    """
    Args:
        masks: (N, cells) bool.
        by_cell: (cells, D) float.

    Returns:
        (N, N, D): the sum of the cells that two instances share.
    """
    rows = masks.float()
    return torch.einsum("ac,bc,cd->abd", rows, rows, by_cell)


@sums_in_overlaps.register_fake
def _(masks, by_cell):
    return by_cell.new_empty(masks.shape[0], masks.shape[0], by_cell.shape[1])


@onnxscript.script(onnxscript.values.Opset("oanet_d2", 1), default_opset=op)
def onnx_sums_in_overlaps(masks: BOOL, by_cell: FLOAT) -> FLOAT:
    # The same. For every instance only its own cells are looked at. One without a cell is added,
    # because a loop without a turn has no sizes.
    columns = op.CastLike(op.Transpose(masks, perm=[1, 0]), by_cell)
    padded = op.Pad(masks, op.Constant(value_ints=[0, 0, 1, 0]))

    @onnxscript.graph()
    def of_one(i: INT64, go_on: BOOL):
        own = op.Squeeze(op.NonZero(op.Gather(padded, i)), [0])
        of_own = op.Gemm(op.Gather(columns, own), op.Gather(by_cell, own), transA=1)
        return op.Identity(go_on), of_own

    sums = op.Loop(op.Squeeze(op.Shape(padded, start=0, end=1)), True, body=of_one)
    return op.Slice(sums, [0], [-1], [0])


def onnx_stable_sort(x, stable=True, dim=-1, descending=False):
    """
    `aten.sort.stable` of a vector, which the exporter lacks. Not every engine's TopK keeps equal values
    in their order, so it sorts positions, which are all different.
    """
    if len(x.shape) != 1:
        raise ExportError(f"A stable sort of {len(x.shape)} dimensions cannot be exported; sort vectors.")
    length = op.Shape(x)
    index = op.Range(op.Constant(value_int=0), op.Squeeze(length), op.Constant(value_int=1))
    own, own_index = (op.Unsqueeze(y, op.Constant(value_ints=[1])) for y in (x, index))
    beats = op.Greater(x, own) if descending else op.Less(x, own)
    before = op.Or(beats, op.And(op.Equal(x, own), op.Less(index, own_index)))
    position = op.ReduceSum(op.Cast(before, to=7), op.Constant(value_ints=[1]), keepdims=0)  # int64
    _, order = op.TopK(position, length, largest=0)
    return op.Gather(x, order), order


def _with_constant_padding(backbone: Any) -> nn.Module:
    """
    A copy without timm's Conv2dSame, which finds its padding from the size of the input. Here that is
    a multiple of all strides, so the padding is always the same.
    """
    backbone = copy.deepcopy(backbone)
    for name, x in list(backbone.named_modules()):
        if type(x).__name__ == "Conv2dSame":
            padding: Any = ()
            for k, stride, dilation in zip(x.kernel_size, x.stride, x.dilation):
                total = max((k - 1) * dilation + 1 - stride, 0)
                padding = (total // 2, total - total // 2, *padding)  # the last dimension first
            conv = nn.Conv2d(
                x.in_channels, x.out_channels, x.kernel_size, x.stride, 0, x.dilation, x.groups,
                x.bias is not None,
            )  # fmt: skip
            conv.load_state_dict(x.state_dict())
            backbone.set_submodule(name, nn.Sequential(nn.ZeroPad2d(padding), conv))
    return backbone


def _check(model: Any) -> None:
    """Refuses what PanopticGraph would compute otherwise than the model does."""
    if not isinstance(model, OANet):
        raise ExportError(f"The model is a {type(model).__name__}; it must be an OANet.")
    for name, x in model.named_modules():
        if isinstance(x, (layers.DeformConv, layers.ModulatedDeformConv)):
            raise ExportError(f"{name} is a deformable convolution, which ONNX Runtime does not have.")
        if isinstance(x, ROIPooler) and not isinstance(x.level_poolers[0], layers.ROIAlign):
            raise ExportError(f"{name} pools by {type(x.level_poolers[0]).__name__}; it must be ROIAlign.")
        if isinstance(x, PointRendSemSegHead):
            raise ExportError(f"{name} is PointRend's, which PyTorch cannot convert to ONNX.")
    rpn, heads = model.proposal_generator, model.roi_heads
    standard = CascadeROIHeads if isinstance(heads, CascadeROIHeads) else StandardROIHeads
    _same("MODEL.PROPOSAL_GENERATOR.NAME", rpn, RPN, ["forward", "predict_proposals"])
    _same("MODEL.ANCHOR_GENERATOR.NAME", rpn.anchor_generator, DefaultAnchorGenerator, ["forward"])
    parts = ["forward", "_forward_box", "_forward_mask", "forward_with_given_boxes"]
    _same("MODEL.ROI_HEADS.NAME", heads, standard, parts)
    predictors = heads.box_predictor if standard is CascadeROIHeads else [heads.box_predictor]
    for x in predictors:
        parts = ["forward", "inference", "predict_boxes", "predict_probs"]
        _same("roi_heads.box_predictor", x, FastRCNNOutputLayers, parts)
    _same("MODEL.ROI_MASK_HEAD.NAME", heads.mask_head, BaseMaskRCNNHead, ["forward"])


def _same(where: str, x: Any, known: type, methods: Sequence[str]) -> None:
    for name in methods:
        if getattr(type(x), name, None) is not getattr(known, name):
            raise ExportError(
                f"{where} is {type(x).__name__}, which has its own {name}(). Only Detectron2's "
                f"{known.__name__} can be exported."
            )


def export_onnx(predictor: PanopticPredictor, path: str) -> None:
    """
    Args:
        predictor: of the model, on the CPU.
        path: the file to write, `*.onnx`.

    Raises:
        ExportError: the model cannot be exported.
    """
    if predictor.cfg.TEST.AUG.ENABLED:
        raise ExportError(
            "TEST.AUG.ENABLED is True, but an exported model sees each picture once; set it to False."
        )
    model = predictor.model
    graph = PanopticGraph(model).eval()
    side, sizes = model.backbone.padding_constraints.get("square_size", 0), predictor.cfg.INPUT
    if side and not 0 < sizes.MIN_SIZE_TEST <= sizes.MAX_SIZE_TEST <= side:
        raise ExportError(
            f"INPUT.MIN_SIZE_TEST and INPUT.MAX_SIZE_TEST are {sizes.MIN_SIZE_TEST} and "
            f"{sizes.MAX_SIZE_TEST}; they must be from 1 to {side}, the square that the backbone wants."
        )
    # Two sizes that no other number equals: PyTorch takes equal ones for the same.
    size = (side - 2, side - 1) if 0 < side <= 330 else (200, 330)
    image = torch.zeros(*size, 3, dtype=torch.uint8)
    names = [*OUTPUTS, "margins" if model.order in MARGINS else "order"]
    any_size = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    try:
        with torch.no_grad():
            program = torch.export.export(graph, (image,), dynamic_shapes=(any_size,), strict=False)
            onnx: Any = torch.onnx.export(
                program,
                (),
                input_names=["image"],
                output_names=names,
                opset_version=OPSET,
                dynamo=True,
                verbose=False,
                custom_translation_table={
                    torch.ops.oanet_d2.sums_in_overlaps.default: onnx_sums_in_overlaps,
                    torch.ops.aten.sort.stable: onnx_stable_sort,
                },
            )
    except Exception as error:  # the exporter has many kinds
        reason = (str(error).strip().splitlines() or [""])[0]
        raise ExportError(
            f"PyTorch cannot export this model: {type(error).__name__}: {reason}. A part of your own may "
            "decide by the values of tensors, or use what ONNX does not have; the error before says more."
        ) from error
    onnx.model.metadata_props["oanet_d2"] = json.dumps(_description(predictor))
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    with atomic_path(path) as temporary:
        onnx.save(temporary)


def _description(predictor: PanopticPredictor) -> Dict[str, Any]:
    cfg, model, classes = predictor.cfg, predictor.model, predictor.metadata
    description = {
        "version": FORMAT_VERSION,
        "input_format": cfg.INPUT.FORMAT,
        "min_size": cfg.INPUT.MIN_SIZE_TEST,
        "max_size": cfg.INPUT.MAX_SIZE_TEST,
        "order": model.order,
        "overlap_threshold": model.combine_overlap_thresh,
        "stuff_area_thresh": model.combine_stuff_area_thresh,
        "keep_things_free": model.keep_things_free,
        "semantic_stride": model.semantic_branch.common_stride,
    }
    for kind in ("thing", "stuff"):
        names = classes.get(f"{kind}_classes")
        colors = classes.get(f"{kind}_colors") or [[128, 128, 128]] * len(names)
        id_of = {index: i for i, index in classes.get(f"{kind}_dataset_id_to_contiguous_id").items()}
        description[f"{kind}_classes"], description[f"{kind}_colors"] = names, colors
        # Stuff 0, "things", has no id.
        description[f"{kind}_ids"] = [id_of.get(index) for index in range(len(names))]
    return description


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="oanet-d2 export",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    about = "path to config file; not needed with a model_final.safetensors as MODEL.WEIGHTS"
    parser.add_argument("--config-file", metavar="FILE", help=about)
    parser.add_argument("--output", required=True, metavar="FILE", help="the file to write, *.onnx")
    parser.add_argument("opts", nargs=argparse.REMAINDER, default=[], help="as for predict")
    return parser


def main(argv: Optional[List[str]] = None) -> int:
    parser = get_parser()
    args = parser.parse_args(argv)
    setup_logger(name="oanet_d2")
    for name in ("onnxscript", "onnx_ir", "torch.fx"):
        logging.getLogger(name).setLevel(logging.ERROR)
    on_cpu = ["train.device=cpu"] if is_lazy(args.config_file) else ["MODEL.DEVICE", "cpu"]
    start, opts = time.perf_counter(), [*args.opts, *on_cpu]
    try:
        predictor = PanopticPredictor.from_config(args.config_file, opts=opts)
        with warnings.catch_warnings():  # of the exporter, about PyTorch's and Detectron2's own code
            warnings.simplefilter("ignore")
            export_onnx(predictor, args.output)
    except (ValueError, OSError) as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    size, seconds = os.path.getsize(args.output) / 2**20, time.perf_counter() - start
    logger.info(f"Written to {args.output}: {size:.1f} MiB, {seconds:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
