"""Adapters in parts of a picture: exact against the formula place by place, the base outside, no trace afterwards."""

import copy
import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

from comcat_diffusion import (
    ComcatConfig,
    bases,
    merge_adapters,
    save_adapter,
    set_regions,
    unload_adapters,
)
from comcat_diffusion.adapters.model import adapted_layers
from comcat_diffusion.generation.config import GenerateConfig
from comcat_diffusion.generation.generate import generate
from tests import reference, tiny_families
from tests.test_adapter_file import pipeline

CLEAR = 0.01  # an effect on the output this large cannot be rounding
SAME = {"rtol": 0.0, "atol": 1e-12}


@pytest.fixture(params=[False, True], ids=["free", "foldable"])
def live(request, tiny_unet, randomize):
    """A float64 U-Net with the random adapters dog and cat on self- and cross-attention."""
    unet = tiny_unet(torch.float64)
    for seed, name in enumerate(("dog", "cat")):
        with warnings.catch_warnings():  # PEFT warns of every second adapter, diffusers' way of adding one
            warnings.simplefilter("ignore")
            unet.add_adapter(ComcatConfig(r=2, target_modules=["attn1", "attn2"], foldable=request.param), name)
        randomize(unet, name, seed)
    unet.set_adapters(["dog", "cat"])
    return unet


def only(unet, *names):
    unet.set_adapters(["dog", "cat"], [float("dog" in names), float("cat" in names)])


