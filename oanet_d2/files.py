"""
Files that appear whole or not at all.
"""

import os
from contextlib import contextmanager
from typing import Iterator

__all__ = ["whole_path"]


@contextmanager
def whole_path(path: str) -> Iterator[str]:
    """
    Write a file under a temporary name in its folder. It gets its own name, in place of a file
    that has it, when all is written; after an error or an interruption nothing is left of it.

    Args:
        path: the file; its folder is made if it is not there.

    Yields:
        the temporary name, with the same extension.

    Raises:
        OSError: it cannot be written; names `path`.
    """
    root, extension = os.path.splitext(path)
    temporary = f"{root}.partial{extension}"
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
