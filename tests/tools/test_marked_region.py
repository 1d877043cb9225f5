import pytest
from marked_region import END, begin_mark, split_page, update_page

BEGIN = begin_mark("tools/some.py")


def test_only_the_region_changes(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"# Title\n\n{BEGIN}\nold\n{END}\n\nother {END}\n")
    update_page(page, BEGIN, "| new |")
    expected = f"# Title\n\n{BEGIN}\n\n| new |\n\n{END}\n\nother {END}\n"
    assert page.read_text() == expected
    update_page(page, BEGIN, "| new |")
    assert page.read_text() == expected
    assert [x.name for x in tmp_path.iterdir()] == ["page.md"]


def test_regions_of_one_page_have_names(tmp_path):
    page = tmp_path / "page.md"
    second = begin_mark("tools/some.py", "options")
    page.write_text(f"{BEGIN}\n{END}\n{second}\n{END}\n")
    update_page(page, second, "x")
    assert page.read_text() == f"{BEGIN}\n{END}\n{second}\n\nx\n\n{END}\n"


@pytest.mark.parametrize("text", ["", BEGIN, END, f"{END}\n{BEGIN}"])
def test_a_page_without_the_region_stays_as_it_is(tmp_path, text):
    page = tmp_path / "page.md"
    page.write_text(text)
    with pytest.raises(ValueError, match="page.md has no lines '<!-- tools/some.py"):
        split_page(page, BEGIN)
    with pytest.raises(ValueError):
        update_page(page, BEGIN, "x")
    assert page.read_text() == text
