import logging
import os
import pickle
import re
import sys
from collections import Counter, OrderedDict
from zipfile import ZipFile

import cv2
import numpy as np
import pytest
import torch
from iopath.common.file_io import PathHandler
from torch import nn

from detectron2.checkpoint import DetectionCheckpointer
from detectron2.modeling import build_model
from detectron2.utils import comm
from detectron2.utils.file_io import PathManager

from oanet_d2.checkpoint import CheckpointError, OANetCheckpointer

ZOO = "Detectron2 Model Zoo"
PANOPTIC_FPN = [
    "MODEL.META_ARCHITECTURE",
    "PanopticFPN",
    "MODEL.SEM_SEG_HEAD.NAME",
    "SemSegFPNHead",
]


@pytest.fixture
def cfg(tiny_cfg):
    """An OANet that takes all of a Panoptic FPN."""
    tiny_cfg.merge_from_list(
        [
            *["MODEL.SEM_SEG_HEAD.SUPERVISION", "stuff", "MODEL.SEM_SEG_HEAD.NUM_CLASSES", "7"],
            *["MODEL.SRM_HEAD.PAIRS.EVIDENCE", "('geometry',)"],
        ]
    )
    return tiny_cfg


def model_of(cfg, *opts):
    cfg = cfg.clone()
    cfg.merge_from_list(opts)
    return build_model(cfg)


def panoptic_fpn(cfg, *opts):
    """The state of a Panoptic FPN, unlike any initialization."""
    state = model_of(cfg, *PANOPTIC_FPN, *opts).state_dict()
    return {k: v + (torch.rand(v.shape) if v.is_floating_point() else 7) for k, v in state.items()}


def arrays(state):
    return {k: v.numpy() for k, v in state.items()}


def write(path, content, protocol=2):
    """A pickle, or what torch makes of it, by the path's ending."""
    if path.suffix == ".pkl":
        path.write_bytes(pickle.dumps(content, protocol))
    else:
        torch.save(content, path)
    return str(path)


def zoo(state):
    return {"model": arrays(state), "__author__": ZOO}


def linear(seed=0):
    """The smallest model; its parameters are `head.weight` (2, 3) and `head.bias` (2,)."""
    torch.manual_seed(seed)
    return nn.ModuleDict({"head": nn.Linear(3, 2)})


def lines(caplog):
    """What the checkpointer said; every other logger has to be silent about the tensors."""
    records = [r for r in caplog.records if r.name == "oanet_d2.checkpoint"]
    assert all(r.levelno == logging.INFO for r in records)
    others = [r for r in caplog.records if r not in records and r.levelno > logging.INFO]
    assert not others, others
    return [r.getMessage() for r in records]


def groups(names):
    return ", ".join(f"{k} {n}" for k, n in Counter(x.split(".")[0] for x in names).items())


def counted(names):
    """PyTorch itself does not miss a normalization's counter of batches."""
    return [k for k in names if not (k.startswith("srm_head.") and k.endswith("_batches_tracked"))]


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
    state, model = panoptic_fpn(cfg), model_of(cfg)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    path = write(tmp_path / name, content(state))
    checkpointer = OANetCheckpointer(model)
    rest = checkpointer.load(path)
    if name == "pycls.pyth":  # Detectron2 leaves these out, as no one needs them
        state = {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}
    for k, v in model.state_dict().items():
        assert k in state or k.startswith("srm_head.") or k.endswith("num_batches_tracked")
        assert torch.equal(v, state.get(k, before[k])), k
    assert rest.get("iteration") == (5 if name == "detectron2.pth" else None)
    new = [k for k in counted(model.state_dict()) if k.startswith("srm_head.")]
    assert checkpointer.new == new and len(new) > 0
    assert lines(caplog) == [
        f"From {path}: {len(state)} of {len(state) + len(new)} tensors ({groups(state)})",
        f"New, not in it: {len(new)} tensors (srm_head {len(new)})",
        "Left out for their shape: 0 tensors",
    ]


