#!/usr/bin/env python3
"""
Put a ranking head that was trained from annotations into a Panoptic FPN checkpoint (from the model
zoo or your own): the result is an OANet checkpoint.

    python tools/attach_srm.py --config-file configs/OcclusionScenes/oanet_R_18_masks.yaml \\
        --base panoptic_fpn.pkl --srm output/srm_from_annotations/model_final.pth --output oanet.pth

The config describes the OANet that comes out of it.
"""

import argparse
import logging
import os

from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import get_cfg
from detectron2.modeling import build_model
from detectron2.utils.file_io import PathManager
from detectron2.utils.logger import setup_logger

from oanet_d2 import add_oanet_config

PREFIX = "srm_head."


class Checkpointer(DetectionCheckpointer):
    """
    Remembers which of the model's parameters a file did not give.
    """

    def _load_model(self, checkpoint):
        incompatible = super()._load_model(checkpoint)
        wrong_shape = [key for key, *_ in incompatible.incorrect_shapes]
        self.not_given = {*incompatible.missing_keys, *wrong_shape}
        return incompatible


def load(model, path: str, what: str, ours) -> None:
    """
    Load a part of the model.

    Args:
        ours: name of a parameter -> whether the file has to give it.

    Raises:
        ValueError: it does not.
    """
    if not PathManager.isfile(path):
        raise ValueError(f"{what} {path} does not exist.")
    checkpointer = Checkpointer(model)
    checkpointer.load(path)
    lacking = sorted(filter(ours, checkpointer.not_given))
    if lacking:
        raise ValueError(
            f"{what} {path} does not give {len(lacking)} parameters of this config's model, or in "
            f"another shape, such as {lacking[0]}. It belongs to another config."
        )


def attach(cfg, base: str, srm: str, output: str) -> None:
    """
    Args:
        cfg: config of the OANet.
        base: checkpoint of a Panoptic FPN or OANet; its own ranking head, if any, is replaced.
        srm: checkpoint with `srm_head.*`.
        output: the file to write, .pth; it appears whole or not at all.

    Raises:
        ValueError: a checkpoint does not fit the config.
    """
    model = build_model(cfg)
    load(model, base, "--base", lambda name: not name.startswith(PREFIX))
    load(model, srm, "--srm", lambda name: name.startswith(PREFIX))
    folder, name = os.path.split(os.path.abspath(output))
    stem = os.path.splitext(name)[0]
    DetectionCheckpointer(model, folder).save(stem + ".partial")
    os.replace(os.path.join(folder, f"{stem}.partial.pth"), output)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config-file", required=True, help="config of the OANet")
    parser.add_argument("--base", required=True, help="Panoptic FPN checkpoint, path or URL")
    parser.add_argument("--srm", required=True, help="checkpoint of SRMFromAnnotations")
    parser.add_argument("--output", required=True, help="the OANet checkpoint to write")
    parser.add_argument("opts", nargs="*", help="config overrides, after --")
    args = parser.parse_args()
    setup_logger(name="fvcore").setLevel(logging.ERROR)  # it warns of the other part
    cfg = get_cfg()
    add_oanet_config(cfg)
    cfg.merge_from_file(args.config_file)
    cfg.merge_from_list(args.opts)
    try:
        attach(cfg, args.base, args.srm, args.output)
    except ValueError as error:
        parser.error(str(error))
    print(f"Written to {args.output}")


if __name__ == "__main__":
    main()
