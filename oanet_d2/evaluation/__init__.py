from .oracle import oracle_order
from .orderings import OrderingEvaluator, orderings_of, orderings_table, write_orderings
from .panoptic import PanopticEvaluator

__all__ = [
    "OrderingEvaluator",
    "PanopticEvaluator",
    "oracle_order",
    "orderings_of",
    "orderings_table",
    "write_orderings",
]
