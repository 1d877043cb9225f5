"""Configs in Python: equal to the yaml, and trained, evaluated and predicted with like a yaml."""

import json
import os
import re

import pytest
import torch

from detectron2.config import instantiate
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.engine import default_argument_parser
from detectron2.modeling import build_model
from detectron2.utils.env import seed_all_rng
from detectron2.utils.events import EventStorage

from oanet_d2 import PanopticPredictor, load_config, predict, train
from oanet_d2.checkpoint import CheckpointError
from oanet_d2.data import PanopticDatasetMapper
from oanet_d2.data.occlusion_scenes import write_split
from oanet_d2.engine import OANetTrainer
from oanet_d2.lazy import load_lazy_config
from oanet_d2.output_folder import OutputFolderError
from tests import conftest
from tests.conftest import make_input, registered, scenes_paths

NAME = "COCO-PanopticSegmentation/oanet_R_50_1x"

TINY = """
from detectron2.config import LazyConfig
from detectron2.layers import ShapeSpec

from oanet_d2.config import find_config

dataloader, lr_multiplier, model, optimizer, train = LazyConfig.load(
    find_config("COCO-PanopticSegmentation/oanet_R_50_1x.py"),
    ("dataloader", "lr_multiplier", "model", "optimizer", "train"),
)
model.backbone.bottom_up.stages.depth = 18
del model.backbone.bottom_up.stages.stride_in_1x1
model.backbone.out_channels = model.proposal_generator.head.in_channels = 16
model.proposal_generator.post_nms_topk = (50, 20)
model.proposal_generator.anchor_generator.sizes = [[12], [24], [48], [96], [160]]
_heads = model.roi_heads
_heads.num_classes, _heads.batch_size_per_image = 8, 16
_heads.box_head.input_shape = ShapeSpec(channels=16, height=7, width=7)
_heads.box_head.fc_dims = [32]
_heads.box_predictor.input_shape = ShapeSpec(channels=32)
_heads.box_predictor.test_score_thresh = model.combine_instances_score_thresh = 0.05
_heads.box_predictor.test_topk_per_image = 8
_heads.mask_head.input_shape = ShapeSpec(channels=16, height=14, width=14)
_heads.mask_head.conv_dims = [16, 16]
model.sem_seg_head.num_things, model.sem_seg_head.num_classes = 8, 14
model.sem_seg_head.conv_dims = 32

dataloader.train.dataset.names = "{train}"
dataloader.test.dataset.names = "{val}"
for _loader, size in ((dataloader.train, [48, 64]), (dataloader.test, 64)):
    _loader.num_workers = 0
    _loader.mapper.augmentations[0].short_edge_length = size
dataloader.train.total_batch_size = 2
dataloader.evaluator.orders = ["score", "class_order", "srm_pairs", "oracle"]
optimizer.lr = 0.00001
train.update(init_checkpoint="", device="cpu", max_iter=4, eval_period=0, seed=1, output_dir="{out}")
train.srm_only_share = 0.5
train.checkpointer.period = 1
"""



@pytest.fixture(scope="module")
def both():
    """The yaml and the config in Python, each with its model. The weights are the same."""
    cfg, lazy = conftest.load_config(f"{NAME}.yaml"), load_lazy_config(f"{NAME}.py")
    models = build_model(cfg), instantiate(lazy.model)
    of_yaml, of_lazy = (model.state_dict() for model in models)
    assert [(k, x.shape) for k, x in of_lazy.items()] == [(k, x.shape) for k, x in of_yaml.items()]
    models[1].load_state_dict(of_yaml)
    return (cfg, models[0]), (lazy, models[1])


def test_model_is_the_yamls(both):
    batch = [
        make_input((96, 128), [(8, 8, 90, 80), (30, 20, 120, 60)], [0, 27], 3, num_things=80),
        make_input((80, 64), [(5, 5, 50, 70)], [79], 53, num_things=80, seed=1),
    ]
    losses, results = [], []
    for _, model in both:
        seed_all_rng(3)
        with EventStorage():
            losses.append({k: x.item() for k, x in model.train()(batch).items()})
        with torch.no_grad():
            results.append(model.eval()(batch))
    assert losses[0] == pytest.approx(losses[1])
    assert {"loss_sem_seg", "loss_mask", "loss_srm_pairs"} < losses[0].keys()
    for of_yaml, of_lazy in zip(*results):
        assert torch.equal(of_lazy["panoptic_seg"][0], of_yaml["panoptic_seg"][0])
        assert of_lazy.keys() == of_yaml.keys()


