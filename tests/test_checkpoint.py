import logging
import os
import pickle
import re
import sys
from collections import Counter, OrderedDict

import numpy as np
import pytest
import torch
from iopath.common.file_io import PathHandler
from torch import nn

from detectron2.modeling import build_model
from detectron2.utils.file_io import PathManager

from oanet_d2.checkpoint import CheckpointError, OANetCheckpointer
from tests.conftest import panoptic_fpn_cfg

ZOO = "Detectron2 Model Zoo"


def linear(seed=0):
    """The smallest model; its parameters are `head.weight` (2, 3) and `head.bias` (2,)."""
    torch.manual_seed(seed)
    return nn.ModuleDict({"head": nn.Linear(3, 2)})


def zoo(state):
    return {"model": {k: v.numpy() for k, v in state.items()}, "__author__": ZOO}


def write(path, content, protocol=2):
    """A pickle, or what torch makes of it, by the path's ending."""
    if path.suffix == ".pkl":
        path.write_bytes(pickle.dumps(content, protocol))
    else:
        torch.save(content, path)
    return str(path)


def lines(caplog):
    records = [r for r in caplog.records if r.name == "oanet_d2.checkpoint"]
    return [r.getMessage() for r in records]


def groups(names):
    return ", ".join(f"{k} {n}" for k, n in Counter(x.split(".")[0] for x in names).items())


@pytest.fixture
def cfg(tiny_cfg):
    """An OANet that takes all of a Panoptic FPN."""
    tiny_cfg.MODEL.SEM_SEG_HEAD.SUPERVISION, tiny_cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES = "stuff", 7
    tiny_cfg.MODEL.SRM_HEAD.PAIRS.EVIDENCE = ("geometry",)
    return tiny_cfg


def panoptic_fpn_state(cfg, *opts):
    """The state of a Panoptic FPN, unlike any initialization."""
    cfg = panoptic_fpn_cfg(cfg)
    cfg.merge_from_list(opts)
    state = build_model(cfg).state_dict()
    return {k: v + (torch.rand(v.shape) if v.is_floating_point() else 7) for k, v in state.items()}


def counted(names):
    return [k for k in names if not k.endswith("num_batches_tracked")]


# ---------------------------------------------------------------- what is loaded


@pytest.mark.parametrize(
    "name, content",
    [
        ("zoo.pkl", zoo),
        ("detectron2.pth", lambda state: {"model": state, "iteration": 5}),
        ("plain.pth", lambda state: OrderedDict(state)),
        ("parallel.pth", lambda state: {f"module.{k}": v for k, v in state.items()}),
        ("pycls.pyth", lambda state: {"model_state": state}),
    ],
)
def test_every_tensor_of_a_panoptic_fpn_arrives(cfg, tmp_path, caplog, name, content):
    caplog.set_level(logging.INFO)
    state, model = panoptic_fpn_state(cfg), build_model(cfg)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    path = write(tmp_path / name, content(state))
    rest = OANetCheckpointer(model).load(path)
    if name == "pycls.pyth":  # Detectron2 leaves these out
        state = {k: state[k] for k in counted(state)}
    for k, v in model.state_dict().items():
        assert k in state or k.startswith("srm_head.") or k.endswith("num_batches_tracked")
        assert torch.equal(v, state.get(k, before[k])), k
    assert rest.get("iteration") == (5 if name == "detectron2.pth" else None)
    new = [k for k in counted(before) if k.startswith("srm_head.")]
    given = counted(state)
    assert lines(caplog) == [
        f"From {path}: {len(given)} of {len(given) + len(new)} tensors ({groups(given)})",
        f"New, not in it: {len(new)} tensors (srm_head {len(new)})",
        "Left out for their shape: 0 tensors",
    ]


def test_another_class_count(cfg, tmp_path, caplog):
    """The layers that depend on it stay as they were, everything else is loaded."""
    caplog.set_level(logging.INFO)
    classes = ["MODEL.ROI_HEADS.NUM_CLASSES", "80", "MODEL.SEM_SEG_HEAD.NUM_CLASSES", "54"]
    state, model = panoptic_fpn_state(cfg, *classes), build_model(cfg)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    others = {"neck.weight": torch.ones(1), "pixel_mean": torch.ones(3)}
    OANetCheckpointer(model).load(write(tmp_path / "zoo.pkl", zoo({**state, **others})))
    changed = {
        "roi_heads.box_predictor.cls_score.weight": "(81, 32) here (9, 32)",
        "roi_heads.box_predictor.cls_score.bias": "(81,) here (9,)",
        "sem_seg_head.predictor.weight": "(54, 16, 1, 1) here (7, 16, 1, 1)",
        "sem_seg_head.predictor.bias": "(54,) here (7,)",
    }
    for k, v in model.state_dict().items():
        assert torch.equal(v, state[k] if k in state and k not in changed else before[k]), k
    assert lines(caplog)[0].endswith(", 1 unused, such as neck.weight")
    shown = ", ".join(f"{k} {changed[k]}" for k in list(changed)[:3])
    assert lines(caplog)[2] == (
        f"Left out for their shape: 4 tensors (roi_heads 2, sem_seg_head 2): {shown} and 1 more"
    )


