#!/usr/bin/env python3
"""
Put a ranking head that was trained from annotations into a Panoptic FPN checkpoint, from the model
zoo or your own. The result is an OANet checkpoint.

    python tools/attach_srm.py --config-file configs/OcclusionScenes/oanet_R_18_masks.yaml \\
        --base panoptic_fpn.pkl --srm output/srm_from_annotations/model_final.pth --output oanet.pth

The config describes the resulting OANet.
"""

from argparse import ArgumentParser, RawDescriptionHelpFormatter
from typing import Dict

import torch

from detectron2.modeling import build_model

from oanet_d2 import complete_config, load_config
from oanet_d2.checkpoint import OANetCheckpointer
from oanet_d2.files import atomic_path


def attach(cfg, base: str, srm: str, output: str) -> None:
    """
    Args:
        cfg: config of the OANet.
        base: checkpoint of a Panoptic FPN or OANet. Its own ranking head, if any, is left out.
        srm: checkpoint with `srm_head.*`. Anything else in it is left out.
        output: the file to write.

    Raises:
        ValueError: a checkpoint does not fit the config.
    """
    state: Dict[str, torch.Tensor] = {}
    for path, ranking in ((base, False), (srm, True)):
        model = build_model(cfg)
        loaded = OANetCheckpointer(model, allow_pickle=cfg.MODEL.ALLOW_PICKLE)
        loaded.load(path)
        misfits = loaded.new + loaded.unused
        names = [name for name in misfits if name.startswith("srm_head.") == ranking]
        if names:
            raise ValueError(
                f"{path} does not fit the config: it lacks {len(names)} parameters, has them in "
                f"another shape or should not have them, such as {names[0]}."
            )
        tensors = model.state_dict().items()
        state.update((name, x) for name, x in tensors if name.startswith("srm_head.") == ranking)
    with atomic_path(output) as temporary:
        torch.save({"model": state}, temporary)


def main():
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
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
