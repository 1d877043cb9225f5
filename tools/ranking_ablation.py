#!/usr/bin/env python3
"""
Ablations of the ranking with the predictions held fixed: the network of a trained OANet runs once
over the training and the validation images, what it predicts is cached, and every row of a table
trains at most a ranking head on the cached predictions and paints the cached instances anew.

    python tools/ranking_ablation.py output/results/seed_1 output/results/seed_2

Each folder is the output of a `train_net.py` run on OcclusionScenes. The cache and the rows, in
`ablation.json`, are written into it; a row that is there already is not repeated.
`tools/results.py` makes the tables of docs/RESULTS.md out of them.
"""

import argparse
import json
import logging
import random
import sys
import time
from collections import Counter
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Callable, Dict, List, Optional, Sequence, Tuple

import numpy as np
import torch
from panopticapi.utils import rgb2id
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import Boxes, Instances
from detectron2.utils.logger import setup_logger

from oanet_d2 import add_oanet_config, load_config
from oanet_d2.checkpoint import OANetCheckpointer
from oanet_d2.data import PanopticDatasetMapper
from oanet_d2.data.files import read_json
from oanet_d2.data.images import read_image
from oanet_d2.engine import OANetTrainer, prepare_datasets
from oanet_d2.evaluation.orderings import OrderingEvaluator, orderings_of
from oanet_d2.evaluation.pair_accuracy import accuracy_by_kind, pair_decisions
from oanet_d2.modeling import (
    RANKING_RULE_REGISTRY,
    PairwiseRankingHead,
    RankingEvidence,
    SpatialRankingHead,
)
from oanet_d2.modeling.candidates import Candidates, RankingTarget
from oanet_d2.modeling.false_positives import with_false_positives
from oanet_d2.modeling.matching import margins_of_matched, match_to_segments
from oanet_d2.whole_files import whole_file, whole_path

SOURCES = ("gt", "pred", "detections")
FALSE_POSITIVES = "gt with false positives"
DEFAULT_SOURCES = ("detections",)
EVIDENCE = ("geometry", "semantic", "features")
TRAIN_IMAGES, ITERATIONS, BATCH = 1000, 400, 8
DEFAULT = get_cfg()
add_oanet_config(DEFAULT)
NETWORKS, MEMORY = (DEFAULT.MODEL.SRM_HEAD.PAIRS[x] for x in ("NUM_NETWORKS", "MEMORY"))


# ---------------------------------------------------------------------------------- predictions


@dataclass
class TrainImage:
    """
    What a ranking head learns from: the instances of each source, the ground truth, and what the
    network makes of the image (thing logits (C, h, w), features (channels, h, w), float16).
    """

    sources: Dict[str, Candidates]
    target: RankingTarget
    semantic: torch.Tensor
    features: torch.Tensor

    def instances(self, source: str, num_classes: int) -> Candidates:
        if source == FALSE_POSITIVES:
            return with_false_positives(self.sources["gt"], num_classes, 1.0)
        return self.sources[source]

    def flipped(self) -> "TrainImage":
        target = RankingTarget(
            self.target.categories.flip(-1), self.target.ids.flip(-1), self.target.segments_info
        )
        sources = {name: _flip(source) for name, source in self.sources.items()}
        return TrainImage(sources, target, self.semantic.flip(-1), self.features.flip(-1))


def _flip(candidates: Candidates) -> Candidates:
    left, top, right, bottom = candidates.boxes.unbind(1)
    boxes = torch.stack([1 - right, top, 1 - left, bottom], dim=1)
    return replace(candidates, masks=candidates.masks.flip(-1), boxes=boxes)


