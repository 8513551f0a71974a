"""Pictures as people have them: found, read, turned upright, and refused by name when they cannot be used."""

import random

import numpy as np
import pytest
import torch
from PIL import Image

from comcat_diffusion.training import images


def gradient(width=40, height=20):
    across = np.linspace(0, 255, width)[None, :, None].repeat(height, 0)
    return Image.fromarray(np.concatenate([across, across * 0, 255 - across], -1).astype(np.uint8))


def test_pictures_are_found_in_order_of_name_and_the_rest_is_listed(tmp_path):
    for name in ("b.png", "a.JPG", "c.webp"):
        gradient().save(tmp_path / name, {"b": "PNG", "a": "JPEG", "c": "WEBP"}[name[0]])
    for name in (".DS_Store", "._a.JPG", "Thumbs.db", "notes.txt"):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "more").mkdir()
    found = images.find(tmp_path)
    assert [path.name for path in found.pictures] == ["a.JPG", "b.png", "c.webp"]
    assert set(found.ignored) == {".DS_Store", "._a.JPG", "Thumbs.db", "notes.txt", "more"}
    assert found.ignored["more"] == "a folder" and found.ignored["notes.txt"] == "not a picture"


def test_a_folder_without_pictures_is_refused_by_what_it_holds(tmp_path):
    with pytest.raises(FileNotFoundError, match="no folder"):
        images.find(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="it is empty"):
        images.find(tmp_path)
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(ValueError, match=r"no pictures.*it holds notes\.txt"):
        images.find(tmp_path)
    with pytest.raises(ValueError, match="is a file"):
        images.find(tmp_path / "notes.txt")


def test_a_file_that_is_no_picture_or_cut_short_is_named(tmp_path):
    (tmp_path / "text.png").write_text("not a picture")
    gradient(400, 400).save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:200])
    for name in ("text.png", "cut.png"):
        with pytest.raises(ValueError, match=f"{name} cannot be read as a picture"):
            images.read(tmp_path / name)


def test_a_rotated_photo_is_turned_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held on its side
    gradient().save(tmp_path / "a.jpg", exif=exif, quality=95)
    picture, notes = images.read(tmp_path / "a.jpg")
    assert picture.size == (20, 40) and notes == ["turned upright as its EXIF data say"]
    red = np.asarray(picture)[..., 0].astype(int)
    assert red[0].mean() < 20 and red[-1].mean() > 235  # what was left is on top


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparent_pixels_become_white(tmp_path, mode):
    clear = Image.new("RGBA", (8, 8), (10, 20, 30, 0)).convert(mode)
    clear.save(tmp_path / "a.png", **({"transparency": 0} if mode == "P" else {}))
    picture, notes = images.read(tmp_path / "a.png")
    assert np.asarray(picture).min() == 255 and "transparent pixels became white" in notes


def test_grey_and_deep_pictures_keep_their_brightness(tmp_path):
    Image.new("L", (8, 8), 100).save(tmp_path / "grey.png")
    Image.fromarray(np.full((8, 8), 100 * 257, dtype=np.uint16)).save(tmp_path / "deep.png")
    for name in ("grey.png", "deep.png"):
        assert np.asarray(images.read(tmp_path / name)[0]).tolist() == [[[100, 100, 100]] * 8] * 8


def test_a_picture_of_too_many_pixels_is_refused_before_it_is_unpacked(tmp_path, monkeypatch):
    gradient(30, 30).save(tmp_path / "huge.png")
    monkeypatch.setattr(images, "MOST_PIXELS", 899)
    with pytest.raises(ValueError, match="30 x 30 pixels; make it smaller"):
        images.read(tmp_path / "huge.png")


def test_squares_are_the_middle_or_four_seeded_places_and_mirrored_on_demand():
    picture = gradient(80, 40)
    (middle,) = images.squares(picture, 20, center_crop=True, mirrored=False, rng=random.Random(0))
    assert middle.size == (20, 20)
    left, right = np.asarray(middle)[10, [0, -1], 0].astype(int)
    assert abs((left + right) / 2 - 127.5) < 3  # as far from either end
    once = images.squares(picture, 20, center_crop=False, mirrored=False, rng=random.Random(0))
    again = images.squares(picture, 20, center_crop=False, mirrored=False, rng=random.Random(0))
    assert len(once) == 4 and [a.tobytes() for a in once] == [b.tobytes() for b in again]
    assert len({a.tobytes() for a in once}) > 1
    plain, flipped = images.squares(picture, 20, center_crop=True, mirrored=True, rng=random.Random(0))
    assert np.array_equal(np.asarray(plain)[:, ::-1], np.asarray(flipped))
    assert images.squares(gradient(5, 3), 20, True, False, random.Random(0))[0].size == (20, 20)


def test_pixels_become_minus_one_to_one():
    tensor = images.to_tensor([Image.new("RGB", (4, 2), (0, 255, 51))])
    assert tensor.shape == (1, 3, 2, 4)
    torch.testing.assert_close(tensor[0, :, 0, 0], torch.tensor([-1.0, 1.0, -0.6]))
