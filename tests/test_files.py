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


@pytest.mark.parametrize("content", ["\u00e4\n", "\u00e4\n".encode()])
def test_after_an_error_the_old_file_stays(tmp_path, content):
    path = tmp_path / "a.txt"
    write_atomically(str(path), content)
    with pytest.raises(KeyboardInterrupt), atomic_path(str(path)) as temporary:
        with open(temporary, "w") as f:
            f.write("half")
        raise KeyboardInterrupt
    assert os.listdir(tmp_path) == ["a.txt"] and path.read_bytes() == b"\xc3\xa4\n"


def test_a_full_disk_names_the_file(small_disk):
    with pytest.raises(OSError, match="No space left.*large"):
        write_atomically(str(small_disk / "large"), bytes(2 << 20))
    assert os.listdir(small_disk) == []
