"""Files that appear whole or not at all."""

import os
from contextlib import contextmanager
from typing import Iterator, Union

__all__ = ["atomic_path", "write_atomically"]


@contextmanager
def atomic_path(path: str, sync: bool = True) -> Iterator[str]:
    """
    The block writes a file under a temporary name in the same folder. When the block ends, the file
    is on the disk and takes its own name. After an error nothing of it is left, and the file that
    had the name before stays.

    Args:
        path: the file. Its folder is made if it does not exist.
        sync: False for many small files: it does not wait for the disk, so a loss of power may leave
            an empty file.

    Yields:
        the temporary name, with the same extension.
    """
    root, extension = os.path.splitext(path)
    temporary = f"{root}.partial-{os.getpid()}{extension}"
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    try:
        yield temporary
        if sync:
            with open(temporary, "rb+") as f:
                os.fsync(f.fileno())
        os.replace(temporary, path)
    finally:
        if os.path.lexists(temporary):
            os.remove(temporary)


def write_atomically(path: str, content: Union[str, bytes], sync: bool = True) -> None:
    """
    Write a whole file with :func:`atomic_path`. Text is written as UTF-8. An OSError names `path`.
    """
    data = content.encode() if isinstance(content, str) else content
    try:
        with atomic_path(path, sync) as temporary, open(temporary, "wb") as f:
            f.write(data)
    except OSError as error:
        raise OSError(error.errno, error.strerror, path) from error