@dataclass
class ValImage:
    """
    What a ranking head ranks, and what painting and scoring it needs.
    """

    input: Dict
    output: Dict
    candidates: Candidates
    semantic: torch.Tensor
    features: torch.Tensor

    @property
    def evidence(self) -> RankingEvidence:
        """What the network's own ranking head said."""
        return self.output["ranking_evidence"]

    def ground_truth_ids(self) -> np.ndarray:
        return rgb2id(read_image(self.input["pan_seg_file_name"], "RGB"))

    def painted_masks(self) -> torch.Tensor:
        """(N, H, W) bool; empty where the instance is not painted."""
        painted = self.candidates.masks.flatten(1).any(1)
        return self.output["instances"].pred_masks & painted[:, None, None]

    def oracle(self) -> Tuple[torch.Tensor, torch.Tensor]:
        """(N, N) margins in pixels by the ground truth, and (N,) matched segment or -1."""
        ids = torch.from_numpy(self.ground_truth_ids())
        masks, segments_info = self.painted_masks(), self.input["segments_info"]
        matched = match_to_segments(masks, self.candidates.classes, ids, segments_info)
        return margins_of_matched(masks, matched, ids), matched


# The cache names these classes; it is the same whether this file is imported or run.
TrainImage.__module__ = ValImage.__module__ = "ranking_ablation"
if __name__ == "__main__":
    sys.modules["ranking_ablation"] = sys.modules["__main__"]


# All classes in a cache.
CACHED = [TrainImage, ValImage, Candidates, RankingTarget, RankingEvidence, Instances, Boxes]


def load_model(folder: Path):
    """
    The config and the model of an output folder of train_net.py.
    """
    cfg = load_config(folder / "config.yaml")
    prepare_datasets(cfg)
    model = OANetTrainer.build_model(cfg).eval()
    OANetCheckpointer(model).load(str(folder / "model_final.pth"))
    return cfg, model


@torch.no_grad()
def predict(cfg, model, num_train: int) -> Tuple[List[TrainImage], List[ValImage]]:
    """
    Run the network over the first `num_train` training images, unaugmented, and over the
    validation images.
    """

    def run(batch):
        images = model.preprocess_image(batch)
        features = model.backbone(images.tensor)
        semantic = model.sem_seg_head.layers(features)
        maps = model.ranking_maps(images, semantic, features)
        return images, features, [x[0].half() for x in maps]

    # Ground truth is cached as it is; `fit` makes up the false positives.
    model.srm_head.gt_false_positives = 0.0
    train, val = [], []
    mapper = PanopticDatasetMapper(cfg, is_train=True, augmentations=[])
    for d in tqdm(DatasetCatalog.get(cfg.DATASETS.TRAIN[0])[:num_train], "training images"):
        batch = [mapper(d)]
        images, features, maps = run(batch)
        proposals, _ = model.proposal_generator(images, features, None)
        gt_instances = [batch[0]["instances"]]
        by_name = {
            kind: model.training_candidates(kind, images, features, proposals, gt_instances)[0]
            for kind in SOURCES
        }
        train.append(TrainImage(by_name, model.ranking_targets(images, batch)[0], *maps))
    for batch in tqdm(OANetTrainer.build_test_loader(cfg, cfg.DATASETS.TEST[0]), "val images"):
        _, _, maps = run(batch)
        (output,) = model(batch)
        evidence, instances = output["ranking_evidence"], output["instances"]
        height, width = instances.image_size
        boxes = instances.pred_boxes.tensor / torch.tensor([width, height, width, height])
        candidates = Candidates(evidence.masks, evidence.classes, evidence.scores, boxes)
        input = {k: v for k, v in batch[0].items() if k != "image"}
        val.append(ValImage(input, output, candidates, *maps))
    return train, val


def cached_predictions(cfg, model, path: Path):
    """
    :func:`predict`, from the file `path` if it is there.

    Raises:
        ValueError: the file holds something else.
    """
    if not path.exists():
        predictions = predict(cfg, model, TRAIN_IMAGES)
        with whole_path(str(path)) as temporary:
            torch.save(predictions, temporary)
    # Only what the cache is made of is unpickled.
    with torch.serialization.safe_globals(CACHED):
        try:
            return torch.load(path, weights_only=True)
        except Exception as error:  # torch, zipfile and pickle raise many kinds
            raise ValueError(
                f"{path} is not what this tool has written: {error!r}. Delete it; it is made anew."
            ) from error


