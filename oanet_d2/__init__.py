"""
OANet for Detectron2. Importing this package registers its modules and datasets. Where Detectron2 is
not installed, only :mod:`oanet_d2.painting` is there, and :mod:`oanet_d2.runtime`, which predicts
with an exported model.
"""

import importlib.util

from . import painting

__version__ = "0.1.0"
__all__ = ["painting"]

if importlib.util.find_spec("detectron2") is not None:
    from . import data, modeling
    from .config import add_oanet_config, load_config
    from .data import complete_config, register_panoptic
    from .modeling import OANet, OANetSemSegFPNHead, PairwiseRankingHead, SpatialRankingHead
    from .predictor import PanopticPredictor
    from .result import PanopticResult

    __all__ += ["OANet", "OANetSemSegFPNHead", "PairwiseRankingHead", "PanopticPredictor"]
    __all__ += ["PanopticResult", "SpatialRankingHead", "add_oanet_config", "complete_config"]
    __all__ += ["data", "load_config", "modeling", "register_panoptic"]
