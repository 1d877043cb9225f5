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

import torch

from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import get_cfg
from detectron2.modeling import build_model
from detectron2.utils.file_io import PathManager
from detectron2.utils.logger import setup_logger

from oanet_d2 import add_oanet_config

PREFIX = "srm_head."


class Checkpointer(DetectionCheckpointer):
    """
    Loads only some of a file's parameters, and remembers what did not fit.
    """

    def __init__(self, model, ours):
        super().__init__(model)
        self.ours = ours

    def _load_model(self, checkpoint):
        given = checkpoint["model"]
        checkpoint["model"] = {name: x for name, x in given.items() if self.ours(name)}
        incompatible = super()._load_model(checkpoint)
        wrong_shape = [name for name, *_ in incompatible.incorrect_shapes]
        self.not_given = sorted(filter(self.ours, {*incompatible.missing_keys, *wrong_shape}))
        self.unknown = sorted(incompatible.unexpected_keys)
        return incompatible


def load(model, path: str, what: str, ours) -> None:
    """
    Load a part of the model.

    Args:
        path: a file, or a URL that Detectron2 knows.
        ours: name of a parameter -> whether it belongs to the part.

    Raises:
        ValueError: the file is missing, or does not hold exactly the part.
    """
    if not os.path.isfile(PathManager.get_local_path(path)):
        raise ValueError(f"{what} {path} does not exist.")
    checkpointer = Checkpointer(model, ours)
    checkpointer.load(path)
    for names, problem in (
        (checkpointer.not_given, "does not give, or in another shape, {} of the parameters"),
        (checkpointer.unknown, "gives {} parameters unknown to the model"),
    ):
        if names:
            raise ValueError(
                f"{what} {path} {problem.format(len(names))}, such as {names[0]}. It belongs to "
                "another config."
            )


def attach(cfg, base: str, srm: str, output: str) -> None:
    """
    Args:
        cfg: config of the OANet.
        base: checkpoint of a Panoptic FPN or OANet; its own ranking head, if any, is left out.
        srm: checkpoint with `srm_head.*`; anything else in it is left out.
        output: the file to write; it appears whole or not at all.

    Raises:
        ValueError: a checkpoint does not fit the config.
    """
    model = build_model(cfg)
    load(model, base, "--base", lambda name: not name.startswith(PREFIX))
    load(model, srm, "--srm", lambda name: name.startswith(PREFIX))
    torch.save({"model": model.state_dict()}, f"{output}.partial")
    os.replace(f"{output}.partial", output)


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
