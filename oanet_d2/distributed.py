"""
Several processes that end together, and say whose fault it was.
"""

import time
from datetime import timedelta
from typing import Callable, List, Optional, Tuple

import torch
import torch.distributed as dist
from torch.multiprocessing import ProcessExitedException

from detectron2.engine import launch as detectron2_launch
from detectron2.engine.launch import DEFAULT_TIMEOUT
from detectron2.utils import comm

__all__ = ["LostRankError", "launch"]

# How long to listen to every other process after one is gone, and then to stay for those that do
# the same, or they would take this one for dead, too.
PROBE_TIME = timedelta(seconds=1)
STAY_TIME = timedelta(seconds=5)


class LostRankError(RuntimeError):
    """
    A process of a distributed run is gone. The message names its rank.
    """


def launch(
    main_func: Callable,
    num_gpus_per_machine: int,
    num_machines: int = 1,
    machine_rank: int = 0,
    dist_url: Optional[str] = None,
    args: Tuple = (),
    timeout: timedelta = DEFAULT_TIMEOUT,
):
    """
    As Detectron2's `launch`. When a process dies, the others of this machine are ended at once,
    those of other machines when they next wait for it; both say which rank it was.

    Raises:
        LostRankError: a process of this machine was killed.
        ProcessRaisedException: one ended by an error, which is in the message.
    """
    try:
        detectron2_launch(
            _run,
            num_gpus_per_machine,
            num_machines,
            machine_rank,
            dist_url,
            (main_func, args),
            timeout,
        )
    except ProcessExitedException as error:
        rank = machine_rank * num_gpus_per_machine + error.error_index
        how = f"was killed by {error.signal_name}" if error.signal_name else "ended"
        raise LostRankError(
            f"The process of rank {rank} (pid {error.error_pid}) {how} (exit code "
            f"{error.exit_code}); the other processes of this machine were ended. If nobody "
            "killed it, the system may have, for lack of memory. Go on with --resume."
        ) from None


def _run(main_func: Callable, args: Tuple):
    try:
        main_func(*args)
    except RuntimeError as error:
        if comm.get_world_size() == 1 or not _is_lost_connection(error):
            raise
        lost = _lost_ranks()
        time.sleep(STAY_TIME.total_seconds())
        whom = f"rank {', '.join(map(str, lost))}" if lost else "the others"
        raise LostRankError(
            f"Rank {comm.get_rank()} cannot go on: it has lost the connection to {whom}. What "
            "happened stands in the output of that machine. Go on with --resume."
        ) from error


def _is_lost_connection(error: RuntimeError) -> bool:
    return isinstance(error, dist.DistError) or "gloo" in str(error)


def _lost_ranks() -> List[int]:
    # Detectron2's group for what is not on a GPU; it is there since the first step. To wait for
    # a process that is gone is an error at once, for one that is there it takes the time.
    group, lost = comm._get_global_gloo_group(), []
    for rank in set(range(comm.get_world_size())) - {comm.get_rank()}:
        try:
            probe = dist.irecv(torch.zeros(1), rank, group)
            assert probe is not None  # it is for a process outside the group
            probe.wait(PROBE_TIME)
        except RuntimeError as error:
            if "timed out" not in str(error).lower():
                lost.append(rank)
    return lost
