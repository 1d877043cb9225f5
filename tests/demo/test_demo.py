import functools
import json
import logging
import re
import shutil
import subprocess
import sys

import cv2
import numpy as np
import pytest
from panopticapi.evaluation import pq_compute
from panopticapi.utils import rgb2id
from PIL import Image

from oanet_d2 import PanopticPredictor
from oanet_d2 import predict as demo
from oanet_d2.data.occlusion_scenes import CATEGORIES
from oanet_d2.visualization import GAP, MARK, PANEL_SIDE, TITLE_HEIGHT
from tests.conftest import REPOSITORY, scenes_paths
from tests.demo.conftest import files_in
from tests.onnx_models import OPTIONS, instances, write_model

built_once = functools.cache(PanopticPredictor.from_config)


@pytest.fixture
def run(config_file, monkeypatch, caplog, capsys):
    """Run the demo with the tiny network. Gives its exit status, and what it logs and prints."""
    once = lambda path, opts=(): built_once(path, opts=tuple(opts))  # noqa: E731
    monkeypatch.setattr(PanopticPredictor, "from_config", once)
    monkeypatch.setattr(demo, "set_up_logging", lambda args: None)  # caplog is there
    monkeypatch.setattr(logging.getLogger("oanet_d2"), "propagate", True)

    def run(*args):
        caplog.clear()
        with caplog.at_level(logging.INFO, "oanet_d2"):
            try:
                model = [] if "--onnx" in args else ["--config-file", str(config_file)]
                status = demo.main([*model, *map(str, args)])
            except SystemExit as end:
                status = end.code
        return status, caplog.text + capsys.readouterr().err

    return run


def touch(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"")


def test_files_folders_and_patterns(tmp_path, monkeypatch):
    touch(tmp_path, "in/b.jpg", "in/a.PNG", "in/note.txt", "in/film.mpg", "in/._b.jpg")
    touch(tmp_path, "in/deep/c.jpg", "x[1].jpg", "raw.dat")
    monkeypatch.chdir(tmp_path)
    assert demo.find_pictures(["in", "in/b.jpg"]) == ["in/a.PNG", "in/b.jpg"]
    assert demo.find_pictures(["in/**/*.jpg"]) == ["in/b.jpg", "in/deep/c.jpg"]
    # A file is a file, whatever its name looks like.
    assert demo.find_pictures(["x[1].jpg", "raw.dat"]) == ["x[1].jpg", "raw.dat"]
    for missing in ("nowhere.jpg", "none*.jpg", "in/deep/none"):
        with pytest.raises(ValueError, match=re.escape(missing)):
            demo.find_pictures(["in", missing])


@pytest.mark.parametrize("extension", demo.PICTURES)
def test_one_picture_to_a_file(run, pictures, tmp_path, extension):
    output = tmp_path / f"segmented{extension}"
    touch(tmp_path, output.name)
    assert run("--input", pictures[0], "--output", output, "--save-panoptic")[0] == 0
    pngs = ["panoptic.json", f"panoptic/{pictures[0].stem}.png"]
    assert files_in(tmp_path) == [*pngs, output.name]
    assert Image.open(output).convert("RGB").size == (480, 480)


def test_what_cannot_be_segmented_is_named_and_skipped(run, pictures, tmp_path):
    folder, output = tmp_path / "in", tmp_path / "new" / "out"
    folder.mkdir()
    for k, path in enumerate(pictures[:2]):
        shutil.copy(path, folder / f"{k}.jpg")
    (folder / "0_cut.jpg").write_bytes(pictures[0].read_bytes()[:700])
    (folder / "0_text.png").write_text("no picture")
    Image.new("RGB", (3000, 1)).save(folder / "0_thin.png")  # less than a pixel when resized
    Image.new("RGB", (2, 100)).save(folder / "2_narrow.png")
    status, text = run("--input", folder, "--output", output, "--save-panoptic")
    assert status == 1 and "Traceback" not in text
    for name in ("0_cut.jpg", "0_text.png", "0_thin.png"):
        assert f"{folder / name} skipped: " in text
    done = ["0.jpg", "1.jpg", "2_narrow.png"]
    pngs = ["panoptic/0.png", "panoptic/1.png", "panoptic/2_narrow.png"]
    assert files_in(output) == [*done, "panoptic.json", *pngs]
    written = json.loads((output / "panoptic.json").read_text())
    assert [x["image_id"] for x in written["annotations"]] == [0, 1, "2_narrow"]
    assert [x["id"] for x in written["images"]] == [0, 1, "2_narrow"]
    with Image.open(output / "0.jpg") as drawing:
        assert drawing.format == "JPEG" and drawing.size == (480, 480)


