import pickle

import pytest
import safetensors.torch
import torch
from attach_srm import attach

from detectron2.modeling import build_model

from tests.conftest import panoptic_fpn_cfg


def checkpoint(path, cfg, *opts):
    """A model zoo's .pkl or a .safetensors, of no initial weights. Gives its path and weights."""
    cfg = cfg.clone()
    cfg.merge_from_list(list(opts))
    state = {k: (7 * torch.rand(v.shape)).to(v) for k, v in build_model(cfg).state_dict().items()}
    if path.suffix == ".safetensors":
        safetensors.torch.save_file(state, path)
        return str(path), state
    model = {k: v.numpy() for k, v in state.items()}
    path.write_bytes(pickle.dumps({"model": model, "__author__": "Detectron2 Model Zoo"}))
    return str(path), state


@pytest.mark.parametrize(
    "fits, base_opts, srm_opts",
    [
        ("all", [], ["MODEL.META_ARCHITECTURE", "SRMFromAnnotations"]),
        ("srm", ["MODEL.FPN.OUT_CHANNELS", 8], []),
        ("base", [], ["MODEL.META_ARCHITECTURE", "PanopticFPN"]),
        ("base", [], ["MODEL.SRM_HEAD.PAIRS.EVIDENCE", ("score_map",)]),
    ],
)
def test_every_parameter_comes_from_its_file(tiny_cfg, tmp_path, fits, base_opts, srm_opts):
    cfg, ranking = tiny_cfg, tiny_cfg.MODEL.SRM_HEAD
    cfg.MODEL.SEM_SEG_HEAD.SUPERVISION = "stuff"
    ranking.PAIRS.EVIDENCE, ranking.TRAIN_MASKS = ("geometry",), "gt"
    base, others = checkpoint(tmp_path / "base.pkl", panoptic_fpn_cfg(cfg), *base_opts)
    srm, ranking = checkpoint(tmp_path / "srm.safetensors", cfg, *srm_opts)
    if fits != "all":
        with pytest.raises(ValueError, match=srm if fits == "base" else base):
            attach(cfg, base, srm, str(tmp_path / "oanet.pth"))
        return
    attach(cfg, base, srm, str(tmp_path / "oanet.pth"))
    state = torch.load(tmp_path / "oanet.pth", weights_only=True)["model"]
    assert state.keys() == {**others, **ranking}.keys()
    for name, value in state.items():
        assert torch.equal(value, (ranking if name.startswith("srm_head.") else others)[name]), name
