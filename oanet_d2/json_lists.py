"""
The lists of a large JSON, read entry by entry: the file is never in memory as a whole.
"""

import json
import os
from typing import Any, Dict, Iterator, List, Optional, Tuple, Union

__all__ = ["JsonLists"]

Range = Tuple[int, int]  # of bytes
_CHUNK = 2**20
_ENDS = [*" \t\r\n,:]}"]  # of a value


class JsonLists:
    """A JSON that is a list, or an object that has lists at the top, as COCO's formats are."""

    def __init__(self, path: Union[str, os.PathLike]):
        self.path = os.fspath(path)

    def read(self, *keys: str) -> List[List[Any]]:
        """All entries of the lists under these keys; none of a list that is not there."""
        ranges: Dict[str, List[Range]] = {key: [] for key in keys}
        for name, range, _ in self._entries():
            if name in ranges:
                ranges[name].append(range)
        return [self.parse(x) for x in ranges.values()]

    def ranges_by_image(self, key: Optional[str]) -> Dict[Any, List[Range]]:
        """
        Args:
            key: of the list in the object; None for a JSON that is a list.

        Returns:
            "image_id" of the entries -> where they are. Neighbours of one image share a range.

        Raises:
            ValueError: it is no such JSON, or an entry has no "image_id".
        """
        ranges: Dict[Any, List[Range]] = {}
        last = None
        for name, (start, end), entry in self._entries():
            if name != key:
                continue
            image_id = entry.get("image_id") if isinstance(entry, dict) else None
            if not isinstance(image_id, (int, float, str)):
                raise ValueError(f"{self.path}: the entry at byte {start} has no 'image_id'.")
            if isinstance(image_id, str) and not image_id.isascii():  # a byte is a character here
                image_id = self.parse([(start, end)])[0]["image_id"]
            of_image = ranges.setdefault(image_id, [])
            if of_image and last == image_id:
                of_image[-1] = of_image[-1][0], end
            else:
                of_image.append((start, end))
            last = image_id
        return ranges

    def parse(self, ranges: List[Range]) -> List[Any]:
        """The entries in these ranges."""
        entries: List[Any] = []
        with open(self.path, "rb") as f:
            for start, end in ranges:
                f.seek(start)
                entries += json.loads(b"[" + f.read(end - start) + b"]")
        return entries

    def is_list(self) -> bool:
        with open(self.path, "rb") as f:
            return f.read(_CHUNK).lstrip()[:1] == b"["

    def _entries(self) -> Iterator[Tuple[Optional[str], Range, Any]]:
        """The key of the list, or None, where the entry is, and the entry, whose strings may be garbled."""
        with open(self.path, "rb") as f:
            text = _Text(f, self.path)
            if text.next() == "[":
                for range, entry in text.list():
                    yield None, range, entry
                return
            text.expect("{")
            while text.next() != "}":
                _, key = text.value()
                text.expect(":")
                if text.next() == "[":
                    for range, entry in text.list():
                        yield key, range, entry
                else:
                    text.value()
                if text.next() != "}":
                    text.expect(",")


class _Text:
    """A position in a file. A byte is a character, so that positions are those of the file."""

    def __init__(self, file, path: str):
        self.file, self.path = file, path
        self.text, self.start, self.at = "", 0, 0
        self.decoder = json.JSONDecoder()

    def _more(self) -> bool:
        self.start += self.at
        # Twice as much each time, so that a long entry is not parsed again and again.
        read = self.file.read(max(_CHUNK, len(self.text) - self.at)).decode("latin-1")
        self.text, self.at = self.text[self.at :] + read, 0
        return bool(read)

    def next(self) -> str:
        """The next character that is no space; the position is before it."""
        while True:
            while self.at < len(self.text):
                if self.text[self.at] not in " \t\r\n":
                    return self.text[self.at]
                self.at += 1
            if not self._more():
                self.fail("it ends too early")

    def expect(self, character: str) -> None:
        if self.next() != character:
            self.fail(f"{character!r} is missing")
        self.at += 1

    def value(self) -> Tuple[Range, Any]:
        self.next()
        while True:
            try:
                value, end = self.decoder.raw_decode(self.text, self.at)
                # What is followed by something else may go on: 1.5e3 is read as 1.5 without its end.
                if self.text[end : end + 1] in _ENDS or not self._more():
                    break
            except json.JSONDecodeError as error:
                if not self._more():
                    self.fail(error.msg)
        range = self.start + self.at, self.start + end
        self.at = end
        return range, value

    def list(self) -> Iterator[Tuple[Range, Any]]:
        self.expect("[")
        while self.next() != "]":
            yield self.value()
            if self.next() != "]":
                self.expect(",")
        self.expect("]")

    def fail(self, reason: str) -> None:
        raise ValueError(f"{self.path} is no JSON of lists: {reason} (byte {self.start + self.at}).")