# ------------------------------------------------------------------------------ heads to compare


def pair_head(
    model, evidence: Sequence[str] = EVIDENCE, dropout=0.3, num_networks=1, memory_size=0
) -> PairwiseRankingHead:
    """
    A pairwise head of the model's widths, untrained. Its map is as small as can be unless it is
    asked for as evidence.
    """
    is_evidence = "score_map" in evidence
    head = PairwiseRankingHead(
        evidence=evidence,
        feature_dim=64,
        dropout=dropout,
        num_networks=num_networks,
        memory_size=memory_size,
        feature_channels=model.backbone.output_shape()[model.srm_in_feature].channels,
        num_classes=model.srm_head.num_classes,
        conv_dim=32,
        num_blocks=2 if is_evidence else 0,
        kernel_size=15 if is_evidence else 1,
        stride=model.srm_head.stride,
    )
    head.remembers = True  # what is cached does not change
    return head


def map_head(model, kernel_size=15, num_blocks=2, head=SpatialRankingHead, **args):
    """
    A spatial ranking head of the given shape, untrained.
    """
    return head(
        num_classes=model.srm_head.num_classes,
        conv_dim=32,
        num_blocks=num_blocks,
        kernel_size=kernel_size,
        stride=model.srm_head.stride,
        **args,
    )


class WeightedMap(SpatialRankingHead):
    """
    Hypothesis 1: cells in which only one class has an instance count `uncontested` times.
    """

    def __init__(self, uncontested: float, **kwargs):
        super().__init__(**kwargs)
        self.uncontested = uncontested

    def losses(self, candidates, targets, semantic=None, features=None):
        tensors = self.instance_tensors(candidates)
        categories = torch.stack([x.categories for x in targets])
        is_thing = categories < self.num_classes
        loss = F.cross_entropy(
            self(tensors), categories.where(is_thing, -1), ignore_index=-1, reduction="none"
        )
        weight = is_thing * torch.where(tensors.sum(1) > 1, 1.0, self.uncontested)
        return {"loss_srm": (loss * weight).sum() / weight.sum().clamp(min=1)}


class InformedMap(SpatialRankingHead):
    """
    Hypothesis 4: the map is told what the semantic branch (and p2) shows, beside the masks.
    """

    def __init__(self, semantic_channels: int, feature_channels: int = 0, **kwargs):
        super().__init__(**kwargs)
        self.with_features = feature_channels > 0
        self.mix = nn.Conv2d(
            self.num_classes + semantic_channels + feature_channels, self.num_classes, 1
        )

    def _logits(self, candidates, semantic, features):
        shown = [self.instance_tensors(candidates), semantic / 4]
        shown += [features] if self.with_features else []
        x = torch.cat(shown, dim=1)
        # The large kernels see a mixture; the 1 x 1 path keeps what is shown in the cell itself.
        return self(self.mix(x)) + semantic

    def losses(self, candidates, targets, semantic=None, features=None):
        categories = torch.stack([x.categories for x in targets])
        return {"loss_srm": self.map_loss(self._logits(candidates, semantic, features), categories)}

    def evidence(self, candidates, semantic=None, features=None):
        score_maps = self.score_map(self._logits(candidates, semantic, features))
        return [
            RankingEvidence(x.scores, x.classes, x.masks, score_map)
            for x, score_map in zip(candidates, score_maps)
        ]


