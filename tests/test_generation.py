"""The generation story on the embedded base: seeds, batches, scales, what the pictures say of themselves, refusals."""

import functools
import json

import numpy as np
import pytest
import torch
from PIL import Image

from comcat_diffusion import ComcatConfig, bases, keep_background, load_adapter, save_adapter
from comcat_diffusion.adapters.header import Notes
from comcat_diffusion.export.lora import export_adapter
from comcat_diffusion.generation.config import GenerateConfig
from comcat_diffusion.generation.generate import generate
from comcat_diffusion.generation.sheet import Row, contact_sheet, footer_of
from comcat_diffusion.training.config import TrainConfig
from comcat_diffusion.training.customize import customize
from tests.quick_training import QUICK
from tests.slow import mostly
from tests.test_adapter_file import edit, rewritten

PROMPT = "a photo of sks teddy on the left, red background"


@pytest.fixture(scope="module")
def adapter(tmp_path_factory, randomize):
    """Of noise, which waits for its trigger as what is trained does."""
    pipe, file = bases.load_base("embedded"), tmp_path_factory.mktemp("run") / "sks-teddy.safetensors"
    pipe.unet.add_adapter(ComcatConfig(r=2, target_modules=["attn2"], trigger=["sks"]), "dog")
    randomize(pipe.unet, "dog", std=0.2)
    save_adapter(pipe, file, "dog", "embedded", Notes("sks", "a photo of sks teddy", "teddy"))
    return str(file)


@pytest.fixture
def config(adapter, tmp_path):
    settings = {"adapter": [adapter], "prompt": [PROMPT], "num_images": 2, "num_inference_steps": 3}
    return lambda **more: GenerateConfig(**{**settings, "output_dir": str(tmp_path / "pictures"), **more})


def pixels(made):
    return np.stack([np.asarray(Image.open(path)).astype(int) for path in made.files])


def test_every_prompt_and_seed_gives_a_picture_and_one_sheet(config, tmp_path):
    made = generate(config(prompt=[PROMPT, "{subject} at the top"], compare=True))
    names = sorted(path.name for path in (tmp_path / "pictures").iterdir())
    assert names == [
        "00-a-photo-of-sks-teddy-on-the-left-red-background-0.png",
        "00-a-photo-of-sks-teddy-on-the-left-red-background-1.png",
        "01-sks-teddy-at-the-top-0.png",
        "01-sks-teddy-at-the-top-1.png",
        "sheet.png",
    ]
    assert Image.open(made.sheet).width > 4 * 64 and len({path.read_bytes() for path in made.files}) == 4


def test_a_picture_says_what_made_it(config, adapter):
    made = generate(config(adapter=[f"{adapter}:0.5"], seed=7, negative_prompt="a cat"))
    told = json.loads(Image.open(made.files[1]).text["comcat"])
    assert (told["prompt"], told["seed"], told["negative_prompt"]) == (PROMPT, 8, "a cat")
    assert told["precision"] == "fp32"
    assert told["guidance_scale"] == 2.0 == bases.default_guidance("embedded") != bases.default_guidance("a/b")
    assert told["adapters"][0]["scale"] == 0.5 and len(told["adapters"][0]["sha256"]) == 64
    assert PROMPT in Image.open(made.files[1]).text["parameters"]


@pytest.mark.slow
def test_the_same_seed_gives_the_same_picture_whatever_the_batch(config, tmp_path):
    together = pixels(generate(config(num_images=3, batch_size=3)))
    apart = pixels(generate(config(num_images=3, batch_size=1)))
    later = pixels(generate(config(num_images=1, seed=2)))
    # kernels may sum in another order at another batch size, which rounds a pixel up instead of down now and then
    assert np.abs(together - apart).max() <= 1 and np.abs(together[2] - later[0]).max() <= 1
    assert np.abs(together[0] - together[1]).max() > 50


@pytest.mark.slow
def test_a_sampler_with_noise_of_its_own_follows_the_seed_too(config):
    ancestral = {"scheduler": "EulerAncestralDiscreteScheduler", "num_images": 2}
    together = pixels(generate(config(batch_size=2, **ancestral)))
    apart = pixels(generate(config(batch_size=1, **ancestral)))
    assert np.abs(together - apart).max() <= 1


