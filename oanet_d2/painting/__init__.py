"""
Painting overlapping instances: tensors in, tensors out, without Detectron2.
"""

from .fusion import combine
from .masks import BoxedMasks
from .ranking import RANKING_RULE_REGISTRY, OrderInputs, order_from_margins

__all__ = ["RANKING_RULE_REGISTRY", "BoxedMasks", "OrderInputs", "combine", "order_from_margins"]
