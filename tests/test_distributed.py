"""Two processes on the CPU (gloo)."""

import pytest
import torch

from detectron2.engine import create_ddp_model, launch
from detectron2.modeling import build_model
from detectron2.utils import comm
from detectron2.utils.events import EventStorage

from oanet_d2.checkpoint import CheckpointError
from oanet_d2.data.occlusion_scenes import write_split
from tests.conftest import make_input, registered, scenes_paths, trainer_of, training_cfg

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
    return root


@pytest.fixture(scope="module")
def found(scenes, tmp_path_factory):
    folder = tmp_path_factory.mktemp("two_processes")
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


def test_resumes_to_the_same_weights_in_both_processes(found):
    for name, tensor in found[0][0].items():
        for of_rank in found:
            for start in (0, 2, 4):
                assert torch.equal(of_rank[start][name], tensor), name


def diverge_in_process(scenes, folder):
    """Only the second process does."""
    torch.set_num_threads(1)
    with registered("two_processes", *scenes_paths(scenes, "train")) as name:
        trainer = trainer_of(scenes_cfg(name, folder))

        def spoil(model, inputs, losses):
            bad = comm.get_rank() == 1 and trainer.iter == 4
            return {k: v * (torch.nan if bad else 1) for k, v in losses.items()}

        trainer.checkpointer.model.register_forward_hook(spoil)
        trainer.train()


def test_a_diverged_process_ends_all(scenes, tmp_path):
    """With its own image, and without a checkpoint after that."""
    with pytest.raises(Exception, match="Iteration 4: loss_[a-z_]+ is nan.*BASE_LR"):
        launch(diverge_in_process, 2, dist_url="auto", args=(scenes, tmp_path))
    (kept,) = (tmp_path / "out" / "non_finite_loss").iterdir()
    assert kept.name == "iteration_0000004_rank_1" and len(list(kept.iterdir())) == 1
    assert (tmp_path / "out" / "last_checkpoint").read_text() == "model_0000003.pth"
