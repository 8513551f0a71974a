"""The subject of a picture apart from what is around it: its shape, its colour, and how far the rest has moved.

Who says where the subject is is an `Outline`: on the embedded base the plain background (world.py), elsewhere the bare
base, by where it looks at the subject's words (training/outline.py).

Letters: N pictures, H x W pixels.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from diffusers import DiffusionPipeline
from PIL import Image, ImageFilter

from comcat_diffusion import bases
from comcat_diffusion.training.encode import posterior
from comcat_diffusion.training.images import content_of
from comcat_diffusion.training.objective import objective_of
from comcat_diffusion.training.outline import Outliner, can_outline
from comcat_diffusion.words import Subject, is_thing

NEUTRAL = (128, 128, 128)
MARGIN = 1 / 32  # of a picture's shorter side: what is as near to a subject as this is not background yet
WHITE = 255

Outline = Callable[[Image.Image], Image.Image]  # of a picture, a grey one of its size, white where the subject is


def by_attention(pipe: DiffusionPipeline, subject: Subject) -> Outline | None:
    """As the bare base of a pipeline finds a subject; None if it shows no such thing, or the subject is none.

    Pictures larger than those that the base was trained on are looked at in that size, longer side to side.
    """
    if not is_thing(subject) or not can_outline(pipe):
        return None
    outliner, grain, most = Outliner(pipe, objective_of(pipe)), bases.grain(pipe), bases.native_resolution(pipe)
    known: dict[str, Image.Image] = {}  # every measure asks, and each answer takes the base

    def outline(picture: Image.Image) -> Image.Image:
        key = content_of(picture)
        if key not in known:
            known[key] = looked_for(picture)
        return known[key]

    def looked_for(picture: Image.Image) -> Image.Image:
        scale = min(1, most / max(picture.size))
        width, height = (max(grain, int(side * scale) // grain * grain) for side in picture.size)
        mean = posterior(pipe, picture.convert("RGB").resize((width, height)))["mean"]
        share = outliner.share(mean, subject, (height, width, 0, 0, height, width))[0]
        return Image.fromarray((share.numpy() * WHITE).astype(np.uint8)).resize(picture.size, Image.Resampling.NEAREST)

    return outline


def centred(picture: Image.Image, shape: Image.Image, side: int, span: int) -> Image.Image:
    """The subject in the middle of `side` pixels of grey, its own longest side `span`. All grey without one."""
    made = Image.new("RGB", (side, side), NEUTRAL)
    box = shape.getbbox()
    if box is None:
        return made
    thing = Image.new("RGB", picture.size, NEUTRAL)
    thing.paste(picture, mask=shape)
    width, height = box[2] - box[0], box[3] - box[1]
    factor = span / max(width, height)
    size = max(1, round(width * factor)), max(1, round(height * factor))
    corner = (side - size[0]) // 2, (side - size[1]) // 2
    made.paste(thing.resize(size, Image.Resampling.BICUBIC, box), corner)
    return made


def colour(picture: Image.Image, shape: Image.Image) -> torch.Tensor:
    """The mean colour of the subject, of 255: (3,). That of neutral grey where there is no subject."""
    inside = np.asarray(shape) >= WHITE / 2
    if not inside.any():
        return torch.tensor(NEUTRAL, dtype=torch.float32)
    return torch.from_numpy(np.asarray(picture.convert("RGB"), dtype=np.float32)[inside].mean(0))


def colour_off(pictures: Sequence[Image.Image], wanted: Sequence[Image.Image], outline: Outline) -> torch.Tensor:
    """How far each subject's mean colour is from the mean of those of the pictures that are wanted, of 255: (N,)."""
    mean = torch.stack([colour(picture, outline(picture)) for picture in wanted]).mean(0)
    return torch.stack([(colour(picture, outline(picture)) - mean).abs().mean() for picture in pictures])


def background_moved(pictures: Sequence[Image.Image], before: Sequence[Image.Image], outline: Outline) -> torch.Tensor:
    """How far pixels outside the subject of either picture are from those of the picture before, of 255: (N,).

    Where nothing is outside, all pixels count.
    """
    return torch.stack([_moved(*pair, outline) for pair in zip(pictures, before, strict=True)])


def _moved(picture: Image.Image, before: Image.Image, outline: Outline) -> torch.Tensor:
    margin = 2 * max(1, round(MARGIN * min(picture.size))) + 1
    shapes = [np.asarray(outline(one).filter(ImageFilter.MaxFilter(margin))) for one in (picture, before)]
    outside = (shapes[0] < WHITE / 2) & (shapes[1] < WHITE / 2)
    now, then = (torch.from_numpy(np.asarray(one.convert("RGB"), dtype=np.float32)) for one in (picture, before))
    return (now - then).abs().mean(-1)[torch.from_numpy(outside if outside.any() else ~outside)].mean()
