import json
import os
import pickle
import re
from collections import OrderedDict

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn

from detectron2.modeling import build_model

from oanet_d2.checkpoint import CheckpointError, OANetCheckpointer, read_description
from tests.conftest import panoptic_fpn_cfg


def linear(seed=0):
    """The smallest model; its parameters are `head.weight` (2, 3) and `head.bias` (2,)."""
    torch.manual_seed(seed)
    return nn.ModuleDict({"head": nn.Linear(3, 2)})


def zoo(state):
    return {"model": {k: v.numpy() for k, v in state.items()}, "__author__": "Model Zoo"}


def write(path, content):
    """A pickle, a .safetensors of the model alone, or what torch makes of it, by the path's ending."""
    if path.suffix == ".pkl":
        path.write_bytes(pickle.dumps(content, protocol=2))
    elif path.suffix == ".safetensors":
        state = {k: torch.as_tensor(v) for k, v in content["model"].items()}
        safetensors.torch.save_file(state, path)
    else:
        torch.save(content, path)
    return str(path)


def refused(path, words):
    """Loading must fail, with a message that begins with the path."""
    with pytest.raises(CheckpointError, match=words) as error:
        OANetCheckpointer(linear()).resume_or_load(str(path), resume=False)
    assert str(error.value).startswith(f"{path} ")
    assert "weights_only" not in str(error.value)  # which is what torch would advise


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


@pytest.mark.parametrize(
    "name, content",
    [
        ("zoo.pkl", zoo),
        ("detectron2.pth", lambda state: {"model": state, "iteration": 5}),
        ("parallel.pth", lambda state: {f"module.{k}": v for k, v in state.items()}),
        ("pycls.pyth", lambda state: {"model_state": state}),
        ("other.safetensors", lambda state: {"model": state}),
    ],
)
def test_every_tensor_of_a_panoptic_fpn_arrives(cfg, tmp_path, name, content):
    state, model = panoptic_fpn_state(cfg), build_model(cfg)
    checkpointer = OANetCheckpointer(model)
    rest = checkpointer.load(write(tmp_path / name, content(state)))
    loaded = model.state_dict()
    for k, v in state.items():
        assert torch.equal(loaded[k], v) or (name == "pycls.pyth" and "num_batches" in k), k
    assert rest.get("iteration") == (5 if name == "detectron2.pth" else None)
    assert set(checkpointer.new) == {k for k in loaded if k.startswith("srm_head.")}
    assert checkpointer.left_out == checkpointer.unused == []


@pytest.mark.parametrize("name", ["zoo.pkl", "other.safetensors"])
def test_another_class_count(cfg, tmp_path, name):
    """The layers that depend on it stay as they were. Everything else is loaded."""
    classes = ["MODEL.ROI_HEADS.NUM_CLASSES", "80", "MODEL.SEM_SEG_HEAD.NUM_CLASSES", "54"]
    state, model = panoptic_fpn_state(cfg, *classes), build_model(cfg)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    checkpointer = OANetCheckpointer(model)
    state.update({"neck.weight": torch.ones(1), "pixel_mean": torch.ones(3)})
    checkpointer.load(write(tmp_path / name, zoo(state)))
    assert checkpointer.unused == ["neck.weight"]
    changed = {name: shapes for name, *shapes in checkpointer.left_out}
    assert changed["sem_seg_head.predictor.bias"] == [(54,), (7,)]
    layers = ("roi_heads.box_predictor.cls_score", "sem_seg_head.predictor")
    assert set(changed) == {f"{layer}.{x}" for layer in layers for x in ("weight", "bias")}
    for k, v in model.state_dict().items():
        assert torch.equal(v, state[k] if k in state and k not in changed else before[k]), k


class Call:
    """Pickled as a call of `function`, with a state set afterwards."""

    def __init__(self, function, *args, state=None):
        self.reduced = (function, args, state)

    def __reduce__(self):
        return self.reduced


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
    arrays = [np.arange(3, dtype=np.float16), np.zeros((0, 3)), np.arange(6.0).reshape(2, 3).T]
    scalars = [np.float32(1.5), np.int64(-2), np.bool_(True)]
    rest = OrderedDict(arrays=arrays, scalars=scalars, others=(1, None, "x", {"y": ()}))
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


class MakeFolder(str):  # when it is unpickled
    def __reduce__(self):
        return os.mkdir, (str(self),)


@pytest.mark.parametrize("allow_pickle", [False, True])
@pytest.mark.parametrize("name", ["evil.pkl", "evil.pth"])
def test_code_in_a_file_runs_only_if_allowed(tmp_path, name, allow_pickle):
    content = {"evil": MakeFolder(tmp_path / "made"), **zoo(linear(1).state_dict())}
    path = write(tmp_path / name, content)
    if allow_pickle:
        OANetCheckpointer(linear(), allow_pickle=True).load(path)
    else:
        refused(path, f"holds {os.mkdir.__module__}.mkdir,.*MODEL.ALLOW_PICKLE")
    assert (tmp_path / "made").exists() == allow_pickle


