"""The order of the training data: an endless stream that can be entered anywhere."""

import random
from collections import defaultdict
from contextlib import contextmanager
from functools import partial
from itertools import chain, islice
from typing import Any, Dict, Iterator, List, Sequence, Union

import numpy as np
import torch
from torch.utils.data import Dataset, IterableDataset, Sampler, get_worker_info

from detectron2.config import configurable
from detectron2.data import (
    DatasetFromList,
    MapDataset,
    build_batch_data_loader,
    build_detection_train_loader,
    get_detection_dataset_dicts,
)
from detectron2.data.samplers import TrainingSampler
from detectron2.utils import comm

__all__ = ["TrainingStream", "build_train_loader", "derived_seed", "training_dicts", "with_things"]

_OF_SAMPLES = 1  # tells the random numbers of a sample from those of a step


def derived_seed(*key: int) -> int:
    """A seed in [0, 2**32) for non-negative integers. Close keys have unlike seeds."""
    return int(np.random.SeedSequence(key).generate_state(1)[0])


@contextmanager
def random_numbers_of(*key: int) -> Iterator[None]:
    """
    In this context the random numbers of Python, NumPy and torch (on the CPU) depend on the key
    alone. Afterwards they go on as if nothing had happened.
    """
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    seed = derived_seed(*key)
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)
    yield
    random.setstate(states[0])
    np.random.set_state(states[1])
    torch.set_rng_state(states[2])


class TrainingStream(IterableDataset):
    """
    The training samples of this process, in the order of one of Detectron2's samplers. A sample and
    its augmentations depend on its place and on the seed, not on the number of workers. So a training
    that is resumed at the right place sees what it would have seen.

    Attributes:
        seed (int): of the order, one for all processes.
        first_batch (int): the batch to begin with. Both are read when an iteration starts.
    """

    def __init__(self, samples: Dataset, sampler: Sampler, batch_size: int, groups: Sequence[int]):
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
        self.seed: int = vars(sampler)["_seed"]
        self.first_batch = 0

    def batches(self) -> Iterator[List[int]]:
        """The indices of every batch, from the very first on."""
        self.sampler._seed = self.seed
        waiting: Dict[int, List[int]] = defaultdict(list)
        for index in self.sampler:
            batch = waiting[self.groups[index]]
            batch.append(index)
            if len(batch) == self.batch_size:
                yield waiting.pop(self.groups[index])

    def __iter__(self):
        worker = get_worker_info()
        id, workers = (0, 1) if worker is None else (worker.id, worker.num_workers)
        # A loader takes a batch of every worker in turn.
        own = islice(enumerate(self.batches()), self.first_batch + id, None, workers)
        for number, batch in own:
            for place, index in enumerate(batch, start=number * self.batch_size):
                with random_numbers_of(_OF_SAMPLES, self.seed, self.rank, place):
                    sample = self.samples[index]
                yield sample


def training_dicts(names: Union[str, Sequence[str]], filter_empty: bool = True) -> List[Dict]:
    """
    Detectron2's `get_detection_dataset_dicts`, with its arguments, of each dataset by itself: in one
    call it takes it that either all or none have instances.
    """
    read = partial(get_detection_dataset_dicts, filter_empty=filter_empty)
    return [*chain.from_iterable(map(read, [names] if isinstance(names, str) else names))]


def with_things(dataset_dicts: Sequence[Dict]) -> List[Dict]:
    """
    Dataset dicts for a sampler that counts classes: those without an instances JSON have the things of
    their panoptic segments as "annotations".
    """
    return [
        x if "annotations" in x else {**x, "annotations": [s for s in x["segments_info"] if s["isthing"]]}
        for x in dataset_dicts
    ]


def _from_config(cfg, mapper) -> Dict[str, Any]:
    if not cfg.DATASETS.TRAIN:
        raise ValueError("DATASETS.TRAIN is (); a training needs at least one dataset.")
    dicts = training_dicts(cfg.DATASETS.TRAIN, cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS)
    # Detectron2 makes the sampler of the config. The dataset is not serialized for that.
    listed = DatasetFromList(with_things(dicts), copy=False, serialize=False)
    theirs = build_detection_train_loader(
        cfg, mapper=mapper, dataset=listed, aspect_ratio_grouping=False
    )
    return {
        "dataset": dicts,
        "mapper": mapper,
        "sampler": theirs.dataset.sampler,
        "total_batch_size": cfg.SOLVER.IMS_PER_BATCH,
        "aspect_ratio_grouping": cfg.DATALOADER.ASPECT_RATIO_GROUPING,
        "num_workers": cfg.DATALOADER.NUM_WORKERS,
    }


@configurable(from_config=_from_config)
def build_train_loader(
    dataset: List[Dict],
    *,
    mapper: Any,
    sampler: Any = None,
    total_batch_size: int,
    aspect_ratio_grouping: bool = True,
    num_workers: int = 0,
):
    """
    Detectron2's `build_detection_train_loader`, with its arguments, or with a config and a mapper. The
    loader's `dataset` is a :class:`TrainingStream`. A mapper that pastes gets the whole dataset, too,
    as `others`.

    Raises:
        ValueError: the config names no training set.
    """
    groups = [int(aspect_ratio_grouping and x["width"] > x["height"]) for x in dataset]
    listed = DatasetFromList(dataset, copy=False)  # in memory that workers share
    if getattr(mapper, "copy_paste", 0) > 0:
        mapper = partial(mapper, others=listed)
    if sampler is None:
        sampler = TrainingSampler(len(listed))
    batch_size = total_batch_size // comm.get_world_size()
    stream = TrainingStream(MapDataset(listed, mapper), sampler, batch_size, groups)
    if stream.seed < 0:  # newer versions of Detectron2 hand SEED -1 on: a random seed
        stream.seed = comm.shared_random_seed()
    return build_batch_data_loader(
        stream,
        None,
        total_batch_size,
        num_workers=num_workers,
        seed=stream.seed,  # or it would take a random number from the step that starts it
    )
