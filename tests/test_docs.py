"""
What the documentation shows works, and it is whole.
"""

import importlib.util
import os
import re

import pytest
import torch
import yaml

from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data import detection_utils as utils
from detectron2.modeling import META_ARCH_REGISTRY, build_model
from detectron2.structures import Instances

from oanet_d2 import OANet, add_oanet_config
from oanet_d2.data.check import check
from oanet_d2.data.occlusion_scenes import write_split
from oanet_d2.modeling import RANKING_RULE_REGISTRY, RankingEvidence
from tests.conftest import REPOSITORY, box_mask

DOCS = REPOSITORY / "docs"
PAGES = [REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md", *sorted(DOCS.glob("*.md"))]


def blocks(page, language, heading=None):
    """The fenced code blocks of a page, of one section if a heading is given."""
    text = page.read_text()
    if heading is not None:
        text = re.split(r"^## ", text.partition(f"## {heading}\n")[2], flags=re.MULTILINE)[0]
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def only_block(page, language, heading):
    (block,) = blocks(page, language, heading)
    return block


def anchors(page):
    """What GitHub makes of a page's headings."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return [re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings]


# ------------------------------------------------------------------------------------ the pages


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if not target.startswith(("http://", "https://")):
            name, _, anchor = target.partition("#")
            file = (page.parent / name).resolve() if name else page
            assert file.exists(), target
            assert REPOSITORY.resolve() in file.parents, target
            assert not anchor or anchor in anchors(file), target


def test_the_index_lists_every_page():
    listed = re.findall(r"\]\((\w+\.md)\)", (DOCS / "README.md").read_text())
    assert sorted([*listed, "README.md"]) == sorted(p.name for p in DOCS.glob("*.md"))


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_config_keys_exist(page):
    """Every key of the config that a page names in full."""
    cfg = get_cfg()
    add_oanet_config(cfg)
    keys = r"`((?:MODEL|INPUT|SOLVER|TEST|DATASETS|DATALOADER)(?:\.[A-Z0-9_]+)+)\b(?!\.)"
    for key in re.findall(keys, page.read_text()):
        node = cfg
        for name in key.split("."):
            assert name in node, key
            node = node[name]


# ------------------------------------------------------------------------- configuration reference


@pytest.fixture(scope="module")
def reference():
    script = REPOSITORY / "tools" / "config_reference.py"
    spec = importlib.util.spec_from_file_location("config_reference", script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_reference_is_not_stale(reference):
    assert reference.main(["--check"]) == 0, "run: python tools/config_reference.py"


def test_a_stale_reference_is_told(reference, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(reference, "PAGE", tmp_path / "configuration.md")
    assert reference.main(["--check"]) == 1
    assert reference.main([]) == 0 and reference.main(["--check"]) == 0
    reference.PAGE.write_text(reference.PAGE.read_text().replace("srm_pairs", "srm_mean", 1))
    assert reference.main(["--check"]) == 1
    assert "is stale; write it by: python tools/config_reference.py" in capsys.readouterr().err


SOURCE = """
    # -------- fusion
    # Which order; see :func:`combine`:
    #   "a": the first,
    #       or so.
    #   "b": the second.
    # At inference only.
    cfg.MODEL.ORDER = "a"
    cfg.MODEL.OTHER = 1

    # About the node.
    cfg.MODEL.NODE = CN()
    # Two.
    cfg.MODEL.NODE.TWO = 2
"""


def test_comments_become_text(reference):
    entries = reference.read_entries(SOURCE)
    assert [e.keys for e in entries] == [["MODEL.ORDER", "MODEL.OTHER"], [], ["MODEL.NODE.TWO"]]
    assert {e.section for e in entries} == {"fusion"}
    assert reference.as_markdown(entries[0].comment) == [
        "Which order; see `combine`:",
        '* `"a"`: the first,',
        "  or so.",
        '* `"b"`: the second.',
        "",
        "At inference only.",
    ]


def test_a_key_without_a_comment_is_refused(reference):
    with pytest.raises(ValueError, match=r"MODEL\.NEW has no comment"):
        reference.read_entries(SOURCE + "    # ------------ training\n    cfg.MODEL.NEW = 1\n")


def test_a_key_that_is_not_read_is_refused(reference):
    source = reference.SOURCE.read_text()
    hidden = source.replace("cfg.MODEL.ALLOW_PICKLE =", "model = cfg.MODEL; model.ALLOW_PICKLE =")
    assert hidden != source
    with pytest.raises(ValueError, match=r"MODEL\.ALLOW_PICKLE is not set in config\.py"):
        reference.page(hidden)


# ------------------------------------------------------------------------------------ migration

# A Panoptic FPN as its owner has it, small; nothing in it is OANet's.
PANOPTIC_FPN = {
    "MODEL": {
        "META_ARCHITECTURE": "PanopticFPN",
        "DEVICE": "cpu",
        "WEIGHTS": "",
        "MASK_ON": True,
        "BACKBONE": {"NAME": "build_resnet_fpn_backbone"},
        "RESNETS": {
            "DEPTH": 18,
            "RES2_OUT_CHANNELS": 64,
            "OUT_FEATURES": ["res2", "res3", "res4", "res5"],
        },
        "FPN": {"IN_FEATURES": ["res2", "res3", "res4", "res5"], "OUT_CHANNELS": 16},
        "ANCHOR_GENERATOR": {"SIZES": [[8], [16], [32], [64], [128]]},
        "RPN": {"IN_FEATURES": ["p2", "p3", "p4", "p5", "p6"], "POST_NMS_TOPK_TEST": 50},
        "ROI_HEADS": {
            "NAME": "StandardROIHeads",
            "IN_FEATURES": ["p2", "p3", "p4", "p5"],
            "NUM_CLASSES": 8,
            "SCORE_THRESH_TEST": 0.0,
        },
        "ROI_BOX_HEAD": {"NAME": "FastRCNNConvFCHead", "NUM_FC": 1, "FC_DIM": 16},
        "ROI_MASK_HEAD": {"NAME": "MaskRCNNConvUpsampleHead", "NUM_CONV": 1, "CONV_DIM": 16},
        "SEM_SEG_HEAD": {"NUM_CLASSES": 7, "CONVS_DIM": 16, "NORM": ""},
        "PANOPTIC_FPN": {"COMBINE": {"INSTANCES_CONFIDENCE_THRESH": 0.0, "STUFF_AREA_LIMIT": 1}},
    },
    "INPUT": {"MIN_SIZE_TRAIN": [64], "MIN_SIZE_TEST": 64, "MASK_FORMAT": "bitmask"},
    "SOLVER": {"IMS_PER_BATCH": 2, "MAX_ITER": 2, "WARMUP_ITERS": 0},
    "DATASETS": {"TRAIN": ["my_train_separated"], "TEST": ["my_val_separated"]},
    "DATALOADER": {"NUM_WORKERS": 0},
    "TEST": {"DETECTIONS_PER_IMAGE": 20},
    "VERSION": 2,
}


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """An empty current folder; what is registered meanwhile is forgotten afterwards."""
    before = set(DatasetCatalog.list())
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    for name in set(DatasetCatalog.list()) - before:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def test_migration(workplace):
    for split, number in (("train", 4), ("val", 2)):
        write_split(workplace / "my", split, number, image_size=64, seed=0, num_workers=0)
    (workplace / "panoptic_fpn.yaml").write_text(yaml.safe_dump(PANOPTIC_FPN))
    cfg = get_cfg()
    cfg.merge_from_file("panoptic_fpn.yaml")
    torch.manual_seed(0)
    theirs = build_model(cfg).eval()
    torch.save({"model": theirs.state_dict()}, "panoptic_fpn.pth")

    page = DOCS / "migration.md"
    config = only_block(page, "yaml", "The config")
    assert len(config.splitlines()) == 10
    (workplace / "oanet.yaml").write_text(config)
    exec(only_block(page, "python", "The data"), {})
    scope = {}
    exec(only_block(page, "python", "Your own script"), scope)

    ours = scope["trainer"].model.eval()
    assert type(ours) is OANet
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], tensor), name
    orders = set(scope["trainer"]._last_eval_results)
    assert orders >= {"panoptic_seg/score", "panoptic_seg/srm_pairs", "panoptic_seg/oracle"}
    assert os.path.isfile("output/oanet/model_final.pth")

    ours.order = "score"
    for d in DatasetCatalog.get("my_val"):
        image = utils.read_image(d["file_name"], "BGR").transpose(2, 0, 1).copy()
        batch = [{"image": torch.from_numpy(image), "height": 64, "width": 64}]
        with torch.no_grad():
            (expected,), (result,) = theirs(batch), ours(batch)
        assert len(expected["panoptic_seg"][1]) > 3
        assert torch.equal(result["panoptic_seg"][0], expected["panoptic_seg"][0])


# ------------------------------------------------------------------------------------ CONTRIBUTING


def contributed(heading):
    """Run the section's code block; return what it defines."""
    scope = {}
    exec(only_block(REPOSITORY / "CONTRIBUTING.md", "python", heading), scope)
    return scope


@pytest.fixture
def forget():
    """Takes (registry, name) pairs out of their registries after the test."""
    names = []
    yield names
    for registry, name in names:
        registry._obj_map.pop(name)


def test_a_contributed_rule(forget, tiny_cfg):
    forget.append((RANKING_RULE_REGISTRY, "smallest_first"))
    contributed("A ranking rule")
    masks = torch.stack([box_mask(0, 0, 5, 5), box_mask(1, 1, 3, 3), box_mask(0, 0, 4, 4)])
    evidence = RankingEvidence(torch.tensor([0.9, 0.8, 0.7]), torch.tensor([0, 1, 0]), masks)
    assert evidence.order("smallest_first").tolist() == [1, 2, 0]
    tiny_cfg.MODEL.OANET.ORDER = "smallest_first"
    assert build_model(tiny_cfg).order == "smallest_first"


def test_a_contributed_combiner(forget, tiny_cfg):
    forget.append((META_ARCH_REGISTRY, "OANetWithoutCrumbs"))
    contributed("A combiner")
    tiny_cfg.MODEL.META_ARCHITECTURE = "OANetWithoutCrumbs"
    tiny_cfg.MODEL.PANOPTIC_FPN.COMBINE.OVERLAP_THRESH = 0.9
    tiny_cfg.MODEL.PANOPTIC_FPN.COMBINE.STUFF_AREA_LIMIT = 1
    model = build_model(tiny_cfg).eval()
    # visible: 64 of 64 pixels, 16 of 64, 15 of 47, which is a crumb
    masks = torch.zeros(3, 20, 20, dtype=torch.bool)
    masks[0, 0:8, 0:8] = True
    masks[1, 2:10, 0:8] = True
    masks[2, 0:8, 4:8] = masks[2, 16:19, 0:5] = True
    instances = Instances((20, 20))
    instances.scores = torch.tensor([0.9, 0.8, 0.7])
    instances.pred_classes = torch.tensor([0, 1, 2])
    semantic = torch.full((20, 20), 3)
    seg, segments = model.combine(masks, instances, semantic, torch.arange(3))
    expected = torch.full((20, 20), 4, dtype=torch.int32)
    expected[masks[2]] = 0
    expected[masks[1]] = 2
    expected[masks[0]] = 1
    visible = [(seg == s["id"]).sum().item() for s in segments]
    assert torch.equal(seg, expected)
    assert [s["id"] for s in segments] == [1, 2, 4] and visible[:2] == [64, 16]


def test_a_contributed_dataset(workplace):
    write_split(workplace / "kitchen", "val", 2, image_size=64, seed=0, num_workers=0)
    contributed("A dataset")
    assert len(DatasetCatalog.get("kitchen_val")) == 2
    metadata = MetadataCatalog.get("kitchen_val")
    files = (metadata.image_root, metadata.panoptic_json, metadata.panoptic_root)
    assert check(*files, metadata.json_file, progress=False) == []