def fit(head: nn.Module, train: List[TrainImage], sources: Sequence[str], seed: int) -> nn.Module:
    """
    Train a ranking head on cached predictions; every image of a batch takes one of `sources`.
    """
    rng = random.Random(seed)
    optimizer = torch.optim.AdamW(head.parameters(), lr=2e-3, weight_decay=0.01)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, ITERATIONS, pct_start=0.1)
    for _ in range(ITERATIONS):
        batch = [x.flipped() if rng.random() < 0.5 else x for x in rng.sample(train, BATCH)]
        losses = head.losses(
            [x.instances(rng.choice(sources), head.num_classes) for x in batch],
            [x.target for x in batch],
            torch.stack([x.semantic for x in batch]).float(),
            torch.stack([x.features for x in batch]).float(),
        )
        optimizer.zero_grad()
        sum(losses.values()).backward()
        nn.utils.clip_grad_norm_(head.parameters(), 10.0)
        optimizer.step()
        scheduler.step()
    return head.eval()


# ------------------------------------------------------------------------------------- the rows

# An order for every validation image: rule, and what gives the evidence that it looks at.
Ranked = Tuple[str, Callable[[ValImage], RankingEvidence]]


def by_head(head: nn.Module, rule: str) -> Ranked:
    @torch.no_grad()
    def evidence(image: ValImage) -> RankingEvidence:
        maps = image.semantic[None].float(), image.features[None].float()
        return head.evidence([image.candidates], *maps)[0]

    return rule, evidence


def by_own(rule: str) -> Ranked:
    return rule, lambda image: image.evidence


def by_map(make_map: Callable[[ValImage], torch.Tensor]) -> Ranked:
    return "srm_overlap", lambda image: replace(image.evidence, score_map=make_map(image))


def by_margins(make_margins: Callable[[ValImage], torch.Tensor]) -> Ranked:
    return "srm_pairs", lambda image: replace(image.evidence, pair_margins=make_margins(image))


def semantic_map(image: ValImage) -> torch.Tensor:
    return image.semantic.float().softmax(0)


def oracle_where(
    pixels_per_cell: int, which: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
) -> Ranked:
    """
    The oracle's answer for some pairs, the network's own for the others.

    Args:
        pixels_per_cell: the oracle counts pixels, the network cells.
        which: (N, N) bool of the same class, (N, N) bool of both matched -> (N, N) bool.
    """

    def margins(image: ValImage) -> torch.Tensor:
        oracle, matched = image.oracle()
        classes = image.candidates.classes
        same = classes[:, None] == classes[None]
        both = (matched >= 0)[:, None] & (matched >= 0)[None]
        own = image.evidence.pair_margins * pixels_per_cell
        return torch.where(which(same, both), oracle, own)

    return by_margins(margins)


def depth_oracle(image: ValImage) -> torch.Tensor:
    """
    The oracle's answer where both instances match something, detection score otherwise: an oracle
    of depth that does not know what is a false positive.
    """
    oracle, matched = image.oracle()
    both = (matched >= 0)[:, None] & (matched >= 0)[None]
    scores = image.candidates.scores
    by_score = (scores[:, None] - scores[None]).sign() * image.evidence.pair_margins.ne(0)
    return torch.where(both, oracle, by_score)


@RANKING_RULE_REGISTRY.register()
def pairs_by_wins(evidence: RankingEvidence) -> torch.Tensor:
    """
    Hypothesis 5: Copeland's order, by the number of comparisons won minus those lost.
    """
    wins = evidence.pair_margins.sign().sum(1)
    by_score = torch.argsort(-evidence.scores)
    return by_score[torch.argsort(-wins[by_score], stable=True)]


@RANKING_RULE_REGISTRY.register()
def pairs_by_sum(evidence: RankingEvidence) -> torch.Tensor:
    """
    Hypothesis 5: Borda's order, by the sum of the margins.
    """
    by_score = torch.argsort(-evidence.scores)
    return by_score[torch.argsort(-evidence.pair_margins.sum(1)[by_score], stable=True)]


