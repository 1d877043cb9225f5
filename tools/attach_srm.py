#!/usr/bin/env python3
"""
Put a ranking head that was trained from annotations into a Panoptic FPN checkpoint (from the model
zoo or your own): the result is an OANet checkpoint.

    python tools/attach_srm.py --config-file configs/OcclusionScenes/oanet_R_18_masks.yaml \\
        --base panoptic_fpn.pkl --srm output/srm_from_annotations/model_final.pth --output oanet.pth

The config describes the OANet that comes out of it.
"""

import argparse

import torch

from detectron2.modeling import build_model

from oanet_d2 import complete_config, load_config
from oanet_d2.checkpoint import CheckpointError, OANetCheckpointer
from oanet_d2.whole_files import whole_path

PREFIX = "srm_head."


class Checkpointer(OANetCheckpointer):
    """
    Loads only some of a file's parameters, and leaves it to :func:`load` to say what did not fit.
    """

    def __init__(self, model, ours, **kwargs):
        super().__init__(model, **kwargs)
        self.ours = ours

    def _load_model(self, checkpoint):
        given = checkpoint["model"]
        checkpoint["model"] = {name: x for name, x in given.items() if self.ours(name)}
        return super()._load_model(checkpoint)

    def _log_incompatible_keys(self, incompatible):
        pass


def load(model, path: str, what: str, ours, allow_pickle: bool = False) -> None:
    """
    Load a part of the model.

    Args:
        path: a file, or a URL that Detectron2 knows.
        what: what it is to the user, for messages.
        ours: name of a parameter -> whether it belongs to the part.
        allow_pickle: as for :class:`OANetCheckpointer`.

    Raises:
        ValueError: the file is missing or no checkpoint, or does not hold exactly the part.
    """
    checkpointer = Checkpointer(model, ours, allow_pickle=allow_pickle)
    try:
        checkpointer.load(path)
    except CheckpointError as error:
        raise ValueError(f"{what} {error}") from error
    not_given = [*checkpointer.new, *(name for name, *_ in checkpointer.left_out)]
    not_given = sorted(filter(ours, not_given))
    for names, problem in (
        (not_given, "does not give, or in another shape, {} of the parameters"),
        (sorted(checkpointer.unused), "gives {} parameters unknown to the model"),
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
    allow_pickle = cfg.MODEL.ALLOW_PICKLE
    load(model, base, "--base", lambda name: not name.startswith(PREFIX), allow_pickle)
    load(model, srm, "--srm", lambda name: name.startswith(PREFIX), allow_pickle)
    with whole_path(output) as temporary:
        torch.save({"model": model.state_dict()}, temporary)


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
    try:
        cfg = load_config(args.config_file, args.opts)
        complete_config(cfg)
        attach(cfg, args.base, args.srm, args.output)
    except ValueError as error:
        parser.error(str(error))
    print(f"Written to {args.output}")


if __name__ == "__main__":
    main()
