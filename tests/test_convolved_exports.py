"""Terms beside convolutions as LoRAs: of every kind, in both tools' names, merged, approximated; and trained so."""

import json
import warnings

import pytest
import safetensors.torch
import torch
from diffusers import DiffusionPipeline
from torch.testing import assert_close

from comcat_diffusion import (
    ComcatConfig,
    load_adapter,
    lora_layers,
    merge_adapters,
    read_adapter,
    save_adapter,
    unload_adapters,
    unmerge_adapters,
)
from comcat_diffusion.adapters import separable as maths
from comcat_diffusion.adapters.convolved import ConvolvedLayer
from comcat_diffusion.adapters.effect import predictions
from comcat_diffusion.adapters.model import factors, side_cars
from comcat_diffusion.adapters.parts import components, plain_modules
from comcat_diffusion.adapters.shrink import shrink
from comcat_diffusion.bases import load_base
from comcat_diffusion.cli import main
from comcat_diffusion.export.card import Shared, card
from comcat_diffusion.export.checkpoint import merge_to_folder
from comcat_diffusion.export.clients import FORMATS
from comcat_diffusion.export.lora import export_adapter
from comcat_diffusion.export.share import build_folder
from comcat_diffusion.families.stable_diffusion import StableDiffusion
from comcat_diffusion.training.becomes import becomes, lora_bytes
from comcat_diffusion.training.config import TrainConfig
from comcat_diffusion.training.customize import customize
from comcat_diffusion.training.learned import adapter_config
from tests.slow import mostly
from tests.test_export import build_tiny_xl, build_xl, outputs_of  # noqa: F401

KINDS = {
    "foldable": {"foldable": True},
    "tied": {"foldable": True, "tied": True},
    "cores": {"foldable": True, "cores": True},
}
PROMPTS = ["a photo of sks teddy", "a photo of a ball"]
CLEAR = 0.01  # an effect on the output this large cannot be rounding
CLOSE = {"rtol": 0.0, "atol": 5e-5}  # of float32 through all blocks, two steps and an effect of more than one
ONE = "down_blocks.0.resnets.0.conv1"


@pytest.fixture(scope="module")
def base():
    return load_base("embedded")


def written(base, path, randomize, **options):
    """A random adapter's file, with terms beside convolutions; the base is as it was."""
    options = {"r": 2, "alpha": 3.0, "target_modules": ["attn2"], "convolutions": 3} | options
    base.unet.add_adapter(ComcatConfig(**options), "dog")
    randomize(base.unet, "dog", 1, std=0.2)
    save_adapter(base, path, "dog", "embedded")
    unload_adapters(base)
    return path


@pytest.fixture(scope="module", params=mostly(KINDS, "cores"))
def file(request, base, randomize, tmp_path_factory):
    """A file of each kind that is a LoRA."""
    return written(base, tmp_path_factory.mktemp(request.param) / "dog.safetensors", randomize, **KINDS[request.param])


def with_file(base, path, noisy, scale=1.0):
    load_adapter(base, path, "dog")
    base.unet.set_adapters(["dog"], [scale])
    found = predictions(base, PROMPTS, noisy, steps=2)[1]
    unload_adapters(base)
    return found


@pytest.mark.parametrize("format", mostly(FORMATS, "kohya"))
def test_diffusers_loads_the_lora_and_it_does_what_the_adapter_does(base, file, tmp_path, format):
    export_adapter(file, tmp_path / "lora.safetensors", format, models=components(base))
    noisy, plain = predictions(base, PROMPTS, steps=2)
    base.load_lora_weights(str(tmp_path / "lora.safetensors"), adapter_name="lora")
    for scale in (1.0, 0.4):
        base.set_adapters(["lora"], [scale])
        found = predictions(base, PROMPTS, noisy, steps=2)[1]
        base.disable_lora()
        expected = with_file(base, file, noisy, scale)
        base.enable_lora()
        assert_close(found, expected, **CLOSE)
        assert (expected - plain).abs().max() > 0.1
    base.unload_lora_weights()
    tensors = safetensors.torch.load_file(tmp_path / "lora.safetensors")
    name = {"kohya": f"lora_unet_{ONE.replace('.', '_')}.lora_", "diffusers-lora": f"unet.{ONE}.lora_"}[format]
    ends = ("down", "up") if format == "kohya" else ("A", "B")
    down, up = (tensors[f"{name}{end}.weight"] for end in ends)
    assert down.shape[0] == up.shape[1] == 3 and down.shape[2:] == (3, 3) and up.shape[2:] == (1, 1)


