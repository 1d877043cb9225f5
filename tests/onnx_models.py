"""Small ONNX files in the format that OnnxPredictor reads."""

import json

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

OPTIONS = {
    "version": 1,
    "input_format": "BGR",
    "min_size": 0,
    "max_size": 1333,
    "order": "srm_pairs",
    "overlap_threshold": 0.5,
    "stuff_area_thresh": 1,
    "keep_things_free": True,
    "semantic_stride": 4,
    "thing_classes": ["person", "tie"],
    "stuff_classes": ["things", "sky", "road"],
    "thing_colors": [[220, 20, 60], [0, 0, 230]],
    "stuff_colors": [[0, 0, 0], [70, 130, 180], [128, 64, 128]],
    "thing_ids": [1, 32],
    "stuff_ids": [0, 187, 149],
}
KINDS = {np.dtype(np.float32): TensorProto.FLOAT, np.dtype(np.int64): TensorProto.INT64}


def instances(boxes, classes, margins=None, order=None, masks=None, size=4):
    """Outputs for N instances, by default with full masks, in the order of their scores."""
    number = len(boxes)
    masks = np.ones((number, size, size)) if masks is None else masks
    outputs = {
        "boxes": np.array(boxes, np.float32).reshape(number, 4),
        "scores": np.linspace(0.9, 0.6, number, dtype=np.float32),
        "classes": np.array(classes, np.int64),
        "masks": np.asarray(masks, np.float32),
    }
    if order is not None:
        return {**outputs, "order": np.array(order, np.int64)}
    margins = np.zeros((number, number)) if margins is None else margins
    return {**outputs, "margins": np.array(margins, np.float32)}


def write_model(path, outputs, **options):
    """
    A model with these constant outputs. Without a constant "semantic", the scores are the means of the
    picture's three channels over 4 x 4 pixels.
    """
    values = [numpy_helper.from_array(x, f"{name}_") for name, x in outputs.items()]
    nodes = [helper.make_node("Identity", [f"{name}_"], [name]) for name in outputs]
    about = [helper.make_tensor_value_info(n, KINDS[x.dtype], x.shape) for n, x in outputs.items()]
    if "semantic" not in outputs:
        values.append(numpy_helper.from_array(np.zeros(1, np.int64), "first"))
        nodes += [
            helper.make_node("Cast", ["image"], ["float"], to=TensorProto.FLOAT),
            helper.make_node("Transpose", ["float"], ["channels"], perm=[2, 0, 1]),
            helper.make_node("Unsqueeze", ["channels", "first"], ["batch"]),
            helper.make_node(
                "AveragePool", ["batch"], ["means"], kernel_shape=[4, 4], strides=[4, 4], ceil_mode=1
            ),
            helper.make_node("Squeeze", ["means", "first"], ["semantic"]),
        ]
        about.append(helper.make_tensor_value_info("semantic", TensorProto.FLOAT, (3, "h", "w")))
    image = helper.make_tensor_value_info("image", TensorProto.UINT8, ("H", "W", 3))
    graph = helper.make_graph(nodes, "model", [image], about, values)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    helper.set_model_props(model, {"oanet_d2": json.dumps({**OPTIONS, **options})})
    onnx.save(model, path)
    return path
