import importlib.util

import numpy as np
import pytest
import torch
from PIL import Image

from detectron2.checkpoint import DetectionCheckpointer
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import build_model

from oanet_d2.data import PanopticDatasetMapper
from oanet_d2.data.occlusion_scenes import write_split
from oanet_d2.modeling import RankingEvidence
from tests.conftest import REPOSITORY, box_mask, registered, scenes_paths

PICTURES = ["instance_tensor", "overlap", "painting", "result", "score_map"]


@pytest.fixture(scope="module")
def concepts():
    script = REPOSITORY / "tools" / "draw_concepts.py"
    spec = importlib.util.spec_from_file_location("draw_concepts", script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def tie_on_person(mean_of_tie):
    """
    A person of 40 cells, a tie of 4 on it that S shows, and a cup of 2 beside the tie.
    """
    masks = torch.stack([box_mask(0, 0, 4, 10), box_mask(1, 1, 2, 5), box_mask(2, 1, 3, 3)])
    score_map = torch.zeros(3, 10, 12)
    score_map[0][masks[0]] = 1.0
    score_map[0][masks[1]] = 0.1
    score_map[1][masks[1]] = mean_of_tie
    score_map[2][masks[2]] = 1.0
    margins = torch.tensor([[0.0, -4.0, 0.0], [4.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    classes, scores = torch.tensor([0, 1, 2]), torch.tensor([0.9, 0.5, 0.8])
    return RankingEvidence(scores, classes, masks, score_map, margins)


def test_the_tie_on_the_person_is_telling(concepts):
    # mean of the person: (36 + 0.4) / 40 = 0.91, of the tie 0.8; in the overlap 0.1 against 0.8
    evidence = tie_on_person(0.8)
    truth = torch.tensor([[0.0, -3.0, 0.0], [3.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    assert concepts.most_telling_pair(evidence, truth, {1}) == (3.0, 1, 0)
    # nothing to tell: the order does not decide on it; the truth is otherwise; the mean is right
    assert concepts.most_telling_pair(evidence, truth, {2}) is None
    assert concepts.most_telling_pair(evidence, -truth, {0, 1, 2}) is None
    assert concepts.most_telling_pair(tie_on_person(0.95), truth, {1}) is None
    # the detection score is right
    evidence.scores[1] = 0.95
    assert concepts.most_telling_pair(evidence, truth, {1}) is None


def opts(cfg, name):
    cfg.merge_from_list(
        [
            *["DATASETS.TEST", f"('{name}',)", "TEST.ORDERS", "('score', 'srm_pairs')"],
            *["MODEL.PANOPTIC_FPN.COMBINE.INSTANCES_CONFIDENCE_THRESH", "0.0"],
            *["MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.0", "INPUT.MIN_SIZE_TEST", "64"],
        ]
    )


def test_pictures(concepts, tiny_cfg, tmp_path):
    """Of an untrained network and the first two instances that overlap."""
    write_split(tmp_path, "val", 1, image_size=64, seed=0, num_workers=0)
    with registered("test_draw_concepts", *scenes_paths(tmp_path, "val")) as name:
        opts(tiny_cfg, name)
        torch.manual_seed(0)
        model = build_model(tiny_cfg).eval()
        (input,) = DatasetCatalog.get(name)
        with torch.no_grad():
            (result,) = model([PanopticDatasetMapper(tiny_cfg, is_train=False)(input)])
        masks = result["ranking_evidence"].masks.flatten(1).float()
        front, behind = torch.nonzero((masks @ masks.t()).triu(1))[0].tolist()
        example = concepts.Example(input, result, front, behind)
        concepts.draw_all(example, model, MetadataCatalog.get(name), tmp_path / "out")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [f"{p}.png" for p in PICTURES]
    for picture in PICTURES:
        pixels = np.asarray(Image.open(tmp_path / "out" / f"{picture}.png").convert("RGB"))
        assert pixels.shape[1] >= 500 and pixels.std() > 10


def test_a_model_that_has_nothing_to_tell(concepts, tiny_cfg, tmp_path):
    write_split(tmp_path, "val", 1, image_size=64, seed=0, num_workers=0)
    with registered("test_draw_concepts", *scenes_paths(tmp_path, "val")) as name:
        opts(tiny_cfg, name)
        tiny_cfg.OUTPUT_DIR = str(tmp_path)
        DetectionCheckpointer(build_model(tiny_cfg), str(tmp_path)).save("model_final")
        config = tmp_path / "config.yaml"
        config.write_text(tiny_cfg.dump())
        with pytest.raises(ValueError, match=f"In {name} there is no instance that .* longer"):
            concepts.main(["--config-file", str(config), "--output", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
