"""Validation: everything wrong with a run in one list, in seconds, and the real cost if it is asked for."""

import re
import shutil
from pathlib import Path

import pytest
import transformers
from diffusers import DiffusionPipeline, StableDiffusionImg2ImgPipeline, StableDiffusionPipeline
from PIL import Image
from transformers import CLIPTokenizer

from comcat_diffusion import bases
from comcat_diffusion.cli import main
from comcat_diffusion.training.config import TrainConfig, ValidateConfig
from comcat_diffusion.training.customize import customize
from comcat_diffusion.training.suitable import refuse_pipeline
from comcat_diffusion.training.validate import validate
from tests import tiny_bases
from tests.quick_training import QUICK


@pytest.fixture
def pictures(tmp_path):
    shutil.copytree(bases.assets() / "subject" / "train", tmp_path / "pictures", ignore=shutil.ignore_patterns("*.txt"))
    return tmp_path / "pictures"


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Where no run was yet: a folder called out would be its own."""
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"resolution": 50}, "--resolution 50 must be a multiple of"),
        ({"mixed_precision": "fp16"}, "needs a GPU"),
        ({"init_adapter": "nope.safetensors"}, "no adapter file"),
        ({"name": "a/b"}, "makes no file name"),
        ({"output_dir": "used"}, "holds another run"),
    ],
)
def test_what_a_run_would_refuse_is_an_error(pictures, tmp_path, settings, message):
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "run.toml").write_text("")
    report = found(pictures, **settings)
    assert any(message in error for error in report.errors), report.errors


@pytest.mark.slow
def test_the_size_told_of_an_adapter_that_is_learned_on_is_its_own(pictures, tmp_path):
    settings = {"rank": 2, "kind": "free", "max_train_steps": 1, "skip_final_inference": True, **QUICK}
    first = customize(TrainConfig(output_dir=str(tmp_path / "first"), **settings))
    told = found(pictures, init_adapter=str(first.adapter)).facts
    assert any(f"{first.parameters:,} parameters" in fact for fact in told)


def test_it_says_which_pictures_are_learned_from_before_other_backgrounds(pictures):
    assert any(fact.startswith("4 of 4 pictures have a plain background") for fact in found(pictures).facts)
    assert not any("background" in fact for fact in found(pictures, background_augmentation=False).facts)


def found(pictures, **settings):
    own = {"instance_data_dir": str(pictures), "instance_prompt": "a photo of sks teddy"}
    return validate(ValidateConfig(**{**own, **settings}))


def test_the_sample_is_fine():
    report = validate(ValidateConfig())
    assert not report.doubts and not report.errors
    assert "'sks teddy': 4 pictures, 4 prompts, 0 masks." in report.facts
    assert "400 steps show every picture about 400 times." in report.facts  # four at once


@pytest.mark.slow
def test_the_size_that_is_told_is_the_one_that_is_written(tmp_path):
    (told,) = [fact for fact in validate(ValidateConfig(rank=3)).facts if fact.startswith("Adapter")]
    few = {"max_train_steps": 1, "output_dir": str(tmp_path), "skip_final_inference": True, **QUICK}
    outcome = customize(TrainConfig(rank=3, **few))
    assert f"{outcome.parameters:,} parameters" in told


def test_all_that_is_wrong_with_the_pictures_is_told_at_once(pictures):
    (pictures / "a.png").write_bytes(b"nothing")
    (pictures / "b.png").write_bytes((pictures / "1.png").read_bytes()[:500])
    shutil.copy(pictures / "1.png", pictures / "twin.png")
    (pictures / ".DS_Store").write_bytes(b"x")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.open(pictures / "2.png").save(pictures / "turned.jpg", exif=exif)
    report = found(pictures)
    assert [error.split(" cannot")[0].rpartition("/")[2] for error in report.errors] == ["a.png", "b.png"]
    assert "twin.png shows the same as 1.png" in " ".join(report.doubts)
    said = " ".join(report.facts)
    assert "turned.jpg: turned upright" in said and "Left aside: .DS_Store" in said


def test_captions_prompts_and_pace_are_doubted(pictures):
    for path in sorted(pictures.glob("*.png")):
        path.with_suffix(".txt").write_text("sks teddy" if path.stem != "2" else "a teddy " + "on the left " * 20)
    report = found(pictures, max_train_steps=10, lr_warmup_steps=6, train_batch_size=1)
    said = " ".join(report.doubts)
    for expected in (
        "caption of 2.png does not contain 'sks'",
        "the end is cut off",
        "less than 20 times each",
        "6 is more",
    ):
        assert expected in said


def test_a_trigger_that_everybody_uses_is_doubted(pictures, monkeypatch):
    """On a vocabulary of CLIP's size, where the order of words is that of their frequency."""

    class Large(CLIPTokenizer):
        def __len__(self):
            return 49_408

    monkeypatch.setattr(transformers, "CLIPTokenizer", Large)
    for trigger in ("cat", "vkp"):  # by our own list, and by the vocabulary
        told = f"'{trigger}' is a word that the base knows well"
        report = found(pictures, instance_prompt=None, trigger=trigger, class_word="pet")
        assert any(doubt.startswith(told) and "--trigger sks --class_word pet" in doubt for doubt in report.doubts)