# ---------------------------------------------------------------- code in files


class Call:
    """Unpickling it calls a function, and sets the state of what that returns."""

    def __init__(self, function, *args, state=None):
        self.reduced = (function, args, state)

    def __reduce__(self):
        return self.reduced


@pytest.mark.parametrize("allow_pickle", [False, True])
@pytest.mark.parametrize("name", ["evil.pkl", "evil.pth"])
def test_code_in_a_file_runs_only_if_allowed(tmp_path, name, allow_pickle):
    state = linear(1).state_dict()
    content = zoo(state) if name.endswith("pkl") else {"model": state}
    path = write(tmp_path / name, {**content, "evil": Call(os.mkdir, str(tmp_path / "made"))})
    if allow_pickle:
        OANetCheckpointer(linear(), allow_pickle=True).load(path)
    else:
        refused(path, f"holds {os.mkdir.__module__}.mkdir,.*MODEL.ALLOW_PICKLE True")
    assert (tmp_path / "made").exists() == allow_pickle


@pytest.mark.parametrize(
    "module, name",
    [
        *[("builtins", "eval"), ("__builtin__", "eval"), ("posix", "system"), ("this", "s")],
        *[("numpy", "load"), ("numpy", "ndarray.tofile"), ("torch.storage", "_load_from_bytes")],
    ],
)
def test_what_is_refused_is_named_and_never_imported(tmp_path, module, name, monkeypatch):
    monkeypatch.delitem(sys.modules, "this", raising=False)
    short = [b"\x8c" + bytes([len(x)]) + x.encode() for x in (module, name)]
    for opcodes in (f"c{module}\n{name}\n".encode(), b"\x80\x04" + b"".join(short) + b"\x93"):
        (tmp_path / "a.pkl").write_bytes(opcodes + b".")
        refused(tmp_path / "a.pkl", re.escape(f"holds {module}.{name}, which could run code"))
    assert "this" not in sys.modules


RECONSTRUCT, EMPTY = np.zeros(1).__reduce__()[:2]
DTYPE_STATE = (3, "|", None, None, None, -1, -1)


@pytest.mark.parametrize(
    "content",
    [
        Call(np.ndarray, (1,), "O", b"A" * 8),  # an object at an address that the file gives
        Call(RECONSTRUCT, np.ndarray, (1,), "O"),
        np.array([{}]),
        Call(RECONSTRUCT, *EMPTY, state=(1, (1,), Call(np.dtype, "V8"), False, b"A" * 8)),
        Call(RECONSTRUCT, *EMPTY, state=(1, (1,), "O", False, [1])),
        Call(RECONSTRUCT, *EMPTY, state=(1, (-1, -2), np.dtype("i1"), False, b"AA")),
        Call(np.float32(0).__reduce__()[0], "O", b"A" * 8),
        # numbers that claim to be objects, a subarray, a structure
        Call(np.dtype, "f8", state=(*DTYPE_STATE, 63)),
        Call(np.dtype, "f8", state=(3, "|", (1, (2,)), None, None, -1, -1, 0)),
        Call(np.dtype, "f8", state=(3, "|", None, ("a",), {"a": 1}, -1, -1, 0)),
    ],
)
def test_numpy_cannot_be_misused(tmp_path, content):
    refused(write(tmp_path / "a.pkl", {"blobs": {}, "x": content}), "holds numpy|cannot be read")


@pytest.mark.parametrize("numpy", [b"core", b"_core"])  # the name in NumPy 1 and 2
@pytest.mark.parametrize("protocol", range(5))
def test_numpy_is_allowed_in_pkl(tmp_path, protocol, numpy):
    rest = {
        "arrays": [
            np.arange(3, dtype=np.float16),
            np.zeros((0, 3)),
            np.arange(6.0).reshape(2, 3).T,
        ],
        "scalars": [np.float32(1.5), np.int64(-2), np.bool_(True)],
        "containers": OrderedDict(a=(1, None, "x"), b=[2.5, {"y": ()}]),
    }
    data = pickle.dumps({**zoo(linear(1).state_dict()), "rest": rest}, protocol)
    if protocol < 4:  # later ones hold its length too
        data = re.sub(rb"numpy\._?core\.", b"numpy." + numpy + b".", data)
    (tmp_path / "a.pkl").write_bytes(data)
    model = linear()
    found = OANetCheckpointer(model).load(str(tmp_path / "a.pkl"))["rest"]
    assert torch.equal(model["head"].weight, linear(1)["head"].weight)
    assert repr(found) == repr(rest)


