import codecs
import json
import os
import pickle
import re
from collections import OrderedDict
from contextlib import contextmanager
from typing import Any, Dict, Iterable, Iterator, List, Optional, Tuple
from urllib.parse import urlparse

import safetensors.torch
import torch

from detectron2.checkpoint import DetectionCheckpointer
from detectron2.utils import comm
from detectron2.utils.file_io import PathManager

from .files import atomic_path, write_atomically
from .modeling.timm_backbone import TimmBackbone

__all__ = ["CheckpointError", "OANetCheckpointer", "first_not_finite", "read_description"]


class CheckpointError(ValueError):
    """A checkpoint that cannot be used. The message names it, the reason and the remedy."""


class OANetCheckpointer(DetectionCheckpointer):
    """
    Reads what :class:`DetectionCheckpointer` reads, and `.safetensors`, but runs no code from a file
    unless `allow_pickle` is set, and refuses a file without one tensor for the model. It writes the
    same files, whole or not at all.

    Attributes:
        new (list[str]): tensors of the model that the last file lacks or has in another shape.
        left_out (list[tuple]): (name, shape in the file, shape in the model) where shapes differ.
        unused (list[str]): tensors of the file that the model does not have.
    """

    def __init__(self, model, save_dir: str = "", *, allow_pickle: bool = False, **kwargs):
        """
        Args:
            allow_pickle: unpickle whatever a file holds, which can run any code.
            save_dir, kwargs: see :class:`DetectionCheckpointer`.
        """
        super().__init__(model, save_dir, **kwargs)
        self.allow_pickle = allow_pickle
        self.new: List[str] = []
        self.left_out: List[Tuple] = []
        self.unused: List[str] = []

    def save(self, name: str, **kwargs: Any) -> None:
        """
        As :meth:`DetectionCheckpointer.save`.

        Raises:
            CheckpointError: the file cannot be written.
            FloatingPointError: a tensor of the model is not finite.
        """
        if not self.save_dir or not self.save_to_disk:
            return
        data = {"model": self.model.state_dict()}
        data.update({key: x.state_dict() for key, x in self.checkpointables.items()}, **kwargs)
        with self._saving(f"{name}.pth") as path:
            with atomic_path(path) as temporary, open(temporary, "wb") as f:
                torch.save(data, f)
            write_atomically(os.path.join(self.save_dir, "last_checkpoint"), f"{name}.pth")

    def save_safetensors(self, name: str, config: str, categories: List[Dict], **more: str) -> None:
        """
        Write `name`.safetensors: the model's tensors, and in its metadata what
        :func:`read_description` gives. No training resumes from it.

        Args:
            config: yaml of the whole config.
            categories: of the dataset, as in a COCO panoptic JSON.
            more: other metadata.

        Raises:
            CheckpointError, FloatingPointError: as :meth:`save`.
        """
        if not self.save_dir or not self.save_to_disk:
            return
        metadata = {"config": config, "categories": json.dumps(categories), **more}
        # The format takes no two tensors that share memory.
        state = self.model.state_dict().items()
        tensors = {k: x.to("cpu", copy=True).contiguous() for k, x in state}
        with self._saving(f"{name}.safetensors") as path:
            write_atomically(path, safetensors.torch.save(tensors, metadata))

    @contextmanager
    def _saving(self, name: str) -> Iterator[str]:
        path = os.path.join(self.save_dir, name)
        last = f"The last checkpoint is {self.get_checkpoint_file() or 'none yet'}."
        broken = first_not_finite(self.model.state_dict().items())
        if broken is not None:
            raise FloatingPointError(f"{path} is not saved: {broken} is not finite. {last}")
        self.logger.info(f"Saving checkpoint to {path}")
        try:
            yield path
        except (OSError, RuntimeError) as error:  # torch may raise the latter for a full disk
            reason = f"{error.__context__ or error}. {last} Make room and go on with --resume."
            raise CheckpointError(f"{path} cannot be written: {reason}") from error

    def resume_or_load(self, path: str, *, resume: bool = True) -> Dict[str, Any]:
        """
        As :meth:`DetectionCheckpointer.resume_or_load`.

        Raises:
            CheckpointError: see :meth:`load`; or the last checkpoint is of another kind of training,
                or not every process finds it.
        """
        last = self.get_checkpoint_file() if resume and self.has_checkpoint() else ""
        found = comm.all_gather(os.path.basename(last))
        if len(set(found)) > 1:
            raise CheckpointError(
                f"The processes would resume from {found}: not all of them find the last checkpoint "
                f"in {self.save_dir}. Every machine needs that folder."
            )
        try:
            return super().resume_or_load(path, resume=resume)
        except KeyError as error:
            raise CheckpointError(
                f"{last} cannot be resumed here: it has no {error}. A config in Python cannot resume a "
                "training of a yaml, nor the other way round. Load it as weights, in another output folder."
            ) from error

    def load(self, path: str, *args, **kwargs) -> Dict[str, Any]:
        """
        As :meth:`DetectionCheckpointer.load`; "timm://..." is for :meth:`TimmBackbone.pretrained`.

        Raises:
            CheckpointError: the file is missing, is not a checkpoint, holds code, or has not one
                tensor that fits the model.
        """
        self._path = path  # with which errors begin
        if path.startswith("timm://"):
            return self._load_timm(path[len("timm://") :])
        if path:
            tag = os.path.join(self.save_dir, "last_checkpoint")
            _local_file(path, self.path_manager, f"Correct MODEL.WEIGHTS or, to resume, {tag}.")
        return super().load(path, *args, **kwargs)

    def _load_timm(self, source: str) -> Dict[str, Any]:
        self.logger.info(f"Loading the backbone from {self._path}")
        state = {}
        for name, module in self.model.named_modules():
            if isinstance(module, TimmBackbone):
                try:
                    tensors = module.pretrained(source)
                except Exception as error:  # a download can fail in many ways
                    raise CheckpointError(f"{self._path} cannot be used: {error}") from error
                state.update({f"{name}.{key}": x for key, x in tensors.items()})
        if not state:
            raise CheckpointError(f"{self._path} is for a backbone of timm, and the model has none.")
        self._log_incompatible_keys(self._load_model({"model": state}))
        return {}

    def _load_file(self, filename: str) -> Dict[str, Any]:
        try:
            if not self.allow_pickle and filename.endswith(".pkl"):
                with open(filename, "rb") as f:
                    _PickleCheck(f, encoding="latin1").load()  # then Detectron2 may read it
            elif filename.endswith(".pyth"):
                self._torch_load(filename)
            checkpoint = super()._load_file(filename)
            self._convert_ndarray_to_tensor(checkpoint["model"])
            return checkpoint
        except Exception as error:  # a damaged file makes pickle, zipfile and torch raise anything
            # What torch raises advises to allow code; its context says what went wrong.
            reason = (error.__suppress_context__ and error.__context__) or error
            code = re.search(r"(?:GLOBAL|Unsupported class) (\S+)", str(reason))
            if code:
                raise CheckpointError(
                    f"{self._path} holds {code[1]}, which could run code; only tensors, NumPy arrays "
                    "(in a .pkl) and containers are loaded. If you trust it, set MODEL.ALLOW_PICKLE "
                    "True."
                ) from error
            raise CheckpointError(
                f"{self._path} cannot be read as a checkpoint: {reason!r}. It must be a .pkl of the "
                f"model zoo, or a .pth or .safetensors with tensors by name; {filename} is damaged or "
                "another kind."
            ) from error

    def _torch_load(self, f: str) -> Dict[str, Any]:
        if f.endswith(".safetensors"):
            return {"model": safetensors.torch.load_file(f)}
        return torch.load(f, map_location="cpu", weights_only=not self.allow_pickle)

    def _log_incompatible_keys(self, incompatible) -> None:
        super()._log_incompatible_keys(incompatible)
        missing, unexpected, self.left_out = incompatible
        self.new = [x for x in missing if "num_batches_tracked" not in x]
        self.unused = [x for x in unexpected if x not in ("pixel_mean", "pixel_std")]
        names = list(self.model.state_dict())
        if set(names) <= set(missing):
            raise CheckpointError(
                f"{self._path} has not one tensor that fits the model. It has, for example, "
                f"{[*self.unused, *self.left_out][:3]}, and the model {names[:3]}. If it is a "
                "backbone's .pth, put ?matching_heuristics=True after the path."
            )