@pytest.mark.slow
def test_pictures_of_other_shapes_are_what_the_bases_own_pipeline_draws(config, adapter):
    """Without adapters diffusers alone is the oracle."""
    size = {"height": 48, "width": 96, "num_images": 1}
    bare = generate(config(adapter=[], pretrained_model_name_or_path="embedded", **size))
    pipe = bases.load_base("embedded")
    noise = torch.Generator("cpu").manual_seed(0)
    own = pipe(PROMPT, height=48, width=96, num_inference_steps=3, guidance_scale=2.0, generator=noise).images[0]
    assert own.size == (96, 48) and np.array_equal(pixels(bare)[0], np.asarray(own).astype(int))
    kept = generate(config(**size))
    load_adapter(pipe, adapter, "teddy")
    call = {"height": 48, "width": 96, "num_inference_steps": 3, "guidance_scale": 2.0}
    call["generator"] = torch.Generator("cpu").manual_seed(0)
    own = keep_background(pipe, {"teddy": ["sks teddy"]}, PROMPT, **call).images[0]
    assert np.abs(pixels(kept)[0] - np.asarray(own)).max() <= 1 < np.abs(pixels(kept) - pixels(bare)).max()
    told = Image.open(kept.files[0]).text
    about = json.loads(told["comcat"])
    assert "Size: 96x48" in told["parameters"] and (about["height"], about["width"]) == (48, 96)
    assert Image.open(kept.sheet).width > 288  # its cells are 288 x 144


@pytest.mark.slow
def test_a_side_that_is_left_open_is_the_resolution(config):
    (tall,) = generate(config(height=96, num_images=1)).files
    (low,) = generate(config(width=96, resolution=48, num_images=1)).files
    assert Image.open(tall).size == (64, 96) and Image.open(low).size == (96, 48)
    assert "height" not in json.loads(Image.open(generate(config(num_images=1)).files[0]).text["comcat"])
    with pytest.raises(ValueError, match="--height 90 must be a multiple of 16 for this base"):
        generate(config(height=90))
    with pytest.raises(ValueError, match="--width must be at least 1, not 0"):
        config(width=0)


@pytest.mark.slow
def test_a_region_has_the_shape_of_the_picture(config, adapter, tmp_path):
    left = np.zeros((48, 96), np.uint8)
    left[:, :32] = 255
    Image.fromarray(left).save(tmp_path / "left.png")
    region, free = [f"sks-teddy={tmp_path / 'left.png'}"], {"keep_background": False, "num_images": 1}
    size = {"height": 48, "width": 96}
    base = pixels(generate(config(adapter=[], pretrained_model_name_or_path="embedded", **size)))[:1]
    moved = np.abs(pixels(generate(config(region=region, **size, **free))) - base)[0].mean((0, 2))
    assert moved[:32].mean() > 2 * moved[64:].mean() > 0
    for more, shape in (({}, "1 : 1"), ({"width": 96}, "96 : 64"), ({"height": 96, "width": 48}, "48 : 96")):
        with pytest.raises(ValueError, match=f"mask of 'sks-teddy' is 96 x 48 .* picture .{shape}"):
            generate(config(region=region, **more))


@pytest.mark.slow
def test_scale_zero_is_the_base_and_scales_differ(config, adapter):
    base = pixels(generate(config(adapter=[], pretrained_model_name_or_path="embedded")))
    assert np.array_equal(pixels(generate(config(scale=0.0))), base)
    full, half = pixels(generate(config())), pixels(generate(config(adapter=[f"{adapter}:0.5"])))
    assert np.abs(full - base).max() > 2 and np.abs(full - half).max() > 0


@pytest.mark.slow
def test_merging_first_draws_the_same_pictures(config, tmp_path):
    with pytest.raises(ValueError, match=r"--merge: .*sks-teddy.safetensors acts from its trigger on.*--everywhere"):
        generate(config(merge=True))
    settings = {"everywhere": True, "kind": "free", "skip_final_inference": True, "max_train_steps": 15, **QUICK}
    adapter = str(customize(TrainConfig(output_dir=str(tmp_path / "o"), **settings)).adapter)
    config = functools.partial(config, adapter=[adapter])
    assert np.abs(pixels(generate(config())) - pixels(generate(config(merge=True)))).max() <= 1


