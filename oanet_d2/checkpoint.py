import codecs
import logging
import os
import pickle
import re
import shutil
from collections import Counter, OrderedDict
from contextlib import contextmanager, nullcontext
from typing import Any, Dict, Iterable, List, Optional, Tuple
from urllib.parse import urlparse

import numpy as np
import torch
from torch.nn.parallel import DistributedDataParallel

from detectron2.checkpoint import DetectionCheckpointer

from .whole_files import WholeFiles

__all__ = ["CheckpointError", "OANetCheckpointer", "first_not_finite", "read_checkpoint"]

logger = logging.getLogger(__name__)


class CheckpointError(ValueError):
    """
    A checkpoint that cannot be used. The message names it, the reason and what would be right.
    """


class OANetCheckpointer(DetectionCheckpointer):
    """
    Reads what :class:`DetectionCheckpointer` reads, with three differences: no code in a file is
    run unless `allow_pickle` is set, a file that is of no use is an error that says why, and what
    became of every tensor is told in three lines. It writes the same files, but whole or not at
    all: what was there stays until the new one is on the disk.

    Attributes:
        loaded, new (list[str]): the model's tensors that came from the file that was loaded last,
            and those that are not in it.
        left_out (list[tuple]): (name, shape in the file, shape in the model) of those that are in
            it in another shape.
        unused (list[str]): what the model does not know, under its name in the file or, where
            names are matched by heuristics, the one it was converted to.
    """

    def __init__(self, model, save_dir: str = "", *, allow_pickle: bool = False, **kwargs):
        """
        Args:
            allow_pickle: unpickle whatever a file holds, which can run any code. If False, only
                tensors, numpy arrays and scalars, and plain containers.

        Other arguments are the same as :class:`DetectionCheckpointer`.
        """
        super().__init__(model, save_dir, **kwargs)
        self.path_manager: Any = WholeFiles(self.path_manager)
        self.allow_pickle = allow_pickle
        self.loaded: List[str] = []
        self.new: List[str] = []
        self.left_out: List[Tuple] = []
        self.unused: List[str] = []
        self._path = ""  # of the file being loaded, as it was given
        self._names: List[str] = []  # of its tensors, as they are in it
        self._given: Dict[str, torch.Tensor] = {}  # its tensors, as they are compared with the model

    def save(self, name: str, **kwargs) -> None:
        """
        As :meth:`DetectionCheckpointer.save`.

        Raises:
            CheckpointError: it cannot be written.
            FloatingPointError: a tensor of the model is not finite; it would be of no use.
        """
        if not self.save_dir or not self.save_to_disk:
            return
        broken = first_not_finite(self.model)
        if broken is not None:
            raise FloatingPointError(
                f"{name}.pth is not saved: {broken} holds NaN or infinite numbers. The last "
                f"checkpoint is {self.get_checkpoint_file() or 'none yet'}."
            )
        try:
            super().save(name, **kwargs)
        except (OSError, RuntimeError) as error:  # torch.save raises both for a full disk
            cause: BaseException = error
            while not isinstance(cause, OSError) and cause.__context__ is not None:
                cause = cause.__context__
            free = shutil.disk_usage(self.save_dir).free
            raise CheckpointError(
                f"{os.path.join(self.save_dir, name)}.pth cannot be written: {cause}. What was "
                f"there stays; the last checkpoint is {self.get_checkpoint_file() or 'none yet'}. "
                f"({free / 1e6:,.0f} MB are free.) Go on by --resume when there is room."
            ) from cause

    def load(self, path: str, *args, **kwargs) -> Dict:
        """
        As :meth:`DetectionCheckpointer.load`.

        Raises:
            CheckpointError: the file is missing, is not a checkpoint, holds code, or gives not one
                tensor of the model.
        """
        self._path = path
        if path:
            self._check_file(urlparse(path)._replace(query="").geturl())
        try:
            return super().load(path, *args, **kwargs)
        finally:
            self._parsed_url_during_load = None  # Detectron2 keeps it after an error, and refuses
            self._given = {}

    def _check_file(self, path: str) -> None:
        try:
            local_path = self.path_manager.get_local_path(path)
        except Exception as error:  # each kind of URL has its own
            raise CheckpointError(
                f"{self._path} cannot be fetched: {error!r}. Check the address and the connection, "
                "or fetch the file another way and give its path."
            ) from error
        # Of a wrapped model Detectron2 lets only the main worker have the file.
        if isinstance(self.model, DistributedDataParallel) or os.path.isfile(local_path):
            return
        if os.path.isdir(local_path):
            problem = "is a folder; give the path of a checkpoint in it, such as model_final.pth"
        else:
            problem = "does not exist; give the path or URL of a checkpoint"
            if self.save_dir and path == self.get_checkpoint_file():
                tag = os.path.join(self.save_dir, "last_checkpoint")
                problem += f", or resume from another one by writing its name into {tag}"
        raise CheckpointError(f"{self._path} {problem}.")

    def _load_file(self, filename: str) -> Dict:
        try:
            if not self.allow_pickle and filename.endswith(".pkl"):
                # Detectron2 reads the file again, and makes sense of it.
                with self.path_manager.open(filename, "rb") as f:
                    _PickleCheck(f, encoding="latin1").load()
            elif not self.allow_pickle and filename.endswith(".pyth"):
                self._torch_load(filename)
            checkpoint = super()._load_file(filename)
            self._convert_ndarray_to_tensor(checkpoint["model"])
            if not all(isinstance(name, str) for name in checkpoint["model"]):
                raise TypeError("names of tensors must be strings")
        except Exception as error:  # a broken file makes pickle, zipfile and torch raise anything
            raise CheckpointError(self._problem(error, filename)) from error
        return checkpoint

    def _torch_load(self, f: str) -> Dict:
        with nullcontext() if self.allow_pickle else _numpy_scalars():
            return torch.load(f, map_location="cpu", weights_only=not self.allow_pickle)

    def _problem(self, error: BaseException, filename: str) -> str:
        # torch raises "from None" what it would advise instead of what went wrong.
        while error.__suppress_context__ and error.__context__ is not None:
            error = error.__context__
        refused = re.search(r"(?:GLOBAL|Unsupported class) (\S+)", str(error))
        if refused and not self.allow_pickle:
            arrays = "arrays and " if filename.endswith(".pkl") else ""
            return (
                f"{self._path} holds {refused[1]}. Of what is no tensor, only numpy's {arrays}"
                "scalars of numbers and plain containers are loaded; all else can run code. If "
                "you trust the file, set MODEL.ALLOW_PICKLE True."
            )
        fetched = "" if filename in self._path else f" It was fetched to {filename}: delete that."
        return (
            f"{self._path} cannot be read as a checkpoint: {error!r}. It must be a .pkl of the "
            "model zoo, or a .pth with the tensors of a model by name; this one is cut short, "
            f"damaged or something else.{fetched}"
        )

    def _convert_ndarray_to_tensor(self, state_dict: Dict) -> None:
        super()._convert_ndarray_to_tensor(state_dict)
        # The last one that comes here is what fvcore gives to the model, less the wrong shapes.
        self._given = state_dict

    def _load_model(self, checkpoint: Dict):
        self._names = list(checkpoint["model"])
        with _only_errors("detectron2.checkpoint.c2_model_loading"):
            incompatible = super()._load_model(checkpoint)
        model = self.model.state_dict()
        self.left_out = list(incompatible.incorrect_shapes)
        # Detectron2 takes these from the config.
        ignored = {"pixel_mean", "pixel_std"}
        self.unused = [name for name in incompatible.unexpected_keys if name not in ignored]
        if checkpoint.get("matching_heuristics", False):
            # These match the ends of names, and leave under the file's name what has another shape.
            for name in incompatible.missing_keys:
                ends = [end for end in self.unused if name.endswith(f".{end}")]
                if ends:
                    shape = self._given[max(ends, key=len)].shape
                    self.left_out.append((name, tuple(shape), tuple(model[name].shape)))
                    self.unused = [end for end in self.unused if end not in ends]
        left_out = {name for name, *_ in self.left_out}
        self.loaded = [name for name in model if name in self._given]
        self.new = [name for name in incompatible.missing_keys if name not in left_out]
        return incompatible

    def _log_incompatible_keys(self, incompatible) -> None:
        if not self.loaded:
            shapes = self.left_out and f" Left out for their shape: {_shapes(self.left_out)}."
            raise CheckpointError(
                f"{self._path} gives not one tensor of the model: it holds {_few(self._names)}; "
                f"the model has {_few(list(self.model.state_dict()))}.{shapes or ''} It belongs to "
                "another model, or is a .pth of a backbone alone: put ?matching_heuristics=True "
                "after the path of that."
            )
        total = len(self.loaded) + len(self.new) + len(self.left_out)
        unused = f", {len(self.unused)} unused, such as {self.unused[0]}" if self.unused else ""
        loaded = f"{len(self.loaded)} of {_count(total, self.loaded)}"
        logger.info(f"From {self._path}: {loaded}{unused}")
        logger.info(f"New, not in it: {_count(len(self.new), self.new)}")
        names = [name for name, *_ in self.left_out]
        shapes = f": {_shapes(self.left_out)}" if names else ""
        logger.info(f"Left out for their shape: {_count(len(names), names)}{shapes}")


