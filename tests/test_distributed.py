"""
Two processes on the CPU (gloo).
"""

import pytest
import torch

from detectron2.engine import create_ddp_model, launch
from detectron2.modeling import build_model
from detectron2.utils import comm
from detectron2.utils.events import EventStorage

from oanet_d2.checkpoint import CheckpointError
from oanet_d2.data.occlusion_scenes import write_split
from tests.conftest import (
    SMALLEST,
    AfterStep,
    load_config,
    make_input,
    registered,
    scenes_paths,
    trainer_of,
)

# Every anchor and every proposal is sampled, whatever the random numbers; no statistics of a batch.
DETERMINISTIC = [
    *["MODEL.RPN.BATCH_SIZE_PER_IMAGE", 8000, "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", 300],
    *["MODEL.RPN.POSITIVE_FRACTION", 0.5, "MODEL.ROI_HEADS.POSITIVE_FRACTION", 0.5],
    *["MODEL.RESNETS.NORM", "FrozenBN", "MODEL.FPN.NORM", ""],
]


def demo_model(seed):
    torch.manual_seed(seed)
    return build_model(
        load_config("OcclusionScenes/oanet_R_18.yaml", *SMALLEST, *DETERMINISTIC)
    ).train()


def gradients(model, rank):
    """Of an image of the rank's own: other sizes and contents; the second one shows no thing."""
    boxes = [[[8, 8, 60, 90], [20, 20, 40, 70], [50, 30, 90, 95]], []][rank]
    image = make_input(((96, 96), (64, 96))[rank], boxes, [0, 1, 0][: len(boxes)], 2, seed=rank)
    with EventStorage():
        sum(model([image]).values()).backward()
    return {n.replace("module.", "", 1): p.grad for n, p in model.named_parameters()}


def scenes_cfg(name, folder, *opts):
    """Six iterations; in the last three the ranking head learns alone."""
    return load_config(
        "OcclusionScenes/oanet_R_18.yaml",
        *SMALLEST,
        *["DATASETS.TRAIN", f"('{name}',)", "DATASETS.TEST", "()", "TEST.ORDERS", "()"],
        *["INPUT.MIN_SIZE_TRAIN", "(64,)", "DATALOADER.NUM_WORKERS", "0"],
        *["SOLVER.IMS_PER_BATCH", "2", "SOLVER.MAX_ITER", "6", "SOLVER.CHECKPOINT_PERIOD", "2"],
        *["MODEL.SRM_HEAD.TRAIN_MASKS", "gt", "SOLVER.SRM_ONLY_SHARE", "0.5"],
        *["SOLVER.WEIGHT_DECAY", "0.1", "OUTPUT_DIR", str(folder / "out")],
    )


def states_of_training(trainer):
    """What the model holds after the iterations 2 and 5."""
    states = {}

    def copy():
        state = trainer.checkpointer.model.state_dict()
        states[trainer.iter] = {k: v.clone() for k, v in state.items()}

    trainer.register_hooks([AfterStep(i, copy) for i in (2, 5)])
    trainer.train()
    return states


def train_in_process(scenes, folder):
    """All that the tests below look at, in one start of two processes: it takes seconds."""
    torch.set_num_threads(1)
    rank = comm.get_rank()
    found = {}
    model = create_ddp_model(demo_model(rank), device_ids=None, broadcast_buffers=False)
    found["gradients"] = gradients(model, rank)
    with registered("two_processes", *scenes_paths(scenes, "train")) as name:
        cfg = scenes_cfg(name, folder)
        found["whole"] = states_of_training(trainer_of(cfg))
        for last in (1, 3):
            if rank == 0:
                (folder / "out" / "last_checkpoint").write_text(f"model_{last:07d}.pth")
            comm.synchronize()
            trainer = trainer_of(cfg)
            trainer.resume_or_load(resume=True)
            assert trainer.start_iter == last + 1
            found[f"resumed after {last}"] = states_of_training(trainer)
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
    """What each of the two processes found."""
    folder = tmp_path_factory.mktemp("two_processes")
    launch(train_in_process, 2, dist_url="auto", args=(scenes, folder))
    return [torch.load(folder / f"{rank}.pth", weights_only=True) for rank in range(2)]


def test_gradients_are_the_mean_over_the_processes(found):
    """Both have the weights of the first, and the mean of the gradients that the images give alone."""
    alone = [gradients(demo_model(0), rank) for rank in range(2)]
    compared = 0
    for name, expected in alone[0].items():
        if expected is None:
            assert found[0]["gradients"][name] is None, name
            continue
        mean = (expected + alone[1][name]) / 2
        for rank in range(2):
            torch.testing.assert_close(found[rank]["gradients"][name], mean, rtol=1e-3, atol=1e-3)
        compared += not torch.allclose(expected, alone[1][name], rtol=1e-2, atol=1e-2)
    assert compared > 10


def test_two_phases(found):
    """In the second one the head learns, from a network that does not change; both agree."""
    for name, before in found[0]["whole"][2].items():
        after = [found[rank]["whole"][5][name] for rank in range(2)]
        assert torch.equal(*after), name
        if not name.startswith("srm_head."):
            assert torch.equal(before, after[0]), name
    head = [name for name in found[0]["whole"][5] if name.startswith("srm_head.network.compare")]
    assert head
    for name in head:
        assert not torch.equal(found[0]["whole"][2][name], found[0]["whole"][5][name]), name


@pytest.mark.parametrize("last", [1, 3])
def test_resumes_to_the_same_weights(found, last):
    for of_rank in found:
        resumed = of_rank[f"resumed after {last}"][5]
        for name, tensor in of_rank["whole"][5].items():
            assert torch.equal(resumed[name], tensor), name


def diverge_in_process(scenes, folder, iteration):
    """Only the second process does."""
    torch.set_num_threads(1)
    with registered("two_processes", *scenes_paths(scenes, "train")) as name:
        trainer = trainer_of(scenes_cfg(name, folder))
        model = trainer.checkpointer.model
        part = model.sem_seg_head if iteration < 3 else model.srm_head
        losses = part.losses

        def broken(*args):
            bad = comm.get_rank() == 1 and trainer.iter == iteration
            return {k: v * (torch.nan if bad else 1) for k, v in losses(*args).items()}

        part.losses = broken
        trainer.train()


@pytest.mark.parametrize("iteration", [pytest.param(2, marks=pytest.mark.slow), 4])
def test_a_diverged_process_ends_all(scenes, tmp_path, iteration):
    """In both phases, with its own image, and without a checkpoint after that."""
    with pytest.raises(Exception, match=f"Iteration {iteration}: loss_[a-z_]+ is nan.*BASE_LR"):
        launch(diverge_in_process, 2, dist_url="auto", args=(scenes, tmp_path, iteration))
    (kept,) = (tmp_path / "out" / "non_finite_loss").iterdir()
    assert kept.name == f"iteration_{iteration:07d}_rank_1" and len(list(kept.iterdir())) == 1
    last = (tmp_path / "out" / "last_checkpoint").read_text()
    assert last == f"model_{iteration // 2 * 2 - 1:07d}.pth"
