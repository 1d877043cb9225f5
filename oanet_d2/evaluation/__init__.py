from .oracle import oracle_order
from .orderings import (
    OrderingEvaluator,
    closure,
    orderings_of,
    orderings_table,
    write_orderings,
)
from .panoptic_pictures import PanopticPictures
from .report_data import ReportRecorder

__all__ = [
    "OrderingEvaluator",
    "PanopticPictures",
    "ReportRecorder",
    "closure",
    "oracle_order",
    "orderings_of",
    "orderings_table",
    "write_orderings",
]
