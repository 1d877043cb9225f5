"""Two processes on the CPU (gloo)."""

import json
import math
import os
import signal
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import pytest
import torch

from detectron2.data import DatasetCatalog
from detectron2.engine import create_ddp_model, launch
from detectron2.engine.launch import _find_free_port
from detectron2.modeling import build_model
from detectron2.utils import comm
from detectron2.utils.events import EventStorage

from oanet_d2.checkpoint import CheckpointError
from oanet_d2.data.occlusion_scenes import write_split
from oanet_d2.engine import OANetTrainer
from tests.conftest import (
    after_step,
    make_input,
    registered,
    scenes_paths,
    trainer_of,
    training_cfg,
)
from tests.evaluation.silhouettes import SilhouetteModel

# Every anchor and every proposal is sampled, whatever the random numbers; no statistics of a batch. (The
# processes share those of pairs, which the first image alone has.)
DETERMINISTIC = [
    *["MODEL.SRM_HEAD.TRAIN_MASKS", "gt", "MODEL.SRM_HEAD.GT_FALSE_POSITIVES", 0.0],
    *["MODEL.RPN.BATCH_SIZE_PER_IMAGE", 8000, "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", 300],
    *["MODEL.RPN.POSITIVE_FRACTION", 0.5, "MODEL.ROI_HEADS.POSITIVE_FRACTION", 0.5],
    *["MODEL.RESNETS.NORM", "FrozenBN", "MODEL.FPN.NORM", ""],
]


def demo_model(seed):
    cfg = training_cfg("occlusion_scenes_train", "")
    cfg.merge_from_list(DETERMINISTIC)
    torch.manual_seed(seed)
    return build_model(cfg).train()


def gradients(model, rank):
    """Of an image of the rank's own: other sizes and contents; the second one shows no thing."""
    boxes = [[[8, 8, 60, 90], [20, 20, 40, 70], [50, 30, 90, 95]], []][rank]
    image = make_input(((96, 96), (64, 96))[rank], boxes, [0, 1, 0][: len(boxes)], 2, seed=rank)
    with EventStorage():
        sum(model([image]).values()).backward()
    return {n.replace("module.", "", 1): p.grad for n, p in model.named_parameters()}


