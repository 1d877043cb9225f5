from . import builtin  # registers the datasets
from .classes import complete_config
from .dataset_mapper import PanopticDatasetMapper
from .register import register_from_config, register_panoptic

__all__ = [
    "PanopticDatasetMapper",
    "builtin",
    "complete_config",
    "register_from_config",
    "register_panoptic",
]
