"""
Which pictures are read, and under which names results are written.
"""

import glob
import os
from collections import Counter
from typing import Container, Dict, List, Union

from PIL import Image

from oanet_d2.data.images import FORMATS
from oanet_d2.data.register import read_annotations


def is_picture(path: str, formats: Container[str]) -> bool:
    """
    Whether a file's extension is of a picture.

    Args:
        formats: PIL's names of those to consider, such as FORMATS or `Image.SAVE`.
    """
    extension = os.path.splitext(path)[1].lower()
    name = Image.registered_extensions().get(extension)
    return name in formats and Image.MIME.get(name, "").startswith("image/")


def find_pictures(inputs: List[str]) -> List[str]:
    """
    Args:
        inputs: files, folders (their pictures, not those of folders in them) and glob patterns.

    Returns:
        paths in the order of `inputs`, sorted within a folder and a pattern, each once.

    Raises:
        ValueError: one of them gives nothing.
    """
    found = []
    for given in map(os.path.expanduser, inputs):
        if os.path.isdir(given):
            listed = glob.glob(os.path.join(glob.escape(given), "*"))
            listed = [x for x in listed if os.path.isfile(x) and is_picture(x, FORMATS)]
            problem = "is a folder without a picture"
        elif os.path.lexists(given):
            listed = [given] if os.path.isfile(given) else []
            problem = "is no file"
        else:
            listed = [x for x in glob.glob(given, recursive=True) if os.path.isfile(x)]
            problem = "is no file, no folder and no pattern that a file matches"
        if not listed:
            raise ValueError(f"--input: {given} {problem}.")
        found += sorted(listed)
    return list({os.path.abspath(path): path for path in found}.values())


def output_names(paths: List[str]) -> List[str]:
    """
    Names for what is made of pictures, to be joined to the output folder: the pictures' own, or,
    where some have one name, their paths below the folder that holds them all. (Of a format that
    cannot be written, with .png after it.)

    Args:
        paths: different files.

    Returns:
        relative paths, without "..", no two the same.

    Raises:
        ValueError: two would be the same after all.
    """
    names = [os.path.basename(path) for path in paths]
    if _twice(names):
        whole = [os.path.abspath(path) for path in paths]
        top = os.path.commonpath([os.path.dirname(path) for path in whole])
        names = [os.path.relpath(path, top) for path in whole]
    return _unique([n if is_picture(n, Image.SAVE) else f"{n}.png" for n in names])


def png_names(names: List[str]) -> List[str]:
    """
    Names of PNGs for :func:`output_names`: with .png instead of the extension or, where that makes
    two the same (`a.jpg` and `a.bmp`), after it.

    Raises:
        ValueError: two would be the same after all.
    """
    roots = [os.path.splitext(name)[0] for name in names]
    twice = _twice(roots)
    return _unique([f"{n if r.lower() in twice else r}.png" for n, r in zip(names, roots)])


def _twice(names: List[str]) -> set:
    # Some file systems do not tell apart what differs in case.
    return {name for name, count in Counter(x.lower() for x in names).items() if count > 1}


def _unique(names: List[str]) -> List[str]:
    for name in _twice(names):
        raise ValueError(
            f"--input: two pictures would both be written to {name}; give them in two runs, with "
            "an --output of their own."
        )
    return names


def image_ids(paths: List[str], pngs: List[str], metadata) -> List[Union[int, str]]:
    """
    Ids for a COCO panoptic JSON: of a picture of the dataset, the one in its panoptic JSON; of any
    other the number that it is named by, as COCO's are (`000000000139.jpg`), or, if it has none or
    not alone, its name without the extension.

    Args:
        paths, pngs: of the pictures, and their :func:`png_names`.
        metadata: of the dataset; its files need not be there.
    """
    known = _dataset_ids(paths, metadata)
    names = [os.path.splitext(png)[0] for png in pngs]
    ids = [
        known.get(path, int(name) if name.isascii() and name.isdigit() else name)
        for path, name in zip(paths, names)
    ]
    count = Counter(ids)
    return [x if path in known or count[x] == 1 else n for x, path, n in zip(ids, paths, names)]


def _dataset_ids(paths: List[str], metadata) -> Dict[str, Union[int, str]]:
    """
    Returns:
        path -> id in the dataset's panoptic JSON, of the pictures that are in it.
    """
    root, annotations = metadata.get("image_root"), metadata.get("panoptic_json")
    if not root or not os.path.isfile(annotations):
        return {}
    root = os.path.realpath(root)
    places = {path: os.path.relpath(os.path.realpath(path), root) for path in paths}
    if all(place.startswith(os.pardir) for place in places.values()):
        return {}  # which spares reading the JSON
    images = read_annotations(annotations, "images")["images"]
    known = {os.path.normpath(image["file_name"]): image["id"] for image in images}
    return {path: known[place] for path, place in places.items() if place in known}


def check_outputs(outputs: List[str], inputs: List[str], overwrite: bool):
    """
    Args:
        outputs: files that will be written.
        inputs: files that will be read.
        overwrite: whether outputs may replace files.

    Raises:
        ValueError: an output is one of the inputs, a folder, another output, or there already.
    """
    for path in _twice([os.path.abspath(path) for path in outputs]):
        raise ValueError(f"Two results would be written to {path}; write them to two folders.")
    read = {os.path.realpath(path) for path in inputs}
    for path in outputs:
        if os.path.realpath(path) in read:
            raise ValueError(f"{path} is an input; write to another place.")
        if os.path.isdir(path):
            raise ValueError(f"{path} would be written, but it is a folder.")
    there = [path for path in outputs if os.path.lexists(path)]
    if there and not overwrite:
        more = f" and {len(there) - 1} more" if len(there) > 1 else ""
        raise ValueError(
            f"{there[0]}{more} would be overwritten; write to another place, or say --overwrite."
        )
