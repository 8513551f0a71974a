"""A folder as people have it: pictures in order, captions and masks that belong to them, strays left aside."""

import json

import numpy as np
import pytest
from PIL import Image

from comcat_diffusion.training import folder


def picture(path, size=(12, 8)):
    Image.new("RGB", size, "green").save(path)
    return path


def test_pictures_are_found_in_order_of_name_and_the_rest_is_listed(tmp_path):
    for name in ("b.png", "a.JPG", "c.webp"):
        Image.new("RGB", (4, 4)).save(tmp_path / name, {"b": "PNG", "a": "JPEG", "c": "WEBP"}[name[0]])
    for name in (".DS_Store", "._a.JPG", "Thumbs.db", "notes.md"):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "more").mkdir()
    found = folder.find(tmp_path)
    assert [shot.path.name for shot in found.shots] == ["a.JPG", "b.png", "c.webp"]
    assert all(shot.caption is None and shot.mask is None for shot in found.shots)
    assert set(found.ignored) == {".DS_Store", "._a.JPG", "Thumbs.db", "notes.md", "more"}
    assert found.ignored["more"] == "a folder" and found.ignored["notes.md"] == "not a picture"


def test_a_folder_without_pictures_is_refused_by_what_it_holds(tmp_path):
    with pytest.raises(FileNotFoundError, match="no folder"):
        folder.find(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="it is empty"):
        folder.find(tmp_path)
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(ValueError, match=r"no pictures.*it holds notes\.txt"):
        folder.find(tmp_path)
    with pytest.raises(ValueError, match="is a file"):
        folder.find(tmp_path / "notes.txt")


@pytest.mark.parametrize("suffix", [".txt", ".caption"])
def test_captions_stand_beside_their_pictures(tmp_path, suffix):
    for stem in "ab":
        picture(tmp_path / f"{stem}.png")
        (tmp_path / f"{stem}{suffix}").write_text(f"\ufeffa photo of sks dog,\n  {stem} \n", encoding="utf-8")
    assert [shot.caption for shot in folder.find(tmp_path).shots] == [
        "a photo of sks dog, a",
        "a photo of sks dog, b",
    ]


def test_captions_stand_in_metadata(tmp_path):
    for stem in "ab":
        picture(tmp_path / f"{stem}.png")
    rows = [{"file_name": f"{stem}.png", "text": f"sks {stem}", "more": 1} for stem in "ba"]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    found = folder.find(tmp_path)
    assert [shot.caption for shot in found.shots] == ["sks a", "sks b"] and not found.ignored


def test_masks_belong_to_their_pictures(tmp_path):
    picture(tmp_path / "a.jpg"), picture(tmp_path / "b.png")
    Image.fromarray(np.zeros((8, 12), dtype=np.uint8)).save(tmp_path / "a-mask.png")
    found = folder.find(tmp_path)
    assert [(shot.path.name, shot.mask and shot.mask.name) for shot in found.shots] == [
        ("a.jpg", "a-mask.png"),
        ("b.png", None),
    ]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"a.txt": "one", "c.txt": "two"}, r"caption .*c\.txt has no picture"),
        ({"a.txt": "one"}, r"b\.png has no caption"),
        ({"a.txt": " \n", "b.txt": "x"}, r"a\.txt is empty"),
        ({"a.txt": b"\xff\xfe\x00", "b.txt": "x"}, r"a\.txt is not UTF-8"),
        ({"metadata.jsonl": '{"file_name": "a.png", "text": "x"}\n{oops'}, r"metadata\.jsonl, line 2 is not"),
        ({"metadata.jsonl": '{"file_name": "a.png"}'}, r"line 1 is not"),
        ({"metadata.jsonl": '{"file_name": "z.png", "text": "x"}'}, r"line 1: there is no picture 'z\.png'"),
        ({"metadata.jsonl": '{"file_name": "a.png", "text": " "}'}, r"the text of a\.png is empty"),
        ({"metadata.jsonl": "", "a.txt": "x"}, "keep one of the two"),
        ({"z-mask.png": None}, r"mask .*z-mask\.png has no picture z"),
    ],
)
def test_what_does_not_belong_together_is_told(tmp_path, files, message):
    for stem in "ab":
        picture(tmp_path / f"{stem}.png")
    for name, content in files.items():
        if content is None:
            picture(tmp_path / name)
        else:
            (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message) as caught:
        folder.find(tmp_path)
    assert "\n" not in str(caught.value)