def steps_that_lack_something(model, rank):
    """The images of the second process are without things, pairs, stuff, and all of them."""
    boxes, apart = [[8, 8, 60, 90], [20, 20, 40, 70]], [[8, 8, 40, 40], [50, 50, 90, 90]]
    lacking = [([], 2), (apart, 2), (boxes, None), ([], None)]
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-5)
    for i, found in enumerate(lacking * 2):
        (boxes_of_rank, stuff), size = ((boxes, 2), (96, 96)) if rank == 0 else (found, (64, 128))
        classes = [0, 1][: len(boxes_of_rank)]
        with EventStorage(), torch.autocast("cpu", torch.bfloat16, enabled=i >= len(lacking)):
            loss = sum(model([make_input(size, boxes_of_rank, classes, stuff)]).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return {name: x.detach().clone() for name, x in model.named_parameters()}


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
        (dataset, task, metric): 0 if math.isnan(x) else x
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
    """All that the tests below look at, in one start of two processes: it takes seconds."""
    torch.set_num_threads(1)
    rank = comm.get_rank()
    model = create_ddp_model(demo_model(rank), device_ids=None, broadcast_buffers=False)
    found = {"gradients": gradients(model, rank)}
    found["steps"] = steps_that_lack_something(model, rank)
    found["evaluated"] = evaluated(scenes, folder / "evaluated")
    with registered("two_processes", *scenes_paths(scenes, "train")) as name:
        cfg = scenes_cfg(name, folder)
        trainer = trainer_of(cfg)
        trainer.train()
        found[0] = trainer.checkpointer.model.state_dict()
        for start in (2, 4):  # in both phases
            if rank == 0:
                (folder / "out" / "last_checkpoint").write_text(f"model_{start - 1:07d}.pth")
            comm.synchronize()
            trainer = trainer_of(cfg)
            trainer.resume_or_load(resume=True)
            assert trainer.start_iter == start
            trainer.train()
            found[start] = trainer.checkpointer.model.state_dict()
        trainer = trainer_of(cfg)
        if rank == 1:
            trainer.checkpointer.save_dir = str(folder / "elsewhere")
        with pytest.raises(CheckpointError, match=r"would start at the iterations \[6, 0\].*out"):
            trainer.resume_or_load(resume=True)
    torch.save(found, folder / f"{rank}.pth")


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
    launch(train_in_process, 2, dist_url="auto", args=(scenes, folder))
    return [torch.load(folder / f"{rank}.pth", weights_only=True) for rank in range(2)]


def test_gradients_are_the_mean_over_the_processes(found):
    """Both have the weights of the first, and the mean of the gradients that the images give alone."""
    alone = [gradients(demo_model(0), rank) for rank in range(2)]
    compared = 0
    for name, expected in alone[0].items():
        if expected is None:
            continue
        mean = (expected + alone[1][name]) / 2
        for of_rank in found:
            torch.testing.assert_close(of_rank["gradients"][name], mean, rtol=1e-3, atol=1e-3)
        compared += not torch.allclose(expected, alone[1][name], rtol=1e-2, atol=1e-2)
    assert compared > 10  # the images do differ


def test_steps_in_which_one_process_lacks_something(found):
    for name, tensor in found[0]["steps"].items():
        assert torch.equal(tensor, found[1]["steps"][name]) and torch.isfinite(tensor).all(), name


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
    for name, tensor in found[0][0].items():
        for of_rank in found:
            for start in (0, 2, 4):
                assert torch.equal(of_rank[start][name], tensor), name


def end_in_process(scenes, folder, kind):
    """Only the second process does, after a checkpoint."""
    torch.set_num_threads(1)
    with registered("two_processes", *scenes_paths(scenes, "train")) as name:
        trainer = trainer_of(scenes_cfg(name, folder))

        def spoil(model, inputs, losses):
            bad = comm.get_rank() == 1 and trainer.iter == 4
            return {k: v * (torch.nan if bad else 1) for k, v in losses.items()}

        if kind == "diverged":
            trainer.checkpointer.model.register_forward_hook(spoil)
        elif comm.get_rank() == 1:
            trainer.register_hooks([after_step(4, lambda: os.kill(os.getpid(), signal.SIGKILL))])
        trainer.train()


def test_a_diverged_process_ends_all(scenes, tmp_path):
    """With its own image, and without a checkpoint after that."""
    with pytest.raises(Exception, match="Iteration 4: loss_[a-z_]+ is nan.*BASE_LR"):
        launch(end_in_process, 2, dist_url="auto", args=(scenes, tmp_path, "diverged"))
    (kept,) = (tmp_path / "out" / "non_finite_loss").iterdir()
    assert kept.name == "iteration_0000004_rank_1" and len(list(kept.iterdir())) == 1
    assert (tmp_path / "out" / "last_checkpoint").read_text() == "model_0000003.pth"


def test_a_killed_machine_ends_the_other(scenes, tmp_path):
    """Two machines have nobody who looks after both. The last checkpoint is whole."""
    url = f"tcp://127.0.0.1:{_find_free_port()}"

    def machine(rank):
        with pytest.raises(Exception) as error:
            launch(end_in_process, 1, 2, rank, url, args=(scenes, tmp_path, "killed"))
        return str(error.value)

    with ThreadPoolExecutor(2) as pool:
        other, killed = pool.map(machine, range(2))
    assert "SIGKILL" in killed and "Connection" in other
    tag = tmp_path / "out" / "last_checkpoint"
    assert tag.read_text() == "model_0000003.pth"
    assert torch.load(tag.parent / tag.read_text())["iteration"] == 3
