"""
What a ranking head has been shown, to learn from it again.
"""

from typing import Dict, Optional, Tuple

import torch

from .pair_network import DescribedPairs

__all__ = ["PairMemory"]


class PairMemory:
    """
    The last pairs that were added, and who was visible in each. An image shows few pairs and costs
    a pass of the whole network; a pair that is remembered costs next to nothing.
    """

    def __init__(self, capacity: int):
        """
        Args:
            capacity: how many pairs are remembered; more push out the oldest. 0: none.
        """
        self.capacity = capacity
        self._added = 0  # that ever were
        self._tensors: Optional[Tuple[torch.Tensor, ...]] = None

    def __len__(self) -> int:
        return min(self._added, self.capacity)

    @torch.no_grad()
    def add(self, pairs: DescribedPairs, shares: torch.Tensor) -> None:
        """
        Args:
            shares: (P,) float, see :meth:`PairwiseRankingHead.losses`. A pair that the ground truth
                does not decide, 0, is not worth remembering.
        """
        decided = (shares != 0).nonzero()[-self.capacity :, 0]
        # The means are most of it. (Not the numbers: those of a flat box may be large.)
        new = [x[decided] for x in (pairs.classes, pairs.numbers, pairs.means.half(), shares)]
        if self._tensors is None:
            self._tensors = tuple(x.new_empty(self.capacity, *x.shape[1:]) for x in new)
        places = torch.arange(self._added, self._added + len(decided), device=shares.device)
        for kept, x in zip(self._tensors, new):
            kept[places % self.capacity] = x
        self._added += len(decided)

    def draw(self, count: int) -> Tuple[DescribedPairs, torch.Tensor]:
        """
        Pairs drawn at random, with replacement. Random numbers are torch's.

        Returns:
            `count` of them, and their shares; none if none is remembered.
        """
        assert self._tensors is not None  # something was added, if only 0 pairs
        size = (count if len(self) else 0,)
        chosen = torch.randint(max(len(self), 1), size, device=self._tensors[0].device)
        classes, numbers, means, shares = (x[chosen] for x in self._tensors)
        return DescribedPairs(classes, numbers, means.float()), shares

    def state_dict(self) -> Dict:
        """
        What a checkpoint has to hold.
        """
        tensors = self._tensors or ()
        return {"added": self._added, "tensors": [x[: len(self)].clone() for x in tensors]}

    def load_state_dict(self, state: Dict, device: torch.device) -> None:
        """
        Go on from :meth:`state_dict`. With another capacity it is forgotten.
        """
        tensors = [x.to(device) for x in state["tensors"]]
        if not tensors or min(state["added"], self.capacity) != len(tensors[0]):
            return
        self._added = state["added"]
        self._tensors = tuple(x.new_empty(self.capacity, *x.shape[1:]) for x in tensors)
        for kept, x in zip(self._tensors, tensors):
            kept[: len(x)] = x