def test_an_output_is_never_an_input_or_another_output(run, pictures, video, tmp_path):
    picture, film = tmp_path / "a.png", tmp_path / "a.mp4"
    Image.open(pictures[0]).save(picture)
    shutil.copy(video, film)
    shutil.copytree(tmp_path, tmp_path / "other")
    (tmp_path / "link").symlink_to(tmp_path)
    before = picture.read_bytes(), film.read_bytes()
    for args, problem in (
        (["--input", picture, "--output", tmp_path], "is an input"),
        (["--input", picture, "--output", tmp_path / "link"], "is an input"),
        (["--video-input", film, "--output", tmp_path], "is an input"),
        (["--input", picture, tmp_path / "other/a.png", "--output", tmp_path / "out"], "another"),
        (["--input", picture, "--output", "out", "--save-panoptic", "out.json"], "another"),
    ):
        status, text = run(*args)
        assert status == 2 and problem in text
    assert (picture.read_bytes(), film.read_bytes()) == before and not (tmp_path / "out").exists()


def test_compare(run, pictures, tmp_path):
    args = ["--input", pictures[0], "--output", tmp_path / "out.png", "--compare"]
    assert run(*args, "--order", "srm_overlap", "--confidence-threshold", 0.3)[0] == 0

    picture = np.asarray(Image.open(tmp_path / "out.png"))
    assert picture.shape == (PANEL_SIDE + TITLE_HEIGHT, 3 * PANEL_SIDE + 2 * GAP, 3)
    starts = [k * (PANEL_SIDE + GAP) for k in range(3)]
    image, score, ranked = (picture[TITLE_HEIGHT:, x : x + PANEL_SIDE] for x in starts)
    marks = [(panel == MARK).all(axis=2) for panel in (image, score, ranked)]
    assert not marks[0].any() and marks[1].sum() > 100 and (marks[1] == marks[2]).mean() > 0.99
    assert np.abs(score.astype(int) - ranked).max() > 50


def test_arguments_change_the_config(config_file):
    def model(*args):
        args = ["--config-file", str(config_file), "--input", "a.jpg", *args]
        return demo.Segmenter(demo.get_parser().parse_args(args)).predictor.model

    plain = model()
    assert plain.order == "srm_pairs" and plain.combine_instances_score_thresh == 0.6
    args = ["--order", "srm_mean", "--confidence-threshold", "0.1", "--opts"]
    changed = model(*args, "MODEL.PANOPTIC_FPN.COMBINE.STUFF_AREA_LIMIT", "9")
    assert changed.order == "srm_mean" and changed.combine_stuff_area_thresh == 9
    assert changed.combine_instances_score_thresh == 0.1
    assert changed.roi_heads.box_predictor.test_score_thresh == 0.1


def test_a_file_that_needs_no_config(weights_file, pictures, tmp_path):
    """The classes in it are the dataset's."""
    panoptic = tmp_path / "panoptic.json"
    args = ["--input", str(pictures[0]), "--save-panoptic", str(panoptic)]
    assert demo.main([*args, "--opts", "MODEL.WEIGHTS", str(weights_file)]) == 0
    known = ("id", "name", "isthing", "color")
    expected = [{key: c[key] for key in known} for c in CATEGORIES]
    assert json.loads(panoptic.read_text())["categories"] == expected
    for opts in ([], ["--opts", "MODEL.WEIGHTS"], ["--opts", "MODEL.WEIGHTS", str(pictures[0])]):
        with pytest.raises(SystemExit) as end:
            demo.main([*args, *opts])
        assert end.value.code == 2


