import codecs
import logging
import os
import pickle
import re
from collections import Counter, OrderedDict
from typing import Any, Dict, Iterable, List, Optional, Tuple
from urllib.parse import urlparse

import torch

from detectron2.checkpoint import DetectionCheckpointer

from .files import atomic_path, write_atomically

__all__ = ["CheckpointError", "OANetCheckpointer", "first_not_finite"]

logger = logging.getLogger(__name__)


class CheckpointError(ValueError):
    """
    A checkpoint that cannot be used. The message names it, the reason and the remedy.
    """


class OANetCheckpointer(DetectionCheckpointer):
    """
    Reads what :class:`DetectionCheckpointer` reads, but runs no code from a file unless
    `allow_pickle` is set, refuses a file without one tensor for the model, and says in three log
    lines what became of the tensors. It writes the same files, whole or not at all.

    Attributes:
        new (list[str]): tensors of the model that the last file does not have.
        left_out (list[tuple]): (name, shape in the file, shape in the model) of tensors whose shapes
            differ.
        unused (list[str]): tensors of the file that the model does not have.
    """

    def __init__(self, model, save_dir: str = "", *, allow_pickle: bool = False, **kwargs):
        """
        Args:
            allow_pickle: unpickle whatever a file holds. This can run any code.

        Other arguments are the same as :class:`DetectionCheckpointer`.
        """
        super().__init__(model, save_dir, **kwargs)
        self.allow_pickle = allow_pickle
        self.new: List[str] = []
        self.left_out: List[Tuple] = []
        self.unused: List[str] = []
        self._path = ""  # the file being loaded, as the user gave it

    def save(self, name: str, **kwargs: Any) -> None:
        """
        As :meth:`DetectionCheckpointer.save`.

        Raises:
            CheckpointError: the file cannot be written.
            FloatingPointError: a tensor of the model is not finite.
        """
        if not self.save_dir or not self.save_to_disk:
            return
        path = os.path.join(self.save_dir, f"{name}.pth")
        last = f"The last checkpoint is {self.get_checkpoint_file() or 'none yet'}."
        broken = first_not_finite(self.model.state_dict().items())
        if broken is not None:
            raise FloatingPointError(f"{path} is not saved: {broken} is not finite. {last}")
        data = {"model": self.model.state_dict()}
        data.update({key: x.state_dict() for key, x in self.checkpointables.items()}, **kwargs)
        self.logger.info(f"Saving checkpoint to {path}")
        try:
            with atomic_path(path) as temporary, open(temporary, "wb") as f:
                torch.save(data, f)
            self.tag_last_checkpoint(f"{name}.pth")
        except (OSError, RuntimeError) as error:  # torch may raise the latter for a full disk
            reason = error if isinstance(error, OSError) else error.__context__ or error
            raise CheckpointError(
                f"{path} cannot be written: {reason}. {last} Make room and go on with --resume."
            ) from error

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        """
        As :meth:`DetectionCheckpointer.tag_last_checkpoint`.
        """
        write_atomically(os.path.join(self.save_dir, "last_checkpoint"), last_filename_basename)

    def load(self, path: str, *args, **kwargs) -> Dict[str, Any]:
        """
        As :meth:`DetectionCheckpointer.load`.

        Raises:
            CheckpointError: the file is missing, is not a checkpoint, holds code, or has not one
                tensor that fits the model.
        """
        self._path = path
        if path:
            self._check_exists(urlparse(path)._replace(query="").geturl())
        try:
            return super().load(path, *args, **kwargs)
        finally:
            self._parsed_url_during_load = None  # Detectron2 keeps it after an error

    def _check_exists(self, path: str) -> None:
        try:
            local_path = self.path_manager.get_local_path(path)
        except Exception as error:  # each kind of URL raises its own
            raise CheckpointError(f"{self._path} cannot be fetched: {error!r}.") from error
        if os.path.isdir(local_path):
            raise CheckpointError(f"{self._path} is a folder; give the path of a file in it.")
        if not os.path.isfile(local_path):
            resumed = f", or correct {self.save_dir}/last_checkpoint, if that names it"
            raise CheckpointError(
                f"{self._path} does not exist; give the path or URL of a checkpoint"
                f"{resumed if self.save_dir else ''}."
            )

    def _load_file(self, filename: str) -> Dict[str, Any]:
        try:
            if not self.allow_pickle and filename.endswith(".pkl"):
                with open(filename, "rb") as f:
                    _PickleCheck(f, encoding="latin1").load()  # then Detectron2 may read it
            elif not self.allow_pickle and filename.endswith(".pyth"):
                self._torch_load(filename)
            checkpoint = super()._load_file(filename)
            self._convert_ndarray_to_tensor(checkpoint["model"])
        except Exception as error:  # a damaged file makes pickle, zipfile and torch raise anything
            raise CheckpointError(f"{self._path} {self._problem(error, filename)}") from error
        return checkpoint

    def _torch_load(self, f: str) -> Dict[str, Any]:
        return torch.load(f, map_location="cpu", weights_only=not self.allow_pickle)

    def _problem(self, error: BaseException, filename: str) -> str:
        # torch raises its advice "from None"; the context says what went wrong
        while error.__suppress_context__ and error.__context__ is not None:
            error = error.__context__
        refused = re.search(r"(?:GLOBAL|Unsupported class) (\S+)", str(error))
        if refused and not self.allow_pickle:
            return (
                f"holds {refused[1]}, which could run code; only tensors, NumPy arrays (in a .pkl) and "
                "plain containers are loaded. If you trust the file, set MODEL.ALLOW_PICKLE True."
            )
        fetched = "" if filename in self._path else f" Delete {filename}, where it was fetched to."
        return (
            f"cannot be read as a checkpoint: {error!r}. It must be a .pkl of the model zoo, or a "
            f".pth with the tensors of a model by name; this one is damaged or another kind.{fetched}"
        )

    def _log_incompatible_keys(self, incompatible) -> None:
        names = [x for x in self.model.state_dict() if not x.endswith("num_batches_tracked")]
        self.left_out = list(incompatible.incorrect_shapes)
        left_out = [name for name, *_ in self.left_out]
        self.new = [x for x in names if x in incompatible.missing_keys and x not in left_out]
        loaded = [x for x in names if x not in incompatible.missing_keys and x not in left_out]
        from_config = ("pixel_mean", "pixel_std")
        self.unused = [x for x in incompatible.unexpected_keys if x not in from_config]
        shapes = _few([f"{name} {there} here {here}" for name, there, here in self.left_out])
        if not loaded:
            raise CheckpointError(
                f"{self._path} has not one tensor that fits the model. Unknown: {_few(self.unused)}; "
                f"with another shape: {shapes}. The model has {_few(names)}. It is another model's, or "
                "a backbone's .pth: put ?matching_heuristics=True after the path then."
            )
        unused = f", {len(self.unused)} unused, such as {self.unused[0]}" if self.unused else ""
        logger.info(f"From {self._path}: {len(loaded)} of {_count(len(names), loaded)}{unused}")
        logger.info(f"New, not in it: {_count(len(self.new), self.new)}")
        shapes = f": {shapes}" if left_out else ""
        logger.info(f"Left out for their shape: {_count(len(left_out), left_out)}{shapes}")


