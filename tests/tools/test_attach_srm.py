import pickle

import pytest
import torch
from attach_srm import attach, main

from detectron2.modeling import build_model

from oanet_d2 import OANet
from tests.conftest import panoptic_fpn_cfg

NARROW = ["MODEL.FPN.OUT_CHANNELS", 8]


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


@pytest.mark.parametrize("base_has_a_ranking", [False, True])
@pytest.mark.parametrize("srm_has_a_network", [False, True])
def test_every_parameter_comes_from_its_file(cfg, tmp_path, base_has_a_ranking, srm_has_a_network):
    base = weights(cfg if base_has_a_ranking else panoptic_fpn_cfg(cfg), 1)
    srm = weights(cfg, 2) if srm_has_a_network else ranking(cfg)
    files = [save(tmp_path / "base.pkl", base), save(tmp_path / "srm.pth", srm)]
    (tmp_path / "last_checkpoint").write_text("model_final.pth")
    attach(cfg, *files, str(tmp_path / "oanet.pth"))
    # In the folder of a training it does not change where --resume goes on.
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"base.pkl", "srm.pth", "last_checkpoint", "oanet.pth"}
    assert (tmp_path / "last_checkpoint").read_text() == "model_final.pth"
    state = torch.load(tmp_path / "oanet.pth", weights_only=True)["model"]
    model = build_model(cfg)
    assert isinstance(model, OANet) and state.keys() == model.state_dict().keys()
    for name, value in state.items():
        assert torch.equal(value, (srm if name.startswith("srm_head.") else base)[name]), name


@pytest.mark.parametrize("wrong", ["narrow base", "no ranking", "other ranking", "no file"])
def test_what_does_not_fit_is_refused(cfg, tmp_path, wrong):
    fpn = panoptic_fpn_cfg(cfg)
    base = weights(fpn, 1, *NARROW) if wrong == "narrow base" else weights(fpn, 1)
    srm = {
        "no ranking": lambda: weights(fpn, 2),
        "other ranking": lambda: ranking(cfg, "MODEL.SRM_HEAD.PAIRS.EVIDENCE", ("score_map",)),
    }.get(wrong, lambda: ranking(cfg))()
    files = [save(tmp_path / "base.pkl", base), save(tmp_path / "srm.pth", srm)]
    if wrong == "no file":
        files[1] = str(tmp_path / "none.pth")
    with pytest.raises(ValueError, match=files[0 if wrong == "narrow base" else 1]):
        attach(cfg, *files, str(tmp_path / "oanet.pth"))
    assert not (tmp_path / "oanet.pth").exists()


def test_command_line(cfg, tmp_path, monkeypatch, capsys):
    (tmp_path / "oanet.yaml").write_text(cfg.dump())
    base = save(tmp_path / "base.pkl", weights(panoptic_fpn_cfg(cfg), 1))
    srm = save(tmp_path / "srm.pth", ranking(cfg))
    args = ["attach_srm.py", "--config-file", str(tmp_path / "oanet.yaml"), "--base", base]
    args += ["--srm", srm, "--output", str(tmp_path / "oanet.pth")]
    monkeypatch.setattr("sys.argv", [*args, "--", *map(str, NARROW)])
    with pytest.raises(SystemExit):
        main()
    assert base in capsys.readouterr().err and not (tmp_path / "oanet.pth").exists()
    monkeypatch.setattr("sys.argv", args)
    main()
    assert (tmp_path / "oanet.pth").exists()
