import contextlib
import functools
import io
import json
import logging
import re
import shlex
import shutil
import subprocess
import sys

import cv2
import numpy as np
import pytest
from panopticapi.evaluation import pq_compute
from panopticapi.utils import rgb2id
from PIL import Image

from detectron2.data import MetadataCatalog

import demo
from oanet_d2 import PanopticPredictor
from oanet_d2.data.occlusion_scenes import CATEGORIES
from oanet_d2.visualization import GAP, MARK, PANEL_SIDE, TITLE_HEIGHT
from tests.conftest import REPOSITORY, load_config, registered, scenes_paths
from tests.demo.conftest import files_in, owners

from_config = PanopticPredictor.from_config


@functools.cache
def built_once(config_file, opts):
    return from_config(config_file, opts=opts)


@pytest.fixture
def run(config_file, monkeypatch, caplog, capsys):
    """
    Run the demo with the tiny network. Gives its exit status, and what it logs or prints as error.
    """
    once = lambda path, opts=(): built_once(path, tuple(opts))  # noqa: E731
    monkeypatch.setattr(PanopticPredictor, "from_config", once)
    monkeypatch.setattr(demo, "setup_logger", lambda name: None)  # caplog is there
    monkeypatch.setattr(logging.getLogger("oanet_d2"), "propagate", True)

    def run(*args, config=config_file):
        caplog.clear()
        with caplog.at_level(logging.INFO, "oanet_d2"):
            try:
                status = demo.main(["--config-file", str(config), *map(str, args)])
            except SystemExit as end:
                status = end.code
        return status, caplog.text + capsys.readouterr().err

    return run


def touch(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"")


# Which files are read and written


def test_files_folders_and_patterns(tmp_path, monkeypatch):
    touch(tmp_path, "in/b.jpg", "in/a.PNG", "in/note.txt", "in/film.mpg", "in/._b.jpg")
    touch(tmp_path, "in/deep/c.jpg", "x[1].jpg", "raw.dat")
    monkeypatch.chdir(tmp_path)
    assert demo.find_pictures(["in"]) == ["in/a.PNG", "in/b.jpg"]
    assert demo.find_pictures(["in/**/*.jpg"]) == ["in/b.jpg", "in/deep/c.jpg"]
    # A file is a file, whatever its name looks like. What is given twice is one picture.
    assert demo.find_pictures(["x[1].jpg", "raw.dat"]) == ["x[1].jpg", "raw.dat"]
    assert demo.find_pictures(["./in/b.jpg", "in", "in/b.jpg"])[1:] == ["in/a.PNG"]
    monkeypatch.setenv("HOME", str(tmp_path / "in"))
    assert demo.find_pictures(["~/b.jpg"]) == [str(tmp_path / "in" / "b.jpg")]
    for missing in ("nowhere.jpg", "none*.jpg", "in/deep/none"):
        with pytest.raises(ValueError, match=re.escape(missing)):
            demo.find_pictures(["in", missing])


@pytest.mark.parametrize(
    "paths, stems, names",
    [
        (["in/a.jpg", "/x/b.png"], ["a", "b"], ["a.jpg", "b.png"]),
        (["/x/1/a.jpg", "/x/2/a.jpg"], ["1/a", "2/a"], ["1/a.jpg", "2/a.jpg"]),
        (["a.jpg", "a.bmp"], ["a.jpg", "a.bmp"], ["a.jpg", "a.bmp"]),
        (["scan.xyz", "b"], ["scan", "b"], ["scan.xyz.png", "b.png"]),
    ],
)
def test_names_of_outputs(paths, stems, names):
    assert demo.names_of(paths) == (stems, names)


def test_a_folder_of_pictures(run, scenes, pictures, tmp_path):
    status, text = run("--input", scenes / "val", "--output", tmp_path / "new" / "folder")
    assert status == 0
    assert files_in(tmp_path) == [f"new/folder/{p.name}" for p in pictures]
    for path in pictures:
        with Image.open(tmp_path / "new" / "folder" / path.name) as drawing:
            assert drawing.format == "JPEG" and drawing.size == (480, 480)
        assert f"{path}: " in text


@pytest.mark.parametrize("extension", demo.PICTURES)
def test_one_picture_to_a_file(run, pictures, tmp_path, extension):
    output = tmp_path / f"segmented{extension}"
    status, _ = run("--input", pictures[0], "--output", output)
    assert status == 0 and files_in(tmp_path) == [output.name]
    assert Image.open(output).convert("RGB").size == (480, 480)


