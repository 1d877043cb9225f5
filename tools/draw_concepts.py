#!/usr/bin/env python3
"""
Draw the pictures of docs/concepts.md: what the ranking looks at and decides. The scene is the one
where the largest instance is lost if painted by detection score, the paper's mean misleads too, and
the look into the overlap does not.

    make demo
    python tools/draw_concepts.py                                # the demo's model
    python tools/draw_concepts.py MODEL.WEIGHTS my_model.pth     # any config override
"""

import argparse
import io
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Dict, List, Optional, Set, Tuple

import matplotlib

matplotlib.use("Agg")

import numpy as np
import torch
from matplotlib import pyplot as plt
from panopticapi.utils import rgb2id
from PIL import Image
from tqdm import tqdm

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data import detection_utils as utils

from oanet_d2 import complete_config, load_config
from oanet_d2.checkpoint import OANetCheckpointer
from oanet_d2.data import PanopticDatasetMapper
from oanet_d2.engine import OANetTrainer, prepare_datasets
from oanet_d2.modeling import RankingEvidence
from oanet_d2.modeling.candidates import build_instance_tensor, labels_to_grid
from oanet_d2.modeling.matching import visible_margins
from oanet_d2.modeling.ranking import mean_scores, overlap_margins
from oanet_d2.modeling.semantic_labels import semantic_labels
from oanet_d2.visualization import draw_order_comparison
from oanet_d2.whole_files import whole_path

ROOT = Path(__file__).resolve().parent.parent
CONFIG = ROOT / "configs" / "OcclusionScenes" / "oanet_R_18.yaml"
FRONT, BEHIND = "#d01c8b", "#2c7bb6"  # colors of the two instances in every picture
PANEL = 2.5  # inches
DPI = 100


@dataclass
class Example:
    """
    A scene and two of its instances that overlap.

    Attributes:
        input: the dataset dict.
        result: of the model, with "ranking_evidence".
        front, behind: indices of the two; the first is the one that the ground truth shows.
    """

    input: Dict
    result: Dict
    front: int
    behind: int

    @property
    def evidence(self) -> RankingEvidence:
        return self.result["ranking_evidence"]

    def pair(self, values):
        """Of N values the two that are meant, the one in front first."""
        return values[self.front], values[self.behind]


# ---------------------------------------------------------------------------- which scene to show


def most_telling_pair(
    evidence: RankingEvidence, true_margins: torch.Tensor, saved: Set[int]
) -> Optional[Tuple[float, int, int]]:
    """
    Of the pairs that detection score and mean (Eq. 3) put the wrong way round and the look into the
    overlap and the comparison of pairs put the right way round, the one with the largest overlap.

    Args:
        evidence: N instances.
        true_margins: (N, N), see :func:`visible_margins`.
        saved: instances that the order decides on; one of them is the one in front.

    Returns:
        (cells by which the ground truth decides, index in front, index behind); None without one.
    """
    means = mean_scores(evidence.score_map, evidence.masks, evidence.classes)
    margins = overlap_margins(evidence.score_map, evidence.masks, evidence.classes)
    telling = (evidence.scores[:, None] < evidence.scores) & (means[:, None] < means)
    telling &= (margins > 0) & (evidence.pair_margins > 0) & (true_margins > 0)
    telling &= torch.tensor([i in saved for i in range(len(means))])[:, None]
    if not telling.any():
        return None
    clear = true_margins * telling
    front, behind = divmod(int(clear.argmax()), len(clear))
    return float(clear[front, behind]), front, behind


@torch.no_grad()
def find_example(model, mapper, dataset: str) -> Example:
    """
    The dataset's most telling pair.

    Raises:
        ValueError: there is none.
    """
    best, example, rules = 0.0, None, ("score", model.order)
    for input in tqdm(DatasetCatalog.get(dataset), desc=f"looking through {dataset}"):
        (result,) = model([mapper(input)])
        evidence = result["ranking_evidence"]
        painted = [painted_instances(combined(result, model, rule)) for rule in rules]
        ids = torch.from_numpy(read_ids(input).astype(np.int64))
        on_grid = labels_to_grid(ids, model.srm_head.stride, evidence.masks.shape[1:], 0)
        true_margins = visible_margins(
            evidence.masks, evidence.classes, on_grid, input["segments_info"]
        )
        found = most_telling_pair(evidence, true_margins, painted[1] - painted[0])
        if found and found[0] > best:
            best, example = found[0], Example(input, result, *found[1:])
    if example is None:
        raise ValueError(
            f"In {dataset} there is no instance that the order by detection score loses, the mean of "
            "Eq. 3 gets wrong and the model gets right; train it longer (make demo)."
        )
    return example


