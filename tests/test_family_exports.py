"""What is learned on families beyond the U-Nets, merged and as LoRAs: what the adapter does, to rounding."""

import re

import pytest
import torch
from diffusers.loaders.single_file_utils import (
    convert_flux2_transformer_checkpoint_to_diffusers,
    convert_flux_transformer_checkpoint_to_diffusers,
    convert_sd3_transformer_checkpoint_to_diffusers,
    convert_z_image_transformer_checkpoint_to_diffusers,
)
from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict
from PIL import Image, ImageChops
from safetensors import safe_open
from safetensors.torch import load_file
from torch.testing import assert_close

from comcat_diffusion import ComcatConfig, bases, load_adapter, lora_layers, merge_adapters, save_adapter
from comcat_diffusion.adapters.header import AdapterFileError, read_adapter
from comcat_diffusion.adapters.model import default_targets, factors
from comcat_diffusion.adapters.parts import denoiser
from comcat_diffusion.adapters.placing import add_adapter
from comcat_diffusion.cli import main
from comcat_diffusion.export.lora import export_adapter
from comcat_diffusion.export.spread import spread
from comcat_diffusion.families.known import family_of, family_of_model
from comcat_diffusion.generation.config import GenerateConfig
from comcat_diffusion.generation.generate import generate
from comcat_diffusion.training.becomes import becomes, lora_bytes
from comcat_diffusion.training.config import TrainConfig
from comcat_diffusion.training.learner import Learner
from tests import tiny_families
from tests.slow import mostly

PROMPT = "a photo of sks teddy"
CLOSE = {"rtol": 1e-4, "atol": 1e-5}  # float32 sums in another order
BASES = ("pixart", "sd3", "sd35", "sana", "klein", "z_image", "qwen_image", "flux1", "kolors", "chroma")


FED = ("klein", "flux1", "chroma", "sd3", "sd35", "z_image", "qwen_image")  # have terms beside feed-forwards
CASES = [f"{kind}-{name}" for name in BASES for kind in ("tied", "foldable")] + ["cores-klein", "cores-pixart"]
CASES += [f"fed-{name}" for name in FED]
OFTEN = ("tied-pixart", "tied-sd3", "foldable-klein", "tied-z_image", "fed-flux1")  # of each way to name weights one


@pytest.fixture(scope="module", params=mostly(CASES, *OFTEN))
def exported(request, tmp_path_factory):
    """A base, an adapter that acts on every token, in self-attentions too where it can, and what it predicts."""
    kind, _, name = request.param.partition("-")
    return made(kind, name, tmp_path_factory.mktemp(name))


def made(kind, name, folder, everywhere=True):
    """See `exported`; `fed` is foldable with terms beside feed-forwards; not `everywhere`: in joint attention alone."""
    base = str(getattr(tiny_families, name)(folder / "base"))
    pipe = bases.load_base(base)
    model = denoiser(pipe)
    targets = {"pixart": ["attn1", "attn2"], "sd35": ["attn", "attn2"]}
    targets |= {name: ["attn"] for name in ("klein", "flux1", "chroma")}
    targets = targets.get(name) if everywhere else None
    targets = targets or default_targets(model)
    kinds = {"foldable": True, "tied": kind == "tied", "cores": kind == "cores"}
    kinds |= {"feed_forwards": 3 * (kind == "fed")}
    config = ComcatConfig(r=2, alpha=3.0, target_modules=targets, **kinds)
    add_adapter(model, config, "dog")
    with torch.no_grad():
        for number, factor in enumerate(factors(model, "dog").values()):
            factor.normal_(std=0.3 if kind != "cores" else 3.0, generator=torch.Generator().manual_seed(number))
    file = folder / "dog.safetensors"
    save_adapter(pipe, file, "dog", base)
    return base, file, pipe, predicted(pipe)


@torch.no_grad()
def predicted(pipe) -> torch.Tensor:
    """What the denoiser answers to noise."""
    learner = Learner(pipe, [PROMPT], train_text=False).eval()
    channels = denoiser(pipe).config.in_channels
    noise = torch.randn(1, channels, 8, 8, generator=torch.Generator().manual_seed(1))
    return learner(noise, torch.tensor([500]), [PROMPT], torch.tensor([[16.0, 16, 0, 0, 16, 16]]))


