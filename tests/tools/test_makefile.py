import re
import subprocess

from tests.conftest import REPOSITORY


def test_every_pin_has_a_version_and_a_hash():
    for name in ("lock.txt", "detectron2.txt"):
        text = (REPOSITORY / "requirements" / name).read_text()
        for pin in re.findall(r"^\w.*(?:\n +.*)*", text, re.MULTILINE):
            assert re.match(r"[\w.-]+==[\w.]+ [^\0]*--hash=sha256:[0-9a-f]{64}\b", pin), pin


def test_a_folder_that_make_did_not_make_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    command = ["make", "-C", str(REPOSITORY), "setup", f"VENV={tmp_path}"]
    assert str(tmp_path) in subprocess.run(command, capture_output=True, text=True).stderr
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
