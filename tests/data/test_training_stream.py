import random
from itertools import islice

import numpy as np
import pytest
import torch

from detectron2.data import DatasetCatalog, build_detection_train_loader
from detectron2.data.samplers import TrainingSampler
from detectron2.utils import comm

from oanet_d2.data.training_stream import TrainingStream, build_train_loader, random_numbers_of

NAME = "test_training_stream"


@pytest.fixture
def cfg(tiny_cfg):
    """A dataset of 23 images, of both orientations. One class is in two of them."""
    sizes = np.random.default_rng(0).integers(10, 20, (23, 2))
    dicts = [
        {"file_name": str(i), "width": w, "height": h, "annotations": [{"category_id": int(i < 2)}]}
        for i, (w, h) in enumerate(sizes)
    ]
    DatasetCatalog.register(NAME, lambda: dicts)
    tiny_cfg.DATASETS.TRAIN, tiny_cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS = (NAME,), False
    tiny_cfg.DATALOADER.NUM_WORKERS, tiny_cfg.SOLVER.IMS_PER_BATCH = 0, 4
    yield tiny_cfg
    DatasetCatalog.remove(NAME)


def draw():
    return random.random(), np.random.rand(), torch.rand(1).item()


def with_draws(dataset_dict):
    """A mapper that tells the random numbers that an augmentation would see."""
    return {**dataset_dict, "drawn": draw()}


@pytest.mark.parametrize("grouping", [False, True])
@pytest.mark.parametrize("sampler", ["TrainingSampler", "RepeatFactorTrainingSampler"])
def test_same_order_as_detectron2(cfg, grouping, sampler):
    cfg.DATALOADER.ASPECT_RATIO_GROUPING, cfg.DATALOADER.SAMPLER_TRAIN = grouping, sampler
    cfg.SEED, cfg.DATALOADER.REPEAT_THRESHOLD = 5, 0.9
    np.random.seed(3)
    theirs = list(islice(build_detection_train_loader(cfg, mapper=dict), 30))
    np.random.seed(3)
    assert list(islice(build_train_loader(cfg, dict), 30)) == theirs


def test_without_annotations_the_sampler_counts_the_things_of_the_png(cfg):
    cfg.DATALOADER.SAMPLER_TRAIN, cfg.DATALOADER.REPEAT_THRESHOLD = "RepeatFactorTrainingSampler", 0.9
    cfg.SEED = 5

    def order():
        batches = islice(build_train_loader(cfg, dict), 30)
        return [x["file_name"] for batch in batches for x in batch]

    expected = order()
    for x in DatasetCatalog.get(NAME):
        things = [{**a, "isthing": True} for a in x.pop("annotations")]
        x["segments_info"] = [*things, {"category_id": 1, "isthing": False}]
    assert order() == expected and expected.count("0") > 1.5 * expected.count("2")


@pytest.mark.parametrize("step", [1, -1])
def test_sets_with_and_without_instances(cfg, step):
    """An image is left out if annotations say that it has no instance, not if there are none."""
    size = {"width": 9, "height": 9, "segments_info": []}
    dicts = [{"file_name": f"{i}", **size} for i in range(3)]
    dicts[0]["annotations"] = []
    dicts[1]["annotations"] = [{"iscrowd": 0, "category_id": 0}]
    names = ["test_stream_with", "test_stream_without"]
    DatasetCatalog.register(names[0], lambda: dicts[:2])
    DatasetCatalog.register(names[1], lambda: dicts[2:])
    cfg.DATASETS.TRAIN, cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS = names[::step], True
    try:
        batches = islice(build_train_loader(cfg, dict), 5)
        assert {x["file_name"] for batch in batches for x in batch} == {"1", "2"}
    finally:
        for name in names:
            DatasetCatalog.remove(name)


def test_without_a_training_set(cfg):
    cfg.DATASETS.TRAIN = ()
    with pytest.raises(ValueError, match="DATASETS.TRAIN"):
        build_train_loader(cfg, dict)


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_enters_anywhere_with_any_number_of_workers(cfg, workers):
    """No image is lost, not even those that wait for others of their orientation just then."""
    cfg.DATALOADER.NUM_WORKERS = workers
    whole = build_train_loader(cfg, with_draws)
    whole.dataset.seed = 7
    expected = list(islice(whole, 12))

    cfg.DATALOADER.NUM_WORKERS = 0
    later = build_train_loader(cfg, with_draws)
    assert later.dataset.seed != 7
    later.dataset.seed, later.dataset.first_batch = 7, 5
    assert list(islice(later, 7)) == expected[5:]
    assert len({x["drawn"] for batch in expected for x in batch}) == 48


def test_processes_share_the_images(monkeypatch):
    """Of two processes, each enters its own half of the order where it stopped."""
    monkeypatch.setattr(comm, "get_world_size", lambda: 2)
    generator = torch.Generator().manual_seed(7)
    order = [x for _ in range(2) for x in torch.randperm(23, generator=generator).tolist()]
    streams = []
    for rank in range(2):
        monkeypatch.setattr(comm, "get_rank", lambda rank=rank: rank)
        stream = TrainingStream(range(23), TrainingSampler(23, seed=7), 2, [0] * 23)
        stream.first_batch = 3
        streams.append(list(islice(stream, 16)))
    assert [x for pair in zip(*streams) for x in pair] == order[12:44]


def test_other_random_numbers_go_on_as_if_nothing_had_happened():
    found = []
    for between in (False, True):
        random.seed(1), np.random.seed(1), torch.manual_seed(1)
        found.append([draw()])
        if between:
            with random_numbers_of(3, 0, 5):
                draw()
        found[-1].append(draw())
    assert found[0] == found[1]


def test_without_a_seed_it_is_one_of_chance(cfg, monkeypatch):
    """Newer versions of Detectron2 give their samplers the config's SEED, also if it is -1."""
    given = "detectron2.data.build.TrainingSampler"
    monkeypatch.setattr(given, lambda size, **kwargs: TrainingSampler(size, seed=-1))
    seeds = {build_train_loader(cfg, dict).dataset.seed for _ in range(2)}
    assert len(seeds) == 2 and min(seeds) >= 0