def read_description(path: str) -> Tuple[str, List[Dict]]:
    """
    What a file of :meth:`OANetCheckpointer.save_safetensors` says about its model.

    Args:
        path: a path or a URL.

    Returns:
        config (str): yaml, as untrusted as the file.
        categories (list[dict]): of the dataset, as in a COCO panoptic JSON.

    Raises:
        CheckpointError: there is no such file, or it is another one.
    """
    file = _local_file(path, PathManager)
    try:
        with safetensors.safe_open(file, "pt") as f:
            found = f.metadata() or {}
        return found["config"], list(json.loads(found["categories"]))
    except Exception as error:  # damaged, or of another program
        raise CheckpointError(
            f"{path} has no config and classes inside ({error!r}), as a training's "
            "model_final.safetensors has. Use another checkpoint with its yaml, by --config-file or "
            "PanopticPredictor.from_config."
        ) from error


def _local_file(path: str, path_manager, remedy: str = "") -> str:
    try:
        file = path_manager.get_local_path(urlparse(path)._replace(query="").geturl())
    except Exception as error:  # each kind of URL raises its own
        raise CheckpointError(f"{path} cannot be fetched: {error!r}.") from error
    if not os.path.isfile(file):
        raise CheckpointError(f"{path} is no file. {remedy}".rstrip())
    return file


def first_not_finite(tensors: Iterable[Tuple[str, torch.Tensor]]) -> Optional[str]:
    """The first name whose tensor holds NaN or infinite numbers, or None."""
    return next((name for name, x in tensors if not torch.isfinite(x).all()), None)


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