def first_not_finite(model: torch.nn.Module) -> Optional[str]:
    """
    Returns:
        the name of the first tensor in its state that holds NaN or infinite numbers; None if all
        are finite.
    """
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            return name
    return None


def read_checkpoint(path: str) -> Dict:
    """
    What a .pth holds, to look at what is beside its tensors: those stay on the disk until they are
    used. Empty if the file cannot be read like this.
    """
    try:
        with _numpy_scalars():
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception:  # a broken file makes torch raise anything
        return {}
    return content if isinstance(content, dict) else {}


def _refuse(what: str):
    raise pickle.UnpicklingError(f"GLOBAL {what} is not allowed")  # as torch says it


# While a pickle is checked, these stand in for what they are named after. The real ones take any
# state from it: numpy.ndarray((1,), "O", b"8 bytes.") alone makes an object of any address.
class _Dtype:
    numpy: np.dtype

    def __new__(cls, code, align=False, copy=True):
        if not re.fullmatch(r"[biufc]\d+", code):
            _refuse(f"numpy.dtype({code!r})")
        self = super().__new__(cls)
        self.numpy = np.dtype(code)
        return self

    def __setstate__(self, state):
        version, order, *others = state
        if (version, *others) != (3, None, None, None, -1, -1, 0) or order not in {*"<>|="}:
            _refuse("numpy.dtype")
        self.numpy = self.numpy.newbyteorder(order)


