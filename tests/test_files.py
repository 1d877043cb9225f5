import os

import pytest

from oanet_d2.files import whole_path


def test_whole_or_not_at_all(tmp_path):
    file = tmp_path / "new" / "a.txt"
    path = str(file)
    with whole_path(path) as temporary:
        assert temporary.endswith(".txt") and not os.path.exists(path)
        with open(temporary, "w") as f:
            f.write("first")
    with pytest.raises(KeyboardInterrupt), whole_path(path) as temporary:
        with open(temporary, "w") as f:
            f.write("half")
        raise KeyboardInterrupt
    assert os.listdir(tmp_path / "new") == ["a.txt"] and file.read_text() == "first"


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
