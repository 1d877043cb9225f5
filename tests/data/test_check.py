"""The report and the command line; what the checker finds is in test_faults.py."""

import pytest
import yaml

from detectron2.data import DatasetCatalog, MetadataCatalog

from oanet_d2.data.check import Problem, check, format_report, main
from oanet_d2.data.occlusion_scenes import write_split
from oanet_d2.data.register import KEYS
from tests.conftest import registered, scenes_paths


def test_occlusion_scenes_are_clean(tmp_path):
    write_split(tmp_path, "train", 3, image_size=64, seed=0, num_workers=0)
    assert check(*scenes_paths(tmp_path, "train")) == []


def test_report():
    problems = [Problem("PNG missing", f"{i}.png", "there is no such file") for i in range(4)]
    problems.insert(1, Problem("image missing", "a\nb.jpg", "there is no such file"))
    assert format_report(problems, 9, 2).split("\n") == [
        "Samples: 9. Problems: 5, of 2 kinds.",
        "",
        "PNG missing: 4",
        "    0.png: there is no such file",
        "    1.png: there is no such file",
        "    ... and 2 more",
        "",
        "image missing: 1",
        r"    a\nb.jpg: there is no such file",
    ]
    assert format_report([], 9) == "Samples: 9. Problems: 0, of 0 kinds."


def test_exit_status(dataset, capsys):
    paths = dataset.paths()
    assert main(paths) == 0 and main(paths[:3]) == 0
    assert capsys.readouterr().out == "Samples: 3. Problems: 0, of 0 kinds.\n" * 2
    dataset.images[1].unlink()
    dataset.pngs[2].unlink()
    assert main([*paths, "--examples", "0"]) == 1
    assert capsys.readouterr().out.split("\n")[2:] == ["image unusable: 1", "", "PNG unusable: 1", ""]
    assert main([paths[0], str(dataset.root / "none.json"), paths[2]]) == 1
    for arguments in ([], paths[:2], [*paths, "x"], [*paths, "--examples", "many"]):
        with pytest.raises(SystemExit) as exit:
            main(arguments)
        assert exit.value.code == 2


def test_registered_datasets(dataset, capsys):
    """With their instances JSON, if they have one."""
    dataset.instances["annotations"][1]["keypoints"] = [1, 2]
    paths = dataset.paths()
    for used, status in ((paths, 1), (paths[:3], 0)):
        with registered("test_check_train", *used) as name:
            assert main([name]) == status
    assert "malformed keypoints: 1" in capsys.readouterr().out
    assert main(["test_check_train"]) == 2
    error = capsys.readouterr().err
    for name in ("test_check_train", "coco_2017_val_oanet", "cityscapes_fine_panoptic_val_oanet"):
        assert name in error
    assert main(["coco_2017_val_panoptic_separated"]) == 2


def test_datasets_of_a_yaml(dataset, tmp_path, capsys):
    files = dict(zip(KEYS, dataset.paths()))
    path = tmp_path / "config.yaml"

    def status(files):
        path.write_text(yaml.safe_dump({"DATASETS": {"PANOPTIC": {"test_check_yaml": files}}}))
        return main(["test_check_yaml", "--config-file", str(path)])

    assert status(files) == 0
    assert status({**files, "INSTANCES_JSON": ""}) == 0
    assert status({k: v for k, v in files.items() if k != "PANOPTIC_ROOT"}) == 2
    assert "test_check_yaml.PANOPTIC_ROOT" in capsys.readouterr().err
    assert main(["test_check_yaml", "--config-file", str(tmp_path / "none.yaml")]) == 2
    # what could not even be registered is reported like everything else
    dataset.panoptic["categories"].append(dataset.panoptic["categories"][0])
    dataset.paths()
    assert status(files) == 1
    assert "duplicate id: 1" in capsys.readouterr().out
    assert "test_check_yaml" not in DatasetCatalog


def test_datasets_of_a_config_in_python(dataset, tmp_path):
    (tmp_path / "config.py").write_text(
        "from oanet_d2 import register_panoptic\n"
        f"register_panoptic('test_check_py', *{dataset.paths()})\n"
    )
    dataset.pngs[1].unlink()
    assert main(["test_check_py", "--config-file", str(tmp_path / "config.py")]) == 1
    DatasetCatalog.remove("test_check_py")
    MetadataCatalog.remove("test_check_py")
    assert main(["test_check_py", "--config-file", str(tmp_path / "none.py")]) == 2