def rows(model, train: List[TrainImage], seed: int) -> Dict[str, Dict[str, Callable[[], Ranked]]]:
    """
    Returns:
        table -> row -> what makes its order (training a head, where it needs one).
    """

    def pairs(evidence=EVIDENCE, sources=DEFAULT_SOURCES, **head):
        return by_head(fit(pair_head(model, evidence, **head), train, sources, seed), "srm_pairs")

    def maps(sources=("gt",), rule="srm_overlap", **shape):
        return by_head(fit(map_head(model, **shape), train, sources, seed), rule)

    oracle = partial(oracle_where, model.srm_head.stride**2)
    semantic = model.sem_seg_head.num_things
    features = model.backbone.output_shape()[model.srm_in_feature].channels
    return {
        "rules": {
            name: partial(by_own, name) for name in ("score", "srm_mean", "srm_overlap", "srm_pairs")
        }
        | {
            "semantic softmax in overlaps": lambda: by_map(semantic_map),
            "average of S and semantic softmax": lambda: by_map(
                lambda image: image.evidence.score_map + semantic_map(image)
            ),
            "oracle of depth, false positives by score": lambda: by_margins(depth_oracle),
            "oracle": lambda: by_margins(lambda image: image.oracle()[0]),
        },
        "gap": {
            "pairs of one class": lambda: oracle(lambda same, both: same & both),
            "pairs of different classes": lambda: oracle(lambda same, both: ~same & both),
            "pairs with a false positive": lambda: oracle(lambda same, both: ~both),
        },
        "evidence": {
            "classes only": lambda: pairs(()),
            "geometry": lambda: pairs(("geometry",)),
            "geometry + S": lambda: pairs(("geometry", "score_map")),
            "semantic": lambda: pairs(("semantic",)),
            "features": lambda: pairs(("features",)),
            "geometry + semantic": lambda: pairs(("geometry", "semantic")),
            "geometry + features": lambda: pairs(("geometry", "features")),
            "all three (default)": pairs,
            "all three, without dropout": lambda: pairs(dropout=0.0),
            "all three + S": lambda: pairs((*EVIDENCE, "score_map")),
        },
        # What the ranking from annotations alone is compared with.
        "geometry": {
            "geometry": lambda: pairs(("geometry",), num_networks=NETWORKS, memory_size=MEMORY)
        },
        "masks": {
            " + ".join(sources): partial(pairs, sources=sources)
            for sources in (
                ("gt",),
                (FALSE_POSITIVES,),
                ("pred",),
                DEFAULT_SOURCES,
                ("pred", "detections"),
                ("pred", "detections", FALSE_POSITIVES),
            )
        }
        | {
            f"S ({source})": partial(maps, sources=(source,))
            for source in (FALSE_POSITIVES, "pred", "detections")
        },
        "networks": {
            f"{n} network{'s'[: n > 1]}{', remembering' if memory else ''}{default}": partial(
                pairs, num_networks=n, memory_size=memory
            )
            for n, memory, default in (
                (1, 0, ""),
                (NETWORKS, 0, ""),
                (1, MEMORY, ""),
                (NETWORKS, MEMORY, " (default)"),
            )
        },
        "kernel": {
            f"k = {k}, {n} block{'s'[: n > 1]}": partial(maps, kernel_size=k, num_blocks=n)
            for k, n in ((1, 2), (3, 2), (7, 2), (15, 1), (15, 2), (15, 3), (31, 2))
        },
        "loss": {
            f"uncontested cells count {w:g}": partial(
                maps, head=partial(WeightedMap, w)
            )
            for w in (1, 0.25, 0)
        },
        "input": {
            "masks": lambda: maps(("detections",)),
            "masks + semantic logits": lambda: maps(
                ("detections",), head=partial(InformedMap, semantic)
            ),
            "masks + semantic logits + p2": lambda: maps(
                ("detections",), head=partial(InformedMap, semantic, features)
            ),
        },
        "order": {
            "least lost margin (default)": partial(by_own, "srm_pairs"),
            "number of wins (Copeland)": partial(by_own, "pairs_by_wins"),
            "sum of margins (Borda)": partial(by_own, "pairs_by_sum"),
        },
    }


