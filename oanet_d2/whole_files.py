"""
Files that appear whole or not at all.
"""

import os
from contextlib import contextmanager
from typing import IO, Iterator, Optional

__all__ = ["WholeFiles", "drop_unfinished_line", "whole_file", "whole_path"]


@contextmanager
def whole_path(path: str, temporary: Optional[str] = None) -> Iterator[str]:
    """
    For what writes a file by its name. The block writes it under a temporary name in the same
    folder; it gets its own, in place of a file that has it, when all is written. After an error or
    an interruption nothing is left of it and what `path` held before stays. (Of a process that is
    killed, the temporary file may remain.)

    Args:
        path: the file; its folder is made if it is not there.
        temporary: the temporary name. Not given: one with the same extension.

    Yields:
        the temporary name.

    Raises:
        OSError: it cannot be written; names `path`.
    """
    root, extension = os.path.splitext(path)
    temporary = temporary or f"{root}.partial{extension}"
    try:
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        yield temporary
        os.replace(temporary, path)
    except OSError as error:  # of a full disk Python's own names no file
        if error.errno is None:
            raise OSError(f"{path}: {error}") from error
        raise OSError(error.errno, error.strerror, path) from error
    finally:
        if os.path.lexists(temporary):
            os.remove(temporary)


@contextmanager
def whole_file(path: str, mode: str = "w") -> Iterator[IO]:
    """
    Open a file for writing, as :func:`whole_path` writes it, as `path` + ".tmp" at first. At the end
    of the block it is on the disk.

    Args:
        path: a local path.
        mode: "w" (UTF-8) or "wb".

    Raises:
        OSError: it cannot be written; names `path`.
    """
    encoding = None if "b" in mode else "utf-8"
    with whole_path(path, path + ".tmp") as temporary:
        with open(temporary, mode, encoding=encoding) as f:
            yield f
            f.flush()
            os.fsync(f.fileno())


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
