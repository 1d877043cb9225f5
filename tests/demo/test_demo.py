import contextlib
import io
import json
import shutil
import subprocess
import sys

import cv2
import numpy as np
import pictures as demo_pictures
import pytest
import torch
import window
from panopticapi.evaluation import pq_compute
from panopticapi.utils import rgb2id
from PIL import Image

from detectron2.data import DatasetCatalog, MetadataCatalog

import demo
from oanet_d2 import PanopticPredictor, PanopticResult
from oanet_d2.data.occlusion_scenes import CATEGORIES
from oanet_d2.visualization import MARK, PANEL_SIDE, TITLE_HEIGHT
from tests.conftest import REPOSITORY, registered, scenes_paths
from tests.demo.conftest import files_in, owners


@pytest.fixture
def no_predictor(monkeypatch):
    """Whoever wants a network fails: what is refused is refused before any work."""

    def build_predictor(args):
        raise AssertionError("the network was built")

    monkeypatch.setattr(demo, "build_predictor", build_predictor)


def test_a_folder_of_pictures(run, scenes, pictures, tmp_path):
    status, text = run("--input", scenes / "val", "--output", tmp_path / "new" / "folder")
    assert status == 0
    assert files_in(tmp_path) == [f"new/folder/{p.name}" for p in pictures]
    for path in pictures:
        with Image.open(tmp_path / "new" / "folder" / path.name) as drawing:
            assert drawing.format == "JPEG" and drawing.size == (480, 480)
        assert f"{path}: " in text


def test_one_picture_to_a_file(run, pictures, tmp_path):
    status, _ = run("--input", pictures[0], "--output", tmp_path / "segmented.png")
    assert status == 0 and files_in(tmp_path) == ["segmented.png"]
    assert Image.open(tmp_path / "segmented.png").format == "PNG"


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


def test_what_cannot_be_read_is_skipped_and_told(run, pictures, tmp_path):
    folder, output = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    for k, path in enumerate(pictures[:2]):
        shutil.copy(path, folder / f"{k}.jpg")
    (folder / "0_cut.jpg").write_bytes(pictures[0].read_bytes()[:700])
    (folder / "0_text.png").write_text("no picture")
    Image.new("I;16", (64, 64)).save(folder / "0_deep.png")
    Image.new("RGB", (3000, 1)).save(folder / "0_thin.png")  # less than a pixel high when resized
    status, text = run("--input", folder, "--output", output, "--save-panoptic")
    assert status == 1
    for name in ("0_cut.jpg", "0_text.png", "0_deep.png", "0_thin.png"):
        assert f"{folder / name} skipped: " in text
    assert "4 of 6 skipped" in text
    drawings, pngs = ["0.jpg", "1.jpg"], ["panoptic/0.png", "panoptic/1.png"]
    assert files_in(output) == [*drawings, "panoptic.json", *pngs]
    written = json.loads((output / "panoptic.json").read_text())
    assert [x["image_id"] for x in written["annotations"]] == [0, 1]
    assert [x["id"] for x in written["images"]] == [0, 1]


def test_what_is_there_stays(run, no_predictor, pictures, tmp_path):
    old = tmp_path / pictures[1].name
    old.write_text("old")
    status, text = run("--input", *pictures, "--output", tmp_path)
    assert status == 2 and f"{old} would be overwritten" in text and "--overwrite" in text
    assert files_in(tmp_path) == [old.name] and old.read_text() == "old"
    for there in ("panoptic.json", f"panoptic/{pictures[0].stem}.png"):
        folder = tmp_path / there.replace("/", "_")
        (folder / there).parent.mkdir(parents=True)
        (folder / there).write_text("old")
        status, text = run("--input", *pictures, "--output", folder, "--save-panoptic")
        assert status == 2 and f"{there} would be overwritten" in text


def test_overwrite(run, pictures, tmp_path):
    old = tmp_path / pictures[0].name
    old.write_text("old")
    status, _ = run("--input", pictures[0], "--output", tmp_path, "--overwrite")
    assert status == 0 and Image.open(old).size == (480, 480)
    status, text = run("--input", old, "--output", tmp_path, "--overwrite")
    assert status == 2 and f"{old} is an input" in text


def test_a_drawing_that_cannot_be_written_leaves_the_old_one(run, pictures, tmp_path, monkeypatch):
    old = tmp_path / "old.jpg"
    old.write_text("old")

    def full_disk(self, path, **options):
        with open(path, "wb") as f:
            f.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full_disk)
    with pytest.raises(OSError, match="No space left on device: .*old.jpg'"):
        run("--input", pictures[0], "--output", old, "--overwrite")
    assert files_in(tmp_path) == ["old.jpg"] and old.read_text() == "old"


