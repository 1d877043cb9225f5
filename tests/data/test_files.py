import json
import os

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from oanet_d2.data import files
from oanet_d2.data.files import Folder, check_json_file, leads_outside, read_json


@pytest.fixture
def root(tmp_path):
    """A folder with a/x.jpg in it, beside a folder `store` with y.jpg in it."""
    for name in ("root/a/x.jpg", "store/y.jpg"):
        path = tmp_path / name
        path.parent.mkdir(parents=True)
        path.touch()
    return tmp_path / "root"


@pytest.mark.parametrize("name", ["a/x.jpg", "a/./x.jpg", "not_there.jpg", "none/x.jpg", "..jpg"])
def test_names_within_the_folder(root, name):
    assert Folder(root).path(name) == f"{root}/{name}"


@pytest.mark.parametrize(
    "name, words",
    [
        ("../../etc/passwd", "leads out of .*; it must be a path within it"),
        ("a/../../store/y.jpg", "leads out of"),
        ("a/..", "leads out of"),
        ("/etc/passwd", "leads out of"),
        ("a/x.jpg\0.png", "leads out of"),
        ("\ud800.jpg", "cannot be the name of a file"),
        ("", "is ''; it must be a string"),
        (7, "is 7; it must be a string"),
        (None, "is None; it must be a string"),
    ],
)
def test_names_that_are_refused(root, name, words):
    with pytest.raises(ValueError, match=words):
        Folder(root).path(name)


LINKS = {"file.jpg": "../store/y.jpg", "folder": "../store", "absolute": "/etc/passwd"}


@pytest.mark.parametrize("name", ["file.jpg", "folder/y.jpg", "folder/new.jpg", "absolute"])
def test_links_out_of_the_folder(root, name, monkeypatch):
    for link, target in LINKS.items():
        (root / link).symlink_to(target)
    with pytest.raises(ValueError, match="symbolic link.*OANET_D2_LINKED_FOLDERS"):
        Folder(root).path(name)
    store = root.parent / "store"
    monkeypatch.setenv("OANET_D2_LINKED_FOLDERS", f"/nowhere{os.pathsep}{store}")
    if name == "absolute":  # still not one of those folders
        with pytest.raises(ValueError, match="/etc/passwd"):
            Folder(root).path(name)
    else:
        assert Folder(root).path(name) == f"{root}/{name}"


def test_links_within_the_folder_and_to_the_folder_itself(root, tmp_path):
    (root / "b.jpg").symlink_to("a/x.jpg")
    (tmp_path / "alias").symlink_to(root)
    assert Folder(tmp_path / "alias").path("b.jpg") == f"{tmp_path}/alias/b.jpg"
    (root / "gone.jpg").symlink_to("../store/none.jpg")  # a link to what is not there, outside
    with pytest.raises(ValueError, match="symbolic link"):
        Folder(root).path("gone.jpg")


def test_the_current_folder_and_urls(root, monkeypatch):
    monkeypatch.chdir(root)
    assert Folder("").path("a/x.jpg") == "./a/x.jpg"
    assert Folder("https://host/images").path("a/x.jpg") == "https://host/images/a/x.jpg"
    with pytest.raises(ValueError, match="leads out of"):
        Folder("https://host/images").path("../x.jpg")


@given(st.lists(st.sampled_from(["..", ".", "a", "b", ""]), min_size=1).map("/".join))
def test_what_is_not_refused_stays_inside(name):
    """Whatever a name is made of: resolved, it lies in the folder."""
    if not leads_outside(name):
        assert os.path.normpath(f"/root/{name}").startswith("/root")


@pytest.mark.parametrize("content", [b"{", b"", b"\xff\xfe{", b"[1,]", b"9" * 5000])
def test_what_is_not_json(tmp_path, content):
    path = tmp_path / "x.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="x.json is not a JSON file"):
        read_json(str(path))


def test_json_is_read_as_python_reads_it(tmp_path):
    content = {"a": [1, 2.5, None, "ü", "\ud800"]}
    (tmp_path / "x.json").write_text(json.dumps(content))
    assert read_json(str(tmp_path / "x.json")) == content


def test_nested_beyond_measure(tmp_path):
    (tmp_path / "x.json").write_text("[" * 10**6)
    with pytest.raises(ValueError, match="x.json is nested too deeply"):
        read_json(str(tmp_path / "x.json"))


def test_only_regular_files_of_bounded_size(tmp_path, monkeypatch):
    path = tmp_path / "x.json"
    with pytest.raises(ValueError, match="x.json: No such file"):
        check_json_file(str(path))
    os.mkfifo(path)  # nobody writes into it: to open it would wait forever
    with pytest.raises(ValueError, match="x.json: this is not a file"):
        read_json(str(path))
    path.unlink()
    np.zeros(1000, np.uint8).tofile(path)
    monkeypatch.setattr(files, "MAX_JSON_BYTES", 999)
    with pytest.raises(ValueError, match="x.json has 1,000 bytes; at most 999 are read"):
        read_json(str(path))
