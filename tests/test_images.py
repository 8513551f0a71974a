"""Pictures as people have them: found, read, turned upright, and refused by name when they cannot be used."""

import numpy as np
import pytest
import torch
from PIL import Image

from comcat_diffusion.training import images


def gradient(width=40, height=20):
    across = np.linspace(0, 255, width)[None, :, None].repeat(height, 0)
    return Image.fromarray(np.concatenate([across, across * 0, 255 - across], -1).astype(np.uint8))


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


def test_a_mask_is_read_as_grey_and_must_be_of_its_pictures_size(tmp_path):
    gradient(30, 20).save(tmp_path / "a-mask.png")
    assert images.read_mask(tmp_path / "a-mask.png", (30, 20)).mode == "L"
    with pytest.raises(ValueError, match=r"a-mask\.png is 30 x 20 and its picture 20 x 30"):
        images.read_mask(tmp_path / "a-mask.png", (20, 30))


def test_the_alpha_channel_is_read_upright(tmp_path):
    picture = Image.new("RGBA", (10, 4), (1, 2, 3, 0))
    picture.paste((1, 2, 3, 255), (0, 0, 5, 4))
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    picture.save(tmp_path / "a.png", exif=exif)
    alpha = np.asarray(images.read_alpha(tmp_path / "a.png"))
    assert alpha[:, :5].max() == 0 and alpha[:, 5:].min() == 255
    gradient().save(tmp_path / "b.png")
    assert images.read_alpha(tmp_path / "b.png") is None


def test_pixels_become_minus_one_to_one():
    tensor = images.to_tensor([Image.new("RGB", (4, 2), (0, 255, 51))])
    assert tensor.shape == (1, 3, 2, 4)
    torch.testing.assert_close(tensor[0, :, 0, 0], torch.tensor([-1.0, 1.0, -0.6]))