# Orders


def panels(path):
    """The panels of a comparison, (H, W, 3) each, without their titles."""
    picture = np.asarray(Image.open(path).convert("RGB"))[TITLE_HEIGHT:]
    assert picture.shape[1] == 3 * PANEL_SIDE + 2 * 6
    return [picture[:, k : k + PANEL_SIDE] for k in range(0, picture.shape[1], PANEL_SIDE + 6)]


def test_compare(run, config_file, pictures, tmp_path):
    png = tmp_path / "in.png"
    Image.open(pictures[0]).save(png)
    order = ["--order", "srm_overlap", "--confidence-threshold", "0.3"]
    for name in ("compared.png", "again.png"):
        args = ["--input", png, "--output", tmp_path / name, "--compare", *order]
        status, text = run(*args)
        assert status == 0
    assert (tmp_path / "compared.png").read_bytes() == (tmp_path / "again.png").read_bytes()

    opts = ["MODEL.OANET.ORDER", "srm_overlap"]
    opts += ["MODEL.PANOPTIC_FPN.COMBINE.INSTANCES_CONFIDENCE_THRESH", 0.3]
    predictor = PanopticPredictor.from_config(config_file, opts=opts)
    results = predictor.in_orders(str(png), ["score", "srm_overlap"]).values()
    before, after = (owners(x.panoptic_seg, x.segments_info) for x in results)
    changed = before != after
    assert 0 < changed.mean() < 1 and f"{changed.mean():.1%} of the pixels changed" in text

    image, score, ranked = panels(tmp_path / "compared.png")
    marks = [(panel == MARK).all(axis=2) for panel in (image, score, ranked)]
    assert not marks[0].any() and marks[1].sum() > 100 and (marks[1] == marks[2]).mean() > 0.99
    # The outlines lie within two pixels and a half of the picture's size of what changed.
    near = cv2.dilate(changed.astype(np.uint8), np.ones((3, 3)))
    near = cv2.resize(near, (PANEL_SIDE, PANEL_SIDE), interpolation=cv2.INTER_NEAREST) > 0
    assert not (marks[1] & ~near).any()
    assert np.abs(score.astype(int) - ranked).max() > 50


def test_compare_marks_nothing_where_nothing_changes(run, pictures, tmp_path):
    output = tmp_path / "same.png"
    status, text = run(
        *["--input", pictures[0], "--output", output, "--compare"],
        *["--confidence-threshold", 1],  # no instance is left
    )
    assert status == 0 and ": 0 instances" in text and "0.0% of the pixels changed" in text
    _, score, ranked = panels(output)
    assert (score == ranked).all() and not (score == MARK).all(axis=2).any()


def test_compare_needs_another_order(run, pictures, tmp_path):
    args = ["--input", pictures[0], "--output", tmp_path / "out.png", "--compare"]
    status, text = run(*args, "--order", "score")
    assert status == 2 and "MODEL.OANET.ORDER is 'score' itself" in text


def test_arguments_change_the_config(config_file):
    parse = demo.get_parser().parse_args
    common = ["--config-file", str(config_file), "--input", "a.jpg"]
    model = demo.build_predictor(parse(common)).model
    assert model.order == "srm_pairs" and model.combine_instances_score_thresh == 0.6
    args = [*common, "--order", "srm_mean", "--confidence-threshold", "0.1", "--opts"]
    args += ["MODEL.PANOPTIC_FPN.COMBINE.STUFF_AREA_LIMIT", "9"]
    model = demo.build_predictor(parse(args)).model
    assert model.order == "srm_mean" and model.combine_stuff_area_thresh == 9
    assert model.combine_instances_score_thresh == 0.1
    assert model.roi_heads.box_predictor.test_score_thresh == 0.1


# COCO panoptic format


def score_with_panopticapi(scenes, predictions):
    """Its JSON says where the PNGs are."""
    _, gt_json, gt_folder, _ = map(str, scenes_paths(scenes, "val"))
    with contextlib.redirect_stdout(io.StringIO()):
        return pq_compute(gt_json, str(predictions), gt_folder=gt_folder)


def test_panopticapi_takes_the_results(run, config_file, scenes, pictures, tmp_path):
    """Without --output nothing is drawn."""
    output = tmp_path / "results.json"
    status, _ = run("--input", scenes / "val", "--save-panoptic", output)
    assert status == 0
    assert files_in(tmp_path) == ["results.json", *(f"results/{p.stem}.png" for p in pictures)]
    score_with_panopticapi(scenes, output)  # it raises where JSON and PNGs contradict each other

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


