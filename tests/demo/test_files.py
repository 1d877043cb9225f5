import os
from types import SimpleNamespace

import files
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from detectron2.data import MetadataCatalog

from tests.conftest import registered, scenes_paths

NAMES = st.sampled_from(["a", "A", "b", "a.jpg", "..", "...", "é", "1", "a b"])
EXTENSIONS = st.sampled_from([".jpg", ".JPG", ".png", ".bmp", ".heic", ""])
PATHS = st.tuples(st.lists(NAMES, max_size=3), NAMES, EXTENSIONS).map(
    lambda x: os.path.join("/", *x[0], x[1] + x[2])
)


def touch(folder, *names):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    return [str(folder / name) for name in names]


def test_files_folders_and_patterns(tmp_path, monkeypatch):
    touch(tmp_path, "in/b.jpg", "in/a.PNG", "in/note.txt", "in/film.mpg", "in/._b.jpg")
    touch(tmp_path, "in/deep/c.jpg", "x[1].jpg", "raw.dat")
    monkeypatch.chdir(tmp_path)
    assert files.find_pictures(["in"]) == ["in/a.PNG", "in/b.jpg"]
    assert files.find_pictures(["in/*"]) == ["in/a.PNG", "in/b.jpg", "in/film.mpg", "in/note.txt"]
    assert files.find_pictures(["in/**/*.jpg"]) == ["in/b.jpg", "in/deep/c.jpg"]
    # A file is a file, whatever its name looks like; and what is given twice is one picture.
    assert files.find_pictures(["x[1].jpg", "raw.dat"]) == ["x[1].jpg", "raw.dat"]
    assert files.find_pictures(["in/b.jpg", "in", "./in/b.jpg"])[1:] == ["in/a.PNG"]
    monkeypatch.setenv("HOME", str(tmp_path / "in"))
    assert files.find_pictures(["~/b.jpg"]) == [str(tmp_path / "in" / "b.jpg")]


@pytest.mark.parametrize(
    "missing, problem",
    [
        ("nowhere.jpg", "is no file, no folder and no pattern"),
        ("none*.jpg", "is no file, no folder and no pattern"),
        ("empty", "is a folder without a picture"),
        ("broken.jpg", "is no file"),
        ("pipe.jpg", "is no file"),
    ],
)
def test_an_input_that_gives_nothing(tmp_path, missing, problem):
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken.jpg").symlink_to("nowhere.jpg")
    os.mkfifo(tmp_path / "pipe.jpg")  # reading it would wait forever
    good = touch(tmp_path, "good.jpg")
    with pytest.raises(ValueError, match=f"--input: .*{missing[:4]}.* {problem}"):
        files.find_pictures([*good, str(tmp_path / missing)])


def test_names_of_outputs():
    names = files.output_names
    assert names(["in/a.jpg", "/elsewhere/b.png"]) == ["a.jpg", "b.png"]
    assert names(["/x/1/a.jpg", "/x/2/a.jpg", "/x/b.jpg"]) == ["1/a.jpg", "2/a.jpg", "b.jpg"]
    assert names(["/x/a.jpg", "/x/2/A.JPG"]) == ["a.jpg", "2/A.JPG"]
    assert names(["scan.xyz", "b"]) == ["scan.xyz.png", "b.png"]
    assert files.png_names(["a.jpg", "b.tiff"]) == ["a.png", "b.png"]
    assert files.png_names(["a.jpg", "a.bmp", "b.jpg"]) == ["a.jpg.png", "a.bmp.png", "b.png"]
    with pytest.raises(ValueError, match="two pictures .* a.xyz.png"):
        names(["/x/a.xyz", "/x/a.xyz.png"])


@given(st.lists(PATHS, min_size=1, max_size=5))
def test_no_output_leaves_its_folder_or_meets_another(paths):
    paths = list({os.path.abspath(x): x for x in paths}.values())
    assume(all(os.path.basename(x) not in ("", ".", "..") for x in paths))
    try:
        names = files.output_names(paths)
        pngs = files.png_names(names)
    except ValueError:
        return
    for made in (names, pngs):
        whole = [os.path.normpath(os.path.join("/out", name)) for name in made]
        assert all(x.startswith("/out/") for x in whole)
        assert len({x.lower() for x in whole}) == len(paths)


def test_ids_in_the_panoptic_format(scenes, pictures, tmp_path):
    elsewhere = SimpleNamespace(get={"image_root": "no", "panoptic_json": "where"}.get)
    ids = files.image_ids
    assert ids(["x/000139.jpg", "7.jpg"], ["000139.png", "7.png"], elsewhere) == [139, 7]
    assert ids(["1.jpg", "b.jpg"], ["1.png", "b.png"], elsewhere) == [1, "b"]
    three = [["1.jpg", "01.jpg", "2.jpg"], ["1.png", "01.png", "2.png"]]
    assert ids(*three, elsewhere) == ["1", "01", 2]
    assert ids(["²"], ["².png"], elsewhere) == ["²"]  # a digit to Python, and no int

    paths = scenes_paths(scenes, "val")
    for k, renamed in enumerate((False, True)):
        if renamed:  # a dataset whose ids are not the names
            text = paths[1].read_text().replace('"id": 1000001', '"id": 77')
            paths = (paths[0], tmp_path / "other.json", *paths[2:])
            paths[1].write_text(text)
        with registered(f"test_ids_{k}", *paths[:3]) as name:
            metadata = MetadataCatalog.get(name)
            first = 77 if renamed else 1000001
            assert ids(pictures[:2], ["x.png", "y.png"], metadata) == [first, 1000002]
            others = [pictures[0], "b.jpg", "1000001.jpg"]
            found = ids(others, ["x.png", "b.png", "1000001.png"], metadata)
            assert found == [first, "b", 1000001 if renamed else "1000001"]


def test_an_output_never_replaces_an_input(tmp_path):
    a, b = touch(tmp_path, "a.jpg", "b.jpg")
    (tmp_path / "link").symlink_to(tmp_path)
    for overwrite in (False, True):
        with pytest.raises(ValueError, match="link/a.jpg is an input"):
            files.check_outputs([str(tmp_path / "link" / "a.jpg")], [a], overwrite)
        with pytest.raises(ValueError, match="is a folder"):
            files.check_outputs([str(tmp_path)], [a], overwrite)
    with pytest.raises(ValueError, match="a.jpg and 1 more would be overwritten.*--overwrite"):
        files.check_outputs([a, b], [], False)
    files.check_outputs([a, b], [], True)
    with pytest.raises(ValueError, match="Two results would be written to .*/b.png"):
        files.check_outputs([str(tmp_path / x) for x in ("c.png", "b.png", "./b.png")], [], True)