def half(height, width, left=True):
    mask = torch.zeros(height, width)
    mask[:, slice(0, width // 2) if left else slice(width // 2, None)] = 1
    return mask


@torch.no_grad()
def test_a_free_adapter_has_a_region_where_the_last_block_gives_no_text(randomize):
    """Stable Diffusion 3's: the heads of its text are not projected, and are wider where the adapter acts."""
    transformer, made = tiny_families.sd3_transformer().double(), torch.Generator().manual_seed(2)
    latents, words = (torch.randn(*size, generator=made).double() for size in ((1, 4, 8, 8), (1, 5, 48)))

    def run():
        more = {"encoder_hidden_states": words, "pooled_projections": words[:, 0], "timestep": torch.tensor([500.0])}
        return transformer(latents, **more).sample

    base = run()
    transformer.add_adapter(ComcatConfig(r=2), "dog")
    randomize(transformer, "dog", 0)
    whole = run()
    set_regions(transformer, {"dog": torch.ones(8, 8)})
    assert_close(run(), whole, **SAME)
    set_regions(transformer, {"dog": half(8, 8)})
    part = run()
    assert all((part - other).abs().max() > CLEAR for other in (whole, base))


@torch.no_grad()
def test_a_full_mask_is_no_region_and_an_empty_one_is_the_base(live, tiny_unet):
    both, base = tiny_unet.run(live), tiny_unet.run(tiny_unet(torch.float64))
    set_regions(live, {"dog": torch.ones(8, 8)})
    only(live, "dog")
    alone = tiny_unet.run(live)
    set_regions(live, {})
    assert torch.equal(tiny_unet.run(live), alone) and (alone - base).abs().max() > CLEAR
    only(live, "dog", "cat")
    set_regions(live, {"dog": torch.zeros(8, 8), "cat": Image.new("L", (64, 64))})
    assert torch.equal(tiny_unet.run(live), base) and (both - base).abs().max() > CLEAR


@torch.no_grad()
def test_an_adapter_without_a_region_acts_everywhere(live, tiny_unet):
    only(live, "cat")
    cat = tiny_unet.run(live)
    only(live, "dog", "cat")
    both = tiny_unet.run(live)
    set_regions(live, {"dog": torch.zeros(8, 8)})
    assert_close(tiny_unet.run(live), cat, **SAME)
    set_regions(live, {"dog": torch.ones(8, 8)})
    assert torch.equal(tiny_unet.run(live), both) and (both - cat).abs().max() > CLEAR


@torch.no_grad()
@pytest.mark.parametrize("size", [(8, 8), (5, 9)], ids=["square", "not square, odd"])
def test_every_attention_is_the_formula_place_by_place(live, tiny_unet, size):
    """On what every attention really sees in one run of the U-Net, at both of its levels."""
    noise = torch.randn(2, 4, *size, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    inputs = tiny_unet.inputs() | {"sample": noise}
    masks = [half(40 * size[0], 40 * size[1], left=True), half(40 * size[0], 40 * size[1], left=False)]
    masks[1] = masks[1] * 0.75  # a quarter of the base shines through
    seen = {}

    def keep(name):
        return lambda module, args, kwargs, output: seen.update({name: (args, kwargs, output)})

    set_regions(live, dict(zip(("dog", "cat"), masks, strict=True)))
    hooks = [live.get_submodule(n).register_forward_hook(keep(n), with_kwargs=True) for n in adapted_layers(live)]
    live(**inputs)
    for hook in hooks:
        hook.remove()
    set_regions(live, {})
    grids = set()
    for name, (args, kwargs, output) in seen.items():
        attention, alone = live.get_submodule(name), []
        for names in (["dog"], ["cat"], []):
            only(live, *names)
            alone.append(attention(*args, **kwargs))
        grid = size if output.shape[1] == size[0] * size[1] else (-(-size[0] // 2), -(-size[1] // 2))
        small = [torch.nn.functional.interpolate(m[None, None].double(), size=grid, mode="area")[0, 0] for m in masks]
        assert_close(output, reference.blended(alone[2], alone[:2], small, grid), **SAME)
        assert (output - alone[0]).abs().max() > 1e-4 and (output - alone[2]).abs().max() > 1e-4
        grids.add(grid)
    assert len(grids) == 2


@torch.no_grad()
def test_masks_that_overlap_share_the_place(live, tiny_unet):
    set_regions(live, {"dog": torch.ones(8, 8), "cat": torch.ones(8, 8)})
    shared = tiny_unet.run(live)
    set_regions(live, {"dog": torch.full((8, 8), 0.5), "cat": torch.full((8, 8), 0.5)})
    assert_close(tiny_unet.run(live), shared, **SAME)
    only(live, "dog")
    set_regions(live, {})
    assert (tiny_unet.run(live) - shared).abs().max() > CLEAR


@torch.no_grad()
def test_a_copy_keeps_its_regions_and_taking_them_away_leaves_no_trace(live, tiny_unet):
    before = tiny_unet.run(live)
    set_regions(live, {"dog": half(8, 8)})
    split = tiny_unet.run(live)
    other = copy.deepcopy(live)
    set_regions(live, {"dog": half(8, 8, left=False)})  # replaces the first
    set_regions(live, {})
    assert torch.equal(tiny_unet.run(live), before) and not live._forward_pre_hooks
    assert torch.equal(tiny_unet.run(other), split) and (split - before).abs().max() > CLEAR
    set_regions(other, {})
    assert torch.equal(tiny_unet.run(other), before) and not other._forward_pre_hooks
    set_regions(live, {"dog": half(8, 8)})
    unload_adapters(live)
    assert torch.equal(tiny_unet.run(live), tiny_unet.run(tiny_unet(torch.float64))) and not live._forward_pre_hooks


@torch.no_grad()
def test_what_no_region_can_hold_is_refused(live, tiny_unet, tiny_clip):
    mask = torch.ones(8, 8)
    with pytest.raises(ValueError, match="no adapter 'bird' to give a region; loaded: dog, cat"):
        set_regions(live, {"bird": mask})
    for wrong in (torch.full((8, 8), float("nan")), torch.full((8, 8), 2.0), torch.ones(8), torch.ones(0, 8)):
        with pytest.raises(ValueError, match="mask of 'dog' must be a grey picture"):
            set_regions(live, {"dog": wrong})
    pipe = pipeline(live, tiny_clip())
    pipe.text_encoder.add_adapter(ComcatConfig(r=1), "dog")
    with pytest.raises(ValueError, match="'dog' also adapts the text_encoder, whose words have no place"):
        set_regions(pipe, {"dog": mask})
    merge_adapters(live)
    with pytest.raises(ValueError, match="call unmerge_adapters before"):
        set_regions(live, {"dog": mask})
    live.unfuse_lora()
    set_regions(live, {"dog": torch.ones(8, 16)})
    with pytest.raises(ValueError, match=r"mask of 'dog' is 16 x 8 pixels.*proportions of the picture \(8 : 8\)"):
        tiny_unet.run(live)
    with pytest.raises(ValueError, match="act everywhere: take the regions away"):
        merge_adapters(live)
    name = next(iter(adapted_layers(live)))
    with pytest.raises(ValueError, match="while the whole denoiser runs"):
        live.get_submodule(name)(torch.zeros(1, 64, 16, dtype=torch.float64))


# The embedded base, from the command's settings


@pytest.fixture(scope="module")
def two(tmp_path_factory, randomize):
    """Two strong random adapters of the embedded base, one foldable."""
    folder = tmp_path_factory.mktemp("two")
    for seed, name in enumerate(("dog", "cat")):
        pipe = bases.load_base("embedded")
        pipe.unet.add_adapter(ComcatConfig(r=2, foldable=seed == 1), name)
        randomize(pipe.unet, name, seed, std=0.3)
        save_adapter(pipe, folder / f"{name}.safetensors", name, "embedded")
    for name, box in (("left", (0, 0, 32, 64)), ("right", (32, 0, 64, 64)), ("all", (0, 0, 64, 64)), ("none", None)):
        mask = Image.new("L", (64, 64))
        if box:
            mask.paste(255, box)
        mask.save(folder / f"{name}.png")
        Image.merge("LA", [Image.new("L", (64, 64), 255), mask]).save(folder / f"{name}-layer.png")
    Image.new("L", (64, 32)).save(folder / "wide.png")
    (folder / "broken.png").write_bytes(b"x" * 40)
    return folder


def settings(two, output, *regions, **more):
    adapters = [str(two / f"{name}.safetensors") for name in ("dog", "cat")]
    drawn = {"prompt": ["a photo of a teddy"], "any_prompt": True, "num_images": 1, "num_inference_steps": 3}
    regions = [text.replace("=", f"={two}/") for text in regions]
    return GenerateConfig(**{**drawn, "adapter": adapters, "region": regions, "output_dir": str(output), **more})


@pytest.mark.slow
def test_two_subjects_keep_to_their_sides_of_a_picture(two, tmp_path):
    def drawn(*regions, **more):
        made = generate(settings(two, tmp_path / "out", *regions, **more))
        files.append(made.files[0])
        return np.asarray(Image.open(made.files[0])).astype(int)

    files = []

    dog = drawn(adapter=[str(two / "dog.safetensors")])
    assert np.array_equal(drawn("dog=all.png", "cat=none.png"), dog)
    base = drawn(adapter=[], pretrained_model_name_or_path="embedded")
    assert np.array_equal(drawn("dog=none.png", "cat=none.png"), base)
    layers = drawn("dog=left-layer.png", "cat=right-layer.png")  # white on transparent
    split, other = drawn("dog=left.png", "cat=right.png"), drawn("dog=right.png", "cat=left.png")
    assert np.array_equal(layers, split)
    # convolutions and self-attention carry across the border
    near, far = (np.abs(picture - dog)[:, :24].mean() for picture in (split, other))
    assert near < 0.8 * far and np.abs(split - other).max() > 50
    assert len(set(files)) == len(files)  # none took the place of another
    picture = Image.open(files[-1])
    assert "dog=" in picture.text["comcat"] and "right.png" in picture.text["comcat"]


@pytest.mark.parametrize(
    ("region", "message"),
    [
        ("bird=left.png", "there is no adapter 'bird'; loaded: dog, cat"),
        ("dog=wide.png", "mask of 'dog' is 64 x 32 pixels"),
        ("dog=broken.png", "cannot be read as a picture"),
        ("dog=nowhere.png", "cannot be read as a picture"),
        ("dog", "write ADAPTER=MASK"),
    ],
)
def test_a_region_that_cannot_be_is_one_sentence(two, tmp_path, region, message):
    with pytest.raises(ValueError, match=message) as caught:
        generate(settings(two, tmp_path / "out", region))
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


def test_a_region_needs_one_live_adapter_of_its_name(two, tmp_path):
    twice = [str(two / "dog.safetensors")] * 2
    with pytest.raises(ValueError, match="'dog' is there twice"):
        generate(settings(two, tmp_path / "out", "dog=left.png", adapter=twice))
    with pytest.raises(ValueError, match="'dog' is there twice"):
        generate(settings(two, tmp_path / "out", "dog=left.png", "dog=right.png"))
    with pytest.raises(ValueError, match="--merge and --region exclude each other"):
        settings(two, tmp_path / "out", "dog=left.png", merge=True)
    with pytest.raises(ValueError, match="--region needs an --adapter"):
        settings(two, tmp_path / "out", "dog=left.png", adapter=[], pretrained_model_name_or_path="embedded")