class Known:
    """In place of the demo's segmenter: it knows the ground truth."""

    def __init__(self, dataset, wrong=()):
        self.predictor = self
        self.metadata = MetadataCatalog.get(dataset)
        self.wrong = wrong
        self.dicts = {d["file_name"]: d for d in DatasetCatalog.get(dataset)}

    def __call__(self, path):
        d = self.dicts[path]
        with Image.open(d["pan_seg_file_name"]) as png:
            ids = torch.from_numpy(rgb2id(np.asarray(png)).astype(np.int32))
        if path in self.wrong:
            ids, d = torch.zeros_like(ids), {"segments_info": []}
        return [PanopticResult(None, ids, d["segments_info"], self.metadata)]


def test_the_ground_truth_scores_100(scenes, pictures, tmp_path):
    paths = [str(p) for p in pictures]
    with registered("test_demo_known", *scenes_paths(scenes, "val")[:3]) as name:
        for k, wrong in enumerate([(), paths[:1]]):
            output = str(tmp_path / f"{k}.json")
            pngs = [f"{p.stem}.png" for p in pictures]
            plan = demo_pictures.PicturePlan(paths, [], output, pngs)
            segmenter = Known(name, wrong)
            assert demo_pictures.run_on_pictures(plan, segmenter)
            pq = score_with_panopticapi(scenes, output)
            if not wrong:
                assert {pq[x]["pq"] for x in ("All", "Things", "Stuff")} == {1.0}
                continue
            # All of one picture is missing: per class, TP / (TP + FN / 2) with every IoU 1.
            present = {c["id"]: [0, 0] for c in CATEGORIES}
            dataset_id = {
                True: list(segmenter.metadata.thing_dataset_id_to_contiguous_id),
                False: [0, *segmenter.metadata.stuff_dataset_id_to_contiguous_id],
            }
            for path, d in segmenter.dicts.items():
                for s in d["segments_info"]:
                    present[dataset_id[s["isthing"]][s["category_id"]]][path in wrong] += 1
            expected = [tp / (tp + fn / 2) for tp, fn in present.values() if tp + fn]
            assert pq["All"]["pq"] == pytest.approx(np.mean(expected)) and pq["All"]["pq"] < 1


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
    status, text = run("--video-input", video, "--output", tmp_path / "out")
    assert status == 0 and files_in(tmp_path) == ["out/scenes.mp4"]
    rate, frames = frames_of(tmp_path / "out" / "scenes.mp4")
    assert rate == 5 and [x.shape for x in frames] == [(64, 64, 3)] * 3
    _, given = frames_of(video)
    differences = [np.abs(x.astype(int) - y).mean() for x, y in zip(frames, given)]
    assert min(differences) > 10  # painted

    status, text = run("--video-input", video, "--output", tmp_path / "out")
    assert status == 2 and "scenes.mp4 would be overwritten" in text


def test_video_compared(run, video, tmp_path):
    output = tmp_path / "compared.mkv"
    status, _ = run("--video-input", video, "--output", output, "--compare")
    _, frames = frames_of(output)
    width = 3 * PANEL_SIDE + 2 * 6
    assert status == 0 and [x.shape for x in frames] == [(PANEL_SIDE + TITLE_HEIGHT, width, 3)] * 3


def test_an_interrupted_video_leaves_nothing(run, video, tmp_path, monkeypatch):
    read = cv2.VideoCapture.read
    monkeypatch.setattr(PanopticPredictor, "__call__", read)  # not even the right arguments
    with pytest.raises(TypeError):
        run("--video-input", video, "--output", tmp_path / "out.mp4")
    assert files_in(tmp_path) == []


def test_not_a_video(run, no_predictor, tmp_path):
    (tmp_path / "text.mp4").write_text("no video")
    for path in (tmp_path / "text.mp4", tmp_path / "nowhere.mp4"):
        status, text = run("--video-input", path, "--output", tmp_path / "out.mp4")
        assert status == 2 and f"--video-input: {path} is no" in text
    assert files_in(tmp_path) == ["text.mp4"]


@pytest.fixture
def screen(monkeypatch):
    """In place of OpenCV's window: what is shown, and the keys that are pressed."""
    shown, keys = [], []
    monkeypatch.setattr(window, "check_display", lambda: None)
    monkeypatch.setattr(demo, "check_display", lambda: None)
    monkeypatch.setattr(cv2, "namedWindow", lambda name, flags: None)
    monkeypatch.setattr(cv2, "destroyAllWindows", lambda: None)
    monkeypatch.setattr(cv2, "imshow", lambda name, picture: shown.append(picture))
    monkeypatch.setattr(cv2, "waitKey", lambda delay: keys.pop(0) if keys else -1)
    return shown, keys