def test_training_is_the_yamls(both):
    (cfg, of_yaml), (lazy, of_lazy) = both
    lazy.optimizer.params.model = of_lazy
    optimizers = OANetTrainer.build_optimizer(cfg, of_yaml), instantiate(lazy.optimizer)
    settings = []
    for (_, model), optimizer in zip(both, optimizers):
        names = {p: name for name, p in model.named_parameters()}
        keys = "lr", "weight_decay", "momentum", "nesterov"
        groups = [(g, [g[key] for key in keys]) for g in optimizer.param_groups]
        settings.append({names[p]: values for g, values in groups for p in g["params"]})
    assert settings[0] == settings[1]
    schedules = OANetTrainer.build_lr_scheduler(cfg, optimizers[0])._multiplier, lazy.lr_multiplier
    for i in (0, 1, 500, 999, 1000, 59_999, 60_000, 80_000, 89_999):
        expected, found = schedules[0](i / 90_000), instantiate(schedules[1])(i / 90_000)
        assert found == pytest.approx(expected)
    train, test = lazy.dataloader.train, lazy.dataloader.test
    assert (train.total_batch_size, lazy.train.max_iter) == (16, cfg.SOLVER.MAX_ITER)
    assert cfg.SOLVER.IMS_PER_BATCH == 16 and train.num_workers == cfg.DATALOADER.NUM_WORKERS
    assert train.dataset.filter_empty == cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS
    assert (train.dataset.names,) == cfg.DATASETS.TRAIN and (test.dataset.names,) == cfg.DATASETS.TEST
    assert tuple(lazy.dataloader.evaluator.orders) == cfg.TEST.ORDERS
    assert lazy.train.init_checkpoint == load_config(f"{NAME}.yaml").MODEL.WEIGHTS


@pytest.mark.parametrize("is_train", [True, False])
def test_mapper_is_the_yamls(both, few_scenes, is_train):
    (cfg, _), (lazy, _) = both
    loader = lazy.dataloader.train if is_train else lazy.dataloader.test
    mappers = PanopticDatasetMapper(cfg, is_train), instantiate(loader.mapper)
    for i, d in enumerate(DatasetCatalog.get(few_scenes[0])):
        found = []
        for mapper in mappers:
            seed_all_rng(i)
            found.append(mapper(d))
        of_yaml, of_lazy = found
        assert of_yaml.keys() == of_lazy.keys()
        for key in {"image", "sem_seg", "panoptic_category"} & of_yaml.keys():
            assert torch.equal(of_lazy[key], of_yaml[key])


@pytest.fixture
def tiny(few_scenes, tmp_path, monkeypatch):
    """A small config in Python of four iterations. In the last two the ranking head learns alone."""
    for name in ("lazy.setup_logger", "predict.set_up_logging"):  # other tests read the log
        monkeypatch.setattr(f"oanet_d2.{name}", lambda *args, **kwargs: None)
    return write_tiny(tmp_path, *few_scenes)


def write_tiny(folder, train, val, before="", after=""):
    text = TINY.format(train=train, val=val, out=folder / "out")
    (folder / "tiny.py").write_text(before + text + after)
    return folder / "tiny.py"


def run(config, *args):
    return train.run(default_argument_parser().parse_args(["--config-file", str(config), *args]))


