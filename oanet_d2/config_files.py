"""
Configs from yaml files, none of which can run code or grow beyond bounds.
"""

import os
from typing import List, Sequence

import yaml
from fvcore.common.config import BASE_KEY

from detectron2.config import CfgNode, get_cfg
from detectron2.utils.file_io import PathManager

from .config import add_oanet_config

__all__ = ["load_config", "merge_file"]

# Of a config with all that it inherits from.
MAX_BYTES = 2**18
MAX_FILES = 32
# Of one file, with every alias (*name) written out.
MAX_VALUES = 100_000


def load_config(config_file: str, opts: Sequence = ()) -> CfgNode:
    """
    Detectron2's defaults and this project's, then what a yaml says, then overrides. Class counts
    and datasets are left to :func:`oanet_d2.complete_config`.

    Args:
        config_file: see :func:`merge_file`.
        opts: keys and values in turn, as on the command line.

    Raises:
        ValueError: the file or an override is not as it should be; the message names it.
    """
    cfg = get_cfg()
    add_oanet_config(cfg)
    merge_file(cfg, config_file)
    opts = list(opts)
    if len(opts) % 2:
        raise ValueError(f"overrides are KEY VALUE in turn; {opts[-1]!r} has no value.")
    for key, value in zip(opts[::2], opts[1::2]):
        try:
            if isinstance(value, dict):  # yacs would put it in the place of all keys of the section
                raise ValueError("a section cannot be replaced; override its keys")
            cfg.merge_from_list([key, value])
        except Exception as error:  # Detectron2 and yacs raise many kinds
            raise ValueError(f"override {key} {_short(value)}: {_reason(error)}") from error
    return cfg


def merge_file(cfg: CfgNode, config_file: str) -> None:
    """
    As `cfg.merge_from_file(config_file)`, but the file and those it inherits from (`_BASE_`) may
    hold only plain yaml. Detectron2 by itself runs what tags such as `!!python/object/apply` name.

    Args:
        cfg: changed in place; not to be used any more after an error.
        config_file: a path, or a URL that Detectron2's PathManager knows.

    Raises:
        ValueError: a file is missing, too large, no plain yaml or no config; the message names it.
    """
    _check_files(os.fspath(config_file))
    try:
        cfg.merge_from_file(os.fspath(config_file), allow_unsafe=False)
    except Exception as error:  # Detectron2 and yacs raise many kinds
        raise ValueError(f"{config_file}: {_reason(error)}") from error


def _check_files(config_file: str) -> None:
    """Read a config and all that it inherits from as :func:`merge_file` promises."""
    waiting, num_files, num_bytes = [config_file], 0, 0
    while waiting:
        path = waiting.pop()
        num_files += 1
        if num_files > MAX_FILES:
            raise ValueError(
                f"{config_file} inherits from more than {MAX_FILES} files, last {_short(path)}; "
                f"does a {BASE_KEY} lead back to itself?"
            )
        if "\0" in path or not PathManager.isfile(path):  # a named pipe would be waited for forever
            raise ValueError(f"the config {path!r} is not there, or is not a file.")
        try:
            with PathManager.open(path, "rb") as f:
                text = f.read(MAX_BYTES + 1)
        except OSError as error:
            raise ValueError(f"the config {path} cannot be read: {error}") from error
        num_bytes += len(text)
        if num_bytes > MAX_BYTES:
            raise ValueError(f"{path}: a config may have {MAX_BYTES:,} bytes, its bases included.")
        waiting += _bases(_parse(text, path), path)


def _parse(text: bytes, path: str) -> dict:
    loader = None
    try:
        # The text as Detectron2 opens it.
        loader = yaml.SafeLoader(text.decode("utf-8"))
        root = loader.get_single_node()
        if root is not None:
            _count_values(root, {})
        content = None if root is None else loader.construct_document(root)
    except yaml.constructor.ConstructorError as error:
        raise ValueError(
            f"{path}: {error.problem}{error.problem_mark or ''}; a config holds plain yaml "
            "(numbers, strings, lists, mappings), and nothing in it is run."
        ) from error
    except RecursionError as error:
        raise ValueError(f"{path}: nested too deeply.") from error
    except Exception as error:  # yaml's own, and those of what it makes values with
        raise ValueError(f"{path} is no yaml: {error}") from error
    finally:
        if loader is not None:
            loader.dispose()
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds {_short(content)}; it must hold keys and their values.")
    return content


def _count_values(node: yaml.Node, counts: dict) -> int:
    """
    Raises:
        ValueError: it has too many values with every alias written out, as yacs will do; or an
            alias stands for what it lies in.
    """
    if id(node) not in counts:
        counts[id(node)] = None  # under way
        children = node.value if isinstance(node, yaml.CollectionNode) else []
        if isinstance(node, yaml.MappingNode):
            children = [child for pair in children for child in pair]
        counts[id(node)] = 1 + sum(_count_values(child, counts) for child in children)
    count = counts[id(node)]
    if count is None:
        raise ValueError("an alias stands for what it lies in")
    if count > MAX_VALUES:
        raise ValueError(f"more than {MAX_VALUES:,} values, each alias written out")
    return count


def _bases(content: dict, path: str) -> List[str]:
    bases = content.get(BASE_KEY, [])
    bases = bases if isinstance(bases, list) else [bases]
    for base in bases:
        if not isinstance(base, str) or base == "":
            raise ValueError(f"{path}: {BASE_KEY} is {_short(base)}; it must be a path.")
    # as fvcore finds them
    bases = [os.path.expanduser(base) if base.startswith("~") else base for base in bases]
    whole = ("/", "https://", "http://")
    folder = os.path.dirname(path)
    return [base if base.startswith(whole) else os.path.join(folder, base) for base in bases]


def _reason(error: Exception) -> str:
    if isinstance(error, KeyError) and error.args:  # whose message is in quotes
        return str(error.args[0])
    if isinstance(error, (AssertionError, ValueError)) and str(error):
        return str(error)
    return f"no config for Detectron2 ({type(error).__name__}: {error})"


def _short(value) -> str:
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:100]}..."
