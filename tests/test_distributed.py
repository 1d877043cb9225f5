"""Two processes on the CPU (gloo)."""

import json
import math
import os
import signal
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from copy import deepcopy

import pytest
import torch

from detectron2.data import DatasetCatalog
from detectron2.data.samplers import TrainingSampler
from detectron2.engine import launch
from detectron2.engine.launch import _find_free_port
from detectron2.modeling import META_ARCH_REGISTRY, PROPOSAL_GENERATOR_REGISTRY
from detectron2.modeling.proposal_generator import RPN
from detectron2.utils import comm
from detectron2.utils.env import seed_all_rng
from detectron2.utils.events import EventStorage

from oanet_d2.checkpoint import CheckpointError
from oanet_d2.data.occlusion_scenes import write_split
from oanet_d2.data.training_stream import build_train_loader
from oanet_d2.engine import OANetTrainer
from oanet_d2.modeling import OANet
from tests.conftest import (
    after_step,
    make_input,
    registered,
    scenes_paths,
    trainer_of,
    training_cfg,
)
from tests.evaluation.silhouettes import SilhouetteModel

# Nothing is sampled and nothing suppressed, so that no choice hangs on a rounding: all anchors and all
# proposals count, and of these the ground truth's own boxes are foreground. No layer looks at a batch.
WITHOUT_CHOICES = [
    *["MODEL.RPN.PRE_NMS_TOPK_TRAIN", 9999, "MODEL.RPN.POST_NMS_TOPK_TRAIN", 9999],
    *["MODEL.RPN.NMS_THRESH", 1.0, "MODEL.PROPOSAL_GENERATOR.MIN_SIZE", 0],
    *["MODEL.RPN.BATCH_SIZE_PER_IMAGE", 9999, "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", 9999],
    *["MODEL.ROI_HEADS.IOU_THRESHOLDS", [0.999], "MODEL.SRM_HEAD.TRAIN_MASKS", "gt"],
    *["MODEL.SRM_HEAD.GT_FALSE_POSITIVES", 0.0, "MODEL.FPN.NORM", "LN", "MODEL.RESNETS.NORM", "LN"],
    *["MODEL.PROPOSAL_GENERATOR.NAME", "ProposalsOfDoubles"],
]

BOXES, APART = [[4, 4, 40, 60], [10, 14, 30, 50]], [[4, 4, 24, 24], [30, 30, 60, 60]]
# A loss is a mean over as many anchors, proposals, pixels, cells or pairs in one image as in another.
ALIKE = [make_input((64, 64), BOXES, [i, 7 - i], 1 + i % 5, seed=i) for i in range(8)]
# The second process's images are larger, and without things, pairs, stuff, and all of them.
UNLIKE = [
    make_input(size, boxes, [0, 1][: len(boxes)], stuff, seed=len(boxes))
    for found in (([], 2), (APART, 2), (APART, None), ([], None))
    for size, (boxes, stuff) in (((64, 64), (BOXES, 2)), ((64, 96), found))
]


@PROPOSAL_GENERATOR_REGISTRY.register()
class ProposalsOfDoubles(RPN):
    """Detectron2's NMS takes boxes and scores of one type."""

    def predict_proposals(self, anchors, logits, deltas, image_sizes):
        single = ([x.float() for x in levels] for levels in (logits, deltas))
        return super().predict_proposals(anchors, *single, image_sizes)


@META_ARCH_REGISTRY.register()
class MeanOfImages(OANet):
    """Its loss of a batch is the mean of the losses that the images have alone."""

    def losses(self, batch):
        of_each = [super(MeanOfImages, self).losses([x]) for x in batch]
        return {name: sum(x[name] for x in of_each) / len(batch) for name in of_each[0]}


class TrainerOfInputs(OANetTrainer):
    @classmethod
    def build_model(cls, cfg):
        model = super().build_model(cfg)
        if not cfg.SOLVER.AMP.ENABLED:
            model.double()  # or rounding would decide which of a ReLU's inputs are positive
            model.srm_head.float()  # which takes no other
        return model

    @classmethod
    def build_train_loader(cls, cfg):
        inputs = ALIKE if cfg.MODEL.META_ARCHITECTURE == "OANet" else UNLIKE
        sampler = TrainingSampler(len(inputs), shuffle=False)
        options = {"total_batch_size": 2, "aspect_ratio_grouping": False}
        return build_train_loader(inputs, mapper=lambda x: x, sampler=sampler, **options)

    @classmethod
    def build_optimizer(cls, cfg, model):
        optimizer = super().build_optimizer(cfg, model)
        for group in optimizer.param_groups:
            group["eps"] = 1e-2  # or a gradient that is nothing but rounding would make a whole step
        return optimizer


