from .from_annotations import SRMFromAnnotations
from .oanet import FusionInputs, OANet
from .pair_head import PairwiseRankingHead
from .semantic_head import OANetSemSegFPNHead, SemanticBranch
from .srm_head import SRM_HEAD_REGISTRY, SpatialRankingHead, build_srm_head
from .test_time_augmentation import OANetWithTTA
from .timm_backbone import TimmBackbone, build_timm_fpn_backbone

__all__ = ["SRM_HEAD_REGISTRY", "FusionInputs", "OANet", "OANetSemSegFPNHead", "OANetWithTTA"]
__all__ += ["PairwiseRankingHead", "SRMFromAnnotations", "SemanticBranch", "SpatialRankingHead"]
__all__ += ["TimmBackbone", "build_srm_head", "build_timm_fpn_backbone"]
