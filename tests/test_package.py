"""The wheel, and the program `oanet-d2`."""

import json
import shutil
import subprocess
import sys
import zipfile

import pytest

from oanet_d2 import cli
from tests.conftest import REPOSITORY


def test_the_wheel_holds_everything(tmp_path):
    source = tmp_path / "source"
    for folder in ("oanet_d2", "configs"):
        shutil.copytree(REPOSITORY / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, source)
    expected = {"oanet_d2/py.typed", "oanet_d2/report/template/report.html"}
    files = [x for x in source.rglob("*.*") if x.parent != source]
    names = {x.relative_to(source).as_posix() for x in files}
    assert expected < names and "configs/Base-OANet.yaml" in names
    command = [sys.executable, "-m", "pip", "wheel", ".", "--no-deps", "--no-build-isolation"]
    command += ["--no-index", "--wheel-dir", tmp_path]
    result = subprocess.run(command, cwd=source, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    (wheel,) = tmp_path.glob("oanet_d2-*.whl")
    found = {x for x in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in x}
    assert found == {f"oanet_d2/{x}" if x.startswith("configs/") else x for x in names}


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs `oanet-d2`, and gives its exit status, what it prints, and its errors."""

    def run(*args):
        monkeypatch.setattr(sys, "argv", ["/usr/bin/oanet-d2", *args])
        with pytest.raises(SystemExit) as end:
            cli.main()
        return end.value.code, *capsys.readouterr()

    return run


def test_the_commands_are_listed(run):
    status, text, _ = run("--help")
    assert status == 0 and [x.split()[0] for x in text.splitlines()[2:8]] == list(cli.COMMANDS)
    for args in ((), ("pain",)):
        assert run(*args)[0] == 2


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_a_command_has_help(run, command):
    status, text, _ = run(command, "--help")
    assert status == 0 and text.startswith(f"usage: oanet-d2 {command} ")
    # Everything that it tells to type is this program.
    lines = [x.lstrip(" $") for x in text.splitlines()]
    typed = [x for x in lines if x.startswith(("python", "oanet"))]
    assert all(x.startswith(f"oanet-d2 {command} ") for x in typed)


def test_a_missing_package_is_named(run, monkeypatch, tmp_path):
    monkeypatch.delitem(sys.modules, "oanet_d2.predict", raising=False)
    monkeypatch.setitem(sys.modules, "cv2", None)
    status, _, text = run("predict", "--onnx", "a.onnx")
    assert status == 2 and "no module cv2" in text and "[runtime]" in text
    # One that only an option needs.
    image, category = {"id": 1, "height": 1, "width": 1, "file_name": "a.jpg"}, {"id": 1, "name": "a"}
    content = {"images": [image], "categories": [category], "annotations": []}
    (tmp_path / "a.json").write_text(json.dumps(content))
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.delitem(sys.modules, "oanet_d2.painting.learned", raising=False)
    args = ["--instances", str(tmp_path / "a.json"), "--output", str(tmp_path / "out")]
    status, _, text = run("paint", "--order", "a.safetensors", *args)
    assert status == 2 and "no module safetensors" in text and "[train]" in text


# What our modules import is there already, and may have imported them.
WINDOWS = """
import pkgutil, sys
import cv2, detectron2.engine, detectron2.evaluation, jinja2, pycocotools.mask, scipy, shapely, tqdm.contrib
import concurrent.futures.process, detectron2.checkpoint, detectron2.model_zoo, detectron2.projects

absent = "fcntl grp pwd resource termios"
sys.modules.update(dict.fromkeys(absent.split()))
import oanet_d2

names = [x.name for x in pkgutil.walk_packages(oanet_d2.__path__, "oanet_d2.")]
for name in names:
    if not name.endswith(("__main__", "timm_backbone")):
        __import__(name)
print(len(names))
"""


def test_our_modules_import_nothing_that_windows_lacks(subprocess_env):
    command = [sys.executable, "-c", WINDOWS]
    result = subprocess.run(command, env=subprocess_env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) > 50
