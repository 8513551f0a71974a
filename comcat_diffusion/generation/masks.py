"""The masks of a generation run: NAME=FILE on the command line, a grey picture for each adapter that has a region."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from comcat_diffusion.adapters.proportions import refuse_other_shape
from comcat_diffusion.training.images import PictureError, read_layer


def asked_regions(
    texts: Sequence[str], adapters: Sequence[Path], shape: tuple[int, int] | None
) -> dict[int, Image.Image]:
    """Masks by the number of their adapter, whose name is that of its file without the ending.

    `shape` are height and width of the pictures, or their proportions; None: only the base knows them. Raises
    ValueError for a name that is none or two of the adapters', and for what is no mask of such a picture.
    """
    names, found = [path.stem for path in adapters], {}
    for text in texts:
        name, equals, file = text.partition("=")
        if not equals or not file:
            raise ValueError(f"--region {text}: write ADAPTER=MASK, for instance dog=left.png.")
        if name not in names:
            raise ValueError(f"--region {text}: there is no adapter '{name}'; loaded: {', '.join(names)}.")
        if names.count(name) > 1 or names.index(name) in found:
            raise ValueError(f"--region {text}: '{name}' is there twice; give every file a name and a mask of its own.")
        found[names.index(name)] = _read(name, Path(file).expanduser(), shape)
    return found


def _read(name: str, path: Path, shape: tuple[int, int] | None) -> Image.Image:
    try:
        mask = read_layer(path)
    except PictureError as error:
        raise ValueError(f"--region: {error}") from error
    if shape is not None:
        refuse_other_shape(name, np.asarray(mask), *shape)
    return mask