@pytest.mark.parametrize("module, name", [("builtins", "eval"), ("numpy", "ndarray.tofile")])
def test_what_is_refused_is_named(tmp_path, module, name):
    strings = "".join(f"\x8c{chr(len(x))}{x}" for x in (module, name))
    for opcodes in (f"c{module}\n{name}\n.", f"\x80\x04{strings}\x93."):
        (tmp_path / "a.pkl").write_bytes(opcodes.encode("latin1"))
        refused(tmp_path / "a.pkl", f"holds {module}.{name}, which could run code")


@pytest.mark.parametrize("name", ["a.pkl", "a.pth", "a.safetensors"])
def test_damaged_files(tmp_path, name):
    path = tmp_path / name
    write(path, zoo(linear(1).state_dict()))
    whole = path.read_bytes()
    cut = [whole[: len(whole) * i // 9] for i in range(9)]
    for damaged in (*cut, b"<!DOCTYPE html>\n", b"\x89PNG"):
        path.write_bytes(damaged)
        refused(path, "cannot be read as a checkpoint: .*It must be a .pkl of the model zoo")


@pytest.mark.parametrize(
    "content, words",
    [
        ({"model": {"head.weight": 1.5}}, "cannot be read.*head.weight: .*float"),
        ({"state_dict": {"head.bias": torch.ones(2)}, "epoch": 3}, "cannot be.*state_dict: .*dict"),
        ({"head.weight": torch.ones(4, 3)}, r"\('head.weight', \(4, 3\), \(2, 3\)\)"),
        (
            {"model": {"a.b": torch.ones(2)}},
            r"\['a.b'\], and the model \['head.weight', 'head.bias'\]",
        ),
    ],
)
def test_no_tensors(tmp_path, content, words):
    refused(write(tmp_path / "a.pth", content), words)


def test_missing(tmp_path):
    refused("http://localhost:1/gone.pkl", "cannot be fetched: .*refused")
    refused(tmp_path / "none.pth", "is no file. Correct MODEL.WEIGHTS")
    (tmp_path / "last_checkpoint").write_text("model_final.pth")
    with pytest.raises(CheckpointError, match="model_final.pth is no file.*/last_checkpoint"):
        OANetCheckpointer(linear(), str(tmp_path)).resume_or_load("", resume=True)


CATEGORIES = [{"id": 7, "name": "Stra\u00dfe", "isthing": 0, "color": [1, 2, 3]}]


def test_a_safetensors_file_by_its_specification(tmp_path):
    """Eight bytes of length, a JSON header, the numbers. Tensors that share memory are there twice."""
    model = linear()
    model["tied"] = nn.Linear(3, 2)
    model["tied"].weight = model["head"].weight
    model["turned"] = nn.Conv2d(2, 3, 2).to(memory_format=torch.channels_last)
    OANetCheckpointer(model, str(tmp_path)).save_safetensors("net", "MODEL: {}", CATEGORIES)
    data = (tmp_path / "net.safetensors").read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    description = header.pop("__metadata__")
    assert description["config"] == "MODEL: {}"
    assert json.loads(description["categories"]) == CATEGORIES
    state = model.state_dict()
    assert header.keys() == state.keys()
    for name, x in state.items():
        first, last = header[name]["data_offsets"]
        found = np.frombuffer(data[start + first : start + last], "<f4")
        assert (found.reshape(x.shape) == x.numpy()).all(), name
    assert read_description(str(tmp_path / "net.safetensors")) == ("MODEL: {}", CATEGORIES)
    assert os.listdir(tmp_path) == ["net.safetensors"]  # no training resumes from it


def test_what_is_not_finite_is_not_saved(tmp_path):
    model = linear()
    nn.init.constant_(model["head"].bias, float("nan"))
    checkpointer = OANetCheckpointer(model, str(tmp_path))
    for save in (checkpointer.save, lambda name: checkpointer.save_safetensors(name, "", [])):
        with pytest.raises(FloatingPointError, match="net.* is not saved: head.bias is not finite"):
            save("net")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    "metadata", [None, {"config": ""}, {"config": "", "categories": "["}, {"categories": "[]"}]
)
def test_files_without_a_description(tmp_path, metadata):
    path = tmp_path / "a.safetensors"
    safetensors.torch.save_file(linear().state_dict(), path, metadata)
    with pytest.raises(CheckpointError, match="a.safetensors has no config and classes.*yaml"):
        read_description(str(path))
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(CheckpointError, match="a.safetensors has no config and classes"):
        read_description(str(path))
    with pytest.raises(CheckpointError, match="none.safetensors is no file"):
        read_description(str(tmp_path / "none.safetensors"))


def test_disk_is_full(small_disk):
    """A disk of 1 MB, with a model of 0.6 MB."""
    model = nn.Linear(400, 400)
    nn.init.ones_(model.weight)
    checkpointer = OANetCheckpointer(model, str(small_disk))
    checkpointer.save("good", iteration=3)
    with pytest.raises(CheckpointError, match="other.pth .*No space left .*good.pth.*--resume"):
        checkpointer.save("other", iteration=4)
    with pytest.raises(CheckpointError, match="other.safetensors .*No space left .*good.pth"):
        checkpointer.save_safetensors("other", "", [])
    assert sorted(os.listdir(small_disk)) == ["good.pth", "last_checkpoint"]
    nn.init.zeros_(model.weight)
    assert checkpointer.resume_or_load("")["iteration"] == 3 and (model.weight == 1).all()