def test_the_lora_does_what_the_adapter_does(exported, tmp_path):
    """By the family's own loader; diffusers gives PixArt none, so there by PEFT's."""
    base, file, _, live = exported
    argv = ["export", "--adapter", str(file), "--output", str(tmp_path / "lora.safetensors"), "--for", "diffusers"]
    assert main(argv) == 0
    fresh = bases.load_base(base)
    assert (live - predicted(fresh)).abs().max() > 0.01
    if hasattr(fresh, "load_lora_weights"):
        fresh.load_lora_weights(str(tmp_path), weight_name="lora.safetensors")
    else:
        tensors = load_file(tmp_path / "lora.safetensors")
        ranks = {n.split(".", 2)[2].rpartition(".lora_A")[0]: len(t) for n, t in tensors.items() if ".lora_A." in n}
        config = LoraConfig(r=1, target_modules=list(ranks), rank_pattern=ranks, alpha_pattern=ranks)
        inject_adapter_in_model(config, fresh.transformer, "default")
        told = set_peft_model_state_dict(fresh.transformer, tensors, "default")
        assert not told.unexpected_keys
    assert_close(predicted(fresh), live, **CLOSE)


def test_it_draws_beside_an_adapter_where_diffusers_loads_it(exported, tmp_path):
    _, file, pipe, _ = exported
    lora = tmp_path / "lora.safetensors"
    export_adapter(file, lora, "diffusers-lora", models={family_of(pipe).part: denoiser(pipe)})
    folder = str(tmp_path / "pictures")
    more = {"num_images": 1, "num_inference_steps": 2, "prompt": [PROMPT], "output_dir": folder, "precision": "fp32"}
    more |= {"any_prompt": True}
    config = GenerateConfig(adapter=[f"{file}:0"], lora=[str(lora)], **more)
    if hasattr(pipe, "load_lora_weights"):
        own = generate(GenerateConfig(adapter=[str(file)], **more)).files[0]
        assert not ImageChops.difference(Image.open(generate(config).files[0]), Image.open(own)).point(_large).getbbox()
    else:
        with pytest.raises(ValueError, match="diffusers loads no LoRA into a PixArtSigmaPipeline"):
            generate(config)


def _large(difference: int) -> int:
    """More than rounding to 255 parts."""
    return 255 * (difference > 1)


def test_so_does_the_live_one_and_what_is_merged(exported, tmp_path):
    base, file, pipe, live = exported
    layers = lora_layers(denoiser(pipe), "dog")
    fresh = bases.load_base(base)
    weights = dict(denoiser(fresh).named_parameters())
    with torch.no_grad():
        for name in [name for name in layers if ".lora_A." in name]:
            up = layers[name.replace("lora_A", "lora_B")]
            weights[name.replace("lora_A.", "")] += up @ layers[name]
    assert_close(predicted(fresh), live, **CLOSE)
    folder = tmp_path / "merged"
    assert main(["merge", "--adapter", str(file), "--output_dir", str(folder)]) == 0
    assert_close(predicted(bases.load_base(str(folder))), live, **CLOSE)


