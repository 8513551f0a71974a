"""Cut-outs: squares and buckets, in the middle or at seeded places, masks cut along."""

import random

import numpy as np
from PIL import Image

from comcat_diffusion.training.crops import cuts, sizes


def gradient(width, height):
    across = np.linspace(0, 255, width)[None, :, None].repeat(height, 0)
    return Image.fromarray(np.concatenate([across, across * 0, 255 - across], -1).astype(np.uint8))


def cut(picture, options=((20, 20),), mask=None, center=True, mirrored=False, seed=0):
    return cuts(picture, mask, list(options), center, mirrored, random.Random(seed))


def test_the_middle_is_cut():
    (middle,) = cut(gradient(80, 40))
    assert middle.size == (20, 20) and middle.original == (40, 80) and middle.corner == (0, 10)
    left, right = np.asarray(middle.image)[10, [0, -1], 0].astype(int)
    assert abs((left + right) / 2 - 127.5) < 3  # as far from either end


def test_four_seeded_places_are_cut_where_there_is_room():
    once, again = (cut(gradient(80, 40), center=False) for _ in range(2))
    assert len(once) == 4 and [a.image.tobytes() for a in once] == [b.image.tobytes() for b in again]
    assert len({a.image.tobytes() for a in once}) > 1
    assert len(cut(gradient(40, 40), center=False)) == 1


def test_mirror_images_are_added_with_their_masks():
    mask = Image.new("L", (80, 40))
    mask.paste(255, (0, 0, 40, 40))
    plain, flipped = cut(gradient(80, 40), mask=mask, mirrored=True)
    assert np.array_equal(np.asarray(plain.image)[:, ::-1], np.asarray(flipped.image))
    assert np.array_equal(np.asarray(plain.mask)[:, ::-1], np.asarray(flipped.mask))
    assert np.asarray(plain.mask)[:, 0].min() == 255 and np.asarray(flipped.mask)[:, 0].max() == 0


def test_a_tiny_picture_is_enlarged():
    assert cut(gradient(5, 3))[0].size == (20, 20)


def test_buckets_keep_the_area_and_the_nearest_shape():
    options = sizes(512, True, 64)
    assert len(options) > 5 and all(h % 64 == 0 and w % 64 == 0 for h, w in options)
    assert all(0.75 < h * w / 512**2 < 1.25 for h, w in options)
    wide, tall = cut(gradient(160, 90), options)[0], cut(gradient(90, 160), options)[0]
    assert wide.size[1] > wide.size[0] and tall.size == wide.size[::-1]
    assert cut(gradient(99, 100), options)[0].size == (512, 512)
    assert sizes(512, False, 64) == [(512, 512)]
