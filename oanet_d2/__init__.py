"""
OANet for Detectron2. Importing this package registers its modules and datasets.
"""

from . import data, modeling
from .config import add_oanet_config
from .config_files import load_config
from .data import complete_config, register_panoptic
from .modeling import OANet, OANetSemSegFPNHead, SpatialRankingHead
from .predictor import PanopticPredictor, PanopticResult

__version__ = "0.1.0"

__all__ = [
    "OANet",
    "OANetSemSegFPNHead",
    "PanopticPredictor",
    "PanopticResult",
    "SpatialRankingHead",
    "add_oanet_config",
    "complete_config",
    "data",
    "load_config",
    "modeling",
    "register_panoptic",
]
