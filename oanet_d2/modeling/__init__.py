from .oanet import OANet
from .pair_head import PairwiseRankingHead
from .ranking import RANKING_RULE_REGISTRY, RankingEvidence
from .semantic_head import OANetSemSegFPNHead
from .srm_from_annotations import SRMFromAnnotations
from .srm_head import SRM_HEAD_REGISTRY, SpatialRankingHead, build_srm_head

__all__ = [
    "RANKING_RULE_REGISTRY",
    "SRM_HEAD_REGISTRY",
    "OANet",
    "OANetSemSegFPNHead",
    "PairwiseRankingHead",
    "RankingEvidence",
    "SRMFromAnnotations",
    "SpatialRankingHead",
    "build_srm_head",
]
