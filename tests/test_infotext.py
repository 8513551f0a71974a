"""The `parameters` of a picture are what A1111 and the galleries after it read: taken apart here as they do it.

The format: lines of the prompt, then from "Negative prompt:" on those of the negative one; the last line, if it has
three pairs or more, is `name: value` between commas, a value with commas, colons or line ends being a JSON string.
"""

import json

import diffusers
import pytest
from PIL import Image

from comcat_diffusion.generation.infotext import infotext, sampler_name
from comcat_diffusion.generation.pictures import save_png

MADE_BY = {
    "prompt": "a photo of sks dog",
    "negative_prompt": "",
    "seed": 7,
    "num_inference_steps": 25,
    "guidance_scale": 7.5,
    "scheduler": "DDIMScheduler",
    "sampler": "DDIM",
    "base": "someone/base",
    "adapters": [],
}
PAIRS = {"Steps": "25", "Sampler": "DDIM", "CFG scale": "7.5", "Seed": "7", "Size": "64x32", "Model": "someone/base"}


def parsed(text):
    """(prompt, negative prompt, pairs), read letter by letter."""
    *lines, last = text.strip().split("\n")
    pairs = pairs_of(last)
    assert len(pairs) >= 3, "a reader would take the last line for a part of the prompt"
    start = next((n for n, line in enumerate(lines) if line.startswith("Negative prompt:")), len(lines))
    negative = "\n".join(lines[start:]).removeprefix("Negative prompt:").strip()
    return "\n".join(lines[:start]), negative, pairs


def pairs_of(line):
    pairs = {}
    while line:
        name, _, line = line.partition(":")
        line = line.lstrip(" ")
        if line.startswith('"'):
            value, end = json.JSONDecoder().raw_decode(line)
            line = line[end:]
            assert line[:1] in ("", ",")
        else:
            value, comma, line = line.partition(",")
            value, line = value.strip(), comma + line
        pairs[name.strip()] = value
        line = line.removeprefix(",")
    return pairs


def read_back(**changes):
    return parsed(infotext(MADE_BY | changes, (64, 32)))


def test_the_last_line_says_what_a_gallery_shows():
    assert read_back() == ("a photo of sks dog", "", PAIRS)
    assert infotext(MADE_BY, (64, 32)).splitlines()[1].startswith("Steps: 25, Sampler: DDIM, CFG scale: 7.5, Seed: 7")
    assert read_back(negative_prompt="blurry, a cat")[1] == "blurry, a cat"


@pytest.mark.parametrize(
    "prompt",
    [
        'a dog, a cat: (sks:1.2), \\o/ "quoted"',
        "Steps: 3, Sampler: none, CFG scale: 1, Seed: 2",
        "ein Hund über 日本 🐕",
        "",
    ],
)
def test_no_prompt_is_taken_for_something_else(prompt):
    assert read_back(prompt=prompt, negative_prompt=prompt) == (prompt, prompt, PAIRS)


@pytest.mark.parametrize("line", ["\n", "\r\n", "\u2028", "\x85"])
def test_a_prompt_of_several_lines_is_one(line):
    prompt = f"a dog{line}Negative prompt: a cat{line}Steps: 1, Sampler: x, Seed: 2"
    wanted = "a dog Negative prompt: a cat Steps: 1, Sampler: x, Seed: 2"
    assert read_back(prompt=prompt, negative_prompt=prompt) == (wanted, wanted, PAIRS)


def test_a_prompt_that_begins_as_a_negative_one_stays_the_prompt():
    prompt, negative, pairs = read_back(prompt="Negative prompt: a cat")
    assert (prompt.lower(), negative, pairs) == ("negative prompt: a cat", "", PAIRS)


@pytest.mark.parametrize(
    "name",
    [
        "a, b",
        "Steps: 3",
        "two\nlines",
        'he said "no"',
        '"quoted"',
        "C:\\base",
        " padded ",
        "über",
        "a\u2028b",
        "\x1b[1m",
    ],
)
def test_no_value_ends_its_pair_too_early(name):
    assert read_back(base=name)[2] == PAIRS | {"Model": name}


def test_adapters_and_loras_are_named_with_their_scales():
    adapters = [{"file": "sks-dog.safetensors", "scale": 0.8}, {"file": "my cat.safetensors", "scale": 1.0}]
    pairs = read_back(adapters=adapters, loras=["style, old.safetensors:0.5"])[2]
    assert pairs["COMCAT"] == "sks-dog.safetensors:0.8 my cat.safetensors:1"
    assert pairs["LoRA"] == "style, old.safetensors:0.5"


def test_a_sheet_has_no_seed_and_no_size_of_its_own_and_a_chart_no_prompt():
    sheet = {name: value for name, value in MADE_BY.items() if name != "seed"}
    assert set(parsed(infotext(sheet, (900, 900)))[2]) == {"Steps", "Sampler", "CFG scale", "Model"}
    assert infotext({"model": "x", "reduction": 0.4}, (9, 9)) == ""


@pytest.mark.parametrize(
    ("kind", "settings", "name"),
    [
        ("DDIMScheduler", {}, "DDIM"),
        ("PNDMScheduler", {}, "PLMS"),
        ("EulerDiscreteScheduler", {}, "Euler"),
        ("EulerDiscreteScheduler", {"use_karras_sigmas": True}, "Euler Karras"),
        ("EulerAncestralDiscreteScheduler", {}, "Euler a"),
        ("LMSDiscreteScheduler", {"use_karras_sigmas": True}, "LMS Karras"),
        ("HeunDiscreteScheduler", {}, "Heun"),
        ("KDPM2DiscreteScheduler", {}, "DPM2"),
        ("KDPM2AncestralDiscreteScheduler", {}, "DPM2 a"),
        ("UniPCMultistepScheduler", {}, "UniPC"),
        ("LCMScheduler", {}, "LCM"),
        ("DPMSolverMultistepScheduler", {}, "DPM++ 2M"),
        ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}, "DPM++ 2M Karras"),
        ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}, "DPM++ 2M SDE"),
        ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++", "solver_order": 3}, "DPM++ 3M SDE"),
        ("DPMSolverSinglestepScheduler", {"algorithm_type": "sde-dpmsolver++"}, "DPM++ SDE"),
        ("DEISMultistepScheduler", {}, "DEISMultistep"),
    ],
)
def test_samplers_have_the_names_that_a1111_gives_them(kind, settings, name):
    assert sampler_name(kind, getattr(diffusers, kind)(**settings).config) == name


def test_a_file_has_both_chunks_in_any_letters(tmp_path):
    made_by = MADE_BY | {"prompt": "日本, sks", "base": "a, b"}
    with Image.open(save_png(Image.new("RGB", (64, 32)), tmp_path / "x.png", made_by)) as picture:
        assert parsed(picture.text["parameters"]) == ("日本, sks", "", PAIRS | {"Model": "a, b"})
        assert json.loads(picture.text["comcat"]) == made_by
