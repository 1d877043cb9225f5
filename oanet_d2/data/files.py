"""
Files of a dataset: names that a JSON gives stay within the dataset's folders, and a JSON is read
whole or refused.
"""

import json
import os
from pathlib import PurePath
from typing import Any, Dict, Optional, Set

from detectron2.utils.file_io import PathManager

__all__ = ["MAX_JSON_BYTES", "Folder", "check_json_file", "leads_outside", "read_json"]

# Of a JSON file. Python takes about five times as much memory for what is in it. (COCO's largest
# is 0.5 GB, LVIS' 1.2 GB.)
MAX_JSON_BYTES = 2 * 2**30
# Names of folders, separated as in PATH, that symbolic links in a dataset may lead to.
LINKED_FOLDERS = "OANET_D2_LINKED_FOLDERS"


def leads_outside(name: str) -> bool:
    """Whether a file name is no path within the folder that it belongs to, links aside."""
    return os.path.isabs(name) or ".." in PurePath(name).parts or "\0" in name


class Folder:
    """
    A folder, and the paths of files in it that somebody else names. The folder itself is the
    user's word, so it may be or lie behind a symbolic link. What is in it may have come out of an
    archive: links in it are followed as long as they stay in it, or lead to one of the folders in
    the environment variable `OANET_D2_LINKED_FOLDERS` (separated by ":"), as those of a dataset
    whose images lie in a common store do.
    """

    def __init__(self, root: str):
        """
        Args:
            root: a folder, or a URL that Detectron2's PathManager knows; that has no links.
        """
        self.root = str(root) or "."
        linked = os.environ.get(LINKED_FOLDERS, "").split(os.pathsep)
        self._allowed = [os.path.realpath(x) for x in (self.root, *filter(None, linked))]
        self._plain: Dict[str, Set[str]] = {}  # folder -> the names in it that are no links

    def path(self, name: str) -> str:
        """
        Args:
            name: file name relative to the folder.

        Returns:
            `root`/`name`. Whether there is such a file is not looked at.

        Raises:
            ValueError: the name is no relative path, or it leads out of the folder.
        """
        if not isinstance(name, str) or name == "":
            raise ValueError(f"the file name is {name!r}; it must be a string that is not empty")
        if leads_outside(name):
            raise ValueError(f"{name!r} leads out of {self.root}; it must be a path within it")
        try:
            os.fsencode(name)
        except UnicodeEncodeError:
            raise ValueError(f"{name!r} cannot be the name of a file") from None
        path = f"{self.root}/{name}"
        if "://" in self.root:
            return path
        # One look at a folder costs less than one at each of its 100,000 files.
        folder, base = os.path.split(path)
        if folder not in self._plain:
            self._check_links(folder)
            self._plain[folder] = _plain_names(folder)
        if base not in self._plain[folder]:
            self._check_links(path)
        return path

    def _check_links(self, path: str) -> None:
        target = os.path.realpath(path)
        if not any(os.path.commonpath([target, folder]) == folder for folder in self._allowed):
            raise ValueError(
                f"{path} is a symbolic link, or lies behind one, to {target}, out of {self.root}. "
                "If that is meant, name the folder that it leads to in the environment variable "
                f"{LINKED_FOLDERS}."
            )


def _plain_names(folder: str) -> Set[str]:
    try:
        with os.scandir(folder) as entries:
            return {entry.name for entry in entries if not entry.is_symlink()}
    except OSError:  # whoever opens the file will say so
        return set()


def check_json_file(path: str, max_bytes: Optional[int] = None) -> None:
    """
    Raises:
        ValueError: there is no such regular file (a named pipe would be waited for forever), or it
            is larger than `max_bytes`, by default MAX_JSON_BYTES.
    """
    max_bytes = MAX_JSON_BYTES if max_bytes is None else max_bytes
    if not PathManager.isfile(path):
        there = "this is not a file" if PathManager.exists(path) else "No such file"
        raise ValueError(f"Cannot read the annotations {path}: {there}.")
    try:
        size = os.path.getsize(PathManager.get_local_path(path))
    except OSError as error:
        raise ValueError(f"Cannot read the annotations {path}: {error}") from error
    if size > max_bytes:
        raise ValueError(
            f"{path} has {size:,} bytes; at most {max_bytes:,} are read. Split it into several "
            "datasets."
        )


def read_json(path: str) -> Any:
    """
    Raises:
        ValueError: the file is missing, too large (:func:`check_json_file`) or is not JSON.
    """
    check_json_file(path)
    try:
        with PathManager.open(path, "rb") as f:
            return json.loads(f.read())
    except OSError as error:
        raise ValueError(f"Cannot read the annotations {path}: {error}") from error
    except ValueError as error:
        raise ValueError(f"{path} is not a JSON file: {error}") from error
    except RecursionError as error:
        raise ValueError(f"{path} is nested too deeply for an annotation file.") from error
