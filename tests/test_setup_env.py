"""The installer's judgement: what it refuses, and what it takes for a whole environment.

Nothing is installed here: a folder with a `bin/python` link stands for the environment.
"""

import ast
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "tools" / "setup_env.py"


@pytest.fixture
def setup_env():
    spec = importlib.util.spec_from_file_location("setup_env", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.MODULES, module.PROJECT = ["json"], "ast"  # what this stand-in has to hold
    return module


@pytest.fixture
def venv(tmp_path, setup_env):
    """An environment that looks whole."""
    folder = tmp_path / "venv"
    (folder / "bin").mkdir(parents=True)
    (folder / "bin" / "python").symlink_to(sys.executable)
    setup_env.write_stamp(str(folder), setup_env.wanted_stamp(""))
    return folder


def test_every_old_python_reads_far_enough_to_say_that_it_is_too_old():
    ast.parse(SCRIPT.read_text(), feature_version=(3, 6))


@pytest.mark.parametrize("version", [(3, 6, 15), (3, 9, 18), (3, 13, 0), (4, 0, 0)])
def test_refused_python_names_what_was_found_and_what_is_right(setup_env, version):
    with pytest.raises(setup_env.SetupError) as error:
        setup_env.check_python(version, "/some/python")
    text = str(error.value)
    assert "/some/python is Python %d.%d.%d" % version in text
    assert ("too old" if version < (3, 10) else "too new") in text
    assert "Python 3.10 to 3.12" in text


@pytest.mark.parametrize("version", [(3, 10, 0), (3, 11, 7), (3, 12, 9)])
def test_supported_python_passes(setup_env, version):
    setup_env.check_python(version, "/some/python")


def test_unknown_machine_is_refused(setup_env):
    with pytest.raises(setup_env.SetupError, match="Windows on AMD64"):
        setup_env.check_machine("Windows", "AMD64")


def test_full_disk_is_told_before_anything_is_downloaded(setup_env, tmp_path, monkeypatch):
    setup_env.check_space(str(tmp_path / "venv"), "Darwin")
    monkeypatch.setitem(setup_env.SIZE, "Darwin", (1e6, 1e6))
    with pytest.raises(setup_env.SetupError, match="GB free.*\n.*TMPDIR"):
        setup_env.check_space(str(tmp_path / "venv"), "Darwin")


def test_detectron2_choice_that_is_no_source_is_refused(setup_env, tmp_path):
    with pytest.raises(setup_env.SetupError, match="neither a Detectron2 checkout"):
        setup_env.check_detectron2(str(tmp_path))


def test_whole_environment_is_used_as_it_is(setup_env, venv):
    wanted = setup_env.wanted_stamp("")
    assert setup_env.what_is_wrong(str(venv), wanted) is None
    assert setup_env.what_is_wrong(str(venv), wanted, verify=True) is None


def test_missing_and_unfinished_environments_are_told_apart(setup_env, venv, tmp_path):
    wanted = setup_env.wanted_stamp("")
    assert setup_env.what_is_wrong(str(tmp_path / "none"), wanted) == "is not there"
    setup_env.write_stamp(str(venv), setup_env.UNFINISHED)
    assert setup_env.what_is_wrong(str(venv), wanted) == "was not finished"


def test_interrupted_build_is_never_whole(setup_env, venv, monkeypatch):
    """Whichever step it dies in, what it leaves is unfinished, even where a whole one stood."""
    wanted = setup_env.wanted_stamp("")
    steps = []

    def dies_at(last):
        def run(command, held=None, **options):
            steps.append(command)
            if len(steps) == last:
                raise KeyboardInterrupt
            return 0

        return run

    monkeypatch.setattr(setup_env, "output", lambda command: str(venv / "site"))
    monkeypatch.setattr(
        setup_env, "clear", lambda folder: setup_env.write_stamp(folder, setup_env.UNFINISHED)
    )
    (venv / "site" / "tools").mkdir(parents=True)
    for last in range(1, 6):
        steps.clear()
        setup_env.write_stamp(str(venv), wanted)
        monkeypatch.setattr(setup_env, "run", dies_at(last))
        with pytest.raises(KeyboardInterrupt):
            setup_env.build(str(venv), wanted, "", None)
        assert setup_env.what_is_wrong(str(venv), wanted) == "was not finished"


def test_other_pins_python_or_detectron2_make_it_stale(setup_env, venv, tmp_path, monkeypatch):
    def wrong(wanted):
        return setup_env.what_is_wrong(str(venv), wanted)

    problem = wrong(setup_env.wanted_stamp("/src/detectron2"))
    assert "another DETECTRON2: the pinned wheel, now /src/detectron2" in problem
    assert "another Python: 3." in wrong(setup_env.wanted_stamp("", (3, 99)))
    lock = tmp_path / "lock.txt"
    lock.write_bytes(Path(setup_env.LOCK).read_bytes() + b"\n")
    monkeypatch.setattr(setup_env, "LOCK", str(lock))
    assert "another set of pins" in wrong(setup_env.wanted_stamp(""))


def test_broken_environment_names_what_is_broken(setup_env, venv):
    wanted = setup_env.wanted_stamp("")
    setup_env.MODULES = ["json", "no_such_module"]
    for verify in (False, True):
        problem = setup_env.what_is_wrong(str(venv), wanted, verify)
        assert "No module named" in problem and "no_such_module" in problem
    (venv / "bin" / "python").unlink()
    assert "does not start" in setup_env.what_is_wrong(str(venv), wanted)


def test_a_mistake_in_the_project_is_no_fault_of_the_environment(setup_env, venv):
    setup_env.PROJECT = "asyncio.windows_events"  # is there, and fails when imported
    wanted = setup_env.wanted_stamp("")
    assert setup_env.what_is_wrong(str(venv), wanted, verify=True) is None
    setup_env.PROJECT = "no_such_project"
    assert "no_such_project" in setup_env.what_is_wrong(str(venv), wanted, verify=True)


def test_only_what_the_set_up_made_is_ever_emptied(setup_env, venv, tmp_path):
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "thesis.tex").write_text("years of work")
    with pytest.raises(setup_env.SetupError, match="left alone"):
        setup_env.clear(str(theirs))
    assert (theirs / "thesis.tex").exists()

    setup_env.clear(str(venv))
    assert os.listdir(venv) == [setup_env.STAMP]
    assert json.loads((venv / setup_env.STAMP).read_text()) == setup_env.UNFINISHED