def test_pickles_of_python_2(tmp_path):
    """Detectron's ImageNet backbones are such: {"head_b": array([1, -2], "float32")}."""
    data = b"\x80\x02}U\x06head_bcnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00"
    data += b"\x85U\x01b\x87R(K\x01K\x02\x85cnumpy\ndtype\nU\x02f4K\x00K\x01\x87R(K\x03U\x01<NNN"
    data += b"J\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89U\x08"
    data += np.array([1, -2], "<f4").tobytes() + b"tbs."
    (tmp_path / "a.pkl").write_bytes(data)
    model = linear()
    OANetCheckpointer(model).load(str(tmp_path / "a.pkl"))
    assert model["head"].bias.tolist() == [1, -2]


# ---------------------------------------------------------------- errors


def refused(path, words, **kwargs):
    """Loading must fail, with a message that begins with the path, and leave the model alone."""
    model = linear()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    checkpointer = OANetCheckpointer(model, **kwargs)
    with pytest.raises(CheckpointError, match=words) as error:
        checkpointer.resume_or_load(str(path), resume=False)
    assert str(error.value).startswith(f"{path} ")
    assert "weights_only" not in str(error.value)  # which is what torch would advise
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    return checkpointer


@pytest.mark.parametrize("name", ["a.pkl", "a.pth", "a.pyth"])
def test_damaged_files(tmp_path, name):
    state, path = linear(1).state_dict(), tmp_path / name
    whole = write(path, zoo(state) if path.suffix == ".pkl" else {"model_state": state, **state})
    data = path.read_bytes()
    step = max(1, len(data) // 9)
    for damaged in (
        *(data[:n] for n in range(0, len(data), step)),
        b"<!DOCTYPE html>\n",
        b"\x89PNG",
    ):
        path.write_bytes(damaged)
        refused(whole, "cannot be read as a checkpoint: .*It must be a .pkl of the model zoo")


@pytest.mark.parametrize(
    "content, words",
    [
        (lambda x: 5, "cannot be read"),
        (lambda x: {"model": {"head.weight": 1.5}}, "cannot be read.*head.weight: .*float"),
        (lambda x: {"state_dict": {"head.bias": x}, "epoch": 3}, "cannot be.*state_dict: .*dict"),
        (lambda x: {"model": {}}, "not one tensor that fits the model. Unknown: nothing"),
        (lambda x: {"model": {"a.b": x}}, "Unknown: a.b;.* The model has head.weight, head.bias"),
    ],
)
@pytest.mark.parametrize("ending", [".pkl", ".pth"])
def test_no_tensors(tmp_path, content, words, ending):
    content = content(np.ones(2) if ending == ".pkl" else torch.ones(2))
    if isinstance(content, dict) and "model" in content:
        content["__author__"] = ZOO
    refused(write(tmp_path / f"a{ending}", content), words)


def test_not_one_shape_fits_and_then_another_file_does(tmp_path):
    path = write(tmp_path / "a.pth", {"head.weight": torch.ones(4, 3)})
    checkpointer = refused(path, re.escape("head.weight (4, 3) here (2, 3)"))
    checkpointer.load(write(tmp_path / "b.pth", linear(1).state_dict()))
    assert torch.equal(checkpointer.model["head"].weight, linear(1)["head"].weight)


def test_missing(tmp_path):
    refused(tmp_path / "none.pth", "does not exist; give the path or URL of a checkpoint.$")
    refused(tmp_path, "is a folder; give the path of a file in it")
    (tmp_path / "last_checkpoint").write_text("model_final.pth")
    with pytest.raises(CheckpointError, match="model_final.pth does not exist.*/last_checkpoint"):
        OANetCheckpointer(linear(), str(tmp_path)).resume_or_load("", resume=True)


def test_urls(tmp_path):
    class Mirror(PathHandler):
        """Like Detectron2's handlers of detectron2:// and https://."""

        def _get_supported_prefixes(self):
            return ["test-mirror://"]

        def _get_local_path(self, path, force=False, **kwargs):
            if path.endswith("gone.pkl"):
                raise OSError("HTTP Error 404: Not Found")
            return str(tmp_path / path[len("test-mirror://") :])

    PathManager.register_handler(Mirror(), allow_override=True)
    refused("test-mirror://gone.pkl", "cannot be fetched: OSError.*404: Not Found")
    (tmp_path / "cut.pkl").write_bytes(b"")
    refused("test-mirror://cut.pkl", f"cannot be read.*Delete {tmp_path / 'cut.pkl'}")


# ---------------------------------------------------------------- saving


def test_disk_is_full(small_disk):
    """A disk of 1 MB, with a model of 0.6 MB."""
    model = nn.Linear(400, 400)
    nn.init.ones_(model.weight)
    checkpointer = OANetCheckpointer(model, str(small_disk))
    checkpointer.save("good", iteration=3)
    with pytest.raises(
        CheckpointError, match="other.pth cannot .*No space left .*good.pth.*--resume"
    ):
        checkpointer.save("other", iteration=4)
    assert sorted(os.listdir(small_disk)) == ["good.pth", "last_checkpoint"]
    nn.init.zeros_(model.weight)
    assert checkpointer.resume_or_load("")["iteration"] == 3 and (model.weight == 1).all()