def combined(result: Dict, model, rule: str):
    """The panoptic result in the order of a rule."""
    instances = result["instances"]
    semantic = semantic_labels(result["sem_seg"], model.keep_things_free)
    order = result["ranking_evidence"].order(rule)
    return model.combine(instances.pred_masks, instances, semantic, order)


def painted_instances(panoptic) -> Set[int]:
    return {s["instance_id"] for s in panoptic[1] if s["isthing"]}


def read_ids(input: Dict) -> np.ndarray:
    return rgb2id(utils.read_image(input["pan_seg_file_name"], "RGB"))


# ----------------------------------------------------------------------------------- the pictures


def draw_instance_tensor(example: Example, image: np.ndarray, names: List[str]):
    """The image, and the channels of the instance tensor that are not empty."""
    evidence = example.evidence
    tensor = build_instance_tensor(evidence.masks, evidence.classes, len(names))
    of_pair = example.pair(evidence.classes.tolist())
    others = [c for c in tensor.flatten(1).any(1).nonzero()[:, 0].tolist() if c not in of_pair]
    shown = [*of_pair, *others][:4]
    figure, axes = panels(1 + len(shown))
    axes[0].imshow(image)
    axes[0].set_title("image, two instances")
    outline(axes[0], example, image.shape[:2])
    for axis, c in zip(axes[1:], shown):
        axis.imshow(tensor[c], cmap="gray", vmin=0, vmax=1)
        axis.set_title(f"channel “{names[c]}”")
    return figure


def draw_score_map(example: Example, names: List[str]):
    """S for the classes of the two instances, and the mean over each (Eq. 3)."""
    evidence = example.evidence
    means = mean_scores(evidence.score_map, evidence.masks, evidence.classes)
    figure, axes = panels(2, width=1.6)
    classes = example.pair(evidence.classes.tolist())
    for axis, c, mean in zip(axes, classes, example.pair(means.tolist())):
        shown = axis.imshow(evidence.score_map[c], cmap="viridis", vmin=0, vmax=1)
        axis.set_title(f"S of “{names[c]}”\nmean over the {names[c]}: {mean:.2f}")
        outline(axis, example, evidence.masks.shape[1:])
    figure.colorbar(shown, ax=axes)
    return figure


def draw_overlap(example: Example, names: List[str]):
    """The same map only where the two meet, and what every rule makes of the pair."""
    evidence = example.evidence
    classes = example.pair(evidence.classes.tolist())
    both = evidence.masks[example.front] & evidence.masks[example.behind]
    inside = evidence.score_map[list(classes)][:, both].mean(dim=1)
    cells = both.sum()
    probability = float(evidence.pair_margins[example.front, example.behind] / cells + 1) / 2
    means = mean_scores(evidence.score_map, evidence.masks, evidence.classes)
    rules = {
        "score:\ndetection score": example.pair(evidence.scores.tolist()),
        "srm_mean:\nmean of S": example.pair(means.tolist()),
        "srm_overlap:\nS in the overlap": inside.tolist(),
        "srm_pairs:\nthe comparison": (probability, 1 - probability),
    }
    figure, axes = panels(3, widths=(1, 1, 1.3))
    rows, columns = (slice(int(x.min()), int(x.max()) + 1) for x in torch.nonzero(both).T)
    for axis, c in zip(axes, classes):
        seen = evidence.score_map[c].where(both, torch.nan)[rows, columns]
        axis.imshow(seen, cmap="viridis", vmin=0, vmax=1)
        axis.set_title(f"S of “{names[c]}”\nwhere the two meet")
    heights = np.arange(len(rules))
    for offset, values, c, color in zip((-0.2, 0.2), zip(*rules.values()), classes, (FRONT, BEHIND)):
        bars = axes[2].barh(heights + offset, values, height=0.4, color=color, label=names[c])
        axes[2].bar_label(bars, fmt="%.2f", padding=2, fontsize=7)
    axes[2].set_axis_on()
    axes[2].set_yticks(heights, rules, fontsize=8)
    axes[2].invert_yaxis()
    axes[2].set_xlim(0, 1.2)
    axes[2].set_xticks([0, 0.5, 1])
    axes[2].spines[["top", "right"]].set_visible(False)
    axes[2].legend(fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2, frameon=False)
    return figure


