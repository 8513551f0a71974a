"""Colours and depths of any file, brought to what a viewer shows: 8-bit sRGB."""

import io
import struct

import numpy as np
import pytest
from PIL import Image, ImageCms

from comcat_diffusion.training import images

SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))


def fixed(*numbers):
    return b"".join(struct.pack(">i", round(number * 65536)) for number in numbers)


def profile(space, tags):
    """An ICC profile of version 2, as small as the format allows; `tags` are its own, by signature."""
    name = b"of the test\0"
    common = {b"desc": b"desc\0\0\0\0" + struct.pack(">I", len(name)) + name + b"\0" * 78, b"cprt": b"text\0\0\0\0no\0"}
    tags = common | {b"wtpt": b"XYZ \0\0\0\0" + fixed(0.9642, 1, 0.8249)} | tags
    table, data, start = struct.pack(">I", len(tags)), b"", 128 + 4 + 12 * len(tags)
    for signature, content in tags.items():
        content += b"\0" * (-len(content) % 4)
        table += signature + struct.pack(">II", start + len(data), len(content))
        data += content
    kind = b"scnr" if space == b"CMYK" else b"mntr"
    head = struct.pack(">I", start + len(data)) + b"\0" * 4 + struct.pack(">I", 0x02400000) + kind + space
    head += (b"Lab " if space == b"CMYK" else b"XYZ ") + b"\0" * 12 + b"acsp" + b"\0" * 28 + fixed(0.9642, 1, 0.8249)
    return head.ljust(128, b"\0") + table + data


def curve(gamma):
    return b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256)) + b"\0\0"


def rgb_profile(red, green, blue, gamma=2.2):
    columns = zip((b"rXYZ", b"gXYZ", b"bXYZ"), (red, green, blue), strict=True)
    curves = dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), curve(gamma))
    return profile(b"RGB ", {name: b"XYZ \0\0\0\0" + fixed(*xyz) for name, xyz in columns} | curves)


P3 = rgb_profile((0.5151, 0.2412, -0.0011), (0.2920, 0.6922, 0.0419), (0.1571, 0.0666, 0.7841))
GREY = profile(b"GRAY", {b"kTRC": curve(1.0)})


def cmyk_profile():
    """Four inks to Lab by a table of two levels each: black ink and each of the others darken alike."""
    lights = [255 - 50 * bin(place).count("1") for place in range(16)]
    table = b"".join(bytes([max(0, light), 128, 128]) for light in lights)
    identity = fixed(1, 0, 0, 0, 1, 0, 0, 0, 1)
    ramp = bytes(range(256))
    content = b"mft1\0\0\0\0" + bytes([4, 3, 2, 0]) + identity + ramp * 4 + table + ramp * 3
    return profile(b"CMYK", {b"A2B0": content})


def as_shown(picture, icc):
    """What a viewer that knows colour profiles shows."""
    return ImageCms.profileToProfile(picture, ImageCms.ImageCmsProfile(io.BytesIO(icc)), SRGB, outputMode="RGB")


@pytest.mark.parametrize("ending", ["png", "jpg", "tif", "webp"])
def test_a_phones_colours_are_those_that_a_viewer_shows(tmp_path, ending):
    photo = Image.new("RGB", (32, 32), (200, 60, 60))
    path = tmp_path / f"a.{ending}"
    photo.save(path, icc_profile=P3, **({"lossless": True} if ending == "webp" else {}))
    read, notes = images.read(path)
    assert notes == ["colours converted from 'of the test' to sRGB"]
    with Image.open(path) as opened:
        assert read.getpixel((9, 9)) == as_shown(opened, P3).getpixel((9, 9))
    assert np.abs(np.array(read.getpixel((9, 9))) - (219, 37, 49)).max() <= 4  # JPEG keeps colours so


def test_a_transparent_picture_is_converted_below_its_alpha(tmp_path):
    photo = Image.new("RGBA", (8, 8), (200, 60, 60, 255))
    photo.paste((1, 2, 3, 0), (0, 0, 4, 8))
    photo.save(tmp_path / "a.png", icc_profile=P3)
    read, _ = images.read(tmp_path / "a.png")
    assert read.getpixel((6, 4)) == (219, 37, 49) and read.getpixel((1, 4)) == (255, 255, 255)


def test_a_palette_is_converted_too(tmp_path):
    Image.new("RGB", (8, 8), (200, 60, 60)).quantize(4).save(tmp_path / "a.png", icc_profile=P3)
    assert images.read(tmp_path / "a.png")[0].getpixel((4, 4)) == (219, 37, 49)


