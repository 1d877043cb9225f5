import torch

from oanet_d2.evaluation import class_order, count_class_margins
from oanet_d2.painting import OrderInputs
from tests.conftest import registered
from tests.data.conftest import PERSON, TIE, Dataset


def test_which_class_lies_on_which(tmp_path):
    """A tie of 8 pixels on a person, in one of the images; the person has the segment around it."""
    dataset = Dataset(tmp_path)
    ids = dataset.ids(1)
    ids[4:8, 1:3] = 5
    dataset.write_png(1, ids)
    dataset.panoptic["annotations"][1]["segments_info"].append({"id": 5, "category_id": TIE})
    tie = {"image_id": 1, "segmentation": [[1, 4, 3, 4, 3, 8, 1, 8]], "category_id": TIE}
    dataset.instances["annotations"].append(tie)
    assert dataset.instances["annotations"][1]["category_id"] == PERSON
    with registered("test_class_order", *dataset.paths()) as name:
        counts = count_class_margins([name], 2)
        assert count_class_margins([name], 2) is counts  # counted once
    with registered("test_class_order", *dataset.paths()[:3]) as name:
        assert not count_class_margins([name], 2).any()
    assert counts.tolist() == [[0, -8], [8, 0]]

    # A person (0) and two ties (1): the first lies on it, the other elsewhere.
    masks = torch.zeros(3, 2, 4, dtype=torch.bool)
    masks[0, :, :2] = masks[1, 1, 1:3] = masks[2, 0, 3] = True
    scores, classes = torch.tensor([0.9, 0.6, 0.7]), torch.tensor([0, 1, 1])
    assert class_order(OrderInputs(scores, classes, masks), counts).tolist() == [2, 1, 0]