def native_weights(pipe, fed=False) -> dict[str, torch.Tensor]:
    """The projections of attentions as the family's own checkpoints hold them; Kolors' have diffusers' names.

    With `fed`, also the Linears of feed-forwards that terms stand beside.
    """
    model, found = denoiser(pipe), _native_feed_forwards(denoiser(pipe)) if fed else {}
    if hasattr(model, "up_blocks"):
        modules = dict(model.named_modules())
        return {
            n: one.weight.detach().clone() for n, one in modules.items() if n.endswith(("attn2.to_k", "attn2.to_v"))
        }
    for number, block in enumerate(getattr(model, "layers", ())):
        one = block.attention
        found[f"layers.{number}.attention.qkv"] = torch.cat([one.to_q.weight, one.to_k.weight, one.to_v.weight])
    for number, block in enumerate(getattr(model, "transformer_blocks", ())):
        if hasattr(block.attn1 if hasattr(block, "attn1") else None, "to_q"):
            one, two = block.attn1, block.attn2
            if "PixArt" in type(model).__name__:  # Sana's are linear, and nothing is on them
                found[f"blocks.{number}.attn.qkv"] = torch.cat([one.to_q.weight, one.to_k.weight, one.to_v.weight])
            found[f"blocks.{number}.cross_attn.kv_linear"] = torch.cat([two.to_k.weight, two.to_v.weight])
            continue
        joint = block.attn
        if "Qwen" in type(model).__name__:
            found |= {
                f"transformer_blocks.{number}.attn.add_{one}_proj": getattr(joint, f"add_{one}_proj").weight
                for one in "kv"
            }
            continue
        text = [joint.add_q_proj.weight, joint.add_k_proj.weight, joint.add_v_proj.weight]
        if hasattr(model, "single_transformer_blocks"):
            found[f"double_blocks.{number}.txt_attn.qkv"] = torch.cat(text)
            continue
        found[f"joint_blocks.{number}.context_block.attn.qkv"] = torch.cat(text)
        if block.attn2 is not None:
            two = block.attn2
            found[f"joint_blocks.{number}.x_block.attn2.qkv"] = torch.cat(
                [two.to_q.weight, two.to_k.weight, two.to_v.weight]
            )
    for number, block in enumerate(getattr(model, "single_transformer_blocks", ())):
        one = block.attn
        whole = one.to_qkv_mlp_proj.weight if hasattr(one, "to_qkv_mlp_proj") else None
        if whole is None:
            whole = torch.cat([one.to_q.weight, one.to_k.weight, one.to_v.weight, block.proj_mlp.weight])
        found[f"single_blocks.{number}.linear1"] = whole
    return {name: weight.detach().clone() for name, weight in found.items()}


def _native_feed_forwards(model) -> dict[str, torch.Tensor]:
    """But for those that are rows of a Linear which attentions have, too."""
    names = {
        name: name for name, _ in model.named_modules() if re.fullmatch(family_of_model(model).feed_forwards, name)
    }
    for one, other in (
        (r"single_transformer_blocks(\.\d+)\.(attn\.to|proj)_out", r"single_blocks\1.linear2"),
        (r"single_transformer_blocks.*", ""),
        (r"transformer_blocks(\.\d+)\.ff\.net\.0\.proj", r"joint_blocks\1.x_block.mlp.fc1"),
        (r"transformer_blocks(\.\d+)\.ff\.net\.2", r"joint_blocks\1.x_block.mlp.fc2"),
    ):
        names = {name: re.sub(f"^{one}$", other, native) for name, native in names.items()}
    return {native: model.get_submodule(name).weight for name, native in names.items() if native}


def test_native_names_change_the_native_weights_as_merging_does(exported, tmp_path):
    """Every `lora_unet_...` belongs to a fused Linear of the family's own weights, of which it changes no query."""
    base, file, _, _ = exported
    argv = ["export", "--adapter", str(file), "--output", str(tmp_path / "lora.safetensors"), "--for", "comfyui"]
    assert main(argv) == 0
    merged, fed = bases.load_base(base), bool(read_adapter(file).config.get("transformer", {}).get("feed_forwards"))
    before = native_weights(merged, fed)
    load_adapter(merged, file, "dog")
    merge_adapters(merged)
    after, tensors = native_weights(merged, fed), load_file(tmp_path / "lora.safetensors")
    keys = {"lora_unet_" + name.replace(".", "_"): name for name in before}
    assert {name.partition(".")[0] for name in tensors} == set(keys)
    for key, name in keys.items():
        down, up = tensors[f"{key}.lora_down.weight"], tensors[f"{key}.lora_up.weight"]
        change = tensors[f"{key}.alpha"] / len(down) * up @ down
        assert_close(before[name] + change, after[name], **CLOSE)
        assert change.abs().max() > 0.01


def test_native_names_of_stable_diffusion_3_are_those_that_diffusers_converts_from(tmp_path):
    """Its own reading of a single file puts each third where the adapter's page says it is."""
    pipe = bases.load_base(str(tiny_families.sd35(tmp_path)))
    native = {f"{name}.weight": weight for name, weight in native_weights(pipe).items()}

    class Anything(dict):  # the rest of a checkpoint, which does not matter here
        def __missing__(self, key):
            return torch.zeros(48, 16)

        def pop(self, key, *default):
            return super().pop(key) if key in self else self[key]

    found = Anything(native)
    found.update({f"joint_blocks.{n}.x_block.attn.qkv.weight": torch.zeros(48, 16) for n in range(3)})
    converted = convert_sd3_transformer_checkpoint_to_diffusers(found)
    family = family_of(pipe)
    for name, weight in dict(denoiser(pipe).named_parameters()).items():
        projection = name.removesuffix(".weight")
        if projection.rpartition(".")[2] in ("add_k_proj", "add_v_proj"):
            assert torch.equal(converted[name], weight)
            place = family.native_weight(projection)
            third = native[f"{place.name}.weight"].chunk(place.count)[place.place]
            assert torch.equal(third, weight)