def test_trains_and_resumes_and_evaluates(tiny, tmp_path):
    """Resumed before the ranking's part, it ends with the same weights. So does the evaluation."""
    out = tmp_path / "out"
    run(tiny)
    first = torch.load(out / "model_final.pth", weights_only=True)["model"]
    halfway = torch.load(out / "model_0000001.pth", weights_only=True)["model"]
    changed = {x.split(".")[0] for x in first if not torch.equal(first[x], halfway[x])}
    assert changed == {"srm_head"}
    orders = json.loads((out / "orderings.json").read_text())
    assert [*orders["orderings"]] == ["score", "class_order", "srm_pairs", "oracle"]
    assert orders["images"] == 3 and (out / "report.html").exists()
    with pytest.raises(OutputFolderError, match="model_final.pth of another training: .*--resume"):
        run(tiny)

    (out / "last_checkpoint").write_text("model_0000000.pth")
    run(tiny, "--resume", *WITHOUT_ORDERS)
    again = torch.load(out / "model_final.pth", weights_only=True)["model"]
    assert all(torch.equal(again[name], x) for name, x in first.items())

    state = torch.load(out / "model_final.pth", weights_only=True)
    state["trainer"] = {"_trainer": state["trainer"], "iteration": 3}  # as DefaultTrainer has it
    torch.save(state, out / "model_final.pth")
    with pytest.raises(CheckpointError, match="model_final.pth cannot be resumed here"):
        run(tiny, "--resume")

    (out / "orderings.json").unlink()
    run(tiny, "--eval-only", f"train.init_checkpoint={out / 'model_final.pth'}")
    again = json.loads((out / "orderings.json").read_text())
    assert again["orderings"] == orders["orderings"]


def test_a_diverged_training_says_where(tiny, tmp_path):
    with pytest.raises(FloatingPointError, match="Iteration [123]: .* The batch .*rank_0") as error:
        run(tiny, "optimizer.lr=1e30", "train.srm_only_share=0")
    (folder,) = re.findall(r"is in (\S+)\. ", str(error.value))
    assert len(os.listdir(folder)) == 2


def test_predicts_like_the_model(tiny, few_scenes, tmp_path):
    cfg = load_lazy_config(tiny)
    torch.manual_seed(0)
    model = instantiate(cfg.model).eval()
    torch.save({"model": model.state_dict()}, tmp_path / "tiny.pth")
    predictor = PanopticPredictor.from_config(tiny, tmp_path / "tiny.pth")
    for (x,) in instantiate(cfg.dataloader.test):
        with torch.no_grad():
            expected, segments = model([x])[0]["panoptic_seg"]
        found = predictor(x["file_name"])
        assert torch.equal(found.panoptic[0], expected) and len(found.panoptic[1]) == len(segments)
        assert any(s["isthing"] for s in segments)
    args = ["--config-file", str(tiny), "--input", x["file_name"], "--compare", "--output"]
    args += [str(tmp_path / "drawn.png"), "--confidence-threshold", "0.99", "--save-panoptic"]
    args += ["--opts", f"train.init_checkpoint={tmp_path / 'tiny.pth'}"]
    assert predict.main(args) == 0 and (tmp_path / "drawn.png").exists()
    saved = json.loads((tmp_path / "panoptic.json").read_text())
    things = {c["id"] for c in saved["categories"] if c["isthing"]}
    assert not any(s["category_id"] in things for s in saved["annotations"][0]["segments_info"])


@pytest.mark.parametrize(
    "override, words",
    [
        ("train.max_itr=5", "'train.max_itr=5' of .*the config has no train.max_itr"),
        ("SOLVER.MAX_ITER", "'SOLVER.MAX_ITER' of"),
        ("model.srm_head.evidence=[", "'model.srm_head.evidence=\\[' of"),
    ],
)
def test_bad_overrides(override, words):
    with pytest.raises(ValueError, match=words):
        load_lazy_config(f"{NAME}.py", [override])


def test_other_overrides():
    opts = ["model.order=score", "+train.cudnn_benchmark=true", "optimizer.lr=0.5"]
    cfg = load_lazy_config(f"{NAME}.py", opts)
    assert (cfg.model.order, cfg.train.cudnn_benchmark, cfg.optimizer.lr) == ("score", True, 0.5)


PANOPTIC_FPN = """
from detectron2.modeling import PanopticFPN
from detectron2.modeling.meta_arch.semantic_seg import SemSegFPNHead

model._target_, model.sem_seg_head._target_ = PanopticFPN, SemSegFPNHead
del model.srm_head, model.gt_false_positives, model.return_fusion_inputs, model.sem_seg_head.num_things
model.sem_seg_head.num_classes = 7
dataloader.train.mapper.stuff_only = dataloader.test.mapper.stuff_only = True
train.srm_only_share = 0
"""


