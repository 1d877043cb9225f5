import os
import re
import subprocess

from tests.conftest import REPOSITORY


def make(*args):
    command = ["make", "-C", str(REPOSITORY), *args]
    env = {"PATH": os.environ["PATH"]}  # nothing of the make that runs the tests
    return subprocess.run(command, capture_output=True, text=True, env=env)


def test_every_pin_has_a_version_and_a_hash_and_no_address():
    for name in ("lock.txt", "detectron2.txt"):
        text = (REPOSITORY / "requirements" / name).read_text()
        pins = re.findall(r"^\w.*(?:\n +.*)*", text, re.MULTILINE)
        assert pins and "://" not in text and "--index" not in text
        for pin in pins:
            assert re.match(r"[\w.-]+==[\w.]+ [^\0]*--hash=sha256:[0-9a-f]{64}\b", pin), pin


def test_variables(tmp_path):
    demo = make("-n", "demo", "VENV=none", "PYTHON=mypython", "ITERS=7").stdout
    assert "\nmypython train_net.py" in demo and "SOLVER.MAX_ITER 7 OUTPUT_DIR" in demo
    venv = f"VENV={tmp_path / 'venv'}"
    assert "-r requirements/detectron2.txt" in make("-n", "setup", venv).stdout
    assert "--no-build-isolation ../d2\n" in make("-n", "setup", venv, "DETECTRON2=../d2").stdout


def test_a_folder_that_make_did_not_make_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    done = make("setup", f"VENV={tmp_path}")
    assert done.returncode and str(tmp_path) in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