def test_the_lora_is_the_kernel_in_float64(base, file, tmp_path):
    export_adapter(file, tmp_path / "lora.safetensors", dtype=torch.float64, models=components(base))
    lora = safetensors.torch.load_file(tmp_path / "lora.safetensors")
    mark, own = f"lora_unet_{ONE.replace('.', '_')}", safetensors.torch.load_file(file)
    down, up, alpha = (lora[f"{mark}.{end}"] for end in ("lora_down.weight", "lora_up.weight", "alpha"))
    kernel = alpha.double() / len(down) * torch.einsum("or,rcij->ocij", up[:, :, 0, 0], down)
    held = [own[f"unet.{ONE}.{factor}"].double() for factor in ("conv_down", "conv_taps", "conv_up")]
    assert_close(kernel, 1.5 * maths.kernel_of(*held), rtol=0, atol=1e-12)
    assert kernel.abs().max() > CLEAR


@pytest.mark.slow
@torch.no_grad()
def test_it_merges_exactly_and_into_a_checkpoint(base, file, tmp_path):
    noisy, plain = predictions(base, PROMPTS, steps=2)
    expected = with_file(base, file, noisy)
    load_adapter(base, file, "dog")
    merge_adapters(base)
    assert_close(predictions(base, PROMPTS, noisy, steps=2)[1], expected, **CLOSE)
    unmerge_adapters(base)
    unload_adapters(base)
    assert torch.equal(predictions(base, PROMPTS, noisy, steps=2)[1], plain)
    merge_to_folder(load_base("embedded"), [(file, 1.0)], tmp_path / "merged")
    merged = DiffusionPipeline.from_pretrained(tmp_path / "merged")
    assert_close(predictions(merged, PROMPTS, noisy, steps=2)[1], expected, **CLOSE)


@torch.no_grad()
def test_a_live_adapter_is_what_diffusers_saves_as_a_lora(base, file, tmp_path):
    noisy, _ = predictions(base, PROMPTS, steps=2)
    expected = with_file(base, file, noisy)
    load_adapter(base, file, "dog")
    type(base).save_lora_weights(tmp_path, unet_lora_layers=lora_layers(base.unet, "dog"))
    unload_adapters(base)
    base.load_lora_weights(tmp_path)
    assert_close(predictions(base, PROMPTS, noisy, steps=2)[1], expected, **CLOSE)
    base.unload_lora_weights()