class _Array:
    def __setstate__(self, state):
        version, shape, dtype, fortran, data = state
        if not isinstance(dtype, _Dtype) or any(n < 0 for n in shape):
            _refuse("numpy.ndarray")


def _reconstruct(cls, shape, code):
    if (cls, shape, code) not in ((_Array, (0,), b"b"), (_Array, (0,), "b")):
        _refuse("numpy.ndarray")
    return _Array()


def _frombuffer(data, dtype, shape, order, axis_order=None):
    array = _Array()
    array.__setstate__((1, shape, dtype, order == "F", data))
    return array


def _scalar(dtype, data):
    data = data.encode("latin1") if isinstance(data, str) else data
    return np.frombuffer(data, dtype.numpy, 1)[0]


# All that pickles of numpy arrays and scalars (of numpy 1 or 2) and of ordered dicts refer to.
_PICKLE_GLOBALS: Dict[str, Any] = {
    "collections.OrderedDict": OrderedDict,
    "numpy.dtype": _Dtype,
    "numpy.ndarray": _Array,
    **{f"numpy.{core}.multiarray._reconstruct": _reconstruct for core in ("core", "_core")},
    **{f"numpy.{core}.multiarray.scalar": _scalar for core in ("core", "_core")},
    **{f"numpy.{core}.numeric._frombuffer": _frombuffer for core in ("core", "_core")},
    "_codecs.encode": codecs.encode,  # protocols 0 to 2 have no bytes,
    "__builtin__.bytes": bytes,  # nor empty ones
}


class _PickleCheck(pickle.Unpickler):
    def find_class(self, module: str, name: str):
        if f"{module}.{name}" not in _PICKLE_GLOBALS:
            _refuse(f"{module}.{name}")
        return _PICKLE_GLOBALS[f"{module}.{name}"]


def _numpy_scalars():
    """
    Within this context `torch.load(weights_only=True)` takes numpy's scalars too, if this version
    of torch can be told to.
    """
    if torch.__version__ < "2.7":
        return nullcontext()
    names = ("numpy.dtype", "numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar")
    return torch.serialization.safe_globals([_Dtype, *((_PICKLE_GLOBALS[x], x) for x in names)])


@contextmanager
def _only_errors(name: str):
    other = logging.getLogger(name)
    level = other.level
    other.setLevel(logging.ERROR)
    try:
        yield
    finally:
        other.setLevel(level)


def _count(number: int, names: Iterable[str]) -> str:
    groups = Counter(name.split(".")[0] for name in names)
    listed = ", ".join(f"{group} {n}" for group, n in groups.items())
    return f"{number} tensor{'s' * (number != 1)}" + f" ({listed})" * bool(listed)


def _few(items: List[str], most: int = 3) -> str:
    more = f" and {len(items) - most} more" if len(items) > most else ""
    return ", ".join(items[:most]) + more if items else "nothing"


def _shapes(left_out: List[Tuple]) -> str:
    return _few([f"{name} {theirs} here {ours}" for name, theirs, ours in left_out])