@pytest.mark.parametrize("mode", ["L", "LA", "I;16"])
def test_grey_with_a_profile_gets_the_brightness_that_it_means(tmp_path, mode):
    grey = Image.new("L", (8, 8), 128)
    deep = Image.fromarray(np.full((8, 8), 128 * 257, dtype=np.uint16))
    (deep if mode == "I;16" else grey.convert(mode)).save(tmp_path / "a.png", icc_profile=GREY)
    read, notes = images.read(tmp_path / "a.png")
    assert read.getpixel((4, 4)) == as_shown(grey, GREY).getpixel((4, 4)) == (188, 188, 188)  # light, not a curve
    assert any("to sRGB" in note for note in notes)


def test_grey_with_a_profile_of_colours_is_read_by_it(tmp_path):
    Image.new("L", (8, 8), 128).save(tmp_path / "a.jpg", icc_profile=rgb_profile(
        (0.4361, 0.2225, 0.0139), (0.3851, 0.7169, 0.0971), (0.1431, 0.0606, 0.7141), gamma=1.0
    ))  # fmt: skip
    read = np.array(images.read(tmp_path / "a.jpg")[0].getpixel((4, 4)))
    assert np.abs(read - 188).max() <= 1


@pytest.mark.parametrize("ending", ["jpg", "tif"])
def test_inks_with_a_profile_are_those_of_the_print(tmp_path, ending):
    inks = Image.new("CMYK", (8, 8), (255, 0, 0, 0))
    inks.save(tmp_path / f"a.{ending}", icc_profile=cmyk_profile())
    read, notes = images.read(tmp_path / f"a.{ending}")
    shown = as_shown(inks, cmyk_profile()).getpixel((4, 4))
    assert np.abs(np.array(read.getpixel((4, 4))) - shown).max() <= 2 and max(shown) - min(shown) <= 2 < shown[0] < 220
    assert any("converted from CMYK" in note for note in notes) and any("to sRGB" in note for note in notes)


def test_srgb_by_any_name_stays_as_it_is_and_is_not_told(tmp_path):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3)).astype(np.uint8))
    noise.save(tmp_path / "a.png", icc_profile=SRGB.tobytes())
    read, notes = images.read(tmp_path / "a.png")
    assert read.tobytes() == noise.tobytes() and notes == []


@pytest.mark.parametrize(
    ("mode", "icc"), [("RGB", b"no profile"), ("RGB", P3[:150]), ("RGB", GREY), ("CMYK", P3), ("RGB", cmyk_profile())]
)
def test_a_profile_that_is_broken_or_of_another_picture_is_told_and_left_aside(tmp_path, mode, icc):
    Image.new(mode, (8, 8), (10, 20, 30, 0)[: len(mode)]).save(tmp_path / "a.tif", icc_profile=icc)
    read, notes = images.read(tmp_path / "a.tif")
    assert any("broken or not of such a picture and was left aside" in note for note in notes)
    assert read.tobytes() == Image.new(mode, (8, 8), (10, 20, 30, 0)[: len(mode)]).convert("RGB").tobytes()


def test_lab_is_converted(tmp_path):
    Image.new("LAB", (8, 8), (128, 128, 128)).save(tmp_path / "a.tif")
    assert images.read(tmp_path / "a.tif")[0].getpixel((4, 4)) == (119, 119, 119)


@pytest.mark.parametrize(
    ("values", "wanted"),
    [
        (np.array([0, 0.5, 1], "f4"), [0, 128, 255]),
        (np.array([0, 0.7, 1.4], "f4"), [0, 128, 255]),  # brighter than white
        (np.array([-0.01, 0.5, 1.02], "f4"), [0, 128, 255]),  # overshoot of a resize
        (np.array([-1, 0, 1], "f4"), [0, 128, 255]),
        (np.array([0, 128, 255], "f4"), [0, 128, 255]),
        (np.array([0, 32896, 65535], "f4"), [0, 128, 255]),
        (np.array([0, 100, 200], "i4"), [0, 100, 200]),
        (np.array([0, 100 * 257, 65535], "i4"), [0, 100, 255]),
        (np.array([0, 50_000, 100_000], "i4"), [0, 128, 255]),
        (np.array([-500, 0, 500], "i4"), [0, 128, 255]),
        (np.array([7, 7, 7], "i4"), [7, 7, 7]),
        (np.array([0, 100 * 257, 65535], "u2"), [0, 100, 255]),
    ],
)
def test_deep_values_keep_their_brightness_and_that_is_told(tmp_path, values, wanted):
    Image.fromarray(np.tile(values, (4, 1))).save(tmp_path / "a.tif")
    read, notes = images.read(tmp_path / "a.tif")
    assert np.asarray(read)[0, :, 0].tolist() == wanted and any("brought to 8 bits" in note for note in notes)


def test_values_that_are_no_numbers_are_refused_by_name(tmp_path):
    Image.fromarray(np.full((4, 4), np.nan, "f4")).save(tmp_path / "a.tif")
    with pytest.raises(ValueError, match=r"a\.tif cannot be read as a picture \(some of its values are no numbers\)"):
        images.read(tmp_path / "a.tif")
