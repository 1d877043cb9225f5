"""
Two processes on the CPU (gloo) against one.
"""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch
import yaml

from detectron2.engine import launch
from detectron2.engine.defaults import create_ddp_model
from detectron2.modeling import build_model
from detectron2.utils import comm
from detectron2.utils.events import EventStorage

from oanet_d2.data.occlusion_scenes import write_split
from oanet_d2.distributed import LostRankError
from oanet_d2.distributed import launch as launch_named
from tests.conftest import CONFIGS, REPOSITORY, load_config, make_input, scenes_paths

# Every anchor and every proposal is sampled, whatever the random numbers.
NO_SAMPLING = [
    *["MODEL.RPN.BATCH_SIZE_PER_IMAGE", 8000, "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", 300],
    *["MODEL.RPN.POSITIVE_FRACTION", 0.5, "MODEL.ROI_HEADS.POSITIVE_FRACTION", 0.5],
]
NO_STATISTICS = ["MODEL.RESNETS.NORM", "FrozenBN", "MODEL.FPN.NORM", "GN"]
NO_DROPOUT = ["MODEL.SRM_HEAD.PAIRS.DROPOUT", 0.0]
# What a process remembers is what it has seen itself, and it draws from that at random.
NO_MEMORY = ["MODEL.SRM_HEAD.PAIRS.MEMORY", 0]
# (POST_NMS_TOPK proposals an image, and the ground truth)
RANKING = ["MODEL.RPN.POST_NMS_TOPK_TRAIN", 50, "MODEL.SRM_HEAD.TRAIN_MASKS", "('pred',)"]
SMALL = [
    *["MODEL.FPN.OUT_CHANNELS", 32, "MODEL.SEM_SEG_HEAD.CONVS_DIM", 32],
    *["MODEL.ROI_BOX_HEAD.FC_DIM", 32, "MODEL.ROI_MASK_HEAD.CONV_DIM", 16],
    *["MODEL.SRM_HEAD.CONV_DIM", 8, "MODEL.SRM_HEAD.KERNEL_SIZE", 5],
]
OPTIONS = [*NO_SAMPLING, *NO_STATISTICS, *NO_DROPOUT, *NO_MEMORY, *RANKING, *SMALL]


def demo_model(rank=0):
    torch.manual_seed(rank)  # as different as two processes may start
    return build_model(load_config("OcclusionScenes/oanet_R_18.yaml", *OPTIONS)).train()


def image(rank):
    """Of different sizes and contents, the second without a thing."""
    boxes = [[[8, 8, 60, 90], [20, 20, 40, 70], [50, 30, 90, 95]], []][rank]
    return make_input(((96, 96), (64, 96))[rank], boxes, [0, 1, 0][: len(boxes)], 2, seed=rank)


def gradients(model, rank):
    with EventStorage():
        sum(model([image(rank)]).values()).backward()
    return {n.replace("module.", "", 1): p.grad for n, p in model.named_parameters()}


def write_gradients(path):
    """What a process of two does."""
    torch.set_num_threads(1)
    model = create_ddp_model(demo_model(comm.get_rank()), device_ids=None, broadcast_buffers=False)
    torch.save(gradients(model, comm.get_rank()), f"{path}.{comm.get_rank()}")
    comm.synchronize()


def test_gradients_are_the_mean_over_the_processes(tmp_path):
    """Each has its own image; both end with the mean of what the images give alone."""
    launch(write_gradients, num_gpus_per_machine=2, dist_url="auto", args=(tmp_path / "grad",))
    alone = []
    for rank in range(2):
        model = demo_model()
        alone.append(gradients(model, rank))
    for rank in range(2):
        together = torch.load(tmp_path / f"grad.{rank}", weights_only=True)
        assert set(together) == set(alone[0])
        for name, gradient in together.items():
            if gradient is None:
                assert alone[0][name] is None, name
                continue
            expected = (alone[0][name] + alone[1][name]) / 2
            torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-5, msg=name)
    assert any(not torch.allclose(alone[0][n], alone[1][n]) for n in alone[0])


