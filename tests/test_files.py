import os

import pytest

from oanet_d2.files import atomic_path, write_atomically


def test_a_file_appears_when_it_is_whole(tmp_path):
    path = tmp_path / "new" / "a.txt"
    with atomic_path(str(path)) as temporary:
        with open(temporary, "w") as f:
            f.write("new")
        assert temporary.endswith(".txt") and not path.exists()
    assert path.read_text() == "new"


def test_after_an_error_the_old_file_stays(tmp_path):
    path = tmp_path / "a.txt"
    write_atomically(str(path), "old")
    with pytest.raises(KeyboardInterrupt), atomic_path(str(path)) as temporary:
        with open(temporary, "w") as f:
            f.write("half")
        raise KeyboardInterrupt
    assert os.listdir(tmp_path) == ["a.txt"] and path.read_text() == "old"


def test_text_and_bytes(tmp_path):
    for content in ("\u00e4\n", "\u00e4\n".encode()):
        write_atomically(str(tmp_path / "a"), content)
        assert (tmp_path / "a").read_bytes() == b"\xc3\xa4\n"


def test_a_full_disk_names_the_file(small_disk):
    path = small_disk / "large"
    with pytest.raises(OSError, match="No space left.*large"):
        write_atomically(str(path), bytes(2 << 20))
    assert os.listdir(small_disk) == []


def test_an_error_within_the_block_keeps_its_own_file_name(tmp_path):
    """What the block reads is not blamed on the file that it writes."""
    with pytest.raises(FileNotFoundError) as error, atomic_path(str(tmp_path / "a")):
        (tmp_path / "missing").read_text()
    assert error.value.filename == str(tmp_path / "missing")
