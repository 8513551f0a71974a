"""What the wheel carries, and that the pins, the floors and the installed versions fit together."""

import re
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

import comcat_diffusion
from comcat_diffusion.versions import versions_with

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PINS = dict(re.findall(r"^([\w.-]+)==([\w.]+)$", (ROOT / "constraints.txt").read_text(), re.M))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    code = f"from hatchling.build import build_wheel; print(build_wheel({str(folder)!r}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder / done.stdout.split()[-1]


def test_the_wheel_carries_the_base_the_subject_and_the_console_script(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    for path in (
        "tiny-sd/model_index.json", "tiny-sd/unet/diffusion_pytorch_model.safetensors", "tiny-flow/model_index.json",
        "subject/train/1.png",
    ):  # fmt: skip
        assert f"comcat_diffusion/assets/{path}" in names
    assert not any(name.startswith(("tests/", "recipe/", "benchmarks/", "runs/")) for name in names)
    (script,) = [name for name in names if name.endswith("entry_points.txt")]
    assert "comcat = comcat_diffusion.cli:main" in zipfile.ZipFile(wheel).read(script).decode()


@pytest.mark.slow
def test_an_installed_wheel_trains_without_the_checkout(wheel, tmp_path):
    """The wheel's own files alone on the path: the base is found inside the package."""
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    code = (
        "import sys; sys.path.insert(0, 'site'); import comcat_diffusion; assert 'site' in comcat_diffusion.__file__; "
        "from comcat_diffusion.cli import main; sys.exit(main(['train', '--max_train_steps', '1', '--output_dir', 'o']))"  # noqa: E501
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and (tmp_path / "o/sks-teddy.safetensors").is_file(), done.stderr


def test_the_embedded_base_is_small_enough_and_of_stock_classes():
    import json

    base = ROOT / "assets/tiny-sd"
    size = sum(path.stat().st_size for path in base.rglob("*") if path.is_file())
    assert size <= 40_000_000
    index = json.loads((base / "model_index.json").read_text())
    classes = {name: value[1] for name, value in index.items() if isinstance(value, list)}
    assert classes["unet"] == "UNet2DConditionModel" and classes["vae"] == "AutoencoderKL"
    assert classes["text_encoder"] == "CLIPTextModel" and classes["tokenizer"] == "CLIPTokenizer"


def test_the_flow_base_is_small_enough_of_stock_classes_and_reached_its_goals():
    import json

    from recipe.score import GOALS

    base = ROOT / "assets/tiny-flow"
    assert sum(path.stat().st_size for path in base.rglob("*") if path.is_file()) <= 25_000_000
    index = json.loads((base / "model_index.json").read_text())
    assert index["_class_name"] == "Flux2KleinPipeline" and index["transformer"][1] == "Flux2Transformer2DModel"
    scores = json.loads((base / "scores.json").read_text())["scores"]
    assert all(scores[name] >= goal for name, (_, goal) in GOALS.items() if goal is not None)


def test_every_requirement_has_a_floor_and_a_pin_that_reaches_it():
    for requirement in PROJECT["dependencies"]:
        name, floor = re.fullmatch(r"([\w.-]+)>=([\d.]+)", requirement).groups()
        assert tuple(map(int, PINS[name].split("."))) >= tuple(map(int, floor.split(".")))


def test_the_tested_versions_are_the_pinned_ones():
    assert {name: version(name).split("+")[0] for name in PINS} == PINS


def test_a_clone_that_was_never_installed_still_names_its_version(monkeypatch, wheel):
    def installed(name):
        if name == "comcat-diffusion":
            raise PackageNotFoundError(name)
        return "1"

    monkeypatch.setattr("comcat_diffusion.versions.version", installed)
    assert versions_with("torch") == {"comcat-diffusion": comcat_diffusion.__version__, "torch": "1"}
    assert wheel.name.split("-")[1] == comcat_diffusion.__version__ == version("comcat-diffusion")


def test_what_must_not_be_needed_is_not():
    assert not {"torchvision", "timm"} & {re.split(r"[<>=\[]", r)[0] for r in PROJECT["dependencies"]}
