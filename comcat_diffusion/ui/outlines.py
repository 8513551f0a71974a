"""A mask of an image by the base's own attention, as a training that finds no mask makes it (training/outline.py)."""

import random

from PIL import Image

from comcat_diffusion import bases
from comcat_diffusion.training.crops import cuts
from comcat_diffusion.training.encode import posterior
from comcat_diffusion.training.outline import Outliner
from comcat_diffusion.words import Subject


def outlined(outliner: Outliner, picture: Image.Image, subject: Subject) -> Image.Image:
    """Where the subject is in a picture, of its size: white is the subject, black the rest, also what is cut off."""
    side = bases.native_resolution(outliner.pipe)
    (cut,) = cuts(picture, None, [(side, side)], True, False, random.Random(0))
    frame = (*cut.original, *cut.corner, *cut.size)
    share = outliner.share(posterior(outliner.pipe, cut.image)["mean"], subject, frame)
    found = Image.fromarray((share[0] * 255).byte().numpy()).resize((side, side), Image.Resampling.BICUBIC)
    scale = max(side / picture.height, side / picture.width)  # as the picture was brought to the size of the cut
    whole = Image.new("L", (max(side, round(picture.width * scale)), max(side, round(picture.height * scale))))
    whole.paste(found, (cut.corner[1], cut.corner[0]))
    return whole.resize(picture.size, Image.Resampling.BILINEAR)
