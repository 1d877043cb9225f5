from typing import Dict, Protocol, runtime_checkable

import torch
from torch import nn
from torch.nn import functional as F

from detectron2.config import configurable
from detectron2.modeling import SEM_SEG_HEADS_REGISTRY
from detectron2.modeling.meta_arch.semantic_seg import SemSegFPNHead

__all__ = ["OANetSemSegFPNHead", "SemanticBranch", "semantic_branch"]

SUPERVISION = ("things_and_stuff", "stuff")


@runtime_checkable
class SemanticBranch(Protocol):
    """
    What OANet asks of its semantic branch. A head that has all of this, as
    :class:`OANetSemSegFPNHead` has, may know the thing classes (`SUPERVISION` "things_and_stuff"),
    and its logits are labelled at low resolution. :func:`semantic_branch` makes it of other heads.
    """

    num_things: int  # the first classes are things; 0 if class 0 stands for all things
    common_stride: int  # pixels of the network's input per cell of the logits

    def layers(self, features: Dict[str, torch.Tensor]) -> torch.Tensor:
        """(B, classes, h, w) float logits from the backbone's feature maps."""

    def losses(self, predictions: torch.Tensor, targets: torch.Tensor) -> Dict[str, torch.Tensor]:
        """From what :meth:`layers` returns and (B, H, W) int64 labels of the padded images."""

    def stuff_scores(self, logits: torch.Tensor) -> torch.Tensor:
        """(B, 1 + #stuff, h, w) float; channel 0 is "any thing"."""

    def predict(self, logits: torch.Tensor) -> torch.Tensor:
        """The same at the resolution of the padded images, (B, 1 + #stuff, H, W)."""


class _PlainBranch:
    """Of a head that gives what Detectron2 asks for: losses, or logits of the padded images."""

    num_things, common_stride = 0, 1

    def __init__(self, head: nn.Module):
        self.head = head

    def layers(self, features):
        # In training there are no logits, and the losses need the features.
        return features if self.head.training else self.head(features, None)[0]

    def losses(self, predictions, targets):
        return self.head(predictions, targets)[1]

    def stuff_scores(self, logits):
        return logits

    predict = stuff_scores


def semantic_branch(head: nn.Module) -> SemanticBranch:
    """The interface of any of Detectron2's semantic heads: `head` itself, if it has it."""
    return head if isinstance(head, SemanticBranch) else _PlainBranch(head)


@SEM_SEG_HEADS_REGISTRY.register()
class OANetSemSegFPNHead(SemSegFPNHead):
    """
    Detectron2's semantic FPN head, supervised on things *and* stuff, L_seg(stuff+object) in the
    paper. Its layers and their names are Panoptic FPN's. Only the number of classes differs, and with
    `num_things=0` it is Panoptic FPN's head.

    In inference it returns what Panoptic FPN's head returns: 1 + #stuff channels, with "any thing"
    (here the best thing class) as channel 0. Everything downstream of Panoptic FPN works on it.
    """

    @configurable
    def __init__(self, input_shape, *, num_classes: int, num_things: int = 0, **kwargs):
        """
        Args:
            input_shape, num_classes: see :class:`SemSegFPNHead`.
            num_things: this many classes, the first ones, are things; 0 if class 0 stands for all
                things.

        Other arguments are the same as :class:`SemSegFPNHead`.

        Raises:
            ValueError: the numbers of classes contradict each other.
        """
        if num_things > num_classes:
            raise ValueError(
                f"MODEL.SEM_SEG_HEAD.NUM_CLASSES is {num_classes}, but with SUPERVISION "
                f"'things_and_stuff' it counts the {num_things} thing classes of "
                "MODEL.ROI_HEADS.NUM_CLASSES too. Set it to #things + #stuff, or SUPERVISION to "
                "'stuff' for Panoptic FPN's 1 + #stuff classes."
            )
        # By name: Detectron2 would take a LazyConfig's mapping for a whole config.
        super().__init__(input_shape=input_shape, num_classes=num_classes, **kwargs)
        if 0 <= self.ignore_value < num_classes:
            raise ValueError(
                f"MODEL.SEM_SEG_HEAD.IGNORE_VALUE is {self.ignore_value}, which is one of the "
                f"{num_classes} classes; set it to a value outside of them."
            )
        self.num_things = num_things

    @classmethod
    def from_config(cls, cfg, input_shape):
        supervision = cfg.MODEL.SEM_SEG_HEAD.SUPERVISION
        if supervision not in SUPERVISION:
            raise ValueError(
                f"MODEL.SEM_SEG_HEAD.SUPERVISION is {supervision!r}; it must be one of "
                f"{SUPERVISION}."
            )
        ret = super().from_config(cfg, input_shape)
        if supervision == "things_and_stuff":
            ret["num_things"] = cfg.MODEL.ROI_HEADS.NUM_CLASSES
        return ret

    def forward(self, features, targets=None):
        """
        Args:
            features: dict of FPN feature maps.
            targets: (B, H, W) int64 class of every pixel, or None in inference.

        Returns:
            in training (None, dict of losses); in inference ((B, 1 + #stuff, H, W) logits, {}).
        """
        logits = self.layers(features)
        if self.training:
            return None, self.losses(logits, targets)
        return self.predict(logits), {}

    def predict(self, logits: torch.Tensor) -> torch.Tensor:
        """
        Args:
            logits: (B, classes, h, w), what :meth:`layers` returns.

        Returns:
            (B, 1 + #stuff, H, W) logits; channel 0 is "any thing".
        """
        # Reduced before it is enlarged: 54 channels at full resolution on COCO, not 133.
        return F.interpolate(
            self.stuff_scores(logits),
            scale_factor=self.common_stride,
            mode="bilinear",
            align_corners=False,
        )

    def stuff_scores(self, logits: torch.Tensor) -> torch.Tensor:
        """
        As :meth:`predict`, at the resolution of the logits.
        """
        if self.num_things == 0:
            return logits
        things = logits[:, : self.num_things].amax(dim=1, keepdim=True)
        return torch.cat([things, logits[:, self.num_things :]], dim=1)

    def losses(self, predictions: torch.Tensor, targets: torch.Tensor) -> Dict[str, torch.Tensor]:
        """
        As :meth:`SemSegFPNHead.losses`, but 0 instead of NaN if no pixel is labelled.
        """
        if (targets != self.ignore_value).any():
            return super().losses(predictions, targets)
        return {"loss_sem_seg": predictions.sum() * 0}
