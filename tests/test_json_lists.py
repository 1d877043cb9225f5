"""`JsonLists` against the json module."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from oanet_d2 import json_lists
from oanet_d2.json_lists import JsonLists

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=8,
)
IDS = st.integers(0, 3) | st.sampled_from(["a", "straße", "東京", 'q"uote'])
ENTRIES = st.lists(st.fixed_dictionaries({"image_id": IDS, "x": VALUES}), max_size=6)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tmp_path_factory.mktemp("json") / "lists.json"


def by_image(entries):
    found = {}
    for entry in entries:
        found.setdefault(entry["image_id"], []).append(entry)
    return found


@given(
    ENTRIES,
    VALUES,
    st.booleans(),
    st.booleans(),
    st.sampled_from([None, 1, "\t"]),
    st.sampled_from([1, 2, 7, 100, 2**20]),
)
def test_it_reads_what_json_reads(path, entries, other, is_list, ascii, indent, chunk):
    header = {
        "info": other,
        "none": [],
        "images": [other, [], [[other]]],
        "annotations": entries,
        "é": 1.5e300,
    }
    text = json.dumps(entries if is_list else header, ensure_ascii=ascii, indent=indent)
    path.write_text(text, encoding="utf-8")
    lists = JsonLists(path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_lists, "_CHUNK", chunk)
        ranges = lists.ranges_by_image(None if is_list else "annotations")
        assert {k: lists.parse(x) for k, x in ranges.items()} == by_image(entries)
        if chunk > 1 or not text[0].isspace():
            assert lists.is_list() == is_list
        if not is_list:
            for key in ("none", "images", "annotations"):
                assert lists.read(key) == [header[key]]
            assert lists.read("nothing") == [[]]


def test_neighbours_of_an_image_share_a_range(path):
    entries = [{"image_id": i} for i in (1, 1, 1, 2, 1)]
    path.write_text(json.dumps(entries))
    assert {k: len(x) for k, x in JsonLists(path).ranges_by_image(None).items()} == {1: 2, 2: 1}


WHOLE = '{"images": [{"id": 1}, {"id": 2}], "annotations": [{"image_id": 1, "x": "ab"}], "n": 12}'


@pytest.mark.parametrize("end", range(len(WHOLE)))
def test_a_truncated_file(path, end):
    path.write_text(WHOLE[:end])
    with pytest.raises(ValueError, match="lists.json"):
        JsonLists(path).ranges_by_image("annotations")


@pytest.mark.parametrize(
    "text, words",
    [
        ("", "too early"),
        ("12", "'{' is missing"),
        ("<html>", "'{' is missing"),
        ('[{"image_id": 1} {"image_id": 1}]', "',' is missing"),
        ('{"a": [] "b": []}', "',' is missing"),
        ('{"a" []}', "':' is missing"),
        ('[{"image_id": 1}, {"id": 2}]', "entry at byte 18 has no 'image_id'"),
        ("[7]", "entry at byte 1 has no 'image_id'"),
        ('[{"image_id": [1]}]', "entry at byte 1 has no 'image_id'"),
    ],
)
def test_what_is_no_such_json(path, text, words):
    path.write_text(text)
    with pytest.raises(ValueError, match=words):
        JsonLists(path).ranges_by_image(None)
