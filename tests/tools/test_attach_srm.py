import pickle

import pytest
import torch
from attach_srm import attach, main

from detectron2.modeling import build_model

from tests.conftest import panoptic_fpn_cfg


@pytest.fixture
def cfg(tiny_cfg):
    """An OANet around a Panoptic FPN as the model zoo has it."""
    stuff = ["MODEL.SEM_SEG_HEAD.SUPERVISION", "stuff", "MODEL.SEM_SEG_HEAD.NUM_CLASSES", 7]
    masks = ["MODEL.SRM_HEAD.PAIRS.EVIDENCE", ("geometry",), "MODEL.SRM_HEAD.TRAIN_MASKS", "gt"]
    tiny_cfg.merge_from_list([*stuff, *masks])
    return tiny_cfg


def weights(cfg, seed, *opts):
    """The state of a model that is unlike any initialization."""
    cfg = cfg.clone()
    cfg.merge_from_list(list(opts))
    torch.manual_seed(seed)
    state = build_model(cfg).state_dict()
    return {k: v + (torch.rand(v.shape) if v.is_floating_point() else 7) for k, v in state.items()}


def save(path, state):
    """As the model zoo has it (.pkl), or as a training leaves it (.pth)."""
    if path.suffix == ".pkl":
        model = {k: v.numpy() for k, v in state.items()}
        path.write_bytes(pickle.dumps({"model": model, "__author__": "Detectron2 Model Zoo"}))
    else:
        torch.save({"model": state, "iteration": 5}, path)
    return str(path)


@pytest.mark.parametrize("base_is", ["PanopticFPN", "OANet"])
@pytest.mark.parametrize("srm_is", ["SRMFromAnnotations", "OANet"])
def test_every_parameter_comes_from_its_file(cfg, tmp_path, base_is, srm_is):
    base = weights(cfg if base_is == "OANet" else panoptic_fpn_cfg(cfg), 1)
    srm = weights(cfg, 2, "MODEL.META_ARCHITECTURE", srm_is)
    (tmp_path / "last_checkpoint").write_text("model_final.pth")
    files = save(tmp_path / "base.pkl", base), save(tmp_path / "srm.pth", srm)
    attach(cfg, *files, str(tmp_path / "oanet.pth"))
    # In the folder of a training it does not change where --resume goes on.
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"base.pkl", "srm.pth", "last_checkpoint", "oanet.pth"}
    assert (tmp_path / "last_checkpoint").read_text() == "model_final.pth"
    state = torch.load(tmp_path / "oanet.pth", weights_only=True)["model"]
    assert state.keys() == build_model(cfg).state_dict().keys()
    for name, value in state.items():
        assert torch.equal(value, (srm if name.startswith("srm_head.") else base)[name]), name


@pytest.mark.parametrize("wrong", ["narrow base", "no ranking", "other ranking", "no file"])
def test_what_does_not_fit_is_refused(cfg, tmp_path, monkeypatch, capsys, wrong):
    (tmp_path / "oanet.yaml").write_text(cfg.dump())
    fpn, narrow = panoptic_fpn_cfg(cfg), ["MODEL.FPN.OUT_CHANNELS", 8] * (wrong == "narrow base")
    files = {"--base": save(tmp_path / "base.pkl", weights(fpn, 1, *narrow))}
    if wrong == "no ranking":
        files["--srm"] = save(tmp_path / "srm.pth", weights(fpn, 2))
    elif wrong == "no file":
        files["--srm"] = str(tmp_path / "none.pth")
    else:
        other = ["MODEL.SRM_HEAD.PAIRS.EVIDENCE", ("score_map",)] * (wrong == "other ranking")
        srm = weights(cfg, 2, "MODEL.META_ARCHITECTURE", "SRMFromAnnotations", *other)
        files["--srm"] = save(tmp_path / "srm.pth", srm)
    paths = {"--config-file": f"{tmp_path}/oanet.yaml", "--output": f"{tmp_path}/oanet.pth"}
    args = [x for pair in {**files, **paths}.items() for x in pair]
    monkeypatch.setattr("sys.argv", ["attach_srm.py", *args])
    with pytest.raises(SystemExit, match="2"):
        main()
    assert files["--base" if wrong == "narrow base" else "--srm"] in capsys.readouterr().err
    assert not (tmp_path / "oanet.pth").exists()
