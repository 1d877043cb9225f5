import os

import pytest

from oanet_d2.files import whole_file


def test_whole_or_not_at_all(tmp_path):
    path = str(tmp_path / "new" / "a.txt")
    with whole_file(path) as temporary:
        assert temporary.endswith(".txt") and not os.path.exists(path)
        with open(temporary, "w") as f:
            f.write("first")
    with pytest.raises(KeyboardInterrupt), whole_file(path) as temporary:
        with open(temporary, "w") as f:
            f.write("half")
        raise KeyboardInterrupt
    assert os.listdir(tmp_path / "new") == ["a.txt"] and open(path).read() == "first"


def test_errors_name_the_file(tmp_path):
    path = str(tmp_path / "a.txt")
    for error, words in ((OSError(28, "No space left"), "No space left: .*a.txt"), (OSError("x"), "a.txt: x")):
        with pytest.raises(OSError, match=words), whole_file(path):
            raise error
    with pytest.raises(OSError, match="a.txt"), whole_file(path):
        pass  # nothing is written
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file/a.txt"), whole_file(str(tmp_path / "file" / "a.txt")):
        pass
    assert os.listdir(tmp_path) == ["file"]
