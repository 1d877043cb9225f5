import random
from itertools import islice

import numpy as np
import pytest
import torch

from detectron2.data import (
    DatasetCatalog,
    build_detection_train_loader,
    get_detection_dataset_dicts,
)
from detectron2.data.samplers import RepeatFactorTrainingSampler, TrainingSampler
from detectron2.utils import comm

from oanet_d2.data.training_stream import (
    TrainingStream,
    build_train_loader,
    derived_seed,
    random_numbers_of,
)

NAME = "test_training_stream"


def draw():
    return random.random(), np.random.rand(), torch.rand(1).item()


@pytest.fixture
def cfg(tiny_cfg):
    """A dataset of 23 images, of both orientations."""
    sizes = np.random.default_rng(0).integers(10, 20, (23, 2))
    dicts = [{"file_name": str(i), "width": w, "height": h} for i, (w, h) in enumerate(sizes)]
    DatasetCatalog.register(NAME, lambda: dicts)
    tiny_cfg.DATASETS.TRAIN = (NAME,)
    tiny_cfg.DATALOADER.NUM_WORKERS = 0
    tiny_cfg.SOLVER.IMS_PER_BATCH = 4
    yield tiny_cfg
    DatasetCatalog.remove(NAME)


def names(loader, number):
    return [[x["file_name"] for x in batch] for batch in islice(loader, number)]


def with_draws(dataset_dict):
    """A mapper that tells the random numbers an augmentation would see."""
    return {**dataset_dict, "drawn": draw()}


@pytest.mark.parametrize("grouping", [False, True])
@pytest.mark.parametrize("sampler", ["TrainingSampler", "RepeatFactorTrainingSampler"])
def test_same_order_as_detectron2(cfg, grouping, sampler):
    cfg.DATALOADER.ASPECT_RATIO_GROUPING, cfg.DATALOADER.SAMPLER_TRAIN = grouping, sampler
    for x in DatasetCatalog.get(NAME):
        x["annotations"] = []
    cfg.SEED = 5
    np.random.seed(3)
    theirs = names(build_detection_train_loader(cfg, mapper=dict), 30)
    np.random.seed(3)
    ours = names(build_train_loader(cfg, dict), 30)
    assert ours == theirs
    if grouping:
        wide = {x["file_name"]: x["width"] > x["height"] for x in DatasetCatalog.get(NAME)}
        assert all(len({wide[name] for name in batch}) == 1 for batch in ours)


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_enters_anywhere_with_any_number_of_workers(cfg, workers):
    cfg.DATALOADER.NUM_WORKERS = workers
    np.random.seed(3)
    whole = build_train_loader(cfg, with_draws)
    whole.dataset.seed = 7
    expected = list(islice(whole, 12))

    cfg.DATALOADER.NUM_WORKERS = 0
    np.random.seed(4)
    later = build_train_loader(cfg, with_draws)
    assert later.dataset.seed != 7
    later.dataset.seed, later.dataset.first_batch = 7, 5
    assert list(islice(later, 7)) == expected[5:]
    assert len({x["drawn"] for batch in expected for x in batch}) == 48


def test_processes_share_the_images(cfg, monkeypatch):
    """Of two processes, each enters its own half of the order where it stopped."""
    monkeypatch.setattr(comm, "get_world_size", lambda: 2)
    monkeypatch.setattr(comm, "all_gather", lambda x: [x, x])
    cfg.DATALOADER.ASPECT_RATIO_GROUPING = False
    dicts = get_detection_dataset_dicts((NAME,), filter_empty=False)
    generator = torch.Generator().manual_seed(7)
    order = [x for _ in range(2) for x in torch.randperm(23, generator=generator).tolist()]
    streams = []
    for rank in range(2):
        monkeypatch.setattr(comm, "get_rank", lambda rank=rank: rank)
        stream = TrainingStream(dicts, TrainingSampler(len(dicts), seed=7), 2)
        stream.first_batch = 3
        streams.append([int(x["file_name"]) for x in islice(stream, 16)])
    together = [x for pair in zip(*streams) for x in pair]
    assert together == order[12:44]


def test_no_image_is_lost_where_it_is_entered(cfg):
    """Not even those that wait for others of their orientation just then."""
    whole = build_train_loader(cfg, dict).dataset
    whole.seed = 1
    indices = [x for batch in islice(whole.batches(), 40) for x in batch]
    counts = np.bincount(indices, minlength=23)
    # 160 images are about seven passes; up to 3 of each orientation still wait.
    assert counts.min() >= 6 and counts.max() <= 8
    whole.first_batch = 11
    entered = [int(x["file_name"]) for x in islice(whole, 116)]
    assert entered == indices[44:]


def test_random_numbers_of_a_key():
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    expected = [draw(), draw()]
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    found = [draw()]
    with random_numbers_of(3, 0, 5):
        first = draw()
    with random_numbers_of(3, 0, 6):
        assert draw() != first
    with pytest.raises(KeyError), random_numbers_of(3, 0, 5):
        assert draw() == first
        raise KeyError
    assert [*found, draw()] == expected
    assert len({derived_seed(a, b) for a in range(30) for b in range(30)}) == 900


@pytest.mark.parametrize(
    "kind, of", [(TrainingSampler, 20), (RepeatFactorTrainingSampler, torch.ones(20))]
)
def test_seed_of_detectron2s_samplers_is_set(kind, of):
    """The attribute has no public name; this fails if Detectron2 gives it another."""
    stream = TrainingStream(range(20), kind(of, seed=1), 2)
    before = list(islice(stream.batches(), 8))
    stream.seed = 2
    assert stream.sampler._seed == 2
    assert list(islice(stream.batches(), 8)) != before


def test_without_a_seed_it_is_one_of_chance(cfg, monkeypatch):
    """Newer versions of Detectron2 give their samplers the config's SEED, also if it is -1."""
    given = "detectron2.data.build.TrainingSampler"
    monkeypatch.setattr(given, lambda size, **kwargs: TrainingSampler(size, seed=-1))
    streams = [build_train_loader(cfg, dict).dataset for _ in range(2)]
    assert all(stream.seed >= 0 for stream in streams)
    first, second = (list(islice(stream.batches(), 8)) for stream in streams)
    assert first != second
