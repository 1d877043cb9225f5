import importlib.util
import os
import pickle
import re

import pytest
import torch
from iopath.common.file_io import PathHandler

from detectron2.modeling import PanopticFPN, build_model
from detectron2.utils.file_io import PathManager

from oanet_d2 import OANet
from tests.conftest import REPOSITORY

SRM = "srm_head."


@pytest.fixture(scope="module")
def attach_srm():
    script = REPOSITORY / "tools" / "attach_srm.py"
    spec = importlib.util.spec_from_file_location("attach_srm", script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def cfg(tiny_cfg):
    """An OANet around a Panoptic FPN of the model zoo's conventions."""
    tiny_cfg.merge_from_list(
        [
            *["MODEL.SEM_SEG_HEAD.SUPERVISION", "stuff", "MODEL.SEM_SEG_HEAD.NUM_CLASSES", "7"],
            *["MODEL.SRM_HEAD.PAIRS.EVIDENCE", "('geometry',)"],
            *["MODEL.SRM_HEAD.TRAIN_MASKS", "('gt',)"],
        ]
    )
    return tiny_cfg


def weights(cfg, seed, *opts):
    """The state of a model that is unlike any initialization."""
    cfg = cfg.clone()
    cfg.merge_from_list(opts)
    torch.manual_seed(seed)
    state = build_model(cfg).state_dict()
    return {k: v + (torch.rand(v.shape) if v.is_floating_point() else 7) for k, v in state.items()}


def panoptic_fpn(cfg, *opts):
    name = ["MODEL.META_ARCHITECTURE", "PanopticFPN", "MODEL.SEM_SEG_HEAD.NAME", "SemSegFPNHead"]
    return weights(cfg, 1, *name, *opts)


def ranking(cfg, *opts):
    return weights(cfg, 2, "MODEL.META_ARCHITECTURE", "SRMFromAnnotations", *opts)


def save(path, state):
    """As the model zoo has it (.pkl), or as a training leaves it (.pth)."""
    if path.suffix == ".pkl":
        model = {k: v.numpy() for k, v in state.items()}
        path.write_bytes(pickle.dumps({"model": model, "__author__": "Detectron2 Model Zoo"}))
    else:
        torch.save({"model": state, "iteration": 5}, path)
    return str(path)


def check_output(cfg, path, base, srm):
    """It is all that an OANet has, from where it belongs."""
    state = torch.load(path, weights_only=True)["model"]
    model = build_model(cfg)
    assert isinstance(model, OANet)
    model.load_state_dict(state)
    found = model.state_dict()
    assert any(k.startswith(SRM) for k in found) and not all(k.startswith(SRM) for k in found)
    for name, value in found.items():
        source = srm if name.startswith(SRM) else base
        assert torch.equal(value, source[name]), name


@pytest.mark.parametrize("suffix", [".pkl", ".pth"])
def test_every_parameter_comes_from_its_file(attach_srm, cfg, tmp_path, suffix):
    base, srm = panoptic_fpn(cfg), ranking(cfg)
    assert type(build_model(cfg)).__mro__[1] is PanopticFPN
    assert not any(k.startswith(SRM) for k in base) and all(k.startswith(SRM) for k in srm)
    base_path, srm_path = save(tmp_path / f"base{suffix}", base), save(tmp_path / "srm.pth", srm)
    output = tmp_path / "out" / "oanet.pth"
    output.parent.mkdir()
    attach_srm.attach(cfg, base_path, srm_path, str(output))
    check_output(cfg, output, base, srm)
    assert not [name for name in os.listdir(output.parent) if "partial" in name]


def test_a_ranking_head_in_the_base_is_replaced(attach_srm, cfg, tmp_path):
    base, srm = weights(cfg, 1, "MODEL.SRM_HEAD.CONV_DIM", "4"), ranking(cfg)
    assert any(k.startswith(SRM) for k in base)
    output = tmp_path / "oanet.pth"
    paths = save(tmp_path / "base.pth", base), save(tmp_path / "srm.pth", srm)
    attach_srm.attach(cfg, *paths, str(output))
    check_output(cfg, output, base, srm)


def test_nothing_but_the_ranking_head_is_taken_from_srm(attach_srm, cfg, tmp_path):
    """A whole OANet also holds `srm_head.*`."""
    base, srm = panoptic_fpn(cfg), weights(cfg, 2)
    output = tmp_path / "oanet.pth"
    paths = save(tmp_path / "base.pkl", base), save(tmp_path / "srm.pth", srm)
    attach_srm.attach(cfg, *paths, str(output))
    check_output(cfg, output, base, srm)


def test_writes_the_output_and_nothing_else(attach_srm, cfg, tmp_path):
    """In the folder of a training it must not change where `--resume` goes on."""
    paths = save(tmp_path / "base.pkl", panoptic_fpn(cfg)), save(tmp_path / "srm.pth", ranking(cfg))
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "last_checkpoint").write_text("model_final.pth")
    attach_srm.attach(cfg, *paths, str(folder / "oanet.pth"))
    assert sorted(os.listdir(folder)) == ["last_checkpoint", "oanet.pth"]
    assert (folder / "last_checkpoint").read_text() == "model_final.pth"