def trained(architecture, amp, dataset, folder):
    """Scalars by name and step, and the state at the start and after each of two phases of four steps."""
    cfg = training_cfg(dataset, folder / f"{architecture}_{amp}", share="0.5")
    cfg.merge_from_list([*WITHOUT_CHOICES, "MODEL.META_ARCHITECTURE", architecture])
    cfg.SOLVER.MAX_ITER, cfg.SOLVER.CHECKPOINT_PERIOD, cfg.SOLVER.AMP.ENABLED = 8, 100, amp
    cfg.SOLVER.BASE_LR, cfg.SOLVER.WARMUP_ITERS, cfg.SOLVER.WARMUP_FACTOR = 0.01, 2, 0.5
    cfg.SOLVER.WEIGHT_DECAY, cfg.SOLVER.CLIP_GRADIENTS.CLIP_VALUE = 0.1, 0.1
    os.makedirs(cfg.OUTPUT_DIR, exist_ok=True)
    seed_all_rng(1 + comm.get_rank())
    trainer, states = TrainerOfInputs(cfg), []

    def keep():
        states.append(deepcopy(trainer.checkpointer.model.state_dict()))

    keep()
    trainer.register_hooks([after_step(3, keep), after_step(7, keep)])
    trainer.train()
    scalars = {
        (name, step): float(value)
        for name, history in trainer.storage.histories().items()
        if "loss" in name or name == "lr"
        for value, step in history.values()
    }
    return scalars, states


TRAININGS = [("OANet", False), ("MeanOfImages", False), ("MeanOfImages", True)]


class Silhouettes(SilhouetteModel):
    """As Detectron2 calls a model, with masks that COCO's evaluation takes."""

    def __init__(self, *names):
        dicts = [d for name in names for d in DatasetCatalog.get(name)]
        super().__init__(wrong_images=[dicts[0]["image_id"]])
        self.dicts = {d["file_name"]: d for d in dicts}

    def __call__(self, batch):
        results = [super(Silhouettes, self).__call__(self.dicts[x["file_name"]]) for x in batch]
        for x in results:
            x["instances"] = x["fusion_inputs"].instances
            x["instances"].pred_masks = x["fusion_inputs"].masks.full()
        return results


def evaluated(scenes, folder):
    """Numbers of two datasets, of three images and of one, and how many pictures this process keeps."""
    with ExitStack() as stack:
        datasets = {"two_processes_three": scenes / "three", "two_processes_one": scenes / "one"}
        for name, root in datasets.items():
            stack.enter_context(registered(name, *scenes_paths(root, "val")))
        cfg = training_cfg("occlusion_scenes_train", folder)
        cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = (), tuple(datasets)
        cfg.TEST.ORDERS = "score", "smaller_first", "srm_pairs", "oracle"
        with EventStorage() as storage:
            results = OANetTrainer.test(cfg, Silhouettes(*datasets))
    numbers = {
        (dataset, task, metric): 0.0 if math.isnan(x) else float(x)
        for dataset, tasks in results.items()
        for task, metrics in tasks.items()
        for metric, x in metrics.items()
        if metric != "seconds"
    }
    return numbers, len(storage._vis_data)


def report(folder):
    path = folder / "two_processes_three" / "report" / "evaluation.json"
    content = json.loads(path.read_text())
    return [content[key] for key in ("cases", "overlaps", "outcomes", "classes")]


def scenes_cfg(name, folder):
    """In the last three of six iterations the ranking head learns alone."""
    cfg = training_cfg(name, folder / "out", share="0.5")
    cfg.MODEL.SRM_HEAD.TRAIN_MASKS, cfg.SOLVER.WEIGHT_DECAY = "gt", 0.1
    return cfg


def train_in_process(scenes, folder):
    """All that the tests below look at, in one start of two processes. The last training diverges."""
    torch.set_num_threads(1)
    rank, found = comm.get_rank(), {"evaluated": evaluated(scenes, folder / "evaluated")}
    with registered("two_processes", *scenes_paths(scenes, "train")) as name:
        for kind in TRAININGS:
            found[kind] = trained(*kind, name, folder)
        cfg = scenes_cfg(name, folder)
        trainer = trainer_of(cfg)
        trainer.train()
        found["whole"] = trainer.checkpointer.model.state_dict()
        if rank == 0:
            (folder / "out" / "last_checkpoint").write_text("model_0000001.pth")
        comm.synchronize()
        trainer = trainer_of(cfg)
        trainer.resume_or_load(resume=True)
        assert trainer.start_iter == 2
        trainer.train()
        found["resumed"] = trainer.checkpointer.model.state_dict()
        trainer = trainer_of(cfg)
        if rank == 1:
            trainer.checkpointer.save_dir = str(folder / "elsewhere")
        with pytest.raises(CheckpointError, match=r"resume from \['model_final.pth', ''\]"):
            trainer.resume_or_load(resume=True)
        torch.save(found, folder / f"{rank}.pth")
        cfg.OUTPUT_DIR = str(folder / "diverged")
        trainer = trainer_of(cfg)

        def spoil(model, inputs, losses):
            bad = rank == 1 and trainer.iter == 4
            return {k: v * (torch.nan if bad else 1) for k, v in losses.items()}

        trainer.checkpointer.model.register_forward_hook(spoil)
        trainer.train()


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    root = tmp_path_factory.mktemp("scenes")
    write_split(root, "train", 6, image_size=64, seed=0, num_workers=0)
    for name, images in (("three", 3), ("one", 1)):
        write_split(root / name, "val", images, image_size=64, seed=images, num_workers=0)
    return root


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("two_processes")


