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
HOSTILE = '"><script>document.title="broken"</script><img src=x onerror="alert(1)">\'{{7*7}}$x$'


class Evaluation:
    """Scenes and a model whose pairs are all wrong in the last three of them."""

    def __init__(self, dataset_name):
        self.dataset_name = dataset_name
        self.inputs = DatasetCatalog.get(dataset_name)
        self.model = SilhouetteModel([d["image_id"] for d in self.inputs[-3:]])

    def __call__(self, folder, max_cases=2):
        """Evaluate and leave a report in this folder."""
        report = ReportRecorder(self.dataset_name, str(folder), max_cases, ("score", "srm_pairs"))
        evaluator = PanopticEvaluator(self.model, ORDERS, report=report)
        for d in self.inputs:
            evaluator.process([d], [self.model(d)])
        return evaluator.evaluate()


@pytest.fixture(scope="session")
def evaluation(tmp_path_factory):
    root = tmp_path_factory.mktemp("report_scenes")
    write_split(root, "val", NUM_IMAGES, image_size=96, seed=3, num_workers=0)
    with registered("test_report_scenes", *scenes_paths(root, "val")) as name:
        yield Evaluation(name)


@pytest.fixture(scope="session")
def evaluated(evaluation, tmp_path_factory):
    """The folder of an evaluation, not to be changed, and its results."""
    folder = tmp_path_factory.mktemp("evaluated")
    return folder, evaluation(folder)


@pytest.fixture
def folder(evaluated, tmp_path):
    """A copy of the folder, to do anything with."""
    return shutil.copytree(evaluated[0], tmp_path / "output")


def read_json(folder):
    return json.loads((folder / "report" / "evaluation.json").read_text())


def change_json(folder, change):
    content = read_json(folder)
    change(content)
    (folder / "report" / "evaluation.json").write_text(json.dumps(content))


def make_hostile(content):
    cases = [case for cases in content["cases"].values() for case in cases]
    content["dataset"] = HOSTILE
    for key, rows in (
        ("name", content["classes"]),
        ("file_name", cases),
        ("front", [pair for case in cases for pair in case["pairs"]]),
        ("behind", content["overlaps"]),
    ):
        for row in rows:
            row[key] = HOSTILE
