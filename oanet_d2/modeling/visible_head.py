"""
Which part of an instance is visible: the mask head's question, asked of what the mask head has
already found. Dense supervision for the ranking: every cell of every instance says something, and
not only the pairs that overlap.
"""

from typing import List, Optional

import fvcore.nn.weight_init as weight_init
import torch
from torch import nn
from torch.nn import functional as F

from detectron2.layers import Conv2d, ROIAlign, paste_masks_in_image

from .candidates import Candidates
from .pair_evidence import GEOMETRY_DIM, geometry

__all__ = ["VisibleMaskHead"]

# Cells that only one instance claims say little about occlusion, but are most of all.
_UNCONTESTED_WEIGHT = 0.3
_GROUPS = 8


def _group_norm(dim: int) -> nn.GroupNorm:
    # Detectron2's "GN" has 32 groups: of 32 channels it would take away each one's mean, and with
    # it what is known of the whole instance.
    return nn.GroupNorm(_GROUPS, dim)


class VisibleMaskHead(nn.Module):
    """
    A small mask head on the feature map that says of every cell of an instance whether the
    instance is visible there. It is shown, in the instance's extent, the feature map, the
    instance's mask, how many others of its class and of other classes claim the cell, and what the
    semantic branch sees; and it knows the instance's class, score and place.
    """

    def __init__(
        self,
        num_classes: int,
        feature_channels: int,
        with_semantic: bool,
        conv_dim: int = 32,
        num_conv: int = 3,
        resolution: int = 14,
    ):
        """
        Args:
            num_classes: number of thing classes, C.
            feature_channels: channels of the feature map.
            with_semantic: whether the logits of a semantic branch that knows thing classes are
                given.
            conv_dim, num_conv: width and number of the convolutions.
            resolution: M; visibility is said for M x M parts of the instance's extent.
        """
        super().__init__()
        self.with_semantic = with_semantic
        size = resolution, resolution
        self.roi_align = ROIAlign(size, spatial_scale=1.0, sampling_ratio=2, aligned=True)
        self.projection = Conv2d(feature_channels, conv_dim // 2, kernel_size=1)
        self.class_embedding = nn.Embedding(num_classes, conv_dim)
        self.geometry_embedding = nn.Linear(GEOMETRY_DIM, conv_dim)
        shown = conv_dim // 2 + 3 + 2 * with_semantic
        self.first = Conv2d(shown, conv_dim, kernel_size=3, padding=1)
        self.first_norm = _group_norm(conv_dim)
        self.convs = nn.ModuleList(
            Conv2d(
                conv_dim,
                conv_dim,
                kernel_size=3,
                padding=1,
                norm=_group_norm(conv_dim),
                activation=F.relu,
            )
            for _ in range(num_conv - 1)
        )
        self.predictor = Conv2d(conv_dim, 1, kernel_size=1)
        for layer in (self.projection, self.first, *self.convs):
            weight_init.c2_msra_fill(layer)
        nn.init.normal_(self.predictor.weight, std=0.01)
        nn.init.zeros_(self.predictor.bias)
        nn.init.normal_(self.class_embedding.weight, std=0.1)

    def forward(
        self,
        candidates: List[Candidates],
        features: torch.Tensor,
        semantic: Optional[torch.Tensor] = None,
    ) -> List[torch.Tensor]:
        """
        Args:
            candidates: the instances of B images.
            features: (B, channels, h, w) float, on the grid of the candidates.
            semantic: (B, C, h, w) float logits for the thing classes, if there are any.

        Returns:
            for every image (N, M, M) float logits, relative to the extents of the N masks: over 0
            where the instance is visible.
        """
        features = self.projection(features)
        shown = []
        for i, instances in enumerate(candidates):
            of_image = None if semantic is None else semantic[i].softmax(0)
            shown.append(self._shown(instances, features[i], of_image))
        classes = torch.cat([x.classes for x in candidates])
        places = torch.cat([geometry(x) for x in candidates])
        known = self.class_embedding(classes) + self.geometry_embedding(places)
        x = self.first(torch.cat(shown)) + known[:, :, None, None]
        x = F.relu(self.first_norm(x))
        for conv in self.convs:
            x = x + conv(x)
        return list(self.predictor(x)[:, 0].split([len(x.classes) for x in candidates]))

    def _shown(self, candidates: Candidates, features, probabilities) -> torch.Tensor:
        """
        Returns:
            (N, channels, M, M) float: what the convolutions see of every instance.
        """
        masks, classes = candidates.masks.float(), candidates.classes
        num_classes = self.class_embedding.num_embeddings
        # How many instances of each class claim a cell.
        claims = masks.new_zeros(num_classes, *masks.shape[1:]).index_add(0, classes, masks)
        extents = candidates.extents
        first = torch.zeros_like(classes)
        every = torch.arange(len(classes), device=classes.device)

        mask = self._crop(masks[:, None], extents, every)[:, 0]
        same = self._crop(claims[:, None], extents, classes)[:, 0]
        any_class = self._crop(claims.sum(0)[None, None], extents, first)[:, 0]
        shown = [mask, same - mask, any_class - same]
        if probabilities is not None:
            of_class = self._crop(probabilities[None], extents, first)
            own = every, classes
            shown.append(of_class[own])
            shown.append(of_class.index_put(own, of_class.new_zeros(())).amax(1))
        features = self._crop(features[None], extents, first)
        return torch.cat([features, torch.stack(shown, dim=1)], dim=1)

    def _crop(self, maps: torch.Tensor, extents: torch.Tensor, which: torch.Tensor):
        """
        (N, channels, M, M): the extents, (N, 4) in cells, of the maps `which`, (N,) int64.
        """
        rois = torch.cat([which[:, None], extents], dim=1).to(maps.dtype)
        return self.roi_align(maps, rois)

    def loss(
        self,
        logits: List[torch.Tensor],
        candidates: List[Candidates],
        shows: List[torch.Tensor],
    ) -> torch.Tensor:
        """
        Binary cross entropy within the masks. Cells that no other instance claims count less.

        Args:
            logits: see :meth:`forward`.
            candidates: the instances.
            shows: for every image (N, h, w) bool, the cells in which the ground truth shows the
                instance.

        Returns:
            scalar; 0 (with gradients, all 0) without an instance.
        """
        cropped = []
        for instances, shown in zip(candidates, shows):
            masks = instances.masks
            contested = masks & (masks.sum(0) > 1)
            maps = torch.stack([masks, contested, masks & shown], dim=1).float()
            every = torch.arange(len(masks), device=masks.device)
            cropped.append(self._crop(maps, instances.extents, every))
        mask, contested, visible = torch.cat(cropped).unbind(1)
        weight = _UNCONTESTED_WEIGHT * mask + contested
        # Of a part that lies in the mask in part, the share of that.
        target = (visible / mask.clamp(min=1e-6)).clamp(max=1)
        loss = F.binary_cross_entropy_with_logits(
            torch.cat(logits), target, weight=weight, reduction="sum"
        )
        return loss / weight.sum().clamp(min=1)


@torch.no_grad()
def visible_on_grid(logits: torch.Tensor, candidates: Candidates) -> torch.Tensor:
    """
    Args:
        logits: (N, M, M) float, of :class:`VisibleMaskHead`.
        candidates: the N instances.

    Returns:
        (N, h, w) float probabilities that the instance is visible in the cell, 0 outside its mask.
    """
    masks = candidates.masks
    if len(masks) == 0:
        return masks.float()
    # In steps of 1/255; interpolated only within the extents.
    pasted = paste_masks_in_image(
        logits.sigmoid(), candidates.extents.float(), masks.shape[1:], threshold=-1
    )
    return pasted.float().div_(255).mul_(masks)