@pytest.fixture(scope="module")
def found(scenes, folder):
    with pytest.raises(Exception, match="Iteration 4: loss_[a-z_]+ is nan.*BASE_LR"):
        launch(train_in_process, 2, dist_url="auto", args=(scenes, folder))
    return [torch.load(folder / f"{rank}.pth", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("architecture", ["OANet", "MeanOfImages"])
def test_equals_one_process(found, scenes, tmp_path, architecture):
    """
    Losses, learning rates and weights of two phases. The gradients of one process alone would miss by
    about 1.
    """
    kind = architecture, False
    with registered("one_process", *scenes_paths(scenes, "train")) as name:
        scalars, states = trained(*kind, name, tmp_path)
    assert found[0][kind][0] == pytest.approx(scalars, rel=1e-3, abs=1e-6)
    assert {step for name, step in scalars if name == "loss_srm_pairs"} == {4, 5, 6, 7}
    for of_rank in found:
        for state, expected in zip(of_rank[kind][1][1:], states[1:]):
            for name, x in expected.items():
                assert (state[name] - x).norm() <= 0.01 * (x - states[0][name]).norm(), name


@pytest.mark.parametrize("kind", TRAININGS)
def test_processes_have_the_same_weights(found, kind):
    """In mixed precision, too, and from models that were not the same at first."""
    for one, other in zip(found[0][kind][1][1:], found[1][kind][1][1:]):
        assert all(torch.equal(x, other[name]) for name, x in one.items())


def test_evaluates_to_the_numbers_of_one_process(found, folder, scenes, tmp_path):
    """Also where one of them has no image. The main process alone reports, and keeps its pictures."""
    expected, _ = evaluated(scenes, tmp_path)
    (numbers, pictures), other = (x["evaluated"] for x in found)
    assert numbers == pytest.approx(expected) and pictures == 2 + 1 and other == ({}, 0)
    assert report(folder / "evaluated") == report(tmp_path)
    assert report(tmp_path)[2]["better"] > 0
    for dataset in ("two_processes_three", "two_processes_one"):
        assert expected[dataset, "segm", "AP"] > 10
        assert expected[dataset, "panoptic_seg/score", "PQ_th"] > 10
    assert expected["two_processes_three", "evaluation", "images"] == 3


def test_resumes_to_the_same_weights_in_both_processes(found):
    for name, tensor in found[0]["whole"].items():
        for of_rank in found:
            assert torch.equal(of_rank["whole"][name], tensor), name
            assert torch.equal(of_rank["resumed"][name], tensor), name


def test_a_diverged_process_ends_all(found, folder):
    """With its own image, and without a checkpoint after that."""
    (kept,) = (folder / "diverged" / "non_finite_loss").iterdir()
    assert kept.name == "iteration_0000004_rank_1" and len(list(kept.iterdir())) == 1
    assert (folder / "diverged" / "last_checkpoint").read_text() == "model_0000003.pth"


def kill_in_process(scenes, folder):
    """The second process ends after a checkpoint."""
    torch.set_num_threads(1)
    with registered("two_processes", *scenes_paths(scenes, "train")) as name:
        trainer = trainer_of(scenes_cfg(name, folder))
        if comm.get_rank() == 1:
            trainer.register_hooks([after_step(4, lambda: os.kill(os.getpid(), signal.SIGKILL))])
        trainer.train()


def test_a_killed_machine_ends_the_other(scenes, tmp_path):
    """Two machines have nobody who looks after both. The last checkpoint is whole."""
    url = f"tcp://127.0.0.1:{_find_free_port()}"

    def machine(rank):
        with pytest.raises(Exception) as error:
            launch(kill_in_process, 1, 2, rank, url, args=(scenes, tmp_path))
        return str(error.value)

    with ThreadPoolExecutor(2) as pool:
        other, killed = pool.map(machine, range(2))
    assert "SIGKILL" in killed and "Connection" in other
    tag = tmp_path / "out" / "last_checkpoint"
    assert tag.read_text() == "model_0000003.pth"
    assert torch.load(tag.parent / tag.read_text())["iteration"] == 3
