"""
Files that appear whole or not at all.
"""

import os
from contextlib import contextmanager, suppress
from typing import IO, Iterator

__all__ = ["WholeFiles", "drop_unfinished_line", "whole_file"]


@contextmanager
def whole_file(path: str, mode: str = "w") -> Iterator[IO]:
    """
    Open a file for writing, under a temporary name beside it. At the end of the block it is on the
    disk and takes its own name in one step. If the block fails, the temporary file is removed and
    what `path` held before stays. (Of a process that is killed, `path` + ".tmp" may remain.)

    Args:
        path: a local path.
        mode: "w" or "wb".

    Raises:
        OSError: it cannot be written.
    """
    temporary = path + ".tmp"
    try:
        with open(temporary, mode) as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            os.remove(temporary)
        raise


def drop_unfinished_line(path: str):
    """
    Cut what comes after the last end of a line off a text file: of a log to which lines are
    appended, what was not written to the end. Nothing happens where there is no such file.
    """
    if not os.path.isfile(path):
        return
    with open(path, "rb+") as f:
        unfinished = len(f.read().rpartition(b"\n")[2])
        if unfinished:
            f.seek(-unfinished, os.SEEK_END)
            f.truncate()


class WholeFiles:
    """
    A path manager that writes local files by :func:`whole_file`, and else does what another does.
    """

    def __init__(self, path_manager):
        """
        Args:
            path_manager: iopath's.
        """
        self._path_manager = path_manager

    def __getattr__(self, name: str):
        return getattr(self._path_manager, name)

    def open(self, path: str, mode: str = "r", **kwargs):
        if "w" in mode and "://" not in path:
            return whole_file(path, mode)
        return self._path_manager.open(path, mode, **kwargs)