def test_an_interrupted_write_leaves_the_old_file(attach_srm, cfg, tmp_path, monkeypatch):
    paths = save(tmp_path / "base.pkl", panoptic_fpn(cfg)), save(tmp_path / "srm.pth", ranking(cfg))
    output = tmp_path / "oanet.pth"
    output.write_text("old")

    def full_disk(data, file, *_, **__):
        with open(file, "wb") if isinstance(file, (str, os.PathLike)) else file as f:
            f.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(OSError, match="disk full"):
        attach_srm.attach(cfg, *paths, str(output))
    assert output.read_text() == "old"


class Zoo(PathHandler):
    """Like Detectron2's handlers of detectron2:// and https://, it knows nothing of `isfile`."""

    folder = None

    def _get_supported_prefixes(self):
        return ["test-zoo://"]

    def _get_local_path(self, path, force=False, **kwargs):
        return str(self.folder / path[len("test-zoo://") :])


def test_base_may_be_a_url(attach_srm, cfg, tmp_path):
    zoo = Zoo()
    zoo.folder = tmp_path
    PathManager.register_handler(zoo, allow_override=True)
    base, srm = panoptic_fpn(cfg), ranking(cfg)
    save(tmp_path / "base.pkl", base)
    output = tmp_path / "oanet.pth"
    srm_path = save(tmp_path / "srm.pth", srm)
    attach_srm.attach(cfg, "test-zoo://base.pkl", srm_path, str(output))
    check_output(cfg, output, base, srm)


@pytest.mark.parametrize(
    "wrong, words, parameter",
    [
        ("narrow base", "--base {base} does not give", r"(?!srm_head)\S+"),
        ("srm without a ranking", "--srm {srm} does not give", r"srm_head\.\S+"),
        ("srm of another shape", "--srm {srm} does not give", r"srm_head\.blocks\.0\.\S+"),
        ("no base", "--base {base} does not exist", None),
        ("no srm", "--srm {srm} does not exist", None),
    ],
)
def test_what_does_not_fit_is_refused(attach_srm, cfg, tmp_path, wrong, words, parameter):
    base = panoptic_fpn(cfg, *["MODEL.FPN.OUT_CHANNELS", "8"] * (wrong == "narrow base"))
    srm = {
        "srm without a ranking": lambda: panoptic_fpn(cfg),
        "srm of another shape": lambda: ranking(cfg, "MODEL.SRM_HEAD.CONV_DIM", "4"),
    }.get(wrong, lambda: ranking(cfg))()
    paths = {"base": tmp_path / "base.pkl", "srm": tmp_path / "srm.pth"}
    for name, state in (("base", base), ("srm", srm)):
        if wrong != f"no {name}":
            save(paths[name], state)
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(ValueError, match=re.escape(words.format(**paths))) as error:
        attach_srm.attach(cfg, *map(str, paths.values()), str(tmp_path / "oanet.pth"))
    if parameter:
        named = re.search("such as (\\S+)\\. ", str(error.value))[1]
        assert re.fullmatch(parameter, named) and named in build_model(cfg).state_dict()
    assert sorted(os.listdir(tmp_path)) == before


def test_command_line(attach_srm, cfg, tmp_path, monkeypatch, capsys):
    """The config's overrides count; what does not fit ends with the usage, not a traceback."""
    base, srm = panoptic_fpn(cfg), ranking(cfg, "MODEL.SRM_HEAD.NUM_BLOCKS", "1")
    (tmp_path / "oanet.yaml").write_text(cfg.dump())
    args = ["attach_srm.py", "--config-file", str(tmp_path / "oanet.yaml")]
    args += ["--base", save(tmp_path / "base.pkl", base), "--srm", save(tmp_path / "srm.pth", srm)]
    args += ["--output", str(tmp_path / "oanet.pth")]
    monkeypatch.setattr("sys.argv", args)
    with pytest.raises(SystemExit) as error:
        attach_srm.main()
    assert error.value.code == 2 and "--srm" in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "oanet.pth").exists()

    monkeypatch.setattr("sys.argv", [*args, "--", "MODEL.SRM_HEAD.NUM_BLOCKS", "1"])
    attach_srm.main()
    assert str(tmp_path / "oanet.pth") in capsys.readouterr().out
    cfg.MODEL.SRM_HEAD.NUM_BLOCKS = 1
    check_output(cfg, tmp_path / "oanet.pth", base, srm)
