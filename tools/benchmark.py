#!/usr/bin/env python3
"""
What OANet costs, beside Detectron2's own functions on the same inputs.

    python tools/benchmark.py --rows semantic_labels mapper    # those of the device if none is named
    python tools/benchmark.py --device cuda --update           # into docs/performance.md
    python tools/benchmark.py --rows exported openvino openvino_bf16 --update docs/deploy.md

The sides take turns, each row in its own process. It needs Linux. OMP_NUM_THREADS sets the threads.
The row "exported" also counts PQ with the weights that `make demo` leaves.
"""

import ctypes
import itertools
import math
import multiprocessing
import os
import re
import sys
import tempfile
import time
import traceback
import warnings
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Callable, Dict, Iterable, List, Optional, Tuple

import numpy as np
import torch
from PIL import Image
from results import fill_region, markdown_table
from torch.nn import functional as F

from detectron2.data import DatasetCatalog, DatasetMapper
from detectron2.engine import AMPTrainer, SimpleTrainer
from detectron2.layers import paste_masks_in_image
from detectron2.modeling import ROI_HEADS_REGISTRY, StandardROIHeads, build_model
from detectron2.modeling.meta_arch.panoptic_fpn import combine_semantic_and_instance_outputs
from detectron2.modeling.postprocessing import sem_seg_postprocess
from detectron2.structures import Boxes, Instances
from detectron2.utils.analysis import FlopCountAnalysis
from detectron2.utils.events import EventStorage

from oanet_d2 import PanopticPredictor, complete_config, load_config, register_panoptic
from oanet_d2.checkpoint import OANetCheckpointer
from oanet_d2.data import PanopticDatasetMapper
from oanet_d2.data.load import read_annotations, read_truth
from oanet_d2.data.occlusion_scenes import write_split
from oanet_d2.engine import BFloat16Trainer, OANetTrainer
from oanet_d2.export import export_onnx
from oanet_d2.painting import BoxedMasks, combine
from oanet_d2.painting.metrics import pq_averages, pq_counts, shared_pixels
from oanet_d2.painting.semantic import resized_semantic_labels
from oanet_d2.runtime import OnnxPredictor

ROOT = Path(__file__).resolve().parent.parent
DEMO = "configs/OcclusionScenes/oanet_R_18.yaml"
COCO = "configs/COCO-PanopticSegmentation/oanet_R_50_srm_only.yaml"  # the zoo's network
END_TO_END = "configs/COCO-PanopticSegmentation/oanet_R_50_1x.yaml"
PANOPTIC_FPN = "MODEL.META_ARCHITECTURE PanopticFPN MODEL.SEM_SEG_HEAD.NAME SemSegFPNHead".split()
PANOPTIC_FPN += ["MODEL.SEM_SEG_HEAD.SUPERVISION", "stuff"]
ONLY_PANOPTIC = ["MODEL.OANET.OUTPUTS", "()"]
NUM_THINGS, NUM_STUFF, IMAGE_SIZE = 80, 53, (800, 1333)
EXPORTED_SIZE = HEIGHT, WIDTH = 800, 1216
Sides = Iterable[Callable]  # ours, theirs


def blobs(size: Tuple[int, int], device: str) -> Instances:
    """100 detections as ROI heads leave them, best first: blobs in boxes of 20 to 400 pixels."""
    box_size = 20 + 380 * torch.rand(100, 2)
    first = torch.rand(100, 2) * (torch.tensor([size[1], size[0]]) - box_size)
    line = torch.linspace(-1, 1, 28)
    radius = (line[:, None] ** 2 + line**2).sqrt()
    return Instances(
        size,
        pred_boxes=Boxes(torch.cat([first, first + box_size], dim=1)),
        scores=0.5 + 0.5 * torch.rand(100).sort(descending=True).values,
        pred_classes=torch.randint(NUM_THINGS, (100,)),
        pred_masks=(8 * (0.8 - radius) + 0.5 * torch.randn(100, 1, 28, 28)).sigmoid(),
    ).to(device)


