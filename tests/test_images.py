"""Pictures as people have them: found, read, turned upright, and refused by name when they cannot be used."""

import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile, features

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


def test_of_several_frames_the_first_is_read_and_that_is_told(tmp_path):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "green", "blue")]
    for name in ("a.gif", "a.tif"):
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:])
        picture, notes = images.read(tmp_path / name)
        assert picture.getpixel((4, 4)) == (255, 0, 0) and "of its 3 frames or pages the first is used" in notes


@pytest.mark.parametrize("exif", [b"Exif\0\0garbage", b"Exif\0\0II*\0\xff\xff\xff\xff", b"nonsense"])
@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_broken_exif_data_keep_no_picture_from_being_read(tmp_path, exif):
    gradient().save(tmp_path / "a.jpg", exif=exif)
    assert images.read(tmp_path / "a.jpg")[0].size == (40, 20)


def test_a_decoder_that_breaks_in_its_own_way_names_the_file(tmp_path, monkeypatch):
    gradient().save(tmp_path / "a.png")

    def broken(image):
        raise KeyError("chunk")

    monkeypatch.setattr(images.ImageOps, "exif_transpose", broken)
    with pytest.raises(ValueError, match=r"a\.png cannot be read as a picture \('chunk'\)"):
        images.read(tmp_path / "a.png")


HEIC = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(100)


@pytest.mark.parametrize("name", ["a.HEIC", "a.jpg"])  # phones and messengers call them both
def test_without_its_package_a_heic_picture_is_refused_with_the_way_out(tmp_path, monkeypatch, name):
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    (tmp_path / name).write_bytes(HEIC)
    with pytest.raises(ValueError, match=rf"{name} is a HEIC picture.*pip install pillow-heif, or save it as JPEG"):
        images.read(tmp_path / name)


def test_with_its_package_a_heic_picture_is_read(tmp_path):
    pillow_heif = pytest.importorskip("pillow_heif")
    pillow_heif.from_pillow(gradient(64, 32)).save(tmp_path / "a.HEIC", quality=95)
    picture, _ = images.read(tmp_path / "a.HEIC")
    assert np.abs(np.asarray(picture).astype(int) - np.asarray(gradient(64, 32))).mean() < 8


def test_the_package_that_reads_heic_is_asked_once_it_is_needed(tmp_path, monkeypatch):
    """With a reader of our own in the package's place, as the package is not everywhere."""

    class Reader(ImageFile.ImageFile):
        format = "HEIF"

        def _open(self):
            self._size, self._mode = (6, 4), "RGB"
            self.tile = [ImageFile._Tile("raw", (0, 0, 6, 4), 28, ("RGB", 0, 1))]

    def register_heif_opener():
        Image.register_open(Reader.format, Reader, lambda start: start[8:12] == b"heic")

    monkeypatch.setitem(sys.modules, "pillow_heif", SimpleNamespace(register_heif_opener=register_heif_opener))
    monkeypatch.setattr(Image, "OPEN", dict(Image.OPEN)), monkeypatch.setattr(Image, "ID", list(Image.ID))
    (tmp_path / "a.heic").write_bytes(HEIC[:28] + bytes([9, 8, 7]) * 24)
    assert images.read(tmp_path / "a.heic")[0].getpixel((3, 2)) == (9, 8, 7)


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow reads no AVIF")
def test_an_avif_picture_is_read(tmp_path):
    gradient(64, 32).save(tmp_path / "a.avif", quality=95)
    picture, _ = images.read(tmp_path / "a.avif")
    assert np.abs(np.asarray(picture).astype(int) - np.asarray(gradient(64, 32))).mean() < 8


def test_without_a_pillow_that_reads_it_an_avif_picture_is_refused_with_the_way_out(tmp_path, monkeypatch):
    (tmp_path / "a.avif").write_bytes(b"\0\0\0\x20ftypavif\0\0\0\0avifmif1" + bytes(100))
    monkeypatch.setattr(images.features, "check", lambda feature: False)
    with pytest.raises(ValueError, match=r"a\.avif is an AVIF picture, which Pillow reads from version 11\.3 on"):
        images.read(tmp_path / "a.avif")


def test_a_picture_of_too_many_pixels_is_refused_before_it_is_unpacked(tmp_path, monkeypatch):
    gradient(30, 30).save(tmp_path / "huge.png")
    monkeypatch.setattr(images, "MOST_PIXELS", 899)
    with pytest.raises(ValueError, match="30 x 30 pixels; make it smaller"):
        images.read(tmp_path / "huge.png")


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
