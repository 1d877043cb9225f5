from .oracle import oracle_order
from .orderings import OrderingEvaluator, orderings_of, orderings_table, write_orderings
from .submission import PanopticSubmission

__all__ = [
    "OrderingEvaluator",
    "PanopticSubmission",
    "oracle_order",
    "orderings_of",
    "orderings_table",
    "write_orderings",
]