@pytest.mark.slow
def test_two_adapters_act_together(config, adapter):
    freely = {"keep_background": False}  # by place, two that act in one place share it
    once, twice = (pixels(generate(config(adapter=a, **freely))) for a in ([adapter], [adapter, f"{adapter}:1.0"]))
    assert np.abs(once - twice).max() > 0
    doubled = pixels(generate(config(adapter=[f"{adapter}:2.0"], **freely)))
    assert np.abs(twice - doubled).max() <= 1


def test_two_adapters_of_different_bases_are_refused(config, adapter, tmp_path):
    """The base is the first one's; whose adapter does not fit is named, with both bases."""

    def stranger(tensors, metadata):
        def other(header):
            header["base_model"], header["fingerprint"]["sketch"] = "another/base", [1.0] * 64

        edit(metadata, other)

    other = rewritten(adapter, tmp_path, stranger)
    with pytest.raises(ValueError, match="trained on 'another/base' and does not fit .*other weights"):
        generate(config(adapter=[adapter, str(other)]))
    assert not list((tmp_path / "pictures").iterdir())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prompt": ["a cat"]}, "does not name the subject: write 'sks teddy'"),
        ({"adapter": ["nope.safetensors"]}, "no adapter file"),
        ({"adapter": ["nope.safetensors:loud"]}, "'loud' after the colon is not a number"),
        ({"adapter": ["nope.safetensors:nan"]}, "finite"),
        ({"scheduler": "NoSuchScheduler"}, "no scheduler of this name"),
        ({"scheduler": "UNet2DConditionModel"}, "no scheduler of this name"),
        ({"scheduler": "FlowMatchEulerDiscreteScheduler"}, "is for other models than Stable Diffusion"),
        ({"scheduler": "VQDiffusionScheduler"}, "is for other models than Stable Diffusion"),
        ({"scheduler": "RePaintScheduler"}, "is for other models than Stable Diffusion"),
        ({"scheduler": "KarrasVeScheduler"}, "is for other models than Stable Diffusion"),
        ({"device": "meta"}, "--device meta"),
        ({"resolution": 63}, "--resolution 63 must be a multiple of"),
        (
            {"prompt": ["red " * 80 + "sks teddy"]},
            "tokens, of which the text encoder reads 32, and 'sks teddy' comes later",
        ),
        ({"lora": ["x.safetensors:nan"]}, "weight of --lora"),
        ({"pretrained_model_name_or_path": "no-such-folder/x.safetensors"}, "no base at"),
        ({"pretrained_model_name_or_path": "nobody/nothing"}, "looked for its model_index.json"),
        ({"output_dir": "/proc/nope"}, "--output_dir"),
        ({"reference_images": ["nope.png"]}, "--reference_images: .*nope.png"),
    ],
)
def test_bad_input_is_one_sentence(config, settings, message):
    with pytest.raises((ValueError, OSError), match=message) as caught:
        generate(config(**settings))
    assert "\n" not in str(caught.value)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["LCMScheduler", "DPMSolverMultistepScheduler", "HeunDiscreteScheduler"])
def test_samplers_for_stable_diffusion_draw(config, name):
    assert len(generate(config(scheduler=name)).files) == 2


@pytest.mark.slow
def test_a_picture_never_takes_the_place_of_another(config):
    first, again = generate(config()), generate(config())
    assert first.files == again.files and first.sheet == again.sheet  # the same pictures to the byte
    before = {path: path.read_bytes() for path in (*first.files, first.sheet)}
    other = generate(config(scale=0.5))
    assert not set(other.files) & set(first.files) and other.sheet.name == "sheet-2.png"
    assert before == {path: path.read_bytes() for path in before}


def test_any_prompt_can_be_allowed(config):
    assert len(generate(config(prompt=["a cat"], any_prompt=True)).files) == 2


def test_the_sheet_holds_every_picture_under_its_prompt():
    colours = ["red", "green", "blue", "black"]
    rows = [Row(name, [Image.new("RGB", (64, 64), colour) for colour in colours]) for name in ("before", "after")]
    sheet = np.asarray(contact_sheet(rows, ["one prompt", "another and rather longer prompt " * 3], seeds=2))
    for colour in ((255, 0, 0), (0, 128, 0), (0, 0, 255), (0, 0, 0)):
        found = (sheet == colour).all(-1).sum()
        assert found >= 2 * 144 * 144


def test_cells_of_a_sheet_have_the_shape_of_its_pictures():
    for size, cell in (((64, 32), 288 * 144), ((150, 300), 150 * 300), ((200, 200), 200 * 200)):
        sheet = np.asarray(contact_sheet([Row("", [Image.new("RGB", size, "red")] * 2)], ["one"], seeds=2))
        assert (sheet == (255, 0, 0)).all(-1).sum() == 2 * cell


