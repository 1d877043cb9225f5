import os
import signal
from unittest import mock

import pytest
import torch

from oanet_d2.checkpoint import CheckpointError, OANetCheckpointer
from oanet_d2.whole_files import drop_unfinished_line, whole_file, whole_path


def test_appears_whole_at_the_end(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with whole_file(str(path)) as f:
        f.write("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    with pytest.raises(KeyboardInterrupt), whole_file(str(path), "wb") as f:
        f.write(b"half of")
        raise KeyboardInterrupt
    assert path.read_text() == "new"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_what_writes_by_name(tmp_path):
    path = str(tmp_path / "new" / "a.txt")
    with whole_path(path) as temporary:
        assert temporary.endswith(".txt") and not os.path.exists(path)
        with open(temporary, "w") as f:
            f.write("first")
    with pytest.raises(KeyboardInterrupt), whole_path(path) as temporary:
        with open(temporary, "w") as f:
            f.write("half")
        raise KeyboardInterrupt
    assert os.listdir(tmp_path / "new") == ["a.txt"] and (tmp_path / "new" / "a.txt").read_text() == "first"


def test_errors_name_the_file(tmp_path):
    path = str(tmp_path / "a.txt")
    full = OSError(28, "No space left"), "No space left: .*a.txt"
    for error, words in (full, (OSError("x"), "a.txt: x")):
        with pytest.raises(OSError, match=words), whole_path(path):
            raise error
    with pytest.raises(OSError, match="a.txt"), whole_path(path):
        pass  # nothing is written
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file/a.txt"), whole_path(str(tmp_path / "file" / "a.txt")):
        pass
    assert os.listdir(tmp_path) == ["file"]
@pytest.mark.parametrize(
    "before, after", [("a\nb\n", "a\nb\n"), ("a\nb\n{c", "a\nb\n"), ("{c", ""), ("", "")]
)
def test_unfinished_line(tmp_path, before, after):
    path = tmp_path / "metrics.json"
    drop_unfinished_line(str(path))
    assert not path.exists()
    path.write_text(before)
    drop_unfinished_line(str(path))
    assert path.read_text() == after


@pytest.fixture
def saved(tmp_path):
    """A checkpointer that has saved good.pth, in which every number is 1."""
    model = torch.nn.Linear(100, 100)
    torch.nn.init.ones_(model.weight)
    checkpointer = OANetCheckpointer(model, str(tmp_path))
    checkpointer.save("good", iteration=3)
    torch.nn.init.zeros_(model.weight)
    return checkpointer


def check_good_is_the_last(checkpointer, folder, files=("good.pth", "last_checkpoint")):
    assert sorted(os.listdir(folder)) == sorted(files)
    assert (folder / "last_checkpoint").read_text() == "good.pth"
    assert checkpointer.resume_or_load("")["iteration"] == 3
    assert (checkpointer.model.weight == 1).all()


def half_of_a_save(then):
    def save(data, f):
        f.write(b"PK half of a checkpoint")
        f.flush()
        then()

    return mock.patch("torch.save", save)


@pytest.mark.parametrize("name", ["good", "other"])
def test_killed_while_it_saves(saved, tmp_path, name):
    pid = os.fork()
    if pid == 0:
        with half_of_a_save(lambda: os.kill(os.getpid(), signal.SIGKILL)):
            saved.save(name)
    assert os.waitpid(pid, 0)[1] == signal.SIGKILL
    check_good_is_the_last(saved, tmp_path, ["good.pth", "last_checkpoint", f"{name}.pth.tmp"])


def test_disk_is_full(saved, tmp_path):
    """As torch says it: the OSError comes out as the context of another error."""

    def fail():
        try:
            raise OSError(28, "No space left on device")
        except OSError:
            raise RuntimeError("unexpected pos 64 vs 0")  # noqa: B904, as torch does

    with half_of_a_save(fail), pytest.raises(CheckpointError) as error:
        saved.save("other")
    for text in ("other.pth", "No space left on device", "good.pth", "--resume"):
        assert text in str(error.value)
    check_good_is_the_last(saved, tmp_path)


def test_disk_is_really_full(small_disk):
    """A disk of 1 MB, with a model of 0.6 MB."""
    model = torch.nn.Linear(400, 400)
    torch.nn.init.ones_(model.weight)
    checkpointer = OANetCheckpointer(model, str(small_disk))
    checkpointer.save("good", iteration=3)
    with pytest.raises(CheckpointError, match="No space left on device.*good.pth"):
        checkpointer.save("other", iteration=4)
    check_good_is_the_last(checkpointer, small_disk)


def test_numbers_that_are_not_finite_are_not_saved(saved, tmp_path):
    for value in (torch.nan, torch.inf):
        with torch.no_grad():
            saved.model.bias[7] = value
        with pytest.raises(FloatingPointError, match=r"good.pth is not saved: bias .*good.pth"):
            saved.save("good")
    check_good_is_the_last(saved, tmp_path)
