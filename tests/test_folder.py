"""A folder as people have it: pictures in order, captions and masks that belong to them, strays left aside."""

import json
import os
import sys
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from comcat_diffusion.training import folder
from comcat_diffusion.training.names import shown


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


COMPOSED, TAKEN_APART = (unicodedata.normalize(form, "Café Ångström") for form in ("NFC", "NFD"))


@pytest.mark.parametrize(("of_picture", "of_others"), [(COMPOSED, TAKEN_APART), (TAKEN_APART, COMPOSED)])
def test_names_in_another_unicode_form_belong_together(tmp_path, of_picture, of_others):
    picture(tmp_path / f"{of_picture}.png"), picture(tmp_path / f"{of_others}_mask.png")
    (tmp_path / f"{of_others}.txt").write_text("sks one")
    (shot,) = folder.find(tmp_path).shots
    assert shot.caption == "sks one" and shot.mask.name == f"{of_others}_mask.png"
    (tmp_path / f"{of_others}.txt").unlink()
    line = {"file_name": f"{of_others}.png", "text": "sks two"}
    (tmp_path / "metadata.jsonl").write_text(json.dumps(line, ensure_ascii=False), "utf-8")
    assert folder.find(tmp_path).shots[0].caption == "sks two"


@pytest.mark.parametrize("name", ["DOG.txt", "dog.jpg.txt", "dog.JPG.caption"])
def test_a_caption_may_be_written_in_other_letters_or_with_the_ending(tmp_path, name):
    picture(tmp_path / "dog.JPG")
    (tmp_path / name).write_text("sks dog")
    assert folder.find(tmp_path).shots[0].caption == "sks dog"


def test_pictures_of_one_stem_may_have_captions_with_their_whole_names(tmp_path):
    picture(tmp_path / "1.jpg"), picture(tmp_path / "1.png")
    assert len(folder.find(tmp_path).shots) == 2
    for ending in ("jpg", "png"):
        (tmp_path / f"1.{ending}.txt").write_text(f"sks {ending}")
    assert [shot.caption for shot in folder.find(tmp_path).shots] == ["sks jpg", "sks png"]


@pytest.mark.skipif(sys.platform != "linux", reason="names are bytes on Linux alone")
def test_names_that_are_not_utf8_are_found_and_shown_with_escapes(tmp_path):
    raw = os.fsdecode(b"caf\xe9")
    picture(tmp_path / f"{raw}.png")
    (tmp_path / f"{raw}.txt").write_text("sks dog")
    assert folder.find(tmp_path).shots[0].caption == "sks dog"
    (tmp_path / f"{raw}.txt").write_text("")
    with pytest.raises(ValueError, match=r"The caption .*caf\\xe9\.txt is empty"):
        folder.find(tmp_path)


def test_a_name_is_shown_in_one_line_of_text():
    assert shown(TAKEN_APART) == COMPOSED
    assert shown("two\nlines\tand \udce9 and \ud83d") == "two\\nlines\\tand \\xe9 and \\ud83d"
    assert shown(Path("a") / "b 狗.png") == "a/b 狗.png"


@pytest.mark.parametrize("name", ["IMG.HEIC", "b.heif", "c.avif", "d.jfif", "e.HIF"])
def test_what_phones_and_browsers_save_is_a_picture(tmp_path, name):
    (tmp_path / name).write_bytes(b"x")
    assert [shot.path.name for shot in folder.find(tmp_path).shots] == [name]


def test_pictures_that_are_left_aside_are_doubtful(tmp_path):
    picture(tmp_path / "a.png"), (tmp_path / "raw.CR2").write_bytes(b"x"), (tmp_path / "more").mkdir()
    picture(tmp_path / "more" / "b.png"), (tmp_path / "notes.md").write_text("x")
    reasons = folder.find(tmp_path).ignored
    assert [name for name, reason in reasons.items() if reason in folder.DOUBTFUL] == ["more", "raw.CR2"]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"a.txt": "one", "c.txt": "two"}, r"caption .*c\.txt has no picture"),
        ({"a.txt": "one"}, r"b\.png has no caption"),
        (
            {"a.txt": "one", "a.caption": "two", "b.txt": "x"},
            r"a\.png has two captions, a\.caption and a\.txt: keep one",
        ),
        ({"a.JPG": None, "a.txt": "one", "b.txt": "x"}, r"a\.txt could belong to a\.JPG and a\.png: give every"),
        ({"a.txt": " \n", "b.txt": "x"}, r"a\.txt is empty"),
        ({"a.txt": b"\xff\xfe\x00", "b.txt": "x"}, r"a\.txt is not UTF-8"),
        ({"metadata.jsonl": '{"file_name": "a.png", "text": "x"}\n{oops'}, r"metadata\.jsonl, line 2 is not"),
        ({"metadata.jsonl": '{"file_name": "a.png"}'}, r"line 1 is not"),
        ({"metadata.jsonl": '{"file_name": "z.png", "text": "x"}'}, r"line 1: there is no picture 'z\.png'"),
        ({"metadata.jsonl": '{"file_name": "a.png", "text": " "}'}, r"the text of a\.png is empty"),
        ({"metadata.jsonl": '["a.png", "x"]'}, r"line 1 is not .* but a list: write one such object a line"),
        ({"metadata.jsonl": '"a.png"'}, r"line 1 is not .* but a str"),
        ({"metadata.jsonl": '{"file_name": 1, "text": "x"}'}, "its file_name must be text, and is 1"),
        (
            {"metadata.jsonl": '{"file_name": ["a.png"], "text": "x"}'},
            r'its file_name must be text, and is \["a\.png"\]',
        ),
        ({"metadata.jsonl": '{"file_name": "a.png", "text": null}'}, "its text must be text, and is null"),
        ({"metadata.jsonl": '{"file_name": "a.png", "text": ["x"]}'}, r'its text must be text, and is \["x"\]'),
        ({"metadata.jsonl": '{"file_name": "a.png", "text": "\\ud83d"}'}, r"the text of a\.png has half a letter"),
        ({"metadata.jsonl": '{"file_name": "a.png", "text": "x"}\n' * 2}, r"line 2: a\.png has a line already"),
        ({"metadata.jsonl": b'{"file_name": "caf\xe9.png", "text": "x"}'}, r"line 1 is not .*utf-8"),
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