def test_another_class_count(cfg, tmp_path, caplog):
    """The layers that depend on it stay as they were, everything else is loaded."""
    caplog.set_level(logging.INFO)
    opts = ["MODEL.ROI_HEADS.NUM_CLASSES", "80", "MODEL.SEM_SEG_HEAD.NUM_CLASSES", "54"]
    state, model = panoptic_fpn(cfg, *opts), model_of(cfg)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    path = write(tmp_path / "zoo.pkl", zoo(state))
    OANetCheckpointer(model).load(path)
    changed = {
        "roi_heads.box_predictor.cls_score.weight": "(81, 32) here (9, 32)",
        "roi_heads.box_predictor.cls_score.bias": "(81,) here (9,)",
        "sem_seg_head.predictor.weight": "(54, 16, 1, 1) here (7, 16, 1, 1)",
        "sem_seg_head.predictor.bias": "(54,) here (7,)",
    }
    taken = [k for k in state if k not in changed]
    for k, v in model.state_dict().items():
        assert torch.equal(v, state[k] if k in taken else before[k]), k
    new = [k for k in counted(before) if k.startswith("srm_head.")]
    shown = ", ".join(f"{k} {changed[k]}" for k in list(changed)[:3])
    assert lines(caplog) == [
        f"From {path}: {len(taken)} of {len(counted(before))} tensors ({groups(taken)})",
        f"New, not in it: {len(new)} tensors (srm_head {len(new)})",
        f"Left out for their shape: 4 tensors (roi_heads 2, sem_seg_head 2): {shown} and 1 more",
    ]


def test_the_three_lines(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    model = nn.ModuleDict({"body": nn.Linear(3, 2), "head": nn.Linear(2, 4)})
    state = {
        "body.weight": torch.ones(2, 3),
        "head.weight": torch.ones(5, 2),
        "neck.weight": torch.ones(1),
        "neck.bias": torch.ones(1),
        "pixel_mean": torch.ones(3, 1, 1),
        "proposal_generator.anchor_generator.cell_anchors.0": torch.ones(3, 4),
    }
    path = write(tmp_path / "a.pth", state)
    OANetCheckpointer(model).load(path)
    assert lines(caplog) == [
        f"From {path}: 1 of 4 tensors (body 1), 2 unused, such as neck.weight",
        "New, not in it: 2 tensors (body 1, head 1)",
        "Left out for their shape: 1 tensor (head 1): head.weight (5, 2) here (4, 2)",
    ]


CAFFE2 = {
    "conv1_w": ("backbone.bottom_up.stem.conv1.weight", (64, 3, 7, 7)),
    "res_conv1_bn_s": ("backbone.bottom_up.stem.conv1.norm.weight", (64,)),
    "res2_0_branch2a_w": ("backbone.bottom_up.res2.0.conv1.weight", (64, 64, 3, 3)),
    "cls_score_w": ("roi_heads.box_predictor.cls_score.weight", (9, 32)),
    "cls_score_b": ("roi_heads.box_predictor.cls_score.bias", (11,)),
    "fc1000_w": (None, (1000, 512)),
}


@pytest.mark.parametrize("form", ["caffe2", "blobs", "pth"])
def test_names_are_matched_as_detectron2_does(cfg, tmp_path, caplog, form):
    rng = np.random.default_rng(0)
    content = {k: rng.random(shape, dtype=np.float32) for k, (_, shape) in CAFFE2.items()}
    content["conv1_w_momentum"] = content["conv1_w"]
    query = ""
    if form == "blobs":
        content = {"blobs": content, "cfg": "MODEL: {}"}
    if form == "pth":
        names = ["stem.conv1.weight", "stem.conv1.norm.weight", "res2.0.conv1.weight"]
        names += ["cls_score.weight", "cls_score.bias", "fc.weight"]
        content = {k: torch.from_numpy(v) for k, v in zip(names, content.values())}
        query = "?matching_heuristics=True"
    path = write(tmp_path / ("a.pth" if query else "a.pkl"), content) + query

    theirs, ours = model_of(cfg), model_of(cfg)
    ours.load_state_dict(theirs.state_dict())
    before = {k: v.clone() for k, v in theirs.state_dict().items()}
    DetectionCheckpointer(theirs).load(path)
    caplog.clear()
    caplog.set_level(logging.INFO)
    OANetCheckpointer(ours).load(path)
    for k, v in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[k], v), k
    differ = [k for k, v in ours.state_dict().items() if not torch.equal(v, before[k])]
    assert differ == [k for k, _ in list(CAFFE2.values())[:4]]
    first, _, last = lines(caplog)
    unused = "fc.weight" if form == "pth" else "fc1000.weight"
    assert first.startswith(f"From {path}: 4 of ")
    assert first.endswith(f" tensors (backbone 3, roi_heads 1), 1 unused, such as {unused}")
    name = "roi_heads.box_predictor.cls_score.bias"
    left_out = "Left out for their shape: 1 tensor (roi_heads 1)"
    assert last == f"{left_out}: {name} (11,) here (9,)"
    level = logging.getLogger("detectron2.checkpoint.c2_model_loading").level
    assert level == logging.NOTSET  # as it was


