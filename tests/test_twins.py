"""Pictures that are nearly one are found, and pictures that only resemble each other are not."""

import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from comcat_diffusion import bases
from comcat_diffusion.training.twins import small, twins


def photo(seed, size=(320, 240)):
    """As photographs are: large shapes, smaller ones upon them, and grain."""
    rng = np.random.default_rng(seed)
    total = np.zeros((size[1], size[0], 3))
    for cells, weight in ((3, 1.0), (6, 0.7), (12, 0.4), (40, 0.15)):
        noise = Image.fromarray(rng.integers(0, 256, (cells, cells, 3)).astype(np.uint8))
        total += weight * np.asarray(noise.resize(size, Image.Resampling.BICUBIC), dtype=float)
    total = (total - total.min()) / (total.max() - total.min()) * 255
    return Image.fromarray((total + rng.normal(0, 6, total.shape)).clip(0, 255).astype(np.uint8))


def found(*pictures):
    return twins([small(picture) for picture in pictures])


def crop(picture, left, top, right, bottom):
    width, height = picture.size
    return picture.crop((int(left * width), int(top * height), int(right * width), int(bottom * height)))


AGAIN = {
    "smaller": lambda p: p.resize((p.width // 3, p.height // 3)),
    "larger": lambda p: p.resize((p.width * 2, p.height * 2)),
    "brighter": lambda p: ImageEnhance.Brightness(p).enhance(1.25),
    "paler": lambda p: ImageEnhance.Contrast(p).enhance(0.7),
    "blurred": lambda p: p.filter(ImageFilter.GaussianBlur(2)),
    "mirrored": ImageOps.mirror,
    "cut a little": lambda p: crop(p, 0.02, 0.03, 1, 0.98),
    "a square of it": lambda p: crop(p, 0.1, 0, 0.85, 1),
    "most of it": lambda p: crop(p, 0.12, 0.2, 0.9, 0.95),
    "the middle": lambda p: crop(p, 0.2, 0.2, 0.8, 0.8),
    "a mirrored corner, darker": lambda p: ImageOps.mirror(crop(p, 0.35, 0, 1, 0.7)).point(lambda v: int(v * 0.8)),
}


@pytest.mark.parametrize("how", AGAIN)
@pytest.mark.parametrize("seed", [0, 1])
def test_a_photograph_is_found_again_and_in_the_other(how, seed):
    whole = photo(seed)
    assert found(whole, AGAIN[how](whole)) == [[0, 1]]
    assert found(AGAIN[how](whole), photo(seed + 10), whole) == [[0, 2]]


def test_different_photographs_are_not_taken_for_one():
    assert found(*(photo(seed) for seed in range(8)), *(photo(seed, (200, 300)) for seed in range(8, 14))) == []


def test_two_crops_of_a_third_are_one_group():
    whole = photo(3)
    left, right = crop(whole, 0, 0, 0.6, 1), crop(whole, 0.4, 0, 1, 1)
    assert found(left, right) == []  # too little of either is in the other
    assert found(left, photo(4), whole, right) == [[0, 2, 3]]


def test_the_poses_of_the_sample_subject_are_different_pictures():
    files = sorted((bases.assets() / "subject").glob("*/*.png"))
    assert len(files) == 6 and found(*(Image.open(file).convert("RGB") for file in files)) == []


def test_plain_walls_are_like_nothing():
    assert found(*(Image.new("RGB", (64, 64), colour) for colour in ("white", "gray", "gray")), photo(0)) == []


def test_extreme_shapes_are_compared_too():
    whole = photo(5, (400, 20))
    assert found(whole, photo(6, (4, 300)), Image.new("RGB", (1, 1))) == []
