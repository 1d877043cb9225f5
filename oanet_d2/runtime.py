"""
Panoptic segmentation with an exported model: ONNX Runtime or OpenVINO, NumPy and OpenCV, without
PyTorch and Detectron2. `pip install '.[runtime]'` installs what it needs.
"""

import json
import os
from types import SimpleNamespace
from typing import Any, Callable, Dict, Mapping, Optional, Sequence, Tuple, Union

import cv2
import numpy as np

from .painting.arrays import fuse, label_in_tiles, order_of_sorted, pasted_mask
from .resize import resize, shortest_edge_size
from .result import PanopticResult, check_picture, with_names

__all__ = ["FORMAT_VERSION", "OnnxPredictor"]

FORMAT_VERSION = 1

Path = Union[str, os.PathLike]
Size = Tuple[int, int]  # height and width
Arrays = Dict[str, np.ndarray]


class OnnxPredictor:
    """
    :class:`PanopticPredictor` of an exported model. One predictor can serve several threads.

    Attributes:
        session: the `onnxruntime.InferenceSession`, or the `openvino.CompiledModel`.
        options: what the model was exported with, by name.
        metadata: the classes, in the attributes of Detectron2's metadata.
    """

    def __init__(
        self,
        path: Path,
        providers: Sequence = ("CPUExecutionProvider",),
        openvino: Optional[Mapping[str, Any]] = None,
    ):
        """
        Args:
            path: the exported model, `*.onnx`.
            providers: where it runs, as ONNX Runtime takes them. ("CUDAExecutionProvider",
                "CPUExecutionProvider") is a GPU where there is one; it needs onnxruntime-gpu.
            openvino: properties for OpenVINO, which then runs the model on the CPU instead of ONNX
                Runtime. {} computes in single precision, {"INFERENCE_PRECISION_HINT": "bf16"} in
                half of it.

        Raises:
            ValueError: the file cannot be used. The message says why.
        """
        if not os.path.isfile(path):
            raise ValueError(f"{path} is no file.")
        self.session, self._run, description = (
            _onnxruntime(path, providers) if openvino is None else _openvino(path, openvino)
        )
        self.options = options = _options(description, path)
        self.metadata = SimpleNamespace(
            thing_classes=options["thing_classes"],
            stuff_classes=options["stuff_classes"],
            thing_colors=options["thing_colors"],
            stuff_colors=options["stuff_colors"],
            thing_dataset_id_to_contiguous_id={x: i for i, x in enumerate(options["thing_ids"])},
            # Stuff 0 is "things", of no category.
            stuff_dataset_id_to_contiguous_id={x: i for i, x in enumerate(options["stuff_ids"]) if i},
        )

    def __call__(self, image: Union[Path, np.ndarray]) -> PanopticResult:
        """
        Args:
            image: path of a picture, or a (H, W, 3) uint8 array in BGR, OpenCV's order.

        Returns:
            the result. Its "predictions" are "boxes" (N, 4) float32 XYXY in pixels of the picture,
            "scores" (N,) float32 and "classes" (N,) int64.

        Raises:
            ValueError: the picture cannot be read, or is something else.
        """
        image = _picture(image)
        height, width = size = image.shape[0], image.shape[1]
        input_size = shortest_edge_size(size, self.options["min_size"], self.options["max_size"])
        if min(input_size) < 1:
            raise ValueError(f"A picture of {width} x {height} pixels is too narrow to be resized.")
        resized = resize(image, input_size)
        if self.options["input_format"] == "RGB":
            resized = cv2.cvtColor(resized, cv2.COLOR_BGR2RGB)
        found = self._run(np.ascontiguousarray(resized))
        order = _resize_instances(found, input_size, size)

        panoptic, semantic = np.zeros(size, np.int32), np.empty(size, np.int64)
        stride, free = self.options["semantic_stride"], self.options["keep_things_free"]
        label_in_tiles(semantic, found["semantic"], stride, input_size, free)
        boxes = found["boxes"].tolist()
        segments = fuse(
            panoptic,
            lambda i: pasted_mask(found["masks"][i], boxes[i], size),
            found["scores"].tolist(),
            found["classes"].tolist(),
            order.tolist(),
            semantic,
            overlap_threshold=self.options["overlap_threshold"],
            stuff_area_thresh=self.options["stuff_area_thresh"],
        )
        predictions = {name: found[name] for name in ("boxes", "scores", "classes")}
        named = with_names(segments, self.metadata)
        return PanopticResult(image, panoptic, named, self.metadata, predictions)