def test_the_longest_name_that_matches_is_the_one_left_out(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    state = {"bias": torch.ones(7), "head.bias": torch.ones(5), "weight": torch.ones(2, 3)}
    path = f"{write(tmp_path / 'a.pth', state)}?matching_heuristics=True"
    OANetCheckpointer(nn.ModuleDict({"top": linear()})).load(path)
    assert lines(caplog) == [
        f"From {path}: 1 of 2 tensors (top 1)",
        "New, not in it: 0 tensors",
        "Left out for their shape: 1 tensor (top 1): top.head.bias (5,) here (2,)",
    ]


def test_incompatible_keys_are_detectron2s(tmp_path):
    state = {"head.weight": torch.ones(4, 3), "neck": torch.ones(1), "pixel_mean": torch.ones(3)}
    found = []
    for cls in (DetectionCheckpointer, OANetCheckpointer):
        found.append(cls(linear())._load_model({"model": dict(state)}))
    assert found[0] == found[1]
    assert found[1].incorrect_shapes == [("head.weight", (4, 3), (2, 3))]


def test_no_weights(caplog):
    caplog.set_level(logging.INFO)
    model = linear()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    assert OANetCheckpointer(model).resume_or_load("", resume=False) == {}
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert lines(caplog) == []


# ---------------------------------------------------------------- security


class Evil:
    """Unpickling it makes a folder."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def evil_file(path, folder):
    """Evil, in a file that is otherwise a checkpoint of `linear(1)`."""
    state = linear(1).state_dict()
    content = zoo(state) if path.suffix == ".pkl" else {"model": state, "iteration": 5}
    content["evil"] = Evil(folder)
    if path.suffix == ".pyth":
        content["model_state"] = content.pop("model")
    return write(path, content)


@pytest.mark.parametrize("name", ["evil.pkl", "evil.pth", "evil.pyth"])
def test_code_in_a_file_does_not_run(tmp_path, name):
    path = evil_file(tmp_path / name, tmp_path / "made")
    model = linear()
    with pytest.raises(CheckpointError) as error:
        OANetCheckpointer(model).load(path)
    assert str(error.value).startswith(f"{path} holds {os.mkdir.__module__}.mkdir. ")
    assert str(error.value).endswith("you trust the file, set MODEL.ALLOW_PICKLE True.")
    assert not (tmp_path / "made").exists()
    assert torch.equal(model["head"].weight, linear()["head"].weight)


@pytest.mark.parametrize("name", ["evil.pkl", "evil.pth"])
def test_code_in_a_file_runs_if_allowed(tmp_path, name):
    path = evil_file(tmp_path / name, tmp_path / "made")
    model = linear()
    OANetCheckpointer(model, allow_pickle=True).load(path)
    assert os.listdir(tmp_path / "made") == []
    assert torch.equal(model["head"].weight, linear(1)["head"].weight)


@pytest.mark.parametrize(
    "module, name",
    [
        *[("builtins", "eval"), ("__builtin__", "eval"), ("posix", "system"), ("this", "s")],
        *[("numpy", "load"), ("numpy", "ndarray.tofile"), ("numpy.core.multiarray", "fromfile")],
        *[("torch.storage", "_load_from_bytes"), ("functools", "partial"), ("_codecs", "lookup")],
    ],
)
def test_what_is_refused_is_named_and_never_imported(tmp_path, module, name, monkeypatch):
    monkeypatch.delitem(sys.modules, "this", raising=False)
    text = f"c{module}\n{name}\n.".encode()
    short = [b"\x8c" + bytes([len(x)]) + x.encode() for x in (module, name)]
    for content in (text, b"\x80\x04" + b"".join(short) + b"\x93."):  # GLOBAL and STACK_GLOBAL
        # the refused one comes first
        content = b"(" + content[:-1] + b"cbuiltins\nexec\nt."
        (tmp_path / "a.pkl").write_bytes(content)
        with pytest.raises(CheckpointError, match=re.escape(f"a.pkl holds {module}.{name}. ")):
            OANetCheckpointer(linear()).load(str(tmp_path / "a.pkl"))
    assert "this" not in sys.modules


class Call:
    """Unpickling it calls a function and sets the state of what that returns."""

    def __init__(self, function, *args, state=None):
        self.reduced = (function, args, state)

    def __reduce__(self):
        return self.reduced


NUMBER = (3, "|", None, None, None, -1, -1)
RECONSTRUCT, EMPTY = np.zeros(1).__reduce__()[:2]


@pytest.mark.parametrize(
    "content, words",
    [
        # objects at addresses that the file gives
        (Call(np.ndarray, (1,), "O", b"A" * 8), "cannot be read"),
        (Call(RECONSTRUCT, np.ndarray, (1,), "O"), "holds numpy.ndarray"),
        (np.array([{}]), "holds numpy.dtype..O8.."),
        (Call(RECONSTRUCT, *EMPTY, state=(1, (1,), Call(np.dtype, "V8"), False, b"A" * 8)), "V8"),
        # a number's type that claims to be an object's, to be a subarray, to be structured
        (Call(np.dtype, "f8", state=(*NUMBER, 63)), "holds numpy.dtype"),
        (Call(np.dtype, "f8", state=(3, "|", (1, (2,)), None, None, -1, -1, 0)), "numpy.dtype"),
        (Call(np.dtype, "f8", state=(3, "|", None, ("a",), {"a": 1}, -1, -1, 0)), "numpy.dtype"),
        (Call(np.dtype, "f8", state=(3, "x", None, None, None, -1, -1, 0)), "holds numpy.dtype"),
        (Call(RECONSTRUCT, *EMPTY, state=(1, (1,), "O", False, [1])), "holds numpy.ndarray"),
        # elements that are not there
        (Call(RECONSTRUCT, *EMPTY, state=(1, (-1, -2), np.dtype("i1"), False, b"AA")), "ndarray"),
        (
            Call(RECONSTRUCT, *EMPTY, state=(1, (9,), np.dtype("i1"), False, b"AA")),
            "cannot be read",
        ),
    ],
)
def test_numpy_cannot_be_misused(tmp_path, content, words):
    """Without code, but with an array that is none, a file could still write into memory."""
    refused(write(tmp_path / "a.pkl", {"blobs": {}, "x": content}), words)
    refused(write(tmp_path / "a.pth", {"model": {}, "x": content}), "cannot be read|holds numpy")


NUMPY = {
    "half": np.arange(3, dtype=np.float16),
    "bool": np.array([True, False]),
    "complex": np.array([1 + 2j]),
    "empty": np.zeros((0, 3)),
    "number": np.array(3.5),
    "transposed": np.arange(6.0).reshape(2, 3).T,
    "sliced": np.arange(6)[::2],
}
PLAIN = {
    "scalars": [np.float32(1.5), np.int64(-2), np.bool_(True), np.complex128(1 + 2j)],
    "containers": OrderedDict(a=(1, None, "x"), b=[2.5, {"y": ()}]),
}


@pytest.mark.parametrize("numpy", [b"core", b"_core"])  # the name in numpy 1 and 2
@pytest.mark.parametrize("protocol", range(6))
def test_numpy_is_allowed_in_pkl(tmp_path, protocol, numpy):
    content = {**zoo(linear(1).state_dict()), "rest": {**NUMPY, **PLAIN}}
    data = pickle.dumps(content, protocol)
    if protocol < 4:  # later ones hold its length too
        data = re.sub(rb"numpy\._?core\.", b"numpy." + numpy + b".", data)
        assert b"numpy." + numpy + b"." in data
    (tmp_path / "a.pkl").write_bytes(data)
    model = linear()
    rest = OANetCheckpointer(model).load(str(tmp_path / "a.pkl"))["rest"]
    assert torch.equal(model["head"].weight, linear(1)["head"].weight)
    assert repr(rest) == repr(content["rest"])


def test_pickles_of_python_2(tmp_path):
    """As which Detectron's ImageNet backbones are kept: {"head_b": array([1, -2], "float32")}."""
    data = b"\x80\x02}U\x06head_bcnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00"
    data += b"\x85U\x01b\x87R(K\x01K\x02\x85cnumpy\ndtype\nU\x02f4K\x00K\x01\x87R(K\x03U\x01<NNN"
    data += b"J\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89U\x08"
    data += np.array([1, -2], "<f4").tobytes() + b"tbs."
    (tmp_path / "a.pkl").write_bytes(data)
    model = linear()
    OANetCheckpointer(model).load(str(tmp_path / "a.pkl"))
    assert model["head"].bias.tolist() == [1, -2]
    assert torch.equal(model["head"].weight, linear()["head"].weight)


@pytest.mark.skipif(torch.__version__ < (2, 7), reason="torch.load cannot be told")
@pytest.mark.parametrize("numpy", [b"core", b"_core"])
def test_numpy_scalars_are_allowed_in_pth(tmp_path, numpy):
    swapped = Call(np.float32(0).__reduce__()[0], np.dtype(">f4"), np.array(1.5, ">f4").tobytes())
    content = {"model": linear(1).state_dict(), "rest": PLAIN, "swapped": swapped}
    write(tmp_path / "own.pth", content)
    with ZipFile(tmp_path / "own.pth") as own, ZipFile(tmp_path / "a.pth", "w") as other:
        for name in own.namelist():
            data = own.read(name)
            if name.endswith("data.pkl"):
                data = re.sub(rb"numpy\._?core\.", b"numpy." + numpy + b".", data)
                assert b"numpy." + numpy + b"." in data
            other.writestr(name, data)
    allowed = set(torch.serialization.get_safe_globals())
    model = linear()
    loaded = OANetCheckpointer(model).load(str(tmp_path / "a.pth"))
    rest = loaded["rest"]
    assert torch.equal(model["head"].weight, linear(1)["head"].weight)
    assert repr(rest) == repr(PLAIN) and loaded["swapped"] == 1.5
    assert [type(x) for x in rest["scalars"]] == [type(x) for x in PLAIN["scalars"]]
    assert set(torch.serialization.get_safe_globals()) == allowed


# ---------------------------------------------------------------- errors


def refused(path, words="", model=None, **kwargs):
    """Loading must fail, with a message that begins with the path, and leave the model alone."""
    model = linear() if model is None else model
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=words) as error:
        OANetCheckpointer(model, **kwargs).resume_or_load(str(path), resume=False)
    assert str(error.value).startswith(f"{path} ")
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    return str(error.value)


