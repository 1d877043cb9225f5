from .oracle import oracle_order
from .orderings import OrderingEvaluator, orderings_of, orderings_table, write_orderings
from .panoptic_pictures import PanopticPictures

__all__ = [
    "OrderingEvaluator",
    "PanopticPictures",
    "oracle_order",
    "orderings_of",
    "orderings_table",
    "write_orderings",
]
