"""Random changes to training images that keep what they show."""

__all__ = ["REACH", "Shift"]

import torch
import torch.nn.functional as F
from torch import Tensor

from primer_fast.train.common import generator

REACH = 2  # pixels


class Shift:
    """Moves each image by a whole number of pixels, up to ``REACH`` each way; what comes in from outside is 0.

    Raises:
        ValueError: ``images`` are not (N, H, W).
    """

    def __init__(self, images: Tensor):  # (N, H, W)
        if images.ndim != 3:
            raise ValueError(f"Shift: images must be (N, H, W); got {tuple(images.shape)}")
        height, width = images.shape[1:]
        padded = F.pad(images, (REACH,) * 4)
        self.windows = padded.unfold(1, height, 1).unfold(2, width, 1)  # (N, 2 REACH + 1, 2 REACH + 1, H, W), a view

    def offsets(self, seed: int, epoch: int) -> Tensor:
        """(N, 2) int64: where in the padded image each window of ``epoch`` starts, a function of (seed, epoch)."""
        offsets = torch.randint(0, 2 * REACH + 1, (len(self.windows), 2), generator=generator(seed, 1, epoch))
        return offsets.to(self.windows.device)

    def __call__(self, index: Tensor, offsets: Tensor) -> Tensor:  # (B,), (B, 2) -> (B, H, W)
        return self.windows[index, offsets[:, 0], offsets[:, 1]]