def test_windows(run, screen, pictures, video, monkeypatch):
    shown, keys = screen
    keys += [ord("x"), ord("x"), window.ESCAPE]
    assert run("--input", *pictures[:2])[0] == 0 and len(shown) == 2
    assert run("--input", *pictures[:2])[0] == 0 and len(shown) == 3
    shown.clear()
    assert run("--video-input", video)[0] == 0 and len(shown) == 3
    # A webcam is a video that has no end.
    opened, keys[:] = [], [-1, window.ESCAPE]
    capture = cv2.VideoCapture
    monkeypatch.setattr(cv2, "VideoCapture", lambda x: opened.append(x) or capture(video))
    assert run("--webcam")[0] == 0 and opened == [0] and len(shown) == 5


@pytest.mark.skipif(sys.platform == "darwin", reason="there is always a display")
def test_without_a_display(run, no_predictor, pictures, monkeypatch):
    """OpenCV would abort the process, and not say that --output helps."""
    monkeypatch.setenv("DISPLAY", ":4711")
    for name in ("WAYLAND_DISPLAY", "QT_QPA_PLATFORM"):
        monkeypatch.delenv(name, raising=False)
    status, text = run("--input", pictures[0])
    assert status == 2 and "Without --output" in text and "OpenCV cannot open one" in text


# Arguments


@pytest.mark.parametrize(
    "args, words",
    [
        ("", "one of the arguments --webcam --video-input --input is required"),
        ("--input a.jpg --webcam", "not allowed with argument"),
        ("--input nowhere.jpg --output out", "--input: nowhere.jpg is no file"),
        ("--input PICTURE PICTURE2 --output out.png", "for 2 pictures it must be a folder"),
        ("--input PICTURE --output PICTURE/..txt", "is a file, and not of a picture"),
        ("--input PICTURE --output out --order depth", "invalid choice: 'depth'"),
        ("--input PICTURE --output out --confidence-threshold 60", "is 60.0; it must lie in"),
        ("--input PICTURE --output out --confidence-threshold nan", "is nan; it must lie in"),
        ("--input PICTURE --save-panoptic", "--save-panoptic needs --output"),
        ("--input PICTURE --output out.png --save-panoptic", "needs a folder as --output"),
        ("--input PICTURE --save-panoptic out.txt", "it must end with .json"),
        ("--video-input a.mp4 --output out --save-panoptic", "it goes with --input"),
        ("--webcam --output out", "it takes no --output"),
    ],
)
def test_bad_arguments(run, no_predictor, pictures, tmp_path, monkeypatch, args, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "note.txt").write_text("")
    args = args.replace("PICTURE2", str(pictures[1])).replace("PICTURE/..txt", "note.txt")
    status, text = run(*args.replace("PICTURE", str(pictures[0])).split())
    assert status == 2 and words in text and "Traceback" not in text
    assert files_in(tmp_path) == ["note.txt"]


@pytest.mark.parametrize(
    "opts, words",
    [
        ("MODEL.NO_SUCH_KEY 1", "override MODEL.NO_SUCH_KEY '1': Non-existent key"),
        ("MODEL.OANET.ORDER", "'MODEL.OANET.ORDER' has no value"),
        ("MODEL.OANET.ORDER depth", "MODEL.OANET.ORDER is 'depth'"),
        ("MODEL.SRM_HEAD.NAME SpatialRankingHead", "which needs MODEL.SRM_HEAD.NAME"),
        ("MODEL.WEIGHTS ''", "MODEL.WEIGHTS is not set"),
        ("MODEL.WEIGHTS nowhere.pth", "nowhere.pth does not exist"),
        ("MODEL.FPN.OUT_CHANNELS 8", "It belongs to another config"),
        ("MODEL.META_ARCHITECTURE PanopticFPN", "MODEL.META_ARCHITECTURE is PanopticFPN"),
        ("DATASETS.TEST () DATASETS.TRAIN ()", "DATASETS.TEST and DATASETS.TRAIN are empty"),
        ("DATASETS.TEST ('no_such',) DATASETS.TRAIN ()", "There is no dataset 'no_such'"),
    ],
)
def test_bad_config(run, pictures, tmp_path, opts, words):
    args = ["--input", pictures[0], "--output", tmp_path / "out"]
    status, text = run(*args, "--opts", *opts.split())
    assert status == 2 and words in text and "Traceback" not in text
    assert files_in(tmp_path) == []


def test_config_files(run, pictures, tmp_path):
    args = ["--input", pictures[0], "--output", tmp_path / "out"]
    status, text = run(*args, config=tmp_path / "nowhere.yaml")
    assert status == 2 and "nowhere.yaml is no file" in text


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
    assert files_in(output) == ["a.jpg"]
    assert "b.jpg skipped: " in result.stdout and "2/2" in result.stderr  # the bar
