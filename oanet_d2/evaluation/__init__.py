from .panoptic import PanopticEvaluator, orderings_of, orderings_table, write_orderings
from .pictures import PanopticPictures
from .submission import PanopticSubmission

__all__ = [
    "PanopticEvaluator",
    "PanopticPictures",
    "PanopticSubmission",
    "orderings_of",
    "orderings_table",
    "write_orderings",
]
