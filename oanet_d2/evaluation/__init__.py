from .oracle import oracle_order
from .orderings import (
    OrderingEvaluator,
    closure,
    orderings_of,
    orderings_table,
    write_orderings,
)
from .panoptic import PanopticEvaluator
from .panoptic_pictures import PanopticPictures
from .report_data import ReportRecorder
from .submission import PanopticSubmission

__all__ = [
    "OrderingEvaluator",
    "PanopticEvaluator",
    "PanopticPictures",
    "PanopticSubmission",
    "ReportRecorder",
    "closure",
    "oracle_order",
    "orderings_of",
    "orderings_table",
    "write_orderings",
]