def test_pictures_of_one_name_stay_apart(run, pictures, tmp_path):
    for k in (1, 2):
        (tmp_path / "in" / str(k)).mkdir(parents=True)
        shutil.copy(pictures[k], tmp_path / "in" / str(k) / "a.jpg")
    output = tmp_path / "out"
    status, _ = run("--input", tmp_path / "in/*/*.jpg", "--output", output, "--save-panoptic")
    assert status == 0
    drawings, pngs = ["1/a.jpg", "2/a.jpg"], ["panoptic/1/a.png", "panoptic/2/a.png"]
    assert files_in(output) == [*drawings, "panoptic.json", *pngs]
    assert (output / drawings[0]).read_bytes() != (output / drawings[1]).read_bytes()
    images = json.loads((output / "panoptic.json").read_text())["images"]
    assert [x["id"] for x in images] == ["1/a", "2/a"]


def test_what_cannot_be_segmented_is_named_and_skipped(run, pictures, tmp_path):
    folder, output = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    for k, path in enumerate(pictures[:2]):
        shutil.copy(path, folder / f"{k}.jpg")
    (folder / "0_cut.jpg").write_bytes(pictures[0].read_bytes()[:700])
    (folder / "0_text.png").write_text("no picture")
    Image.new("I;16", (64, 64)).save(folder / "0_deep.png")
    Image.new("RGB", (3000, 1)).save(folder / "0_thin.png")  # less than a pixel when resized
    Image.new("RGB", (2, 100)).save(folder / "2_narrow.png")
    status, text = run("--input", folder, "--output", output, "--save-panoptic")
    assert status == 1 and "Traceback" not in text
    for name in ("0_cut.jpg", "0_text.png", "0_deep.png", "0_thin.png"):
        assert f"{folder / name} skipped: " in text
    done = ["0.jpg", "1.jpg", "2_narrow.png"]
    pngs = ["panoptic/0.png", "panoptic/1.png", "panoptic/2_narrow.png"]
    assert files_in(output) == [*done, "panoptic.json", *pngs]
    written = json.loads((output / "panoptic.json").read_text())
    assert [x["image_id"] for x in written["annotations"]] == [0, 1, "2_narrow"]
    assert [x["id"] for x in written["images"]] == [0, 1, "2_narrow"]


def test_what_cannot_be_drawn_is_skipped(run, pictures, tmp_path, monkeypatch):
    draw = demo.Segmenter.draw

    def draw_all_but_one(self, results):
        if (results[0].image == cv2.imread(str(pictures[0]))).all():
            raise AssertionError("too odd")
        return draw(self, results)

    monkeypatch.setattr(demo.Segmenter, "draw", draw_all_but_one)
    status, text = run("--input", *pictures[:2], "--output", tmp_path / "out")
    assert status == 1 and f"{pictures[0]} skipped: too odd" in text
    assert files_in(tmp_path / "out") == [pictures[1].name]


def test_files_are_replaced_only_if_asked(run, pictures, tmp_path):
    args = ["--input", *pictures[:2], "--output", tmp_path, "--save-panoptic"]
    for name in (pictures[1].name, "panoptic.json", f"panoptic/{pictures[0].stem}.png"):
        touch(tmp_path, name)
        status, text = run(*args)
        assert status == 2 and f"{tmp_path / name} is there already" in text
        assert files_in(tmp_path) == [name] and not (tmp_path / name).read_bytes()
        (tmp_path / name).unlink()
    touch(tmp_path, pictures[0].name)
    assert run(*args, "--overwrite")[0] == 0
    assert Image.open(tmp_path / pictures[0].name).size == (480, 480)


def test_an_output_is_never_an_input_or_another_output(run, pictures, tmp_path):
    picture = tmp_path / "a.png"
    Image.open(pictures[0]).save(picture)
    (tmp_path / "link").symlink_to(tmp_path)
    before = picture.read_bytes()
    for folder in (tmp_path, tmp_path / "link"):
        status, text = run("--input", picture, "--output", folder, "--overwrite")
        assert status == 2 and f"{folder / 'a.png'} is an input" in text
    json_file = tmp_path / "out.json"  # its PNGs go to the folder of the drawings
    args = ["--output", tmp_path / "out", "--save-panoptic", json_file]
    assert run("--input", picture, *args)[0] == 2
    assert picture.read_bytes() == before and not (tmp_path / "out").exists()


def test_a_full_disk_leaves_the_old_drawing(run, pictures, small_disk):
    old = small_disk / "old.bmp"
    old.write_text("old")
    (small_disk / "fill").write_bytes(b"0" * 600_000)
    status, text = run("--input", pictures[0], "--output", old, "--overwrite")
    assert status == 2 and "No space left" in text and str(old) in text
    assert files_in(small_disk) == ["fill", "old.bmp"] and old.read_text() == "old"


