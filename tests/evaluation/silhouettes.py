import numpy as np
import pycocotools.mask as mask_util
import torch

from detectron2.structures import Boxes, Instances

from oanet_d2.data.images import read_segment_ids
from oanet_d2.modeling.oanet import FusionInputs, OANet
from oanet_d2.painting import BoxedMasks, OrderInputs
from oanet_d2.painting.matching import match_to_segments, visible_margins


class SilhouetteModel:
    """
    "Predicts" the whole silhouettes of the ground truth, a duplicate of the first, and another one
    that is not confident enough to be painted. The scores put the largest first. The pairs are right,
    except in the images of `wrong_images`. Everything else is OANet's.
    """

    combine_overlap_thresh = 0.65  # of every silhouette at least 40 % is visible
    combine_stuff_area_thresh = 0
    combine_instances_score_thresh = 0.5
    order = "srm_pairs"
    combine = OANet.combine

    def __init__(self, wrong_images=()):
        self.wrong_images = wrong_images

    def __call__(self, d):
        annotations = [*d["annotations"], *d["annotations"][:1] * 2]
        masks = np.stack([mask_util.decode(a["segmentation"]) for a in annotations])
        masks = torch.from_numpy(masks).bool()
        classes = torch.tensor([a["category_id"] for a in annotations])
        areas = masks.flatten(1).sum(1)
        scores = 0.6 + 0.3 * areas / areas.max()
        scores[-2:] = torch.tensor([0.55, 0.1])
        painted = masks & (scores >= 0.5)[:, None, None]

        ids = torch.from_numpy(read_segment_ids(d["pan_seg_file_name"]))
        semantic = torch.zeros(ids.shape, dtype=torch.int64)
        for s in d["segments_info"]:
            if not s["isthing"]:
                semantic[ids == s["id"]] = s["category_id"]
        matched = match_to_segments(painted, classes, ids, d["segments_info"])
        margins = visible_margins(painted, matched, ids)
        if d["image_id"] in self.wrong_images:
            margins = -margins
        fields = {"pred_boxes": Boxes(torch.zeros(len(masks), 4)), "pred_classes": classes}
        instances = Instances((d["height"], d["width"]), scores=scores, **fields)
        order_inputs = OrderInputs(scores, classes, painted, pair_margins=margins)
        inputs = FusionInputs(BoxedMasks.from_masks(masks), instances, semantic, order_inputs)
        order = order_inputs.order(self.order)
        return {"panoptic_seg": self.combine(inputs, order), "fusion_inputs": inputs}