def first_not_finite(tensors: Iterable[Tuple[str, torch.Tensor]]) -> Optional[str]:
    """
    Args:
        tensors: (name, tensor) in turn.

    Returns:
        the first name whose tensor holds NaN or infinite numbers, or None.
    """
    for name, tensor in tensors:
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            return name
    return None


def _count(number: int, names: List[str]) -> str:
    groups = Counter(name.split(".")[0] for name in names)
    listed = ", ".join(f"{group} {n}" for group, n in groups.items())
    return f"{number} tensor{'s' * (number != 1)}" + f" ({listed})" * bool(listed)


def _few(items: List[str], most: int = 3) -> str:
    more = f" and {len(items) - most} more" if len(items) > most else ""
    return ", ".join(items[:most]) + more if items else "nothing"


def _refuse(what: str):
    raise pickle.UnpicklingError(f"GLOBAL {what} is not allowed")  # as torch says it


# NumPy's own classes trust what a pickle says, and make objects out of any bytes. The check unpickles
# into these instead, which take nothing but numbers.
class _Dtype:
    def __init__(self, code, align=False, copy=True):
        if not re.fullmatch(r"[biufc]\d+", code):
            _refuse(f"numpy.dtype({code!r})")

    def __setstate__(self, state):
        if state[1] not in ("<", ">", "|", "=") or state[2:] != (None, None, None, -1, -1, 0):
            _refuse("numpy.dtype")


class _Array:
    def __setstate__(self, state):
        _, shape, dtype, _, _ = state
        if not isinstance(dtype, _Dtype) or any(n < 0 for n in shape):
            _refuse("numpy.ndarray")


def _reconstruct(cls, shape, code):
    if cls is not _Array or shape != (0,) or code not in ("b", b"b"):
        _refuse("numpy.ndarray")
    return _Array()


def _scalar(dtype, data):
    if not isinstance(dtype, _Dtype):
        _refuse("numpy.generic")


# Everything that pickles of NumPy arrays and scalars (protocols 0 to 4) and ordered dicts refer to.
_GLOBALS = {
    "collections.OrderedDict": OrderedDict,
    "numpy.dtype": _Dtype,
    "numpy.ndarray": _Array,
    **{f"numpy.{core}.multiarray._reconstruct": _reconstruct for core in ("core", "_core")},
    **{f"numpy.{core}.multiarray.scalar": _scalar for core in ("core", "_core")},
    "_codecs.encode": codecs.encode,  # protocols 0 to 2 have no bytes
    "__builtin__.bytes": bytes,
}


class _PickleCheck(pickle.Unpickler):
    def find_class(self, module: str, name: str):
        if f"{module}.{name}" not in _GLOBALS:
            _refuse(f"{module}.{name}")
        return _GLOBALS[f"{module}.{name}"]