def test_small_buckets_are_doubted(pictures):
    Image.open(pictures / "1.png").resize((300, 150)).save(pictures / "wide.png")
    doubts = found(pictures, aspect_ratio_buckets=True, train_batch_size=2).doubts
    (told,) = [doubt for doubt in doubts if "bucket" in doubt]
    assert re.match(r"The bucket \d+ x \d+ holds 1 picture\(s\) for batches of 2", told)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"instance_data_dir": "nowhere"}, "There is no folder nowhere"),
        ({"pretrained_model_name_or_path": "no/base/here"}, "There is no base at"),
        ({"pretrained_model_name_or_path": "nobody/nothing"}, "nor in the local cache"),
        ({"target_modules": ["nope"]}, "--target_modules nope"),
    ],
)
def test_what_would_end_the_run_is_an_error(pictures, settings, message):
    assert any(message in error for error in found(pictures, **settings).errors)


@pytest.fixture(scope="module")
def unsuited(tmp_path_factory):
    """Bases that see a picture, or have no U-Net, beside what can be taught."""
    root = tmp_path_factory.mktemp("bases")
    for name, channels in (("inpainting", 9), ("editing", 8), ("depth", 5), ("other", 3), ("text", 4)):
        pipe = StableDiffusionPipeline.from_pretrained(tiny_bases.sd1(root / name))
        pipe.unet = tiny_bases.unet(in_channels=channels)
        pipe.save_pretrained(root / name)
    StableDiffusionImg2ImgPipeline.from_pretrained(root / "text").save_pretrained(root / "variation")
    shutil.copytree(root / "text", root / "transformer"), shutil.rmtree(root / "transformer" / "unet")
    return root


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("inpainting", "its U-Net sees 9 channels, of which the noisy latents are 4, as for inpainting"),
        ("editing", "its U-Net sees 8 channels"),
        ("depth", "its U-Net sees 5 channels"),
        ("other", "does not fit together: its U-Net sees 3 channels, its VAE has 4"),
        ("variation", "is a StableDiffusionImg2ImgPipeline, which starts from a picture"),
        ("transformer", r"has no U-Net \(it is a StableDiffusionPipeline\)"),
    ],
)
def test_a_base_that_does_not_draw_from_words_alone_is_refused_by_check_and_run(pictures, unsuited, name, message):
    report = found(pictures, pretrained_model_name_or_path=str(unsuited / name))
    (error,) = report.errors
    assert re.search(message, error) and "\n" not in error
    own = {"instance_data_dir": str(pictures), "instance_prompt": "a photo of sks teddy"}
    with pytest.raises(ValueError, match=message):
        customize(TrainConfig(**own, pretrained_model_name_or_path=str(unsuited / name), max_train_steps=1))
    assert not Path("out").exists()


@pytest.mark.slow
def test_so_is_one_that_is_known_when_it_is_loaded(unsuited):
    refuse_pipeline(StableDiffusionPipeline.from_pretrained(unsuited / "text"), "text")
    for name, message in (("inpainting", "sees 9 channels"), ("variation", "starts from a picture")):
        with pytest.raises(ValueError, match=message):
            refuse_pipeline(DiffusionPipeline.from_pretrained(unsuited / name), name)


@pytest.mark.slow
def test_the_real_cost_is_measured_and_nothing_is_left(pictures, tmp_path):
    before = sorted(tmp_path.rglob("*"))
    report = found(pictures, measure=True, output_dir=str(tmp_path / "out"), lr_warmup_steps=100)
    (told,) = [fact for fact in report.facts if fact.startswith("Measured")]
    assert re.search(r"[\d.]+ s per step, [\d.]+ GiB at the peak; the run takes [\d.]+ h", told)
    assert sorted(tmp_path.rglob("*")) == before


def test_the_command_says_whether_the_run_can_start(pictures, capsys):
    assert main(["validate"]) == 0
    assert "This run can start." in capsys.readouterr().out
    (pictures / "a.png").write_bytes(b"nothing")
    assert main(["validate", "--instance_data_dir", str(pictures), "--instance_prompt", "sks teddy"]) == 2
    said = capsys.readouterr().out
    assert "! " in said and "This run would fail." in said