def test_a_sheet_shows_the_subject_itself_at_its_left():
    rows = [Row(name, [Image.new("RGB", (64, 64), "red")] * 2) for name in ("before", "after")]
    bare, beside = (
        np.asarray(contact_sheet(rows, ["one", "two"], seeds=1, references=own))
        for own in ((), [Image.new("RGB", (300, 150), "lime")])
    )
    lime, red = ((beside == colour).all(-1) for colour in ((0, 255, 0), (255, 0, 0)))
    assert lime.sum() == 144 * 72 and red.sum() == (bare == (255, 0, 0)).all(-1).sum()
    assert np.flatnonzero(lime.any(0))[-1] < np.flatnonzero(red.any(0))[0] and beside.shape[0] == bare.shape[0]


@pytest.mark.slow
def test_a_sheet_says_below_its_pictures_how_they_were_made(config, adapter):
    made = generate(config(adapter=[f"{adapter}:0.5"], seed=7, compare=True))
    told = json.loads(Image.open(made.sheet).text["comcat"])
    assert told["seeds"] == [7, 8] and told["sampler"] == "DDIM"
    said = "sks-teddy.safetensors at scale 0.5, base embedded, seeds 7 to 8, 3 steps of DDIM, guidance 2"
    assert footer_of(told, told["seeds"]) == said
    assert footer_of(told | {"adapters": [], "loras": ["style.safetensors:2"]}, [3]) == (
        "LoRA style.safetensors:2, base embedded, seed 3, 3 steps of DDIM, guidance 2"
    )


@pytest.mark.parametrize("text", ["word " * 80, "unbroken" * 80, "a b", "x" * 300 + " y " + "z" * 300])
@pytest.mark.parametrize("columns", mostly([1, 4], 1))
def test_no_words_of_a_sheet_run_over_its_pictures_or_its_edges(text, columns):
    rows = [Row(name, [Image.new("RGB", (64, 64), "red")] * 2 * columns) for name in ("before", "after")]
    bare, told = (np.asarray(contact_sheet(rows, [text] * 2, columns, footer=footer)) for footer in ("", text))
    for sheet in (bare, told):
        assert (sheet == (255, 0, 0)).all(-1).sum() == 4 * columns * 144 * 144
        assert all((edge == 255).all() for edge in (sheet[:, :6], sheet[:, -6:], sheet[:4], sheet[-4:]))
    above, below = np.split(told, [len(bare)])
    assert np.array_equal(above[:, : bare.shape[1]], bare) and (below != 255).any()
    # prompts stand side by side with a gap between them: no letter crosses from one column into the next
    red = (bare == (255, 0, 0)).all(-1)
    left, top = np.flatnonzero(red.any(0))[0], np.flatnonzero(red.any(1))[0]
    border = left + columns * 150
    assert (bare[:top, border - 8 : border] == 255).all()


@pytest.mark.slow
def test_a_lora_of_others_is_drawn_with_beside_an_adapter(config, tmp_path):
    """The LoRA is an exported foldable adapter, so that it is known to do something."""
    outcome = customize(
        TrainConfig(
            output_dir=str(tmp_path / "o"),
            max_train_steps=20,
            learning_rate=1e-2,
            kind="foldable",
            everywhere=True,
            skip_final_inference=True,
            target_modules=["attn1", "attn2"],
        )
    )
    export_adapter(outcome.adapter, tmp_path / "lora.safetensors")
    drawn = {}
    for name, lora in (("without", []), ("with", ["lora"]), ("off", ["lora:0"])):
        lora = [one.replace("lora", str(tmp_path / "lora.safetensors")) for one in lora]
        made = generate(config(lora=lora, output_dir=str(tmp_path / name)))
        drawn[name] = [Image.open(file).tobytes() for file in made.files]
    assert drawn["without"] == drawn["off"] != drawn["with"]
    with pytest.raises(ValueError, match="no such .safetensors file"):
        generate(config(lora=[str(tmp_path / "nope.safetensors")]))
    (tmp_path / "bad.safetensors").write_bytes(b"x" * 40)
    with pytest.raises(ValueError, match="does not load onto this base"):
        generate(config(lora=[str(tmp_path / "bad.safetensors")]))