@pytest.mark.parametrize("allow_pickle", [False, True])
@pytest.mark.parametrize("name", ["whole.pkl", "whole.pth", "legacy.pth"])
def test_cut_short(tmp_path, name, allow_pickle):
    state, path = linear(1).state_dict(), tmp_path / name
    if name == "legacy.pth":
        torch.save(state, path, _use_new_zipfile_serialization=False)
    else:
        write(path, zoo(state) if path.suffix == ".pkl" else state)
    whole, cut = path.read_bytes(), tmp_path / f"cut{path.suffix}"
    words = "cannot be read as a checkpoint: .*cut short"
    if name == "legacy.pth" and not allow_pickle:  # cut in the middle of the name of a class
        words += "|holds \\S+\\. Of what is no tensor"
    step = max(1, len(whole) // 50)
    for length in (*range(0, len(whole), step), *range(len(whole) - step, len(whole))):
        cut.write_bytes(whole[:length])
        refused(cut, words, allow_pickle=allow_pickle)


@pytest.mark.parametrize("suffix", [".pkl", ".pth", ".pyth"])
def test_something_else(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    rng = np.random.default_rng(0)
    picture = cv2.imencode(".png", rng.integers(0, 255, (8, 8, 3), dtype=np.uint8))[1].tobytes()
    for content in (b"", b"<!DOCTYPE html>\n", picture, *(rng.bytes(n) for n in (1, 9, 99, 999))):
        path.write_bytes(content)
        message = refused(
            path, "cannot be read as a checkpoint: .*It must be a .pkl of the model zoo"
        )
        assert "weights_only" not in message  # which is what torch would advise


@pytest.mark.parametrize(
    "content, words",
    [
        (lambda x: 5, "cannot be read"),
        (lambda x: [x], "cannot be read"),
        (lambda x: {"model": 5}, "cannot be read"),
        (lambda x: {"model": {"head.weight": 1.5}}, "cannot be read.*head.weight: .*float"),
        (lambda x: {"state_dict": {"head.bias": x}, "epoch": 3}, "cannot be.*state_dict: .*dict"),
        (lambda x: {"model": {0: x}}, "names of tensors must be strings"),
        (lambda x: {"model": {}}, "gives not one tensor of the model: it holds nothing"),
    ],
)
@pytest.mark.parametrize("suffix", [".pkl", ".pth"])
def test_no_tensors(tmp_path, content, words, suffix):
    content = content(np.ones(2) if suffix == ".pkl" else torch.ones(2))
    if isinstance(content, dict) and "model" in content:
        content["__author__"] = ZOO
    refused(write(tmp_path / f"a{suffix}", content), words)


def test_a_checkpoint_of_another_model(cfg, tmp_path):
    model = model_of(cfg)
    wanted = list(model.state_dict())[:3]
    known = f"the model has {', '.join(wanted)} and {len(model.state_dict()) - 3} more"
    other = {f"layer{i}.weight": torch.ones(1) for i in range(5)}
    words = f"it holds layer0.weight, layer1.weight, layer2.weight and 2 more; {known}"
    for name, content in (("a.pth", other), ("a.pkl", zoo(other)), ("c2.pkl", arrays(other))):
        message = refused(write(tmp_path / name, content), re.escape(words), model)
        assert "?matching_heuristics=True" in message
    other = {"head.weight": torch.ones(4, 3)}
    words = re.escape("head.weight (4, 3) here (2, 3)")
    refused(write(tmp_path / "a.pth", other), words)


def test_missing(tmp_path):
    refused(tmp_path / "none.pth", "does not exist; give the path or URL")
    refused(f"{tmp_path / 'none.pth'}?matching_heuristics=True", "does not exist")
    refused("nowhere://none.pth", "does not exist")
    refused(tmp_path, "is a folder; give the path of a checkpoint in it")
    (tmp_path / "last_checkpoint").write_text("model_final.pth")
    with pytest.raises(CheckpointError, match="does not exist.*writing its name into") as error:
        OANetCheckpointer(linear(), str(tmp_path)).resume_or_load("", resume=True)
    path = tmp_path / "model_final.pth"
    assert str(error.value).startswith(f"{path} ") and str(tmp_path / "last") in str(error.value)
    refused(tmp_path / "none.pth", "give the path or URL of a checkpoint.$", save_dir=str(tmp_path))


class Mirror(PathHandler):
    """Like Detectron2's handlers of detectron2:// and https://."""

    folder = None

    def _get_supported_prefixes(self):
        return ["test-mirror://"]

    def _get_local_path(self, path, force=False, **kwargs):
        if path.endswith("gone.pkl"):
            raise OSError("HTTP Error 404: Not Found")
        return str(self.folder / path[len("test-mirror://") :])


def test_urls(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    mirror = Mirror()
    mirror.folder = tmp_path
    PathManager.register_handler(mirror, allow_override=True)
    refused("test-mirror://gone.pkl", "cannot be fetched: OSError.*404: Not Found.*connection")
    (tmp_path / "cut.pkl").write_bytes(b"")
    refused("test-mirror://cut.pkl", f"cannot be read.*It was fetched to {tmp_path / 'cut.pkl'}")
    state, model = linear(1).state_dict(), linear()
    write(tmp_path / "a.pth", {k[len("head.") :]: v for k, v in state.items()})
    caplog.clear()
    OANetCheckpointer(model).load("test-mirror://a.pth?matching_heuristics=True")
    assert torch.equal(model["head"].weight, state["head.weight"])
    url = "test-mirror://a.pth?matching_heuristics=True"
    assert lines(caplog)[0] == f"From {url}: 2 of 2 tensors (head 2)"


def test_a_checkpointer_can_be_used_after_an_error(tmp_path):
    model = linear()
    checkpointer = OANetCheckpointer(model)
    (tmp_path / "cut.pth").write_bytes(b"")
    with pytest.raises(CheckpointError):
        checkpointer.load(str(tmp_path / "cut.pth"))
    checkpointer.load(write(tmp_path / "a.pth", linear(1).state_dict()))
    assert torch.equal(model["head"].weight, linear(1)["head"].weight)


# ---------------------------------------------------------------- resuming


def training(folder, seed):
    """A model, a function that trains it, and the checkpointer of all that this changes."""
    model = linear(seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2)

    def train(steps):
        for _ in range(steps):
            optimizer.zero_grad()
            model["head"](torch.ones(1, 3)).square().sum().backward()
            optimizer.step()
            scheduler.step()

    states = {"optimizer": optimizer, "scheduler": scheduler}
    return model, train, OANetCheckpointer(model, str(folder), **states)


def test_resuming_goes_on_as_if_nothing_had_happened(tmp_path):
    model, train, checkpointer = training(tmp_path, 0)
    train(3)
    checkpointer.save("model", iteration=2)
    resumed, train_on, other = training(tmp_path, 1)
    assert other.resume_or_load("ignored.pth", resume=True) == {"iteration": 2}
    for key, state in checkpointer.checkpointables.items():
        assert str(other.checkpointables[key].state_dict()) == str(state.state_dict()), key
    train(3)
    train_on(3)
    assert torch.equal(model["head"].weight, resumed["head"].weight)

    loaded, train_new, other = training(tmp_path, 1)
    fresh = str(other.checkpointables["optimizer"].state_dict())
    rest = other.resume_or_load(str(tmp_path / "model.pth"), resume=False)
    assert str(other.checkpointables["optimizer"].state_dict()) == fresh
    assert {*rest} == {"iteration", "optimizer", "scheduler"}


@pytest.fixture
def distributed_model(tmp_path):
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield nn.parallel.DistributedDataParallel(linear())
    torch.distributed.destroy_process_group()


def test_distributed(distributed_model, tmp_path, monkeypatch):
    checkpointer = OANetCheckpointer(distributed_model, str(tmp_path))
    checkpointer.load(write(tmp_path / "a.pth", linear(1).state_dict()))
    assert torch.equal(distributed_model.module["head"].weight, linear(1)["head"].weight)
    checkpointer.save("saved")
    saved = torch.load(tmp_path / "saved.pth", weights_only=True)
    assert list(saved["model"]) == ["head.weight", "head.bias"]
    # A worker other than the main one, and only that one has the file.
    synced = []
    monkeypatch.setattr(comm, "all_gather", lambda here: [True, here])
    monkeypatch.setattr(
        distributed_model, "_sync_params_and_buffers", lambda: synced.append(1), raising=False
    )
    checkpointer.model = distributed_model
    assert checkpointer.load(str(tmp_path / "none.pth")) == {} and synced == [1]
