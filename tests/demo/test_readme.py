"""The README's section "Predict" does what it says."""

import re
import shlex

import cv2

import demo
from oanet_d2.data.occlusion_scenes.writer import file_names
from tests.conftest import REPOSITORY, load_config

SECTION = (REPOSITORY / "README.md").read_text().split("\n## Predict\n")[1].split("\n## ")[0]
CONFIG = "configs/OcclusionScenes/oanet_R_18.yaml"


def test_the_command(run, scenes, pictures, tmp_path, monkeypatch):
    command = re.search(r"^    \.venv/bin/python demo/demo.py ((?:.*\\\n)*.*)$", SECTION, re.M)[1]
    words = shlex.split(command.replace("\\\n", " "))
    args = demo.get_parser().parse_args(words)
    # What it names is what `make demo` leaves and reads.
    cfg = load_config("OcclusionScenes/oanet_R_18.yaml")
    assert args.config_file == CONFIG and (REPOSITORY / CONFIG).is_file()
    assert args.opts == ["MODEL.WEIGHTS", f"{cfg.OUTPUT_DIR}/model_final.pth"]
    assert args.input == ["datasets/occlusion_scenes/val"]

    (tmp_path / "datasets").mkdir()
    (tmp_path / "datasets" / "occlusion_scenes").symlink_to(scenes)
    monkeypatch.chdir(tmp_path)
    status, _ = run(*words[: words.index("--opts")][2:])  # with the tiny network
    assert status == 0
    assert len(list((tmp_path / "output" / "predictions").glob("*.jpg"))) == len(pictures)


def test_the_lines_of_python(config_file, pictures, tmp_path, monkeypatch):
    lines = re.search(r"```python\n(.*?)```", SECTION, re.S)[1]
    weights, picture = "output/occlusion_scenes/model_final.pth", file_names("val", 0)[0]
    for path, ours in {
        CONFIG: config_file,
        weights: config_file.parent / "tiny.pth",
        f"datasets/occlusion_scenes/val/{picture}": pictures[0],
    }.items():
        assert lines.count(f'"{path}"') == 1
        lines = lines.replace(path, str(ours))
    monkeypatch.chdir(tmp_path)
    exec(lines, {})  # noqa: S102
    assert cv2.imread("segmented.png").shape == (480, 480, 3)
