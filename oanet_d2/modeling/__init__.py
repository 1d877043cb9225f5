from .oanet import OANet, RankingEvidence
from .ranking import RANKING_RULE_REGISTRY
from .semantic_head import OANetSemSegFPNHead
from .srm_head import SRM_HEAD_REGISTRY, SpatialRankingHead, build_srm_head

__all__ = [
    "OANet",
    "OANetSemSegFPNHead",
    "RANKING_RULE_REGISTRY",
    "RankingEvidence",
    "SRM_HEAD_REGISTRY",
    "SpatialRankingHead",
    "build_srm_head",
]