def draw_painting(example: Example, model, image: np.ndarray, metadata):
    """Painting by score (above) and in the model's order (below), step by step."""
    orders = {rule: example.evidence.order(rule) for rule in ("score", model.order)}
    figure, axes = plt.subplots(
        2, 4, figsize=(4 * PANEL, 2 * PANEL), layout="constrained", squeeze=False
    )
    names = example.pair(example.evidence.classes.tolist())
    names = {i: metadata.thing_classes[c] for i, c in zip((example.front, example.behind), names)}
    for row, (rule, order) in zip(axes, orders.items()):
        steps = sorted((int((order == i).nonzero()), i) for i in names)
        titles = [f"{names[i]}: place {place + 1}" for place, i in steps]
        ends = [place + 1 for place, _ in steps]
        for axis, end, title in zip(row, [*ends, len(order)], [*titles, "all instances"]):
            axis.imshow(paint(example.result, model, order[:end], image, metadata, stuff=False))
            axis.set_title(title)
        row[3].imshow(paint(example.result, model, order, image, metadata, stuff=True))
        row[3].set_title("and stuff")
        row[0].set_ylabel(rule)
        for axis in row:
            axis.set(xticks=[], yticks=[])
    return figure


def paint(result: Dict, model, order: torch.Tensor, image: np.ndarray, metadata, stuff: bool):
    """
    The fusion's result in the classes' colors; what is free shows the image in gray.
    """
    instances = result["instances"]
    semantic = semantic_labels(result["sem_seg"], model.keep_things_free)
    if not stuff:
        semantic = torch.zeros_like(semantic)
    panoptic_seg, segments = model.combine(instances.pred_masks, instances, semantic, order)
    gray = image.mean(axis=2, keepdims=True)
    picture = np.repeat((gray * 0.5 + 100).astype(np.uint8), 3, axis=2)
    for s in segments:
        colors = metadata.thing_colors if s["isthing"] else metadata.stuff_colors
        picture[panoptic_seg.numpy() == s["id"]] = colors[s["category_id"]]
    return picture


def panels(number: int, width: float = 1.0, widths=None):
    figure, axes = plt.subplots(
        1,
        number,
        figsize=(PANEL * width * number, PANEL * max(width, 1.2)),
        layout="constrained",
        width_ratios=widths,
    )
    for axis in axes:
        axis.set_axis_off()
    return figure, axes


def outline(axis, example: Example, size: Tuple[int, int]):
    """The two instances' outlines on a picture of `size` = (H, W)."""
    masks = example.pair(example.evidence.masks)
    for mask, color in zip(masks, (FRONT, BEHIND)):
        height, width = (np.linspace(-0.5, s - 0.5, 2 * m + 1)[1::2] for s, m in zip(size, mask.shape))
        axis.contour(width, height, mask, levels=[0.5], colors=color, linewidths=1.5)


def save(figure, path: Path):
    """
    As a PNG with a palette, a third of the size; it appears whole or not at all.
    """
    with io.BytesIO() as buffer:
        figure.savefig(buffer, format="png", dpi=DPI)
        save_image(Image.open(buffer).convert("RGB"), path)
    plt.close(figure)


def save_image(image: Image.Image, path: Path):
    with whole_path(str(path)) as unfinished:
        image.quantize(256).save(unfinished, format="PNG", optimize=True)
    print(path)


# -------------------------------------------------------------------------------------- the whole


def draw_all(example: Example, model, metadata, folder: Path):
    """
    Write the pictures of docs/concepts.md into `folder`.
    """
    image = utils.read_image(example.input["file_name"], "RGB")
    names = metadata.thing_classes
    save(draw_instance_tensor(example, image, names), folder / "instance_tensor.png")
    save(draw_score_map(example, names), folder / "score_map.png")
    save(draw_overlap(example, names), folder / "overlap.png")
    save(draw_painting(example, model, image, metadata), folder / "painting.png")
    gt = (read_ids(example.input).astype(np.int32), example.input["segments_info"])
    rules = ("score", model.order)
    before, after = (combined(example.result, model, rule) for rule in rules)
    picture = Image.fromarray(draw_order_comparison(image, gt, before, after, metadata, rules))
    picture.thumbnail((1000, 1000))
    save_image(picture, folder / "result.png")


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config-file", default=str(CONFIG), help="of an OANet")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "pictures" / "concepts")
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="config overrides, KEY VALUE ...")
    args = parser.parse_args(argv)
    cfg = load_config(args.config_file, args.opts)
    complete_config(cfg)
    if "srm_pairs" not in cfg.TEST.ORDERS:
        parser.error("TEST.ORDERS must hold 'srm_pairs', so that the model keeps the evidence.")
    prepare_datasets(cfg)
    weights = cfg.MODEL.WEIGHTS or os.path.join(cfg.OUTPUT_DIR, "model_final.pth")
    model = OANetTrainer.build_model(cfg).eval()
    OANetCheckpointer(model, allow_pickle=cfg.MODEL.ALLOW_PICKLE).load(weights)
    dataset = cfg.DATASETS.TEST[0]
    example = find_example(model, PanopticDatasetMapper(cfg, is_train=False), dataset)
    draw_all(example, model, MetadataCatalog.get(dataset), args.output)


if __name__ == "__main__":
    main()
