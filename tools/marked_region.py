"""
The part of a page that a script writes: what stands between two marks, which stay.
"""

from pathlib import Path
from typing import Tuple

from oanet_d2.whole_files import whole_file

END = "<!-- to here -->"


def begin_mark(script: str, region: str = "") -> str:
    """
    Args:
        script: path in the repository of the script that writes the region.
        region: its name, where a page has several.
    """
    return f"<!-- {script} writes {region + ' ' if region else ''}from here -->"


def split_page(page: Path, begin: str) -> Tuple[str, str]:
    """
    Returns:
        what stands before the region and after it, without its marks.

    Raises:
        ValueError: the page has no such region.
    """
    before, mark, rest = page.read_text().partition(begin)
    _, end, after = rest.partition(END)
    if not mark or not end:
        raise ValueError(f"{page} has no lines {begin!r} and, after it, {END!r}.")
    return before, after


def update_page(page: Path, begin: str, text: str) -> None:
    """
    Replace what stands between the lines `begin` and END by `text`.

    Raises:
        ValueError: the page has no such region.
    """
    before, after = split_page(page, begin)
    with whole_file(str(page)) as f:
        f.write(f"{before}{begin}\n\n{text}\n\n{END}{after}")