def test_panopticapi_takes_the_results(run, config_file, scenes, pictures, tmp_path):
    """Without --output nothing is drawn."""
    output = tmp_path / "results.json"
    assert run("--input", scenes / "val", "--save-panoptic", output)[0] == 0
    assert files_in(tmp_path) == ["results.json", *(f"results/{p.stem}.png" for p in pictures)]
    _, gt_json, gt_folder, _ = map(str, scenes_paths(scenes, "val"))
    pq_compute(gt_json, str(output), gt_folder=gt_folder)  # it compares JSON and PNGs

    results = json.loads(output.read_text())
    names = {c["id"]: c["name"] for c in results["categories"]}
    assert names == {c["id"]: c["name"] for c in CATEGORIES}
    predictor = PanopticPredictor.from_config(config_file)
    for path, annotation in zip(pictures, results["annotations"]):
        result = predictor(path)
        ids = rgb2id(np.asarray(Image.open(tmp_path / "results" / annotation["file_name"])))
        assert (ids == result.panoptic_seg.numpy()).all()
        found = [(s["id"], names[s["category_id"]]) for s in annotation["segments_info"]]
        assert found == [(s["id"], s["category_name"]) for s in result.segments_info]


@pytest.fixture(scope="module")
def video(tmp_path_factory, pictures):
    path = str(tmp_path_factory.mktemp("video") / "scenes.avi")
    writer = cv2.VideoWriter(path, cv2.VideoWriter_fourcc(*"MJPG"), 5, (64, 64))
    for picture in pictures[:3]:
        writer.write(cv2.imread(str(picture)))
    writer.release()
    return path


def frames_of(path):
    capture, frames = cv2.VideoCapture(str(path)), []
    while (read := capture.read())[0]:
        frames.append(read[1])
    return capture.get(cv2.CAP_PROP_FPS), frames


def test_video(run, video, tmp_path):
    assert run("--video-input", video, "--output", tmp_path / "out")[0] == 0
    assert files_in(tmp_path) == ["out/scenes.mp4"]
    rate, frames = frames_of(tmp_path / "out" / "scenes.mp4")
    assert rate == 5 and [x.shape for x in frames] == [(64, 64, 3)] * 3
    _, given = frames_of(video)
    assert min(np.abs(x.astype(int) - y).mean() for x, y in zip(frames, given)) > 10  # painted

    output = tmp_path / "compared.mkv"
    assert run("--video-input", video, "--output", output, "--compare")[0] == 0
    size = PANEL_SIDE + TITLE_HEIGHT, 3 * PANEL_SIDE + 2 * GAP, 3
    assert [x.shape for x in frames_of(output)[1]] == [size] * 3


def test_windows(run, pictures, video, monkeypatch):
    shown, keys, capture = [], [], cv2.VideoCapture
    monkeypatch.setenv("DISPLAY", ":0")
    monkeypatch.setattr(cv2, "namedWindow", lambda name, flags: None)
    monkeypatch.setattr(cv2, "imshow", lambda name, picture: shown.append(picture))
    monkeypatch.setattr(cv2, "waitKey", lambda delay: keys.pop(0))
    monkeypatch.setattr(cv2, "VideoCapture", lambda x: capture(video if x == 0 else x))
    for args, pressed in (
        (["--input", *pictures[:2]], [ord("x"), ord("x")]),
        (["--input", *pictures[:2]], [27]),  # escape
        (["--video-input", video], [-1, -1, -1]),
        (["--webcam"], [-1, 27]),
    ):
        shown.clear()
        keys[:] = pressed
        assert run(*args)[0] == 0 and len(shown) == len(pressed)


@pytest.fixture(scope="module")
def onnx_model(tmp_path_factory):
    """It sees a person and a tie in every picture. What surrounds them depends on the picture."""
    outputs = instances([(0, 0, 30, 30), (20, 20, 50, 60)], [0, 1])
    return write_model(tmp_path_factory.mktemp("onnx") / "model.onnx", outputs, min_size=64)


def test_an_exported_model(run, onnx_model, pictures, video, tmp_path):
    args = ["--onnx", onnx_model, "--output", tmp_path]
    assert run(*args, "--input", *pictures[:2], "--save-panoptic")[0] == 0
    assert run(*args, "--video-input", video)[0] == 0
    pngs = [f"panoptic/{p.stem}.png" for p in pictures[:2]]
    drawings = [p.name for p in pictures[:2]]
    assert files_in(tmp_path) == sorted([*drawings, "panoptic.json", *pngs, "scenes.mp4"])
    written = json.loads((tmp_path / "panoptic.json").read_text())
    ids = dict(zip(OPTIONS["thing_classes"], OPTIONS["thing_ids"]))
    ids.update(zip(OPTIONS["stuff_classes"][1:], OPTIONS["stuff_ids"][1:]))
    assert {c["name"]: c["id"] for c in written["categories"]} == ids
    for annotation, png in zip(written["annotations"], pngs):
        found = rgb2id(np.asarray(Image.open(tmp_path / png)))
        segments = {s["id"]: s["category_id"] for s in annotation["segments_info"]}
        assert segments[found[10, 10]] == ids["person"] and segments[found[55, 45]] == ids["tie"]
        assert set(np.unique(found)) <= {0, *segments}
    rate, frames = frames_of(tmp_path / "scenes.mp4")
    assert rate == 5 and [x.shape for x in frames] == [(480, 480, 3)] * 3
    assert np.asarray(Image.open(tmp_path / pictures[0].name)).shape == (480, 480, 3)


