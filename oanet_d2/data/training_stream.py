"""
The order of the training data: an endless stream that can be entered anywhere.
"""

import random
from collections import defaultdict
from contextlib import contextmanager
from functools import partial
from itertools import islice
from typing import Any, Dict, Iterator, List, Optional, Sequence

import numpy as np
import torch
from torch.utils.data import Dataset, IterableDataset, Sampler, get_worker_info

from detectron2.data import (
    DatasetFromList,
    build_batch_data_loader,
    build_detection_train_loader,
    get_detection_dataset_dicts,
)
from detectron2.utils import comm

__all__ = ["TrainingStream", "build_train_loader", "derived_seed", "random_numbers_of"]

# What tells the random numbers of a sample from those of a step.
_OF_SAMPLES = 1


def derived_seed(*key: int) -> int:
    """
    A seed in [0, 2**32) for a key of non-negative integers. Seeds of keys that are close have
    nothing in common. (Trailing zeros of a key do not count.)
    """
    return int(np.random.SeedSequence(key).generate_state(1)[0])


@contextmanager
def random_numbers_of(*key: int) -> Iterator[None]:
    """
    Within this context the random numbers of Python, NumPy and torch (on the CPU) depend on
    `derived_seed(*key)` alone. Afterwards they go on as if nothing had happened.
    """
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    seed = derived_seed(*key)
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


class TrainingStream(IterableDataset):
    """
    The training samples of this process, in the order of one of Detectron2's samplers. A sample and
    its augmentations depend on its place and on the sampler's seed, not on the number of workers. So
    a training that is resumed at the right place sees what it would have seen.

    Attributes:
        first_batch (int): the batch to begin with. Read when an iteration starts.
    """

    def __init__(
        self,
        samples: Dataset,
        sampler: Sampler,
        batch_size: int,
        groups: Optional[Sequence[int]] = None,
    ):
        """
        Args:
            samples: training inputs by index.
            sampler: endless indices of this process.
            batch_size: images of a batch in this process.
            groups: the group of every index. A batch is of one group. (Detectron2 groups loaded
                images, and would lose those that wait for others when a training stops.)
        """
        self.samples = samples
        self.sampler: Any = sampler  # all of Detectron2's have a _seed, none under a public name
        self.batch_size = batch_size
        self.groups = groups
        self.rank = comm.get_rank()  # which a worker process may not know
        self.first_batch = 0

    @property
    def seed(self) -> int:
        """The seed of the order, one for all processes."""
        return self.sampler._seed

    @seed.setter
    def seed(self, seed: int):
        self.sampler._seed = seed

    def batches(self) -> Iterator[List[int]]:
        """
        The indices of every batch, from the very first on.
        """
        waiting: Dict[int, List[int]] = defaultdict(list)
        for index in self.sampler:
            group = 0 if self.groups is None else self.groups[index]
            waiting[group].append(index)
            if len(waiting[group]) == self.batch_size:
                yield waiting.pop(group)

    def __iter__(self):
        worker = get_worker_info()
        id, workers = (0, 1) if worker is None else (worker.id, worker.num_workers)
        # A loader takes a batch of every worker in turn.
        numbered = islice(enumerate(self.batches()), self.first_batch + id, None, workers)
        for number, batch in numbered:
            for i, index in enumerate(batch):
                place = number * self.batch_size + i
                with random_numbers_of(_OF_SAMPLES, self.seed, self.rank, place):
                    sample = self.samples[index]
                yield sample


def build_train_loader(cfg, mapper):
    """
    Detectron2's `build_detection_train_loader`, of a :class:`TrainingStream`. With
    `INPUT.COPY_PASTE` the mapper gets all images, too, as `others`.

    Returns:
        DataLoader whose `dataset` is the stream.
    """
    dicts = get_detection_dataset_dicts(
        cfg.DATASETS.TRAIN, filter_empty=cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS
    )
    groups = None
    if cfg.DATALOADER.ASPECT_RATIO_GROUPING:
        groups = [int(x["width"] > x["height"]) for x in dicts]
    if cfg.INPUT.COPY_PASTE > 0:
        dicts = DatasetFromList(dicts, copy=False)  # which workers share
        mapper = partial(mapper, others=dicts)
    # Detectron2 makes the samples and the sampler of the config.
    indexed = build_detection_train_loader(
        cfg, mapper=mapper, dataset=dicts, aspect_ratio_grouping=False
    ).dataset
    batch_size = cfg.SOLVER.IMS_PER_BATCH // comm.get_world_size()
    stream = TrainingStream(indexed.dataset, indexed.sampler, batch_size, groups)
    if stream.seed < 0:  # newer versions of Detectron2 hand SEED -1 on: a random seed
        stream.seed = comm.shared_random_seed()
    return build_batch_data_loader(
        stream,
        None,
        cfg.SOLVER.IMS_PER_BATCH,
        num_workers=cfg.DATALOADER.NUM_WORKERS,
        seed=stream.seed,  # or it would take a random number from the step that starts it
    )
