"""Other backgrounds for subjects on plain ones: against pictures that were drawn there, and what is not plain."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from comcat_diffusion import bases
from comcat_diffusion.training import backgrounds
from comcat_diffusion.training.backgrounds import COLOURS, EACH, before, others
from comcat_diffusion.training.config import TrainConfig
from comcat_diffusion.training.dataset import before_others, read_dataset
from comcat_diffusion.training.encode import encode_all
from comcat_diffusion.training.objective import objective_of

THING, SIDE, FINER = (30, 90, 200), 128, 8


def disc(background, thing=THING, box=(40, 30, 90, 110)):
    """A thing with smooth edges on a plain background, RGB."""
    large = Image.new("RGB", (SIDE * FINER, SIDE * FINER), background)
    ImageDraw.Draw(large).ellipse([FINER * side for side in box], fill=thing)
    return large.resize((SIDE, SIDE), Image.Resampling.BOX)


@pytest.mark.parametrize("name", COLOURS)
def test_a_thing_before_another_background_is_as_if_it_had_been_drawn_there(name):
    own = (240, 230, 120)
    made, _ = before(disc(own), name)
    off = np.abs(np.asarray(made, float) - np.asarray(disc(COLOURS[name]), float))
    # Shares are too small by up to what counts as ringing, of the contrast; they move by the backgrounds' difference.
    moved, contrast = (np.abs(np.subtract(other, own)).max() for other in (COLOURS[name], THING))
    assert off.max() <= moved * (backgrounds.RINGING + 1) / contrast + 1


def test_the_mask_has_the_thing_and_what_is_near_it():
    _, mask = before(disc((240, 230, 120)), "red")
    drawn = np.asarray(disc((0, 0, 0), (255, 255, 255)).convert("L")) > 0
    inside = np.asarray(mask) > 0
    assert set(np.unique(mask)) == {0, 255}
    assert inside[drawn].all()
    near = round(backgrounds.AROUND * SIDE)
    down, across = np.nonzero(inside)
    rows, columns = np.nonzero(drawn)
    assert rows.min() - near <= down.min() < rows.min() and columns.max() < across.max() <= columns.max() + near


def test_light_and_compression_leave_a_background_plain():
    rng = np.random.default_rng(0)
    ramp = np.linspace(-8, 8, SIDE)[:, None, None]
    noisy = np.asarray(disc((230, 230, 228)), float) + ramp + rng.normal(0, 3, (SIDE, SIDE, 3))
    photograph = Image.fromarray(noisy.clip(0, 255).astype(np.uint8))
    assert others(photograph, 0)
    made = np.asarray(before(photograph, "blue")[0], float)
    corner = made[:20, :20] - COLOURS["blue"]
    assert np.abs(corner).max() <= backgrounds.ALIKE  # its light stays, on another colour


def test_pictures_have_different_backgrounds_and_none_its_own():
    picture = disc(COLOURS["green"])
    found = [others(picture, first) for first in range(2)]
    assert all(len(set(names)) == EACH for names in found) and found[0] != found[1]
    assert "green" not in found[0] + found[1]


def vignette():
    """A thing on a background that grows darker towards it, so that nobody can say where it ends."""
    across, down = np.meshgrid(np.linspace(-1, 1, SIDE), np.linspace(-1, 1, SIDE))
    light = 1 - 0.5 * np.exp(-4 * (across**2 + down**2))
    return Image.fromarray((np.asarray(disc((220, 220, 220)), float) * light[..., None]).astype(np.uint8))


def stripes():
    picture = Image.new("RGB", (SIDE, SIDE), (250, 250, 250))
    for left in range(0, SIDE, 16):
        picture.paste((40, 120, 60), (left, 0, left + 8, SIDE))
    return picture


@pytest.mark.parametrize(
    "picture",
    [
        stripes(),
        Image.linear_gradient("L").resize((SIDE, SIDE)).convert("RGB"),
        Image.new("RGB", (SIDE, SIDE), (200, 200, 200)),  # nothing is there
        vignette(),
        disc((250, 250, 250), box=(60, 60, 62, 62)),  # a speck
        Image.new("RGB", (3000, 2), (90, 90, 90)),
        Image.new("RGB", (1, 1)),
    ],
    ids=["stripes", "ramp", "nothing", "vignette", "speck", "line", "pixel"],
)
def test_what_has_no_thing_on_a_plain_background_stays_as_it_is(picture):
    assert others(picture, 0) == []


@pytest.fixture
def folder(tmp_path):
    """A picture on a plain background and one that is none, with captions where they are asked for."""

    def made(captions=False):
        pictures = tmp_path / "pictures"
        pictures.mkdir()
        for name, picture in (("plain", disc((250, 250, 250))), ("stripes", stripes())):
            picture.save(pictures / f"{name}.png")
            if captions:
                (pictures / f"{name}.txt").write_text(f"sks mug, {name}")
        return str(pictures)

    return made


def config_of(folder, prompt="a photo of sks mug", **settings):
    return TrainConfig(instance_data_dir=folder, instance_prompt=prompt, **settings)


@pytest.mark.parametrize("captions", [False, True])
def test_a_picture_on_a_plain_background_is_there_before_others_that_its_prompt_names(folder, captions):
    found = before_others(read_dataset(config_of(folder(captions))).examples)
    assert [one.name for one in found] == ["plain.png"] * EACH
    assert [one.prompt for one in found] == [f"a photo of sks mug, {one.background} background" for one in found]
    assert not any(one.plain for one in found)  # no share of them is learned without the background's name
    picture, mask, _ = found[0].read()
    assert picture.getpixel((0, 0)) == COLOURS[found[0].background] and mask.size == picture.size


def test_what_a_mask_of_its_own_hides_is_learned_on_no_background(folder):
    place = Path(folder())
    Image.new("L", (SIDE, SIDE)).save(place / "stripes-mask.png")
    half = Image.new("L", (SIDE, SIDE), 255)
    half.paste(0, (0, 0, SIDE // 2, SIDE))
    half.save(place / "plain-mask.png")
    for one in before_others(read_dataset(config_of(str(place))).examples):
        mask = np.asarray(one.read()[1])
        assert not mask[:, : SIDE // 2].any() and mask[:, SIDE // 2 :].any()


def test_a_large_picture_is_set_there_in_a_smaller_size(folder):
    place = Path(folder())
    disc((250, 250, 250)).resize((2560, 2560)).save(place / "plain.png")
    picture, mask, _ = before_others(read_dataset(config_of(str(place))).examples)[0].read()
    assert picture.size == mask.size == (1280, 1280)


def test_a_style_is_everywhere_in_its_pictures_and_has_no_background(folder):
    assert before_others(read_dataset(config_of(folder(), "a picture in sks style")).examples) == []


@pytest.mark.parametrize(
    ("settings", "crops"),
    [({}, 2 + EACH), ({"background_augmentation": False}, 2), ({"prior": "teacher", "everywhere": True}, 2 + EACH)],
)
def test_they_are_encoded_with_masks_and_known_to_every_prior(folder, settings, crops):
    pipe, notes = bases.load_base("embedded"), []
    config = config_of(folder(), resolution=64, auto_mask=False, **settings)
    material = encode_all(config, pipe, read_dataset(config), objective_of(pipe), notes.append)
    assert len(material.crops) == crops
    assert [crop.weight is not None for crop in material.crops] == [False] * 2 + [True] * (crops - 2)
    assert any("--no-background_augmentation" in note for note in notes) == (crops > 2)
    if "prior" in settings:
        assert {crop.prompt for crop in material.crops} == material.class_prompts.keys()
        assert set(material.class_prompts.values()) == {"a photo of mug"}
