import json
import subprocess
import sys

# An import that finds None in sys.modules fails like one of a package that is not installed, and
# importlib.util.find_spec answers None.
SCRIPT = """
import json, sys
sys.modules.update(dict.fromkeys(["detectron2", "panopticapi", "pycocotools"]))
import oanet_d2, torch
from oanet_d2.painting import combine, metrics

masks, order = torch.tensor([[[1, 1, 0]], [[0, 1, 0]]]).bool(), torch.tensor([1, 0])
limits = dict(overlap_threshold=0.5, stuff_area_thresh=1, instances_score_thresh=0.5)
seg, info = combine(masks, torch.ones(2), torch.arange(2), order, torch.full((1, 3), 3), **limits)
ours = [name for name in sys.modules if name.startswith("oanet_d2.")]
print(json.dumps([oanet_d2.__all__, ours, seg.tolist(), [s["category_id"] for s in info]]))
"""


def test_painting_needs_no_detectron2(subprocess_env):
    command = [sys.executable, "-c", SCRIPT]
    result = subprocess.run(command, env=subprocess_env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    public, modules, seg, categories = json.loads(result.stdout)
    assert public == ["painting"]
    assert all(name.startswith("oanet_d2.painting") for name in modules)
    assert seg == [[2, 1, 3]] and categories == [1, 0, 3]
