import json
import subprocess
import sys

from oanet_d2.painting.learned import LearnedOrder
from oanet_d2.painting.pairs import GEOMETRY_NUMBERS, PairNetwork

# An import that finds None in sys.modules fails like one of a package that is not installed, and
# importlib.util.find_spec answers None.
SCRIPT = """
import json, sys
sys.modules.update(dict.fromkeys(["detectron2", "panopticapi", "pycocotools"]))
import numpy as np
import oanet_d2, torch
from oanet_d2.painting import combine, metrics

masks, order = torch.tensor([[[1, 1, 0]], [[0, 1, 0]]]).bool(), torch.tensor([1, 0])
limits = dict(overlap_threshold=0.5, stuff_area_thresh=1, instances_score_thresh=0.5)
seg, info = combine(masks, torch.ones(2), torch.arange(2), order, torch.full((1, 3), 3), **limits)
ours = [name for name in sys.modules if name.startswith("oanet_d2.")]

from oanet_d2.painting.learned import LearnedOrder

learned, whole = LearnedOrder.load(sys.argv[1]), (slice(0, 8), slice(0, 8))
masks, boxes = np.ones((3, 8, 8), dtype=bool), np.tile([0, 0, 8, 8], (3, 1))
found = learned.order(lambda i: (masks[i], whole), boxes, [0.7, 0.9, 0.8], "aba", (8, 8))
categories = [s["category_id"] for s in info]
print(json.dumps([oanet_d2.__all__, ours, seg.tolist(), categories, found.tolist()]))
"""


def test_painting_and_a_learned_order_need_no_detectron2(subprocess_env, tmp_path):
    path = tmp_path / "order.safetensors"
    LearnedOrder(PairNetwork(2, GEOMETRY_NUMBERS, 0), ["a", "b"], 4, 16, 16).save(path)
    command = [sys.executable, "-c", SCRIPT, str(path)]
    result = subprocess.run(command, env=subprocess_env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    public, modules, seg, categories, order = json.loads(result.stdout)
    assert public == ["painting"]
    assert all(name.startswith("oanet_d2.painting") for name in modules)
    assert seg == [[2, 1, 3]] and categories == [1, 0, 3] and sorted(order) == [0, 1, 2]
