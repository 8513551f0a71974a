"""What is said of pictures before they are learned: facts of what was done, doubts, errors; by check and run alike."""

import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from comcat_diffusion import bases
from comcat_diffusion.cli import main
from comcat_diffusion.training.config import SubjectConfig, TrainConfig, ValidateConfig
from comcat_diffusion.training.customize import Silent, customize
from comcat_diffusion.training.validate import validate
from tests.quick_training import QUICK
from tests.slow import slow
from tests.test_colours import P3
from tests.test_twins import photo

TRAIN = bases.assets() / "subject" / "train"


@pytest.fixture
def pictures(tmp_path, monkeypatch):
    """Four photographs with captions, in a folder where no run was yet."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pictures").mkdir()
    for number in range(1, 5):
        photo(number).save(tmp_path / "pictures" / f"{number}.png")
        (tmp_path / "pictures" / f"{number}.txt").write_text(f"sks teddy in place {number}")
    return tmp_path / "pictures"


class Listener(Silent):
    def __init__(self):
        self.notes = []

    def note(self, text):
        self.notes.append(text)


def said(pictures, **settings):
    """The report of the check, and the notes of a run that must say the same."""
    own = {"instance_data_dir": str(pictures), "instance_prompt": "a photo of sks teddy", **settings}
    report, listener = validate(ValidateConfig(**own)), Listener()
    assert not report.errors, report.errors
    quick = {"max_train_steps": 1, "skip_final_inference": True, "output_dir": "run", **QUICK}
    customize(TrainConfig(**own, **quick), listener)
    shutil.rmtree("run")
    return report, listener.notes


def refused(pictures, message, **settings):
    """The same sentence ends the run that is an error of the check."""
    own = {"instance_data_dir": str(pictures), "instance_prompt": "a photo of sks teddy", **settings}
    with pytest.raises(ValueError, match=message) as caught:
        customize(TrainConfig(**own, max_train_steps=1))
    assert not Path("out").exists() and "\n" not in str(caught.value)
    errors = validate(ValidateConfig(**own)).errors
    assert str(caught.value).split(" There are")[0] in errors
    return errors


@pytest.mark.slow
def test_photographs_on_the_embedded_base_are_doubted_with_what_it_knows_and_the_way_out(pictures):
    report, notes = said(pictures)
    (doubt,) = report.doubts
    assert "it knows 24 drawn things (cat, dog, " in doubt and "photographs" in doubt
    assert "--pretrained_model_name_or_path stable-diffusion-v1-5/stable-diffusion-v1-5" in doubt and doubt in notes


def test_the_sample_subject_is_of_its_world(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for settings in ({}, {"instance_data_dir": str(TRAIN), "instance_prompt": "a photo of sks teddy"}):
        assert validate(ValidateConfig(**settings)).doubts == []


def test_of_several_subjects_one_with_photographs_is_enough(pictures):
    both = [SubjectConfig(instance_data_dir=str(TRAIN), instance_prompt="a photo of sks teddy")]
    both += [SubjectConfig(instance_data_dir=str(pictures), instance_prompt="a photo of sks teddy", trigger="teddy")]
    assert any("The embedded base is" in doubt for doubt in validate(ValidateConfig(subjects=both)).doubts)


@pytest.mark.slow
def test_what_was_merely_done_is_a_fact(pictures):
    Image.open(pictures / "1.png").save(pictures / "1.png", icc_profile=P3)
    Image.open(pictures / "2.png").convert("CMYK").save(pictures / "2.tif")
    (pictures / "2.png").unlink()
    exif = Image.Exif()
    exif[0x0112] = 6
    for number in (3, 4):
        Image.open(pictures / f"{number}.png").save(pictures / f"{number}.jpg", exif=exif)
        (pictures / f"{number}.png").unlink()
    (pictures / "notes.md").write_text("x"), (pictures / "list.csv").write_text("x"), (pictures / ".x").write_text("x")
    report, notes = said(pictures)
    done = [
        "Left aside: .x (a system file).",
        "Left aside: list.csv and notes.md (not a picture).",
        "1.png: colours converted from 'of the test' to sRGB.",
        "2.tif: converted from CMYK to RGB.",
        "3.jpg and 4.jpg: turned upright as its EXIF data say.",
    ]
    assert [fact for fact in report.facts if fact in done] == done and set(done) <= set(notes)
    assert len(report.doubts) == 1  # of the embedded base


@pytest.mark.slow
def test_many_pictures_are_one_sentence(pictures):
    for number in range(5, 30):
        photo(number, (80, 80)).convert("L").save(pictures / f"{number}.png")
        (pictures / f"{number}.txt").write_text(f"sks teddy in place {number}")
    told = [
        fact
        for fact in validate(ValidateConfig(instance_data_dir=str(pictures), trigger="sks")).facts
        if "L to RGB" in fact
    ]
    assert told == ["10.png, 11.png, 12.png and 22 more: converted from L to RGB."]


def test_pictures_without_any_caption_are_doubted(pictures):
    for path in pictures.glob("*.txt"):
        path.unlink()
    report, notes = said(pictures)
    (doubt,) = [doubt for doubt in report.doubts if "caption" in doubt]
    assert doubt.startswith("No picture of 'sks teddy' has a caption") and doubt in notes


@pytest.mark.slow
def test_near_equal_pictures_are_doubted_by_name(pictures):
    whole = Image.open(pictures / "1.png")
    whole.crop((30, 20, 300, 220)).save(pictures / "5.png"), shutil.copy(pictures / "2.png", pictures / "6.png")
    for number in (5, 6):
        (pictures / f"{number}.txt").write_text(f"sks teddy in place {number}")
    report, notes = said(pictures)
    alike = [doubt for doubt in report.doubts if "show" in doubt]
    assert alike[0].startswith("6.png shows the same as 2.png") and alike[1].startswith("1.png and 5.png show nearly")
    assert len(alike) == 2 and set(alike) <= set(notes)


@pytest.mark.slow
def test_pictures_smaller_than_the_resolution_are_doubted_by_name(pictures):
    photo(5, (63, 200)).save(pictures / "1.png")
    report, notes = said(pictures)
    (doubt,) = [doubt for doubt in report.doubts if "smaller" in doubt]
    assert doubt.startswith("1.png (63 x 200) is smaller than the resolution of 64 pixels") and doubt in notes
    photo(5, (64, 200)).save(pictures / "1.png")
    own = {"instance_data_dir": str(pictures), "instance_prompt": "a photo of sks teddy"}
    assert not [doubt for doubt in validate(ValidateConfig(**own)).doubts if "smaller" in doubt]
    (doubt,) = [doubt for doubt in validate(ValidateConfig(**own, resolution=256)).doubts if "smaller" in doubt]
    assert doubt.startswith("1.png (64 x 200), 2.png (320 x 240), 3.png (320 x 240) and 4.png (320 x 240) are smaller")


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (255, 255, "1-mask.png is all white: it masks nothing"),
        slow(252, 255, "1-mask.png is all white"),
        slow(0, 0, "1-mask.png is all black: it masks nothing"),
        slow(0, 3, "1-mask.png is all black"),
        slow(128, 128, "1-mask.png is all one grey"),
        slow(0, 90, "1-mask.png is nowhere white (at most 90 of 255)"),
        slow(0, 255, None),
    ],
)
def test_a_mask_that_masks_nothing_is_doubted(pictures, low, high, expected):
    mask = np.full((240, 320), low, dtype=np.uint8)
    mask[60:180, 80:240] = high
    Image.fromarray(mask).save(pictures / "1-mask.png")
    report, notes = said(pictures)
    told = [doubt for doubt in report.doubts if "mask" in doubt]
    assert [doubt.startswith(expected) for doubt in told] == [True] * bool(expected) and set(told) <= set(notes)


@pytest.mark.slow
def test_a_photograph_that_is_named_like_a_mask_is_doubted(pictures):
    photo(9).save(pictures / "1_mask.png")
    report, notes = said(pictures)
    (told,) = [doubt for doubt in report.doubts if "mask" in doubt]
    assert told.startswith("1_mask.png is mostly neither black nor white: is it a mask?") and told in notes


def test_a_mask_that_leaves_nothing_to_learn_is_an_error(pictures):
    Image.new("L", (320, 240)).save(pictures / "1-mask.png")
    refused(
        pictures, r"1-mask\.png is all black and --unmasked_weight is 0: nothing would be learned", unmasked_weight=0.0
    )


@pytest.mark.slow
def test_alpha_that_is_not_there_is_doubted(pictures):
    half = Image.new("L", (320, 240))
    half.paste(255, (0, 0, 200, 240))
    for number, alpha in (("1", half), ("2", Image.new("L", (320, 240), 255))):
        picture = Image.open(pictures / f"{number}.png")
        picture.putalpha(alpha)
        picture.save(pictures / f"{number}.png")
    told = [doubt for doubt in said(pictures, alpha_mask=True)[0].doubts if "alpha" in doubt]
    assert told[0].startswith("The alpha channel of 2.png is all white")
    assert told[1:] == [f"{n}.png has neither an alpha channel nor a mask: all of it counts." for n in (3, 4)]


@pytest.mark.slow
def test_one_broken_picture_among_many_is_refused_with_an_offer_and_left_out_on_demand(pictures):
    (pictures / "2.png").write_bytes((pictures / "2.png").read_bytes()[:300])
    Image.new("L", (9, 9)).save(pictures / "3-mask.png")
    errors = refused(
        pictures, r"2\.png cannot be read .*--skip_broken leaves it out\. There are 1 more: comcat validate"
    )
    assert len(errors) == 2 and "3-mask.png is 9 x 9" in errors[1]
    report, notes = said(pictures, skip_broken=True)
    left_out = [doubt for doubt in report.doubts if doubt.startswith("Left out: ")]
    assert "2.png cannot be read" in left_out[0] and "3-mask.png" in left_out[1] and set(left_out) <= set(notes)
    assert "'sks teddy': 2 pictures, 2 prompts, 0 masks." in report.facts
    assert "Learning 'sks teddy' from 2 pictures." in notes


def test_if_all_pictures_of_a_subject_are_broken_there_is_nothing_to_offer(pictures):
    for path in pictures.glob("*.png"):
        path.write_bytes(b"nothing")
    for skip in (False, True):
        errors = refused(pictures, "1.png cannot be read", skip_broken=skip)
        assert len(errors) == 4 and not any("--skip_broken" in error for error in errors)


def test_a_heic_picture_without_its_package_is_one_that_can_be_left_out(pictures, monkeypatch):
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    (
        (pictures / "5.heic").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic"),
        (pictures / "5.txt").write_text("sks teddy"),
    )
    refused(
        pictures,
        r"5\.heic is a HEIC picture.*pip install pillow-heif, or save it as JPEG\. --skip_broken leaves it out",
    )


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="names are bytes on Linux alone")
def test_a_picture_whose_name_is_not_utf8_is_learned_and_shown_with_escapes(pictures, capsys):
    os.rename(os.fsencode(pictures / "1.png"), os.fsencode(pictures) + b"/caf\xe9.png")
    os.rename(os.fsencode(pictures / "1.txt"), os.fsencode(pictures) + b"/caf\xe9.txt")
    Image.open(pictures / "2.png").convert("L").save(os.fsencode(pictures) + b"/caf\xe9.png", "PNG")
    report, _ = said(pictures, center_crop=False, validation_fraction=0.25)
    assert "caf\\xe9.png: converted from L to RGB." in report.facts
    with open(os.fsencode(pictures) + b"/caf\xe9.png", "wb") as file:
        file.write(b"nothing")
    flags = ["--instance_data_dir", str(pictures), "--instance_prompt", "a photo of sks teddy"]
    for command in ("validate", "train"):
        assert main([command, *flags]) == 2
        out = capsys.readouterr()
        assert "caf\\xe9.png cannot be read" in out.out + out.err


@pytest.mark.skipif(sys.platform != "linux", reason="names are bytes on Linux alone")
def test_a_folder_or_a_prompt_that_run_toml_could_not_hold_is_refused_by_its_flag():
    for flag in ("instance_data_dir", "instance_prompt", "output_dir"):
        settings = {"instance_data_dir": "dog", "instance_prompt": "a sks dog", flag: os.fsdecode(b"sks caf\xe9")}
        with pytest.raises(ValueError, match=rf"--{flag} 'sks caf\\xe9' is not UTF-8"):
            TrainConfig(**settings)
    with pytest.raises(ValueError, match="--validation_prompt"):
        TrainConfig(validation_prompt=["\udce9"])
