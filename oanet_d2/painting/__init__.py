"""
Painting overlapping instances: tensors in, tensors out, without Detectron2. Without PyTorch, only
:mod:`oanet_d2.painting.arrays` is there.
"""

from importlib.util import find_spec

__all__ = ["arrays"]

from . import arrays

if find_spec("torch") is not None and find_spec("fvcore") is not None:
    from .fusion import combine
    from .masks import BoxedMasks
    from .ranking import RANKING_RULE_REGISTRY, OrderInputs, order_from_margins

    __all__ += ["RANKING_RULE_REGISTRY", "BoxedMasks", "OrderInputs", "combine", "order_from_margins"]
