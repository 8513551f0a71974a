"""The masks of a generation run: NAME=FILE on the command line, a grey picture for each adapter that has a region."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from comcat_diffusion.adapters.proportions import refuse_other_shape
from comcat_diffusion.training.images import PictureError, read_layer


def asked_regions(texts: Sequence[str], adapters: Sequence[Path]) -> dict[int, Image.Image]:
    """Masks by the number of their adapter, whose name is that of its file without the ending.

    Raises ValueError for a name that is none or two of the adapters', and for what is no mask of a square picture.
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
        found[names.index(name)] = _read(name, Path(file).expanduser())
    return found


def _read(name: str, path: Path) -> Image.Image:
    try:
        mask = read_layer(path)
    except PictureError as error:
        raise ValueError(f"--region: {error}") from error
    refuse_other_shape(name, np.asarray(mask), 1, 1)  # what is drawn here is square
    return mask