# Orders


def test_compare(run, config_file, pictures, tmp_path):
    png = tmp_path / "in.png"
    Image.open(pictures[0]).save(png)
    args = ["--input", png, "--output", tmp_path / "out.png", "--compare"]
    assert run(*args, "--order", "srm_overlap", "--confidence-threshold", 0.3)[0] == 0

    opts = ["MODEL.OANET.ORDER", "srm_overlap"]
    opts += ["MODEL.PANOPTIC_FPN.COMBINE.INSTANCES_CONFIDENCE_THRESH", 0.3]
    predictor = PanopticPredictor.from_config(config_file, opts=opts)
    results = predictor.in_orders(str(png), ["score", "srm_overlap"]).values()
    before, after = (owners(*x.panoptic) for x in results)
    changed = before != after
    assert 0 < changed.mean() < 1

    picture = np.asarray(Image.open(tmp_path / "out.png"))
    assert picture.shape == (PANEL_SIDE + TITLE_HEIGHT, 3 * PANEL_SIDE + 2 * GAP, 3)
    starts = [k * (PANEL_SIDE + GAP) for k in range(3)]
    image, score, ranked = (picture[TITLE_HEIGHT:, x : x + PANEL_SIDE] for x in starts)
    marks = [(panel == MARK).all(axis=2) for panel in (image, score, ranked)]
    assert not marks[0].any() and marks[1].sum() > 100 and (marks[1] == marks[2]).mean() > 0.99
    # The outlines lie within a pixel of what changed.
    near = cv2.dilate(changed.astype(np.uint8), np.ones((3, 3)))
    near = cv2.resize(near, (PANEL_SIDE, PANEL_SIDE), interpolation=cv2.INTER_NEAREST) > 0
    assert not (marks[1] & ~near).any()
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


# COCO panoptic format


def test_panopticapi_takes_the_results(run, config_file, scenes, pictures, tmp_path):
    """Without --output nothing is drawn."""
    output = tmp_path / "results.json"
    assert run("--input", scenes / "val", "--save-panoptic", output)[0] == 0
    assert files_in(tmp_path) == ["results.json", *(f"results/{p.stem}.png" for p in pictures)]
    _, gt_json, gt_folder, _ = map(str, scenes_paths(scenes, "val"))
    with contextlib.redirect_stdout(io.StringIO()):
        pq_compute(gt_json, str(output), gt_folder=gt_folder)  # it compares JSON and PNGs

    results = json.loads(output.read_text())
    without = [{k: c[k] for k in c if k != "supercategory"} for c in CATEGORIES]
    assert results["categories"] == without
    names = {c["id"]: c["name"] for c in results["categories"]}
    predictor = PanopticPredictor.from_config(config_file)
    for path, annotation in zip(pictures, results["annotations"]):
        assert annotation["image_id"] == int(path.stem)
        result = predictor(path)
        ids = rgb2id(np.asarray(Image.open(tmp_path / "results" / annotation["file_name"])))
        assert (ids == result.panoptic_seg.numpy()).all()
        found = [(s["id"], names[s["category_id"]]) for s in annotation["segments_info"]]
        assert found == [(s["id"], s["category_name"]) for s in result.segments_info]


def test_ids_in_the_panoptic_format(scenes, pictures, tmp_path):
    none = MetadataCatalog.get("occlusion_scenes_val")
    assert demo.image_ids(["x/000139.jpg", "b.jpg"], ["000139", "b"], none) == [139, "b"]
    assert demo.image_ids(["1.jpg", "01.jpg"], ["1", "01"], none) == ["1", "01"]
    # A dataset whose ids are not the names of its images.
    root, panoptic, folder, _ = scenes_paths(scenes, "val")
    own = tmp_path / "own.json"
    own.write_text(panoptic.read_text().replace('"id": 1000001', '"id": 77'))
    with registered("test_demo_ids", root, own, folder) as name:
        paths, stems = [str(pictures[0]), "b.jpg", "5.jpg"], [pictures[0].stem, "b", "5"]
        assert demo.image_ids(paths, stems, MetadataCatalog.get(name)) == [77, "b", 5]


# Videos and windows


@pytest.fixture(scope="module")
def video(tmp_path_factory, pictures):
    path = str(tmp_path_factory.mktemp("video") / "scenes.avi")
    writer = cv2.VideoWriter(path, cv2.VideoWriter_fourcc(*"MJPG"), 5, (64, 64))
    for picture in pictures[:3]:
        writer.write(cv2.imread(str(picture)))
    writer.release()
    return path


