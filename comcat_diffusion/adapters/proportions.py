"""Whether a mask has the proportions of its picture. Nothing here imports torch, whose tensors have a shape too."""

import typing

if typing.TYPE_CHECKING:
    import numpy as np
    import torch

LOOSE = 0.01  # how far the proportions of a mask may be off: a pixel in a hundred


def refuse_other_shape(name: str, mask: "np.ndarray | torch.Tensor", height: int, width: int) -> None:
    """Raise ValueError if a mask, (height, width), has other proportions than a picture."""
    if abs(mask.shape[1] * height / (mask.shape[0] * width) - 1) > LOOSE:
        raise ValueError(
            f"The mask of '{name}' is {mask.shape[1]} x {mask.shape[0]} pixels, which are not the proportions of the "
            f"picture ({width} : {height})."
        )