NATIVE = [f"{kind}-{n}" for kind in ("tied", "foldable") for n in ("klein", "flux1", "chroma", "z_image", "qwen_image")]
NATIVE += ["tied-wide_kolors", "foldable-wide_kolors", "fed-klein", "fed-z_image", "fed-qwen_image"]


@pytest.mark.parametrize("case", mostly(NATIVE, "tied-klein", "tied-chroma", "tied-z_image", "fed-klein"))
def test_diffusers_reads_native_names(case, tmp_path):
    """Its own reading of files in these names does what the adapter does."""
    kind, _, name = case.partition("-")
    # Of blocks of one stream diffusers knows those of the big FLUX.1 alone, by their widths.
    base, file, _, live = made(kind, name, tmp_path, everywhere=name == "klein")
    argv = ["export", "--adapter", str(file), "--output", str(tmp_path / "lora.safetensors"), "--for", "comfyui"]
    assert main(argv) == 0
    fresh = bases.load_base(base)
    fresh.load_lora_weights(str(tmp_path), weight_name="lora.safetensors")
    assert_close(predicted(fresh), live, **CLOSE)


@pytest.mark.slow
def test_a_kolors_is_taken_for_no_stable_diffusion_xl(tmp_path):
    """Whose U-Net it has, as wide: galleries and programs that know no Kolors are told nothing wrong."""
    _, file, _, _ = made("foldable", "wide_kolors", tmp_path)
    header = read_adapter(file)
    assert header.fingerprint["cross_attention_dim"] == 2048 and header.width is None
    lora = tmp_path / "lora.safetensors"
    assert "ss_base_model_version" not in export_adapter(file, lora).metadata
    assert not any("input_blocks" in name or "output_blocks" in name for name in load_file(lora))
    for client in ("forge", "a1111", "invokeai"):
        argv = ["export", "--adapter", str(file), "--output", str(tmp_path / "other.safetensors"), "--for", client]
        assert main(argv) == 2 and not (tmp_path / "other.safetensors").exists()


@pytest.mark.parametrize("name", ["klein", "flux1"])
def test_native_names_of_flux_are_those_that_diffusers_converts_from(name, tmp_path):
    pipe = bases.load_base(str(getattr(tiny_families, name)(tmp_path)))
    model, family = denoiser(pipe), family_of(pipe)
    native = {f"{name}.weight": weight for name, weight in native_weights(pipe).items() if name.startswith("double")}
    convert = {
        "klein": convert_flux2_transformer_checkpoint_to_diffusers,
        "flux1": convert_flux_transformer_checkpoint_to_diffusers,
    }[name]

    class Anything(dict):  # the rest of a checkpoint, which does not matter here
        def pop(self, key, *default):  # the fused rows of a block of one stream, as many as those of the big model
            return super().pop(key) if key in self else torch.zeros(7 * 3072, 1)

    rest = {} if name == "klein" else {"single_blocks.0.linear2.weight": torch.zeros(1, 1)}
    converted = convert(dict(native) if name == "klein" else Anything(native | rest))
    names = {f"transformer_blocks.{block}.attn.add_{one}_proj.weight" for block in range(2) for one in "qkv"}
    assert names <= set(converted)
    for name in names:
        assert torch.equal(converted[name], model.get_parameter(name))
        place = family.native_weight(name.removesuffix(".weight"))
        assert torch.equal(native[f"{place.name}.weight"].chunk(place.count)[place.place], converted[name])