def frames_of(path):
    capture = cv2.VideoCapture(str(path))
    rate, frames = capture.get(cv2.CAP_PROP_FPS), []
    while True:
        success, frame = capture.read()
        if not success:
            return rate, frames
        frames.append(frame)


def test_video(run, video, tmp_path):
    assert run("--video-input", video, "--output", tmp_path / "out")[0] == 0
    assert files_in(tmp_path) == ["out/scenes.mp4"]
    rate, frames = frames_of(tmp_path / "out" / "scenes.mp4")
    assert rate == 5 and [x.shape for x in frames] == [(64, 64, 3)] * 3
    _, given = frames_of(video)
    assert min(np.abs(x.astype(int) - y).mean() for x, y in zip(frames, given)) > 10  # painted
    status, text = run("--video-input", video, "--output", tmp_path / "out")
    assert status == 2 and "scenes.mp4 is there already" in text


def test_video_compared(run, video, tmp_path):
    output = tmp_path / "compared.mkv"
    assert run("--video-input", video, "--output", output, "--compare")[0] == 0
    size = PANEL_SIDE + TITLE_HEIGHT, 3 * PANEL_SIDE + 2 * GAP, 3
    assert [x.shape for x in frames_of(output)[1]] == [size] * 3


def test_an_interrupted_video_leaves_nothing(run, video, tmp_path, monkeypatch):
    calls = []

    def interrupt(self, image):
        calls.append(image)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return [self.predictor(image)]

    monkeypatch.setattr(demo.Segmenter, "__call__", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run("--video-input", video, "--output", tmp_path / "out.mp4")
    assert files_in(tmp_path) == []


def test_windows(run, pictures, video, monkeypatch):
    shown, keys, opened, capture = [], [], [], cv2.VideoCapture
    monkeypatch.setenv("DISPLAY", ":0")
    monkeypatch.setattr(cv2, "namedWindow", lambda name, flags: None)
    monkeypatch.setattr(cv2, "imshow", lambda name, picture: shown.append(picture))
    monkeypatch.setattr(cv2, "waitKey", lambda delay: keys.pop(0) if keys else -1)
    monkeypatch.setattr(cv2, "VideoCapture", lambda x: opened.append(x) or capture(video))
    escape = 27
    for args, pressed, number in (
        (["--input", *pictures[:2]], [ord("x"), ord("x")], 2),
        (["--input", *pictures[:2]], [escape], 1),
        (["--video-input", video], [], 3),
        (["--webcam"], [-1, escape], 2),
    ):
        shown.clear()
        keys[:] = pressed
        assert run(*args)[0] == 0 and len(shown) == number
    assert opened == [video, 0]


# Arguments


@pytest.mark.parametrize(
    "args, words",
    [
        ("", "--webcam --video-input --input is required"),
        ("--input a.jpg --webcam", "not allowed with argument"),
        ("--input nowhere.jpg --output out", "nowhere.jpg"),
        ("--input PICTURE PICTURE2 --output out.png", "--output is out.png"),
        ("--input PICTURE --output note.txt", "note.txt"),
        ("--input PICTURE --output out --order depth", "invalid choice: 'depth'"),
        ("--input PICTURE --output out --compare --order score", "--compare needs another order"),
        ("--input PICTURE --output out --confidence-threshold 60", "is 60.0"),
        ("--input PICTURE --output out --confidence-threshold nan", "is nan"),
        ("--input PICTURE --save-panoptic", "--save-panoptic needs"),
        ("--input PICTURE --output out.png --save-panoptic", "--save-panoptic needs"),
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


def test_as_a_script(subprocess_env, config_file, pictures, tmp_path):
    output = tmp_path / "out"
    shutil.copy(pictures[0], tmp_path / "a.jpg")
    (tmp_path / "b.jpg").write_text("no picture")
    result = subprocess.run(
        [sys.executable, str(REPOSITORY / "demo" / "demo.py"), "--config-file", str(config_file)]
        + ["--input", str(tmp_path), "--output", str(output)],
        env=subprocess_env,
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert result.returncode == 1, result.stderr
    assert files_in(output) == ["a.jpg"] and "b.jpg skipped: " in result.stdout


def test_the_command_of_the_readme():
    readme = (REPOSITORY / "README.md").read_text()
    command = re.search(r"^    python demo/demo.py ((?:.*\\\n)*.*)$", readme, re.M)[1]
    args = demo.get_parser().parse_args(shlex.split(command.replace("\\\n", " ")))
    weights = load_config("OcclusionScenes/oanet_R_18.yaml").OUTPUT_DIR + "/model_final.pth"
    assert (REPOSITORY / args.config_file).is_file() and args.opts == ["MODEL.WEIGHTS", weights]