@pytest.mark.parametrize(
    "args, words",
    [
        ("--onnx nowhere.onnx --input PICTURE --output out", "nowhere.onnx"),
        ("--onnx a.onnx --config-file a.yaml --input PICTURE --output out", "not allowed with"),
        ("--onnx a.onnx --input PICTURE --output out --compare", "--compare cannot change"),
        ("--onnx a.onnx --input PICTURE --output out --order score", "--order cannot change"),
        ("--onnx a.onnx --input PICTURE --confidence-threshold 0", "--confidence-threshold cannot"),
        ("--onnx a.onnx --input PICTURE --output out --opts A 1", "--opts cannot change"),
        ("--input PICTURE --output out --order none", "none"),
        ("--input nowhere.jpg --output out", "nowhere.jpg"),
        ("--input PICTURE PICTURE2 --output out.png", "--output is out.png"),
        ("--input PICTURE --output note.txt", "note.txt"),
        ("--input PICTURE --output out --compare --order score", "--compare needs another order"),
        ("--input PICTURE --output out --confidence-threshold 60", "is 60.0"),
        ("--input PICTURE --save-panoptic out.txt", "--save-panoptic is out.txt"),
        ("--video-input a.mp4 --output out --save-panoptic", "--save-panoptic is for pictures"),
        ("--video-input note.txt --output out", "note.txt"),
        ("--video-input nowhere.mp4 --output out", "nowhere.mp4"),
        ("--webcam --output out", "--webcam"),
        ("--input PICTURE", "--output"),  # and no display
        ("--input PICTURE --output out --opts MODEL.NO_SUCH_KEY 1", "MODEL.NO_SUCH_KEY"),
        ("--input PICTURE --output out --opts MODEL.WEIGHTS nowhere.pth", "nowhere.pth"),
        ("--config-file nowhere.yaml --input PICTURE --output out", "nowhere.yaml"),
    ],
)
def test_bad_arguments(run, pictures, tmp_path, monkeypatch, args, words):
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.chdir(tmp_path)
    touch(tmp_path, "note.txt")
    args = args.replace("PICTURE2", str(pictures[1])).replace("PICTURE", str(pictures[0]))
    status, text = run(*args.split())
    assert status == 2 and words in text and "Traceback" not in text
    assert files_in(tmp_path) == ["note.txt"]


def test_an_exported_model_needs_neither_detectron2_nor_pytorch(
    subprocess_env, onnx_model, pictures, tmp_path
):
    absent = ["torch", "torchvision", "detectron2", "fvcore", "panopticapi", "scipy", "matplotlib"]
    script = f"import sys, runpy; sys.modules.update(dict.fromkeys({absent}))\n"
    script += "runpy.run_path(sys.argv.pop(1), run_name='__main__')"
    command = [sys.executable, "-c", script, REPOSITORY / "demo/demo.py", "--onnx", onnx_model]
    command += ["--input", pictures[0], "--output", tmp_path / "a.png", "--save-panoptic"]
    result = subprocess.run(command, env=subprocess_env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert files_in(tmp_path) == ["a.png", "panoptic.json", f"panoptic/{pictures[0].stem}.png"]
    assert "segmented in" in result.stdout


def test_as_a_script(subprocess_env, config_file, pictures, tmp_path):
    shutil.copy(pictures[0], tmp_path / "a.jpg")
    (tmp_path / "b.jpg").write_text("no picture")
    command = [sys.executable, REPOSITORY / "demo/demo.py", "--config-file", config_file]
    command += ["--input", tmp_path, "--output", tmp_path / "out"]
    result = subprocess.run(command, env=subprocess_env, capture_output=True, text=True)
    assert result.returncode == 1, result.stderr
    assert files_in(tmp_path / "out") == ["a.jpg"] and "b.jpg skipped: " in result.stdout
