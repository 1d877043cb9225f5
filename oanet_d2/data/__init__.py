from . import builtin  # registers the datasets
from .dataset_mapper import PanopticDatasetMapper
from .register import register_panoptic

__all__ = ["PanopticDatasetMapper", "builtin", "register_panoptic"]