WITHOUT_ORDERS = "dataloader.evaluator.orders=[]", "dataloader.evaluator.instance_ap=false"


def test_detectron2s_panoptic_fpn(tiny, few_scenes, tmp_path):
    write_tiny(tmp_path, *few_scenes, after=PANOPTIC_FPN)
    with pytest.raises(ValueError, match="evaluator.orders is .*return_fusion_inputs is not True"):
        run(tiny, "train.max_iter=1")
    run(tiny, "train.max_iter=1", *WITHOUT_ORDERS)
    last = (tmp_path / "out/metrics.json").read_text().splitlines()[-1]
    assert 0 <= json.loads(last)["panoptic_seg/PQ"] <= 100


SAMPLER = """
from detectron2.config import LazyCall as L
from detectron2.data.samplers import RepeatFactorTrainingSampler
from oanet_d2.data.training_stream import with_things

dataloader.train.sampler = L(RepeatFactorTrainingSampler)(
    repeat_factors=L(RepeatFactorTrainingSampler.repeat_factors_from_category_frequency)(
        dataset_dicts=L(with_things)(dataset_dicts="${dataloader.train.dataset}"), repeat_thresh=0.9
    )
)
"""


def test_trains_the_ranking_alone(tiny, few_scenes, tmp_path):
    """Whatever the share is, and from a dataset with instances beside one without."""
    write_tiny(tmp_path, *few_scenes, after=SAMPLER)
    metadata = MetadataCatalog.get(few_scenes[0])
    files = metadata.image_root, metadata.panoptic_json, metadata.panoptic_root
    with registered("visible_parts", *files):
        names = f"dataloader.train.dataset.names=[{few_scenes[0]},visible_parts]"
        run(tiny, "+model.train_srm_only=true", "train.max_iter=2", names, *WITHOUT_ORDERS)
    weights = [torch.load(tmp_path / f"out/model_000000{i}.pth")["model"] for i in (0, 1)]
    changed = {x.split(".")[0] for x in weights[0] if not torch.equal(weights[0][x], weights[1][x])}
    assert changed == {"srm_head"}


@pytest.mark.parametrize(
    "override, words",
    [
        ("model.order=srm_maen", "ORDER has the order 'srm_maen'; it must be one of"),
        ("dataloader.evaluator.orders=[srm_mean]", "orders has the order 'srm_mean'.* score map"),
        ("model.return_fusion_inputs=false", "return_fusion_inputs is not True"),
        ("model.roi_heads.num_classes=9", "ROI_HEADS.NUM_CLASSES is 9, but dataset .* has 8 thing"),
        ("dataloader.test.mapper.augmentations=[]", "mapper.augmentations is .* one short_edge"),
        ("dataloader.train.mapper.stuff_only=true", "stuff_only is True, .*num_things is 8.* False"),
        ("model.sem_seg_head.num_things=0", "stuff_only is False, .*num_things is 0.* True"),
        ("dataloader.test.dataset.names=[a, b]", r"names is \('a', 'b'\).* one dataset"),
        ("+model.roi_heads.keypoint_head={num_keypoints: 3}", r"KEYPOINTS is 3; .*few_scenes_train.*\[0\]"),
    ],
)
def test_a_wrong_model_is_refused_before_the_training(tiny, tmp_path, override, words):
    with pytest.raises(ValueError, match=words):
        run(tiny, override)
    assert not list((tmp_path / "out").glob("*.pth"))


def test_trains_in_two_processes(tmp_path, monkeypatch):
    """With a dataset that the config itself registers."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    before = "from oanet_d2 import register_panoptic\n"
    for split in ("train", "val"):
        write_split(tmp_path, split, 4, image_size=64, seed=0, num_workers=0)
        paths = [str(x) for x in scenes_paths(tmp_path, split)]
        before += f"register_panoptic('my_{split}', *{paths})\n"
    config = str(write_tiny(tmp_path, "my_train", "my_val", before))
    processes = ["--num-gpus", "2", "--dist-url", "auto"]
    train.main(["--config-file", config, *processes, "train.max_iter=2"])
    assert json.loads((tmp_path / "out/orderings.json").read_text())["images"] == 4