def smooth_scores(classes: int, size: Tuple[int, int], cell: int, device: str) -> torch.Tensor:
    coarse = torch.randn(1, classes, size[0] // cell, size[1] // cell)
    smooth = 4 * F.interpolate(coarse, size=size, mode="bilinear")[0]
    return (smooth + 0.1 * torch.randn(classes, *size)).to(device)


def paste_and_combine(size: Tuple[int, int], device: str) -> Sides:
    x = blobs(size, device)
    labels = smooth_scores(15, size, 80, device).argmax(dim=0)
    limits = {"overlap_threshold": 0.5, "stuff_area_thresh": 4096, "instances_score_thresh": 0.5}

    def ours():
        masks = BoxedMasks.paste(x.pred_masks[:, 0], x.pred_boxes.tensor, size)
        return combine(masks, x.scores, x.pred_classes, (-x.scores).argsort(), labels, **limits)

    def theirs():
        pasted = Instances(size, scores=x.scores, pred_classes=x.pred_classes)
        pasted.pred_masks = paste_masks_in_image(x.pred_masks[:, 0], x.pred_boxes, size)
        return combine_semantic_and_instance_outputs(pasted, labels, **limits)

    return ours, theirs


def semantic_labels(device: str) -> Sides:
    scores = smooth_scores(NUM_THINGS + NUM_STUFF, (200, 336), 16, device)

    def theirs():
        logits = F.interpolate(scores[None], scale_factor=4, mode="bilinear", align_corners=False)
        return sem_seg_postprocess(logits[0], IMAGE_SIZE, 480, 640).argmax(dim=0)

    return partial(resized_semantic_labels, scores, 4, IMAGE_SIZE, (480, 640), True), theirs


@ROI_HEADS_REGISTRY.register()
class BlobROIHeads(StandardROIHeads):
    """They do all their work. Then blobs replace what random weights detect."""

    def _forward_box(self, features, proposals):
        losses = super()._forward_box(features, proposals)
        return losses if self.training else [self.blobs[:] for _ in proposals]

    def _forward_mask(self, features, instances):
        found = super()._forward_mask(features, instances)
        for x in () if self.training else found:
            x.pred_masks = self.blobs.pred_masks[: len(x)]  # the painted ones come first
        return found


def build_config(config: str, device: str, *opts: str):
    always = ["MODEL.DEVICE", device, "MODEL.WEIGHTS", "", "TEST.ORDERS", "()"]
    cfg = load_config(ROOT / config, always + list(opts))
    complete_config(cfg)
    return cfg


def inference(
    ours: List[str],
    theirs: List[str],
    painted: int,
    device: str,
    network_alone: bool = False,
    size: Optional[Tuple[int, int]] = None,
    batch: int = 1,
    dtype: Optional[torch.dtype] = None,
) -> Sides:
    """
    Whole inference. `painted` of 100 detections have a score over the threshold. `network_alone`: our
    side ends there. `dtype`: of mixed precision.
    """
    size = size or IMAGE_SIZE
    images = [{"image": x} for x in torch.randint(0, 256, (batch, 3, *size), dtype=torch.uint8)]
    detections = blobs(size, device)
    detections.scores[painted:] *= 0.49
    # Inputs are scaled down so far that nothing overflows in a network of random weights.
    shared = ["MODEL.ROI_HEADS.NAME", "BlobROIHeads", "MODEL.PIXEL_STD", "[1e8, 1e8, 1e8]"]
    models = [build_model(build_config(COCO, device, *shared, *x)).eval() for x in (ours, theirs)]
    models[1].load_state_dict(models[0].state_dict(), strict=False)
    for model, is_whole in zip(models, (not network_alone, True)):
        model.roi_heads.blobs = detections
        autocast = torch.autocast(device, dtype, enabled=dtype is not None)
        yield torch.no_grad()(autocast(partial(model.inference, images, is_whole)))


def panoptic_fpn_and_ours() -> Tuple[torch.nn.Module, Callable[[str], None]]:
    """An R-50 Panoptic FPN that detects 100 instances, and what exports an OANet of its weights."""
    # So that random weights detect something: activations of about 1, and unequal scores.
    opts = ["MODEL.PIXEL_STD", "[1e4, 1e4, 1e4]", "MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.5"]
    torch.manual_seed(0)
    theirs = build_model(build_config(COCO, "cpu", *opts, *PANOPTIC_FPN)).eval()
    theirs.roi_heads.box_predictor.cls_score.weight.data *= 100
    model = build_model(build_config(COCO, "cpu", *opts))
    model.load_state_dict(theirs.state_dict(), strict=False)

    def export(file: str) -> None:
        with tempfile.TemporaryDirectory() as folder:
            weights = f"{folder}/weights.pth"
            torch.save({"model": model.state_dict()}, weights)
            cpu = [*opts, "MODEL.DEVICE", "cpu"]
            export_onnx(PanopticPredictor.from_config(ROOT / COCO, weights, cpu), file)

    return theirs, export


def exported(device: str, openvino: Optional[Dict] = None) -> Sides:
    """One file, from the picture to the panoptic map with 100 instances, against Panoptic FPN's module."""
    image = np.random.default_rng(0).integers(0, 256, (*EXPORTED_SIZE, 3), dtype=np.uint8)
    theirs, export = panoptic_fpn_and_ours()
    if openvino is not None:
        openvino = {**openvino, "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    with tempfile.TemporaryDirectory() as folder:
        export(f"{folder}/model.onnx")
        ours = OnnxPredictor(f"{folder}/model.onnx", openvino=openvino)
    given = {"image": torch.as_tensor(image.transpose(2, 0, 1).copy()), "height": HEIGHT, "width": WIDTH}
    return partial(ours, image), torch.no_grad()(partial(theirs.inference, [given]))


def facts_of_exported() -> str:
    """What the file weighs and takes, and the least time that its network could take on this processor."""
    theirs, export = panoptic_fpn_and_ours()
    given = {"image": torch.zeros(3, *EXPORTED_SIZE), "height": HEIGHT, "width": WIDTH}
    operations = 2 * FlopCountAnalysis(theirs, ([given],)).total()
    square = torch.randn(4096, 4096)
    fastest = min(milliseconds_of(partial(torch.mm, square, square), "cpu") for _ in range(5))
    speed = 2 * 4096**3 / fastest
    with tempfile.TemporaryDirectory() as folder:
        file = f"{folder}/model.onnx"
        seconds = [milliseconds_of(partial(export, file), "cpu") / 1e3]
        for openvino in (None, {}):
            load = partial(OnnxPredictor, file, openvino=openvino)
            seconds.append(milliseconds_of(load, "cpu") / 1e3)
        mebibytes = os.path.getsize(file) / 2**20
    return (
        f"The file has {mebibytes:.0f} MiB. Exporting it took {seconds[0]:.0f} s, loading it "
        f"{seconds[1]:.1f} s with ONNX Runtime and {seconds[2]:.1f} s with OpenVINO. Panoptic FPN adds and "
        f"multiplies {operations / 1e9:.0f} billion times for this picture. At the speed of a product of "
        f"two matrices of 4096 x 4096 in float32 ({speed / 1e6:.0f} billion a second) that alone takes "
        f"{operations / speed:.0f} ms."
    )


def quality_of_exported() -> str:
    """PQ on the demo's validation set, with the weights that `make demo` leaves."""
    predictor = PanopticPredictor.from_file(ROOT / "output/occlusion_scenes/model_final.safetensors")
    with tempfile.TemporaryDirectory() as folder:
        export_onnx(predictor, f"{folder}/model.onnx")
        engines = {"PyTorch": predictor, "ONNX Runtime": OnnxPredictor(f"{folder}/model.onnx")}
        for name, openvino in (("OpenVINO", {}), ("OpenVINO in bfloat16", BF16)):
            engines[name] = OnnxPredictor(f"{folder}/model.onnx", openvino=openvino)
    counts = {name: Counter() for name in engines}
    for d in DatasetCatalog.get("occlusion_scenes_val"):
        truth, _ = read_truth(d)
        for name, engine in engines.items():
            ids, segments_info = engine(d["file_name"]).panoptic
            shared = shared_pixels(truth, np.asarray(ids))
            counts[name].update(pq_counts(shared, d["segments_info"], segments_info))
    found = ", ".join(f"{pq_averages(x)['PQ']:.2f} with {name}" for name, x in counts.items())
    return f"PQ on the demo's validation set is {found}."


def scenes(folder: str, number: int, size: int, as_coco: bool = False) -> List[Dict]:
    """
    Dataset dicts of scenes that are written into `folder` and registered under its name. `as_coco`:
    as many classes as COCO has.
    """
    root = Path(folder)
    write_split(root, "train", number, image_size=size, seed=0, num_workers=0)
    jsons = [root / "annotations" / f"{kind}_train.json" for kind in ("panoptic", "instances")]
    categories = read_annotations(str(jsons[0]))["categories"]
    for isthing, wanted in ((1, NUM_THINGS), (0, NUM_STUFF)) if as_coco else ():
        missing = wanted - sum(c["isthing"] == isthing for c in categories)
        categories += [
            {"id": 1000 * (1 + isthing) + i, "name": f"{isthing}, {i}", "isthing": isthing}
            for i in range(missing)
        ]
    files = root / "train", jsons[0], root / "panoptic_train", jsons[1]
    register_panoptic(folder, *files, categories=categories)
    return DatasetCatalog.get(folder)


def training_step(phase: str, device: str, config: str = DEMO, size: int = 192, amp: bool = False) -> Sides:
    """
    Forward, backward and optimizer of two images. The demo starts from its weights if `make demo` has
    left them. With other configs the ranking learns from 100 blobs.
    """

    def step(trainer: SimpleTrainer) -> None:
        with EventStorage():
            trainer.run_step()

    trainer_class = (AMPTrainer if device == "cuda" else BFloat16Trainer) if amp else SimpleTrainer
    always = "SOLVER.BASE_LR 0.0 SOLVER.IMS_PER_BATCH 2 INPUT.MASK_FORMAT bitmask".split()
    with tempfile.TemporaryDirectory() as folder:
        dicts = scenes(folder, 8, size, as_coco=config != DEMO)
        if config != DEMO:
            always += ["DATASETS.TRAIN", f"('{folder}',)", "DATASETS.TEST", "()"]
            always += ["MODEL.ROI_HEADS.NAME", "BlobROIHeads", "MODEL.PIXEL_STD", "[1e4, 1e4, 1e4]"]
            always += ["INPUT.MIN_SIZE_TRAIN", "(800,)"]  # the blobs are of one size, too
        for opts in ([], PANOPTIC_FPN):
            cfg = build_config(config, device, *opts, *always)
            model = build_model(cfg)
            OANetCheckpointer(model, str(ROOT / cfg.OUTPUT_DIR)).resume_or_load("")
            if not opts:
                model.set_phase(phase)
            samples = list(map(PanopticDatasetMapper(cfg, is_train=True), dicts))
            if config != DEMO:
                model.roi_heads.blobs = blobs(samples[0]["image"].shape[1:], device)
            batches = itertools.cycle(zip(*[iter(samples)] * cfg.SOLVER.IMS_PER_BATCH))
            optimizer = OANetTrainer.build_optimizer(cfg, model)
            yield partial(step, trainer_class(model, batches, optimizer))


def mapper(device: str) -> Sides:
    """Eight images of COCO's size on one core. Detectron2's mapper reads a PNG of labels, too."""
    torch.set_num_threads(1)
    folder = tempfile.TemporaryDirectory()
    ours = scenes(folder.name, 8, 640)
    names = ["DATASETS.TRAIN", f"('{folder.name}',)", "DATASETS.TEST", "()"]
    cfg = build_config(COCO, "cpu", *names, "INPUT.MASK_FORMAT", "bitmask")
    theirs = [{**d, "sem_seg_file_name": f"{folder.name}/{d['image_id']}.png"} for d in ours]
    for d in theirs:
        Image.open(d["pan_seg_file_name"]).convert("L").save(d["sem_seg_file_name"])

    def read(mapper, images, folder):
        np.random.seed(0)
        for image in images:
            mapper(image)

    for side, images in ((PanopticDatasetMapper, ours), (DatasetMapper, theirs)):
        yield partial(read, side(cfg, is_train=True), images, folder)


BY_SCORE = [*ONLY_PANOPTIC, "MODEL.OANET.ORDER", "score"]
SMALL, LARGE = (partial(paste_and_combine, size) for size in (IMAGE_SIZE, (2160, 3840)))
WHOLE = partial(inference, ONLY_PANOPTIC)
NETWORK = partial(inference, PANOPTIC_FPN, PANOPTIC_FPN, 100, network_alone=True)
BATCHES = partial(WHOLE, PANOPTIC_FPN, 100, size=EXPORTED_SIZE)
R50_STEP = partial(training_step, config=END_TO_END, size=640)
BF16 = {"INFERENCE_PRECISION_HINT": "bf16"}
ROWS: Dict[str, Tuple[str, Callable[[str], Sides], int]] = {  # title, what to measure, turns
    "paste_combine": ("paste + combine, 100 instances, 800 x 1333", SMALL, 15),
    "paste_combine_4k": ("the same, 2160 x 3840", LARGE, 3),
    "semantic_labels": ("133 semantic scores to labels, 480 x 640", semantic_labels, 7),
    "inference": ("inference, 800 x 1333, 100 painted", partial(WHOLE, PANOPTIC_FPN, 100), 7),
    "inference_20": ("the same, 20 painted", partial(WHOLE, PANOPTIC_FPN, 20), 7),
    "network": ("Panoptic FPN's network alone against the whole", NETWORK, 7),
    "exported": ("exported, 800 x 1216, 100 painted, ONNX Runtime", exported, 7),
    "openvino": ("the same, OpenVINO, float32", partial(exported, openvino={}), 7),
    "openvino_bf16": ("the same, OpenVINO, bfloat16", partial(exported, openvino=BF16), 7),
    "ranking": ("100 painted, *srm_pairs* against *score*", partial(WHOLE, BY_SCORE, 100), 7),
    "training_network": ("demo's step, network's phase", partial(training_step, "network"), 12),
    "training_ranking": ("demo's step, ranking's phase", partial(training_step, "ranking"), 12),
    "mapper": ("mapper, 8 images of 640 x 640, one core", mapper, 15),
}
GPU_ROWS: Dict[str, Tuple[str, Callable[[str], Sides], int]] = {}
for size in (1, 8):
    for name, dtype in (("float32", None), ("float16", torch.float16), ("bfloat16", torch.bfloat16)):
        side = partial(BATCHES, batch=size, dtype=dtype)
        GPU_ROWS[f"batch_{size}_{name}"] = f"inference, 800 x 1216, batch of {size}, {name}", side, 15
for phase in ("network", "ranking"):
    for name, amp in (("float32", False), ("AMP", True)):
        title = f"R-50's step, 2 images of 800 x 800, {phase}'s phase, {name}"
        GPU_ROWS[f"step_{phase}_{name}"] = title, partial(R50_STEP, phase, amp=amp), 15
CPU_ROWS = ("exported", "openvino", "openvino_bf16")  # whatever the device is
ROWS.update(GPU_ROWS)


def measure(name: str, device: str) -> List[str]:
    title, prepare, times = ROWS[name]
    sides = list(prepare(device))
    # The first call counts, too: ONNX Runtime keeps its memory for the next ones.
    mebibytes = np.max([[mebibytes_of(side, device) for side in sides] for _ in range(3)], axis=0)
    turns = np.array([[milliseconds_of(side, device) for side in sides] for _ in range(times)])
    cells = [title, *(f"{x:.1f}" for x in np.median(turns, axis=0))]
    cells.append(f"{np.median(turns[:, 0] / turns[:, 1]):.3f}")
    ours, theirs = mebibytes  # none of a GPU's for what runs on the CPU
    cells += [f"{ours:.1f}", f"{theirs:.1f}", f"{ours / theirs:.3f}" if theirs else ""]
    return cells + [str(waits_of(side)) for side in sides if device == "cuda"]


def in_a_process(function: Callable, *args):
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        return process.submit(function, *args).result()


def milliseconds_of(function: Callable, device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()  # the call before has ended
    start = time.perf_counter()
    function()
    if device == "cuda":
        torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - start)


def waits_of(function: Callable) -> int:
    """How often the host waits for the GPU."""
    torch.cuda.set_sync_debug_mode("warn")
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        function()
    torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing CUDA operation" in str(x.message) for x in found)


def workers_needed(cells: Dict[str, List[str]]) -> str:
    """How many workers of the data loader feed the training steps, from the rows that were measured."""
    read = 8e3 / float(cells["mapper"][1])  # images a second
    needed = [
        f"{cells[name][0]}: {2e3 / float(cells[name][1]):.1f} images a second, "
        f"{math.ceil(2e3 / float(cells[name][1]) / read)} workers"
        for name in cells
        if name.startswith("step_")
    ]
    return "; ".join([f"One worker of the data loader reads {read:.1f} images a second", *needed]) + "."


def mebibytes_of(function: Callable, device: str) -> float:
    """By how much a call raises the peak: of allocations on a GPU, of resident memory on a CPU."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        return (torch.cuda.max_memory_allocated() - before) / 2**20

    def peak() -> float:
        return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 2**10

    ctypes.CDLL(None).malloc_trim(0)  # or the call is served from what was freed before
    Path("/proc/self/clear_refs").write_text("5")  # the peak falls to what is resident now
    before = peak()
    function()
    return peak() - before


def main():
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--rows", nargs="+", metavar="ROW", choices=ROWS)
    about = "write it into this page (docs/performance.md)"
    parser.add_argument("--update", nargs="?", const="docs/performance.md", metavar="PAGE", help=about)
    args = parser.parse_args()
    others = CPU_ROWS if args.device == "cuda" else GPU_ROWS
    names = args.rows or [name for name in ROWS if name not in others]
    rows: Dict[str, List[str]] = {}
    for name in names:
        try:
            rows[name] = in_a_process(measure, name, args.device)
        except Exception:  # the other rows are not lost
            traceback.print_exc()
            continue
        print(*rows[name], sep=" | ", file=sys.stderr, flush=True)
        write(args.device, rows, args.update)
    facts = [in_a_process(x) for x in (facts_of_exported, quality_of_exported) if "exported" in rows]
    print(write(args.device, rows, args.update, *facts))
    if len(rows) < len(names):
        sys.exit(f"Failed, see above: {', '.join(x for x in names if x not in rows)}")


def write(device: str, rows: Dict[str, List[str]], page: Optional[str], *facts: str) -> str:
    """What was measured so far, as Markdown, also into the page if there is one."""
    cpu = f"{os.uname().machine} CPU, {torch.get_num_threads()} of {os.cpu_count()} threads"
    processor = torch.cuda.get_device_name() if device == "cuda" else cpu
    headers = ["", "ours, ms", "Detectron2, ms", "time", "ours, MiB", "Detectron2, MiB", "memory"]
    headers += ["ours, waits", "Detectron2, waits"] if device == "cuda" else []
    about = f"{processor}, PyTorch {torch.__version__}, Python {sys.version.split()[0]}."
    parts = [about, markdown_table(headers, [*rows.values()])]
    parts += [workers_needed(rows)] if "mapper" in rows else []
    text = "\n\n".join([*parts, *facts])
    if page:
        fill_region(ROOT / page, f"tools/benchmark.py --device {device}", text)
    return text


if __name__ == "__main__":
    main()
