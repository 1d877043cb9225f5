import json
import shutil

import pytest

from detectron2.data import DatasetCatalog

from oanet_d2.data.occlusion_scenes import write_split
from oanet_d2.evaluation import PanopticEvaluator
from oanet_d2.report import ReportRecorder
from tests.conftest import registered, scenes_paths
from tests.evaluation.silhouettes import SilhouetteModel

ORDERS = ("score", "srm_pairs", "oracle")
NUM_IMAGES = 8
NAMES = ("dataset", "name", "file_name", "front", "behind")
HOSTILE = '"><script>document.title="broken"</script><img src=x onerror="alert(1)">\'{{7*7}}$x$'


def evaluate(dataset_name, folder, max_cases=2):
    """Leave a report in this folder. The pairs are all wrong in the last three images."""
    inputs = DatasetCatalog.get(dataset_name)
    model = SilhouetteModel([d["image_id"] for d in inputs[-3:]])
    report = ReportRecorder(dataset_name, str(folder), max_cases, ORDERS[:2])
    evaluator = PanopticEvaluator(model, ORDERS, report)
    for d in inputs:
        evaluator.process([d], [model(d)])
    evaluator.evaluate()


@pytest.fixture(scope="session")
def scenes(tmp_path_factory):
    root = tmp_path_factory.mktemp("report_scenes")
    write_split(root, "val", NUM_IMAGES, image_size=96, seed=3, num_workers=0)
    with registered("test_report_scenes", *scenes_paths(root, "val")) as name:
        yield name


@pytest.fixture(scope="session")
def evaluated(scenes, tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluated")
    evaluate(scenes, folder)
    return folder


@pytest.fixture
def folder(evaluated, tmp_path):
    """The output folder of an evaluation, to do anything with."""
    return shutil.copytree(evaluated, tmp_path / "output")


def read_json(folder):
    return json.loads((folder / "report" / "evaluation.json").read_text())


def make_hostile(folder):
    """All names in the JSON become one that would break a page that does not escape it."""
    path = folder / "report" / "evaluation.json"

    def hostile(x):
        return {k: HOSTILE if k in NAMES else v for k, v in x.items()}

    path.write_text(json.dumps(json.loads(path.read_text(), object_hook=hostile)))
