"""Masks as tools name and draw them: found, read with their outside black, and doubted when they mask nothing."""

import numpy as np
import pytest
from PIL import Image

from comcat_diffusion.training import folder, images

SIZE = (12, 8)


def write(path, size=SIZE):
    path.parent.mkdir(exist_ok=True)
    Image.new("RGB", size, "green").save(path)
    return path


def found(root):
    return {shot.path.name: shot.mask and str(shot.mask.relative_to(root)) for shot in folder.find(root).shots}


@pytest.mark.parametrize(
    "name",
    [
        "1-mask", "1_mask", "1.mask", "1 mask", "1mask", "1-masklabel", "1_masklabel", "1_Mask", "1-MASK-LABEL",
        "1_mask001", "1_mask_0", "1 (mask)", "1_masks", "mask_1", "Mask-1", "1_seg", "1_segmentation", "1_matte",
        "1_alpha", "1.png_mask", "1.PNG.mask", "masks/1", "masks/1_mask", "Masks/1.png", "mask/1-mask",
    ],
)  # fmt: skip
def test_a_mask_is_known_by_the_name_that_any_tool_gives_it(tmp_path, name):
    write(tmp_path / "1.png"), write(tmp_path / "2.png"), write(tmp_path / f"{name}.png")
    assert found(tmp_path) == {"1.png": f"{name}.png", "2.png": None}
    assert not folder.find(tmp_path).ignored


@pytest.mark.parametrize("name", ["dog_mask.png", "DOG-Mask.PNG", "dog.jpg-mask.png", "Dog.JPG_mask.tif"])
def test_the_ending_of_the_picture_does_not_matter(tmp_path, name):
    write(tmp_path / "dog.JPG"), write(tmp_path / name)
    assert found(tmp_path) == {"dog.JPG": name}


@pytest.mark.parametrize(
    "names",
    [
        ("mask.png", "x.png"),
        ("mask1.png", "mask2.png"),
        ("damask.png", "1_masked.png"),
        ("1.png", "alpha_1.png", "alpha1.png", "1matte.png"),
    ],
)
def test_a_picture_that_is_nobodys_mask_is_one(tmp_path, names):
    for name in names:
        write(tmp_path / name)
    assert found(tmp_path) == dict.fromkeys(names)
    alike = [name for name in names if name.startswith("mask")]
    told = [f"Learned as pictures, though named like masks: {', '.join(alike)}."] * bool(alike)
    assert list(folder.find(tmp_path).doubts) == told


def test_a_subject_that_is_a_mask_can_be_learned_and_have_masks(tmp_path):
    for name in ("wooden_mask.jpg", "tiger_mask.jpg", "tiger_mask_mask.png"):
        write(tmp_path / name)
    assert found(tmp_path) == {"wooden_mask.jpg": None, "tiger_mask.jpg": "tiger_mask_mask.png"}
    told = "Learned as pictures, though named like masks: tiger_mask.jpg, wooden_mask.jpg."
    assert folder.find(tmp_path).doubts == (told,)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("1.jpg", "3_mask.png"), r"The mask .*3_mask\.png has no picture 3: rename it or take it out"),
        (("1.jpg", "masks/3.png"), r"The mask .*masks/3\.png has no picture 3"),
        (("1.jpg", "1-mask.png", "1_mask.png"), r"1\.jpg has two masks, .*1-mask\.png and .*1_mask\.png: keep one"),
        (("1.jpg", "1.mask.png", "masks/1.png"), r"1\.jpg has two masks"),
        (("1.jpg", "1.png", "1_mask.png"), r"1_mask\.png could belong to 1\.jpg and 1\.png: give every picture a name"),
    ],
)
def test_a_mask_of_no_picture_or_of_two_is_told(tmp_path, names, message):
    for name in names:
        write(tmp_path / name)
    with pytest.raises(ValueError, match=message):
        folder.find(tmp_path)


def test_a_mask_with_the_whole_name_of_its_picture_belongs_to_no_other(tmp_path):
    for name in ("1.jpg", "1.png", "1.jpg-mask.png"):
        write(tmp_path / name)
    assert found(tmp_path) == {"1.jpg": "1.jpg-mask.png", "1.png": None}


SHOWN = np.zeros(SIZE[::-1], dtype=np.uint8)
SHOWN[2:6, 3:9] = 255
ERASED = SHOWN.copy()
ERASED[0] = 255  # black that was painted over the outside
LAYERS = {
    "grey": Image.fromarray(SHOWN),
    "one bit": Image.fromarray(SHOWN).convert("1"),
    "16 bits": Image.fromarray(SHOWN.astype(np.uint16) * 257),
    "white on transparent": Image.merge("LA", [Image.new("L", SIZE, 255), Image.fromarray(SHOWN)]),
    "white on a transparent layer": Image.merge("RGBA", [*[Image.new("L", SIZE, 255)] * 3, Image.fromarray(SHOWN)]),
    "black and white, opaque": Image.fromarray(SHOWN).convert("RGBA"),
    "white and erased in black": Image.merge(
        "RGBA", [*[Image.fromarray(SHOWN)] * 3, Image.fromarray(ERASED)]
    ),
    "a photograph cut out": Image.merge(
        "RGBA",
        [*(Image.fromarray(np.random.default_rng(n).integers(0, 99, SHOWN.shape).astype("u1")) for n in range(3)),
         Image.fromarray(SHOWN)],
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", LAYERS)
def test_what_is_transparent_in_a_mask_is_masked(tmp_path, kind):
    LAYERS[kind].save(tmp_path / "1-mask.png")
    assert np.array_equal(np.asarray(images.read_mask(tmp_path / "1-mask.png", SIZE)), SHOWN)


def test_so_is_the_transparent_colour_of_a_palette(tmp_path):
    mask = Image.fromarray((SHOWN > 0).astype(np.uint8)).convert("P")
    mask.putpalette([255] * 6)  # white, and white that is not seen
    mask.save(tmp_path / "1-mask.png", transparency=0)
    assert np.array_equal(np.asarray(images.read_mask(tmp_path / "1-mask.png", SIZE)), SHOWN)


def test_a_soft_brush_on_a_transparent_layer_stays_soft(tmp_path):
    soft = Image.fromarray(np.linspace(0, 255, SHOWN.size).reshape(SHOWN.shape).astype(np.uint8))
    Image.merge("LA", [Image.new("L", SIZE, 255), soft]).save(tmp_path / "1-mask.png")
    assert np.array_equal(np.asarray(images.read_mask(tmp_path / "1-mask.png", SIZE)), np.asarray(soft))


def test_a_mask_of_another_size_is_refused(tmp_path):
    write(tmp_path / "a-mask.png", (30, 20))
    assert images.read_mask(tmp_path / "a-mask.png", (30, 20)).mode == "L"
    with pytest.raises(ValueError, match=r"a-mask\.png is 30 x 20 and its picture 20 x 30"):
        images.read_mask(tmp_path / "a-mask.png", (20, 30))