@pytest.fixture
def one_scene_twice(tmp_path):
    """A config with a dataset of two copies of one scene, registered by the yaml alone."""
    write_split(tmp_path, "train", 1, image_size=96, seed=3, num_workers=0)
    paths = scenes_paths(tmp_path, "train")
    for path in (paths[1], paths[3]):
        content = json.loads(path.read_text())
        copies = [dict(x, id=x["id"] + 1000) for x in content["images"]]
        annotations = [dict(x, image_id=x["image_id"] + 1000) for x in content["annotations"]]
        for x in annotations:
            if "id" in x:
                x["id"] += 1000
        content["images"] += copies
        content["annotations"] += annotations
        path.write_text(json.dumps(content))
    keys = ("IMAGE_ROOT", "PANOPTIC_JSON", "PANOPTIC_ROOT", "INSTANCES_JSON")
    config = {
        "_BASE_": str(CONFIGS / "OcclusionScenes" / "oanet_R_18.yaml"),
        "DATASETS": {
            "PANOPTIC": {"twins": dict(zip(keys, map(str, paths)))},
            "TRAIN": ["twins"],
            "TEST": [],
        },
        "INPUT": {"RANDOM_FLIP": "none", "MIN_SIZE_TRAIN": [96]},
        # momentum tells a sum of gradients from their mean, which AdamW would not
        "SOLVER": {
            "OPTIMIZER": "SGD",
            "BASE_LR": 0.01,
            "IMS_PER_BATCH": 2,
            "MAX_ITER": 5,
            "WARMUP_ITERS": 0,
            "CHECKPOINT_PERIOD": 1,
        },
        "DATALOADER": {"NUM_WORKERS": 0},
        "TEST": {"ORDERS": []},
    }
    (tmp_path / "twins.yaml").write_text(yaml.safe_dump(config))
    return tmp_path


@pytest.mark.parametrize("srm_only_share", [0.0, 0.4])
def test_two_processes_train_as_one_does(one_scene_twice, subprocess_env, srm_only_share):
    """The demo's config, five steps, the same batch of two images in all: the same weights."""
    first, last = {}, {}
    for name, processes in (("one", []), ("two", ["--num-gpus", "2", "--dist-url", "auto"])):
        command = [sys.executable, str(REPOSITORY / "train_net.py"), *processes]
        command += ["--config-file", str(one_scene_twice / "twins.yaml")]
        command += ["SOLVER.SRM_ONLY_SHARE", str(srm_only_share)]
        command += [*map(str, OPTIONS), "OUTPUT_DIR", str(one_scene_twice / name)]
        result = subprocess.run(command, env=subprocess_env, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr[-3000:]
        for weights, file in ((first, "model_0000000.pth"), (last, "model_final.pth")):
            checkpoint = torch.load(one_scene_twice / name / file, weights_only=True)
            weights[name] = torch.cat([x.flatten().double() for x in checkpoint["model"].values()])
    moved = (last["one"] - first["one"]).norm()
    assert (last["two"] - last["one"]).norm() < 0.001 * moved
    assert moved > 0.01


def lose_rank_1(seconds_between_steps):
    """What a process of several does: one of them dies at step 3."""
    torch.set_num_threads(1)
    for step in range(10):
        if step == 3 and comm.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        comm.gather(step)
        time.sleep(seconds_between_steps)


def test_a_dead_process_is_named():
    with pytest.raises(LostRankError, match=r"rank 1 \(pid \d+\) was killed by SIGKILL"):
        launch_named(lose_rank_1, 2, dist_url="auto", args=(0.05,))


@pytest.mark.slow
def test_a_process_that_died_on_another_machine_is_named(subprocess_env):
    """Three machines with one process each; they only know each other by their connections."""
    code = (
        "import sys; from tests.test_distributed import launch_named, lose_rank_1\n"
        "launch_named(lose_rank_1, 1, 3, int(sys.argv[1]), sys.argv[2], (0.05,))"
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"tcp://127.0.0.1:{free.getsockname()[1]}"
    machines = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(rank), url],
            env=subprocess_env,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(3)
    ]
    errors = [x.communicate(timeout=240)[1] for x in machines]
    assert all(x.returncode for x in machines)
    assert "The process of rank 1" in errors[1] and "was killed by SIGKILL" in errors[1]
    # Where the machine is slow, the other one may have noticed and ended before.
    assert re.search(r"Rank 0 cannot go on: .* connection to rank 1(, 2)?\.", errors[0])
    assert re.search(r"Rank 2 cannot go on: .* connection to rank (0, )?1\.", errors[2])
