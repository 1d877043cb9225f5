"""The command line of OcclusionScenes."""

import argparse
import sys
from pathlib import Path

from ..builtin import occlusion_scenes_root
from .writer import ensure_split, write_split


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m oanet_d2.data.occlusion_scenes",
        description="Write OcclusionScenes, a synthetic panoptic dataset of things that lie on one "
        "another, in the layout of COCO panoptic. A complete split of the same parameters stays as it is.",
    )
    add = parser.add_argument
    add("--root", type=Path, default=Path(occlusion_scenes_root()), help="default: %(default)s")
    add("--train", type=int, default=1000, metavar="N", help="training images; 0: leave the split alone")
    add("--val", type=int, default=200, metavar="N", help="validation images; 0: leave the split alone")
    add("--image-size", type=int, default=192, metavar="PIXELS", help="height and width, at least 64")
    add("--seed", type=int, default=0, metavar="N", help="the same seed gives the same files")
    add("--workers", type=int, metavar="N", help="processes; 0: only this one; default: up to 8")
    add("--overwrite", action="store_true", help="replace a split that is already there")
    options = parser.parse_args(arguments)
    write = write_split if options.overwrite else ensure_split
    try:
        for split, count in (("train", options.train), ("val", options.val)):
            if count:
                write(options.root, split, count, options.image_size, options.seed, options.workers)
    except (ValueError, OSError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"OcclusionScenes is in {options.root}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
