"""OcclusionScenes from the command line: `python -m oanet_d2.data.occlusion_scenes --help`."""

import argparse

from ..builtin import dataset_root
from .writer import ensure_split

parser = argparse.ArgumentParser(prog="python -m oanet_d2.data.occlusion_scenes")
parser.add_argument("--root", default=dataset_root("occlusion_scenes"), help="folder; default: %(default)s")
for name, default in {"train": 4000, "val": 200, "image-size": 192, "seed": 0}.items():
    parser.add_argument(f"--{name}", type=int, default=default, help="default: %(default)s")
parser.add_argument("--overwrite", action="store_true", help="replace splits that are already there")
options = parser.parse_args()
for split, count in (("train", options.train), ("val", options.val)):
    if count:  # 0 images: leave the split alone
        size, overwrite = options.image_size, options.overwrite
        ensure_split(options.root, split, count, size, options.seed, overwrite=overwrite)