def test_native_names_of_a_block_of_one_stream_are_those_that_diffusers_converts_from(tmp_path):
    pipe = bases.load_base(str(tiny_families.klein(tmp_path)))
    native, family = native_weights(pipe)["single_blocks.0.linear1"], family_of(pipe)
    converted = convert_flux2_transformer_checkpoint_to_diffusers({"single_blocks.0.linear1.weight": native})
    for place, name in ((1, "to_k"), (2, "to_v")):
        projection = f"single_transformer_blocks.0.attn.{name}"
        held, own = family.held_by(projection), family.native_weight(projection)
        assert own.name == "single_blocks.0.linear1" and (own.place, own.count) == (held.place, held.count)
        rows = converted[f"{held.name}.weight"].chunk(held.count)[held.place]
        assert torch.equal(rows, denoiser(pipe).get_parameter(f"{held.name}.weight")[16 * place : 16 * (place + 1)])


def test_native_names_of_z_image_are_those_that_diffusers_converts_from(tmp_path):
    pipe = bases.load_base(str(tiny_families.z_image(tmp_path)))
    native, family = native_weights(pipe), family_of(pipe)
    converted = convert_z_image_transformer_checkpoint_to_diffusers({f"{n}.weight": w for n, w in native.items()})
    assert {name.rpartition(".attention.")[2] for name in converted} == {"to_q.weight", "to_k.weight", "to_v.weight"}
    for name, weight in converted.items():
        assert torch.equal(weight, denoiser(pipe).get_parameter(name))
        place = family.native_weight(name.removesuffix(".weight"))
        assert torch.equal(native[place.name].chunk(place.count)[place.place], weight)


def test_the_size_that_is_told_before_training_is_what_is_written(exported, tmp_path):
    base, file, pipe, _ = exported
    from dataclasses import replace

    from comcat_diffusion.adapters.store import config_of, expected_shapes
    from comcat_diffusion.adapters.terms import read_contents

    model = denoiser(bases.load_base(base))
    (fields,) = read_adapter(file).config.values()
    config = config_of(fields, file)
    if config.cores:
        count = sum(high * wide for high, wide in expected_shapes(model, config).values())
        assert count == sum(tensor.numel() for tensor in load_file(file).values())
    shapes = expected_shapes(model, replace(config, tied=False, cores=False))
    models = {family_of(pipe).part: model}
    if not config.tied:  # a tied one is smaller: its heads share the rows of `down`
        written = export_adapter(file, tmp_path / "l.safetensors", "kohya", models=models)
        sizes = [t.nbytes for name, t in load_file(written.files[0]).items() if not name.endswith(".alpha")]
        assert lora_bytes(shapes, 2, family_of(pipe)) == sum(sizes)
        scripts = {
            "FluxTransformer2DModel": "_flux",
            "ChromaTransformer2DModel": "_flux",
            "SD3Transformer2DModel": "_sd3",
        }
        assert written.metadata["ss_network_module"] == "networks.lora" + scripts.get(type(model).__name__, "")
    else:
        assert len(spread(read_contents(file), models, file).terms) == len({n.rpartition(".")[0] for n in shapes})
    said = becomes(
        TrainConfig(pretrained_model_name_or_path=base, instance_prompt=PROMPT, instance_data_dir="."), model
    )
    assert "say --as lora" in said and ("its ComfyUI node" in said) == family_of(pipe).has_node


def test_files_say_of_what_architecture_they_are(exported):
    _, file, pipe, _ = exported
    with safe_open(file, framework="pt") as opened:
        told = opened.metadata()["modelspec.architecture"]
    kinds = {
        "PixArtSigmaPipeline": "pixart", "SanaPipeline": "sana", "StableDiffusion3Pipeline": "stable-diffusion-3",
        "Flux2KleinPipeline": "flux-2-klein", "FluxPipeline": "flux-1-dev", "ChromaPipeline": "chroma",
        "ZImagePipeline": "z-image", "QwenImagePipeline": "qwen-image", "KolorsPipeline": "kolors",
    }  # fmt: skip
    assert told == kinds[type(pipe).__name__] + "/comcat"


def test_another_model_has_no_lora_files(exported, tmp_path):
    from dataclasses import replace

    from comcat_diffusion.export.fit import refuse_other_models

    header = read_adapter(exported[1])
    other = replace(header, fingerprint=header.fingerprint | {"class": "WanTransformer3DModel"})
    with pytest.raises(AdapterFileError, match="is for a WanTransformer3DModel; LoRA files are written for .*PixArt"):
        refuse_other_models(other, "x.safetensors")