def score(cfg, model, val: List[ValImage], ranked: Ranked) -> Dict[str, float]:
    """
    Paint all images in an order and score them with panopticapi.
    """
    rule, make_evidence = ranked
    evaluator = OrderingEvaluator(cfg.DATASETS.TEST[0], model, [rule])
    evaluator.reset()
    for image in val:
        output = {**image.output, "ranking_evidence": make_evidence(image)}
        evaluator.process([image.input], [output])
    return orderings_of(evaluator.evaluate())[rule]


def pair_report(val: List[ValImage], metadata) -> Dict:
    """
    How often the network's own order and the order by score are right about a pair.

    Returns:
        "accuracy": order -> kind of pair -> percent; "counts": kind -> pairs; "mistakes": image
        id -> what the network's order has wrong there, in words, the worst first; "images", and
        in how many of them the comparisons contradict each other ("cycles").
    """
    names, decided, mistakes = metadata.thing_classes, {"score": [], "srm_pairs": []}, {}
    cycles = 0
    for image in val:
        ids, masks = image.ground_truth_ids(), image.painted_masks()
        order = image.evidence.order("srm_pairs")
        # No order agrees with comparisons that go round in a circle; this one does otherwise.
        against = torch.tril(image.evidence.pair_margins[order][:, order], diagonal=-1)
        cycles += bool((against > 0).any())
        for order, decisions in decided.items():
            found = pair_decisions(
                masks,
                image.candidates.classes,
                image.evidence.order(order),
                ids,
                image.input["segments_info"],
            )
            decisions += found
            if order == "srm_pairs":
                wrong = sorted((d for d in found if not d.right), key=lambda d: -d.pixels)
                mistakes[image.input["image_id"]] = [
                    f"{names[d.behind]} over {names[d.front]} ({d.kind}, {d.pixels} pixels)"
                    for d in wrong
                ]
    return {
        "accuracy": {order: accuracy_by_kind(d) for order, d in decided.items()},
        "counts": dict(Counter(d.kind for d in decided["score"])),
        "mistakes": mistakes,
        "images": len(val),
        "cycles": cycles,
    }


def run(folder: Path, tables: Optional[Sequence[str]] = None) -> Dict:
    """
    Compute the rows that `folder` does not hold yet.

    Returns:
        table -> row -> {"PQ", "PQ_th", ..., "seconds"}; and "pairs", see :func:`pair_report`.
    """
    path = folder / "ablation.json"
    settings = {"train_images": TRAIN_IMAGES, "iterations": ITERATIONS, "batch": BATCH}
    results = read_json(str(path)) if path.exists() else {}
    if results.get("settings") != settings:
        results = {"settings": settings}
    cfg, model = load_model(folder)
    train, val = cached_predictions(cfg, model, folder / f"predictions_{TRAIN_IMAGES}.pt")

    def save():
        with whole_file(str(path)) as f:
            json.dump(results, f, indent=2)

    if "pairs" not in results:
        results["pairs"] = pair_report(val, MetadataCatalog.get(cfg.DATASETS.TEST[0]))
        save()
    for table, table_rows in rows(model, train, cfg.SEED).items():
        for row, make in table_rows.items():
            if row in results.get(table, {}) or (tables and table not in tables):
                continue
            torch.manual_seed(cfg.SEED)
            start = time.perf_counter()
            metrics = score(cfg, model, val, make())
            metrics["seconds"] = time.perf_counter() - start
            results.setdefault(table, {})[row] = metrics
            save()
            print(f"{folder.name}  {table:9s} {row:36s} PQ_th {metrics['PQ_th']:.2f}", flush=True)
    return json.loads(path.read_text())


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folders", type=Path, nargs="+", help="output folders of train_net.py")
    parser.add_argument("--tables", nargs="+", help="only these; not given: all")
    args = parser.parse_args()
    setup_logger(name="detectron2").setLevel(logging.WARNING)
    for folder in args.folders:
        run(folder, args.tables)


if __name__ == "__main__":
    main()