def test_second_set_up_waits_for_the_first(setup_env, venv):
    second = (
        "import sys; sys.path.insert(0, sys.argv[1]); import setup_env\n"
        "with setup_env.only_one(sys.argv[2]): setup_env.say('mine')"
    )
    with setup_env.only_one(str(venv)):
        process = subprocess.Popen(
            [sys.executable, "-c", second, str(SCRIPT.parent), str(venv)],
            stdout=subprocess.PIPE, universal_newlines=True,
        )
        assert "waiting for it to end" in process.stdout.readline()
        assert process.poll() is None
    assert "mine" in process.communicate(timeout=30)[0]


@pytest.mark.parametrize("name", ["lock.txt", "detectron2.txt"])
def test_every_pin_has_a_version_and_a_hash_and_no_address(setup_env, name):
    text = (ROOT / "requirements" / name).read_text()
    blocks = dict(setup_env.requirements(text))
    lines = [line for line in text.splitlines() if re.match(r"[A-Za-z0-9]", line)]
    assert lines and len(lines) == len(list(setup_env.requirements(text)))
    for line, (_, block) in zip(lines, setup_env.requirements(text)):
        assert re.match(r"[a-z0-9-]+==[\w.]+ ", line), line
        assert re.search(r"--hash=sha256:[0-9a-f]{64}\b", block), line
    assert "://" not in text and "--index" not in text and "--find-links" not in text
    if name == "lock.txt":
        assert {"pip", "setuptools", "torch"} <= set(blocks)
