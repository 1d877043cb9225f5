import json
import subprocess

import pytest
import results
import torch
from PIL import Image

from oanet_d2 import complete_config, load_config
from tests.conftest import REPOSITORY

# Two seeds, and a longer training.
PQ_TH = {
    "score": (40, 50, 60),
    "smaller_first": (41, 49, 6),
    "class_order": (41, 49, 6),
    "srm_pairs": (50, 66, 78),
    "oracle": (60, 70, 80),
}
CONFIG = """
SEED: 1
INPUT: {COPY_PASTE: 0.0, MIN_SIZE_TEST: 256}
SOLVER: {MAX_ITER: 5}
MODEL: {OANET: {ORDER: srm_pairs}, TIMM: {NAME: small}}
DATASETS: {TEST: [occlusion_scenes_val]}
"""


def test_tables_and_pictures(tmp_path, monkeypatch):
    runs, pictures = [tmp_path / x for x in "012"], tmp_path / "docs" / "pictures"
    for i, run in enumerate(runs):  # as far as the script reads them
        for name in ("pictures", "pictures_still_wrong"):
            (run / name).mkdir(parents=True)
            for k in range(3):
                Image.new("RGB", (8, 8), (60 * k, 0, 0)).save(run / name / f"{k:03}_{90 - k}.png")
        orders = {x: dict.fromkeys(results.COLUMNS, values[i]) for x, values in PQ_TH.items()}
        evaluation = {"orderings": orders, "images": 7, "seconds": {"eval": 3.5}}
        (run / "orderings.json").write_text(json.dumps(evaluation))
        torch.save({"model": {"a": torch.zeros(2**18)}}, run / "model_final.pth")
        (run / "config.yaml").write_text(CONFIG.replace("ITER: 5", "ITER: 50" if i == 2 else "ITER: 5"))
        alone = {"orderings": {"srm_pairs": dict.fromkeys(results.COLUMNS, 45 + i)}}
        (run / "from_annotations").mkdir()
        (run / "from_annotations" / "orderings.json").write_text(json.dumps(alone))
    pictures.mkdir(parents=True)
    pages = [tmp_path / "README.md", tmp_path / "docs" / "RESULTS.md"]
    for page, names in zip(pages, ([""], [" (settings)", " (occlusion_scenes)"])):
        regions = [f"<!-- tools/results.py{x} fills this in -->old<!-- end -->\n" for x in names]
        page.write_text("before\n" + "".join(regions) + "after\n")
    monkeypatch.setattr("sys.argv", ["results.py", "--root", *map(str, [tmp_path, *runs])])
    results.main()
    for page in pages:
        text = page.read_text()
        assert text.startswith("before\n<!--") and text.endswith("<!-- end -->\nafter\n")
        row = next(x for x in text.splitlines() if "58.0 ± 11.3" in x)
        # By hand: closures 10 / 20 and 16 / 20; the deviation divides by n - 1.
        assert row.endswith("| 0.650 ± 0.212 |") and "old" not in text
    settings, text = text.split("<!-- end -->", 1)
    rows = [" ".join(x.split("|")).split() for x in settings.splitlines() if x.startswith("| occ")]
    two = "5 256 small 2 45.0 ± 7.1 45.0 ± 5.7 45.0 ± 5.7 58.0 ± 11.3 65.0 ± 7.1 0.650 ± 0.212"
    one = "50 256 small 1 60.0 6.0 6.0 78.0 80.0 0.900"
    assert rows == [["occlusion_scenes", *x.split()] for x in (two, one)]
    found = [x.split("|")[1].strip() for x in text.splitlines() if x.startswith("| ")]
    assert found[:7] == ["order", *list(PQ_TH)[:4], "srm_pairs, annotations", "oracle"]
    assert "| 45.5 ± 0.7 " in text
    assert "1.0 ± 0.0 MiB of weights; 0.50 ± 0.00 seconds an image" in text
    assert len(list(pictures.glob("*_[12].jpg"))) == len(list(pictures.iterdir())) == 4
    assert Image.open(pictures / "wrong_2.jpg").getpixel((4, 4))[0] == pytest.approx(60, abs=5)


def commands_of(script, tmp_path, *arguments):
    """A Python that only writes down its arguments stands in for the real one."""
    calls, python = tmp_path / "calls", tmp_path / "python"
    python.write_text(f'#!/bin/sh\nprintf "%s\\0" "$@" >> {calls}\necho >> {calls}\n')
    python.chmod(0o755)
    copied = tmp_path / "tools" / script  # it works in the folder above its own
    copied.parent.mkdir()
    copied.write_bytes((REPOSITORY / "tools" / script).read_bytes())
    env = {"PATH": "/usr/bin:/bin", "PY": str(python)}
    subprocess.run(["bash", copied, *arguments], check=True, env=env)
    return [line.split("\0")[:-1] for line in calls.read_text().splitlines()]


def test_photographs_without_whole_masks_in_a_folder_with_a_space(tmp_path):
    folder = tmp_path / "my photographs"
    folder.mkdir()
    (folder / "instances_train.json").write_text("")
    ((_, _, path, *opts),) = commands_of("train_photos.sh", tmp_path, folder, "SEED", "7")
    cfg = load_config(REPOSITORY / path, opts)
    assert cfg.SEED == 7 and cfg.OUTPUT_DIR == "output/my photographs"
    train, val = (cfg.DATASETS.PANOPTIC[f"photographs_{split}"] for split in ("train", "val"))
    assert f"{folder}/images/train" == train.IMAGE_ROOT and f"{folder}/panoptic_val" == val.PANOPTIC_ROOT
    assert f"{folder}/instances_train.json" == train.INSTANCES_JSON and not val.INSTANCES_JSON


def test_every_command_of_the_trainings_has_a_valid_config(tmp_path):
    commands = commands_of("train_results.sh", tmp_path)
    assert len(commands) == 3 * 3 * 4 + 3 + 5 + 3 + 1 and commands[-1][0] == "tools/results.py"
    kinds = set()
    for program, *arguments in commands[:-1]:
        first = next(i for i, x in enumerate(arguments) if x.split(".")[0].isupper() or x == "--")
        opts = [x for x in arguments[first:] if x != "--"]
        at = arguments.index("--config-file")
        cfg = load_config(REPOSITORY / arguments[at + 1], opts)
        complete_config(cfg)
        kinds.add((program, cfg.MODEL.META_ARCHITECTURE, "--eval-only" in arguments))
    assert len(kinds) == 4