@pytest.mark.slow
def test_a_shrunk_one_exports_what_is_left_of_it(base, randomize, tmp_path):
    for name in ("foldable", "tied"):
        whole = written(base, tmp_path / f"{name}.safetensors", randomize, r=4, **KINDS[name])
        small = tmp_path / f"{name}-small.safetensors"
        made = shrink(whole, small, whole.stat().st_size // 4)
        assert made.header.format_version == 4 and made.header.convolved
        noisy, plain = predictions(base, PROMPTS, steps=2)
        export_adapter(small, tmp_path / "lora.safetensors", models=components(base))
        expected = with_file(base, small, noisy)
        base.load_lora_weights(str(tmp_path / "lora.safetensors"))
        assert_close(predictions(base, PROMPTS, noisy, steps=2)[1], expected, **CLOSE)
        base.unload_lora_weights()
        assert (expected - plain).abs().max() > 0.1


@pytest.mark.parametrize("format", mostly(FORMATS, "kohya"))
def test_sdxl_s_convolutions_have_the_names_of_its_original_code(build_xl, randomize, tmp_path, format):  # noqa: F811
    live, fresh = build_xl(), build_xl()
    live.unet.add_adapter(ComcatConfig(r=2, alpha=3.0, foldable=True, convolutions=3), "dog")
    randomize(live.unet, "dog", 3)
    save_adapter(live, tmp_path / "dog.safetensors", "dog")
    export_adapter(tmp_path / "dog.safetensors", tmp_path / "lora.safetensors", format)
    before = outputs_of(fresh)[0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fresh.load_lora_weights(str(tmp_path / "lora.safetensors"))
    found, expected = outputs_of(fresh)[0], outputs_of(live)[0]
    assert_close(found, expected, rtol=0, atol=1e-4)
    assert (expected - before).abs().max() > CLEAR
    count = len([one for one in side_cars(live.unet) if "resnets" in one])
    names = {n.partition(".")[0] for n in safetensors.torch.load_file(tmp_path / "lora.safetensors")}
    if format == "kohya":
        own = {name for name in names if "_layers_" in name}
        assert len(own) == count and not any("resnets" in name for name in names)
        assert {f"lora_unet_{name}" for name in (
            "input_blocks_1_0_in_layers_2", "input_blocks_8_0_out_layers_3", "middle_block_0_in_layers_2",
            "middle_block_2_out_layers_3", "output_blocks_0_0_in_layers_2", "output_blocks_8_0_out_layers_3",
        )} <= own  # fmt: skip


def test_the_header_says_what_kohya_s_scripts_would_be_told(base, randomize, tmp_path):
    """Their own files have the rank of convolutions in the arguments; one rank of several sizes is `Dynamic`."""
    whole = written(base, tmp_path / "dog.safetensors", randomize, **KINDS["tied"])
    for format, alpha in (("kohya", "3.0"), ("diffusers-lora", "3")):
        made = export_adapter(whole, tmp_path / "lora.safetensors", format, models=components(base)).metadata
        assert (made["ss_network_dim"], made["ss_network_args"]) == (
            "2", json.dumps({"conv_dim": "3", "conv_alpha": alpha}),
        )  # fmt: skip
    shrink(whole, tmp_path / "small.safetensors", whole.stat().st_size // 8)
    made = export_adapter(tmp_path / "small.safetensors", tmp_path / "lora.safetensors", models=components(base))
    assert (made.metadata["ss_network_dim"], made.metadata["ss_network_args"]) == ("Dynamic", "{}")
    plain = written(base, tmp_path / "plain.safetensors", randomize, foldable=True, convolutions=0)
    assert export_adapter(plain, tmp_path / "lora.safetensors").metadata["ss_network_args"] == "{}"


# The closest LoRA of what is none


@pytest.mark.slow
def test_the_closest_lora_keeps_the_terms_as_they_are(base, randomize, tmp_path, capsys):
    free = written(base, tmp_path / "free.safetensors", randomize, trigger=["sks"])
    with pytest.raises(ValueError, match="free adapter|acts from 'sks' on"):
        export_adapter(free, tmp_path / "lora.safetensors")
    target = tmp_path / "lora.safetensors"
    words = ["--prompt", PROMPTS[0], "--force"]
    assert main(["export", "--adapter", str(free), "--output", str(target), "--approximate", *words]) == 0
    told = capsys.readouterr().out
    assert "The closest foldable adapter differs by" in told and "Acting everywhere keeps" in told
    lora, own = safetensors.torch.load_file(target), safetensors.torch.load_file(free)
    mark = f"lora_unet_{ONE.replace('.', '_')}"
    down, up, alpha = (lora[f"{mark}.{end}"] for end in ("lora_down.weight", "lora_up.weight", "alpha"))
    kernel = alpha / len(down) * torch.einsum("or,rcij->ocij", up[:, :, 0, 0], down)
    held = [own[f"unet.{ONE}.{factor}"] for factor in ("conv_down", "conv_taps", "conv_up")]
    assert_close(kernel, 1.5 * maths.kernel_of(*held), rtol=0, atol=1e-5)


@pytest.mark.slow
@torch.no_grad()
def test_what_is_measured_is_all_of_it(base, randomize, tmp_path):
    """Without its attentions, which no LoRA has, an adapter of convolutions alone is off by nothing."""
    from comcat_diffusion.export.approximate import approximate

    base.unet.add_adapter(ComcatConfig(r=2, alpha=3.0, target_modules=["attn2"], convolutions=3), "dog")
    randomize(base.unet, "dog", 1, std=0.2)
    for name, factor in factors(base.unet, "dog").items():
        if name.endswith((".k_down", ".out_up")):
            factor.data.zero_()
    save_adapter(base, tmp_path / "a.safetensors", "dog", "embedded")
    unload_adapters(base)
    made = approximate(base, tmp_path / "a.safetensors", tmp_path / "b.safetensors", PROMPTS)
    assert made.error < 1e-5 and read_adapter(tmp_path / "b.safetensors").config["unet"]["convolutions"] == 3
    export_adapter(tmp_path / "b.safetensors", tmp_path / "lora.safetensors")
    assert all("_conv" in name for name in safetensors.torch.load_file(tmp_path / "lora.safetensors"))


# What is said of it


def test_the_card_and_the_folder_to_share_say_what_is_there(base, randomize, tmp_path):
    path = written(base, tmp_path / "dog.safetensors", randomize, foldable=True)
    (tmp_path / "folder").mkdir()
    build_folder(tmp_path / "folder", "me/dog", path)
    assert (tmp_path / "folder" / "dog-lora.safetensors").is_file()  # it is one exactly
    told = card(read_adapter(path), Shared("me/dog", path.name, 1))
    assert "with terms beside convolutions" in told
    plain = written(base, tmp_path / "plain.safetensors", randomize, foldable=True, convolutions=0)
    assert "convolutions" not in card(read_adapter(plain), Shared("me/dog", path.name, 1))


def test_how_large_a_lora_with_such_terms_will_be_is_known_before(base, randomize, tmp_path):
    learned = TrainConfig(as_="lora", rank=2, convolutions=3)
    seconds = adapter_config(learned, base.unet, []).convolution_ranks
    path = written(base, tmp_path / "dog.safetensors", randomize, foldable=True, convolution_ranks=seconds)
    export_adapter(path, tmp_path / "lora.safetensors")
    lora = safetensors.torch.load_file(tmp_path / "lora.safetensors")
    shapes = {n.removeprefix("unet."): tuple(f.shape) for n, f in safetensors.torch.load_file(path).items()}
    whole = sum(tensor.nbytes for name, tensor in lora.items() if not name.endswith(".alpha"))
    assert lora_bytes(shapes, 2, StableDiffusion()) == whole
    told = becomes(learned, base.unet)
    assert f"exactly, a LoRA that every program reads (at most {whole / 1000:,.0f} kB" in told


# Trained so


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind", [{"as_": "lora"}, {"kind": "tied"}, {"kind": "cores"}, {"up_blocks_only": True}], ids=str
)
def test_every_kind_learns_with_such_terms(base, tmp_path, kind):
    few = {"max_train_steps": 2, "skip_final_inference": True, "convolutions": 2, "target_modules": ["attn2"]}
    made = customize(TrainConfig(output_dir=str(tmp_path), **few, **kind)).adapter
    config, noisy = read_adapter(made).config["unet"], predictions(base, PROMPTS, steps=2)[0]
    assert config["convolutions"] == 2
    hosts = {name for name in plain_modules(base.unet) if ConvolvedLayer.can_stand(base.unet, name)}
    where = "up_blocks." if kind.get("up_blocks_only") else ""
    seconds = {name for name in hosts if name.startswith(where) and name.endswith("conv2")}
    assert config["convolution_ranks"] == dict.fromkeys(seconds - {"down_blocks.0.resnets.0.conv2"}, 2) and seconds
    if kind == {"as_": "lora"}:
        export_adapter(made, tmp_path / "lora.safetensors")
        expected = with_file(base, made, noisy)
        base.load_lora_weights(str(tmp_path / "lora.safetensors"))
        assert_close(predictions(base, PROMPTS, noisy, steps=2)[1], expected, **CLOSE)
        base.unload_lora_weights()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["foldable", "tied"])
def test_a_budget_is_kept_by_every_kind_that_has_one(tmp_path, kind):
    few = {"max_train_steps": 4, "skip_final_inference": True, "convolutions": 2, "target_modules": ["attn2"]}
    made = customize(TrainConfig(output_dir=str(tmp_path), kind=kind, max_bytes=12_000, **few)).adapter
    assert made.stat().st_size <= 12_000 and read_adapter(made).convolved
