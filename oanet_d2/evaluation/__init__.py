from .oracle import oracle_order
from .orderings import OrderingEvaluator, orderings_of, orderings_table, write_orderings

__all__ = [
    "OrderingEvaluator",
    "oracle_order",
    "orderings_of",
    "orderings_table",
    "write_orderings",
]
