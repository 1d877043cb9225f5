"""
Painting overlapping instances, without Detectron2. :func:`paint` takes anyone's masks and needs no
PyTorch; the functions that take and give tensors are there where PyTorch is.
"""

from importlib.util import find_spec

__all__ = ["Painted", "arrays", "paint", "read_detections"]

from . import arrays
from .formats import read_detections
from .painter import Painted, paint

if find_spec("torch") is not None and find_spec("fvcore") is not None:
    from .fusion import combine
    from .masks import BoxedMasks
    from .ranking import RANKING_RULE_REGISTRY, OrderInputs, order_from_margins

    __all__ += ["RANKING_RULE_REGISTRY", "BoxedMasks", "OrderInputs", "combine", "order_from_margins"]