def _onnxruntime(path: Path, providers: Sequence) -> Tuple[Any, Callable[[np.ndarray], Arrays], Any]:
    """The loaded model, a function that runs it, and what the exporter says about it."""
    import onnxruntime

    try:
        options = onnxruntime.SessionOptions()
        options.enable_mem_pattern = False  # it would keep a block of memory for every size of picture
        session = onnxruntime.InferenceSession(os.fspath(path), options, providers=list(providers))
    except Exception as error:  # ONNX Runtime has a dozen kinds, without a common one
        raise ValueError(f"{path} cannot be loaded by ONNX Runtime: {error}") from error
    names = [x.name for x in session.get_outputs()]

    def run(image: np.ndarray) -> Arrays:
        return dict(zip(names, session.run(names, {"image": image})))

    return session, run, session.get_modelmeta().custom_metadata_map.get("oanet_d2")


def _openvino(path: Path, properties: Mapping) -> Tuple[Any, Callable[[np.ndarray], Arrays], Any]:
    """The same as :func:`_onnxruntime`."""
    import openvino

    # Without a precision OpenVINO takes half of it where the CPU can.
    properties = {"INFERENCE_PRECISION_HINT": "f32", **properties}
    core = openvino.Core()
    try:
        model = core.read_model(os.fspath(path))
        compiled = core.compile_model(model, "CPU", properties)
    except RuntimeError as error:
        raise ValueError(f"{path} cannot be loaded by OpenVINO: {error}") from error

    def run(image: np.ndarray) -> Arrays:
        found = compiled.create_infer_request().infer({"image": image})
        return {output.any_name: array for output, array in found.items()}

    key = ["framework", "oanet_d2"]
    return compiled, run, model.get_rt_info(key).astype(str) if model.has_rt_info(key) else None


def _options(text: Optional[str], path: Path) -> Dict[str, Any]:
    if text is None:
        raise ValueError(
            f"{path} is an ONNX model, but not one of `oanet-d2 export`: its metadata have no "
            "'oanet_d2'."
        )
    options = json.loads(text)
    if options.get("version") != FORMAT_VERSION:
        raise ValueError(
            f"{path} has the format version {options.get('version')}; this oanet_d2 reads version "
            f"{FORMAT_VERSION}. Export it again."
        )
    return options


def _picture(image: Union[Path, np.ndarray]) -> np.ndarray:
    if not isinstance(image, np.ndarray):
        path = os.fspath(image)
        # With all its bits, so that a picture of 16 bits a channel is refused, not cut to 8.
        read = cv2.imread(path, cv2.IMREAD_COLOR | cv2.IMREAD_ANYDEPTH)
        if read is None:
            raise ValueError(f"{path} is no picture that OpenCV can read.")
        if read.dtype != np.uint8:
            raise ValueError(f"{path} is a picture of {read.dtype}; convert it to 8 bits per channel.")
        return read
    check_picture(image)
    return image


def _resize_instances(found: Dict[str, np.ndarray], input_size: Size, size: Size) -> np.ndarray:
    """
    As Detectron2's `detector_postprocess`: the boxes in `found` become boxes in the picture, and
    instances whose box is empty there go. Returns the painting order of those that are left.
    """
    (height, width), (input_height, input_width) = size, input_size
    scale = np.array([width / input_width, height / input_height] * 2, np.float32)
    found["boxes"] = boxes = np.clip(found["boxes"] * scale, 0, np.array([width, height] * 2, np.float32))
    left = (boxes[:, 2:] > boxes[:, :2]).all(axis=1)
    for name in ("boxes", "scores", "classes", "masks"):
        found[name] = found[name][left]
    if "margins" in found:
        return order_of_sorted(found["margins"][left][:, left])
    order = found["order"]
    return (left.cumsum() - 1)[order[left[order]]]  # positions among those that are left
