import pytest
import torch

from detectron2.data import DatasetCatalog, MetadataCatalog

from oanet_d2.data import PanopticDatasetMapper, builtin, register_panoptic
from oanet_d2.data.occlusion_scenes import write_split
from tests.conftest import load_config


@pytest.fixture
def scenes(tmp_path, monkeypatch):
    """What `register_builtin` registers, under other names, for a folder with three scenes."""
    names = []

    def register(name, *args, **kwargs):
        names.append(f"test_builtin_{name}")
        register_panoptic(names[-1], *args, **kwargs)

    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    monkeypatch.setattr(builtin, "register_panoptic", register)
    monkeypatch.setattr(builtin, "register_cityscapes", lambda root: None)  # its names are taken
    write_split(tmp_path / "occlusion_scenes", "train", 3, image_size=96, seed=0, num_workers=0)
    try:
        builtin.register_builtin()
        yield "test_builtin_occlusion_scenes_train"
    finally:
        for name in names:
            DatasetCatalog.remove(name)
            MetadataCatalog.remove(name)


def test_visible_scenes_have_masks_cut_to_what_is_visible(scenes):
    assert MetadataCatalog.get(scenes).json_file
    assert MetadataCatalog.get(scenes + "_visible").json_file is None
    cfg = load_config("OcclusionScenes/oanet_R_18.yaml")
    mapper = PanopticDatasetMapper(cfg, is_train=True, augmentations=[])
    whole, visible = (DatasetCatalog.get(scenes + end) for end in ("", "_visible"))
    assert len(visible) == 3
    overlaps = 0
    for with_silhouettes, d in zip(whole, visible):
        assert d["file_name"] == with_silhouettes["file_name"]
        sample = mapper(d)
        instances = sample["instances"]
        ids, segments = sample["panoptic_seg"]
        things = [s for s in segments if s["isthing"]]
        assert len(instances) == len(things) > 1
        for mask, c, segment in zip(instances.gt_masks.tensor, instances.gt_classes, things):
            assert torch.equal(mask, ids == segment["id"]) and c == segment["category_id"]
        assert instances.gt_masks.tensor.sum(0).max() == 1

        sample = mapper(with_silhouettes)
        assert torch.equal(sample["panoptic_seg"][0], ids) and sample["panoptic_seg"][1] == segments
        overlaps += (sample["instances"].gt_masks.tensor.sum(0) > 1).sum()
    assert overlaps > 0  # or there would be nothing to cut
