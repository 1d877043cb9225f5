"""
From a picture to a drawing of its segments.
"""

from typing import List

import numpy as np

from oanet_d2 import PanopticPredictor, PanopticResult
from oanet_d2.visualization import changed_pixels, draw_order_comparison

PANEL_SIDES = 480, 1280  # pixels, the longer side of a panel of --compare: at least and at most


class Segmenter:
    """
    Segments pictures in the order that the config names and, to compare, in that of the detection
    scores. Its results are a list, of which the last is what the config asks for.
    """

    def __init__(self, predictor: PanopticPredictor, compare: bool):
        """
        Raises:
            ValueError: there is nothing to compare.
        """
        self.predictor = predictor
        self.orders = ("score", predictor.model.order) if compare else (predictor.model.order,)
        if len(set(self.orders)) < len(self.orders):
            raise ValueError(
                "--compare compares an order with 'score', but MODEL.OANET.ORDER is 'score' "
                "itself; say which by --order."
            )

    def __call__(self, image) -> List[PanopticResult]:
        """
        Args:
            image: a path or an array, as :class:`PanopticPredictor` takes them.
        """
        if len(self.orders) == 1:
            return [self.predictor(image)]
        return list(self.predictor.in_orders(image, self.orders).values())

    def draw(self, results: List[PanopticResult]) -> np.ndarray:
        """
        Returns:
            uint8 RGB picture; of two results, beside the image and with the changes outlined.
        """
        if len(results) == 1:
            return results[0].draw().get_image()
        rgb = results[0].image[:, :, ::-1]
        side = int(np.clip(max(rgb.shape[:2]), *PANEL_SIDES))
        return draw_order_comparison(
            rgb, None, *_panoptic(results), self.predictor.metadata, self.orders, side
        )


def summary(results: List[PanopticResult]) -> str:
    """
    A few words on the results of a picture.
    """
    shown = results[-1].segments_info
    things = sum(s["isthing"] for s in shown)
    text = f"{things} instances, {len(shown) - things} stuff classes"
    if len(results) > 1:
        text += f", {changed_pixels(*_panoptic(results)).mean():.1%} of the pixels changed"
    return text


def _panoptic(results: List[PanopticResult]) -> List:
    return [(x.panoptic_seg, x.segments_info) for x in results]
