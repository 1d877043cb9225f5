from .class_order import class_order, count_class_margins
from .instances import build_instance_evaluator
from .panoptic import PanopticEvaluator, orderings_of, orderings_table, write_orderings
from .pictures import PanopticPictures
from .submission import PanopticFiles

__all__ = ["PanopticEvaluator", "PanopticFiles", "PanopticPictures"]
__all__ += ["build_instance_evaluator", "class_order", "count_class_margins", "orderings_of"]
__all__ += ["orderings_table", "write_orderings"]
