"""Transformers in files of their own, beside a folder for all else: the same bases as whole folders.

Single files of Stable Diffusion's U-Nets are in tests/test_bases.py.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from comcat_diffusion import bases
from comcat_diffusion.adapters.header import read_adapter
from comcat_diffusion.adapters.parts import denoiser
from comcat_diffusion.generation.config import GenerateConfig
from comcat_diffusion.generation.generate import generate
from comcat_diffusion.training.config import TrainConfig, ValidateConfig
from comcat_diffusion.training.customize import customize
from comcat_diffusion.training.validate import validate
from tests import tiny_bases, tiny_families
from tests.slow import mostly


def written(tensors: dict[str, torch.Tensor], path: Path) -> Path:
    save_file({name: value.contiguous().clone() for name, value in tensors.items()}, path)
    return path


def native_z_image(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Its weights by their first names, queries, keys and values as one."""
    state, found = dict(model.state_dict()), {}
    for name in [name for name in state if name.endswith(".attention.to_q.weight")]:
        own = [state.pop(name.replace("to_q", f"to_{one}")) for one in "qkv"]
        found[name.replace("to_q", "qkv")] = torch.cat(own)
    renamed = {
        "all_final_layer.2-1.": "final_layer.", "all_x_embedder.2-1.": "x_embedder.", "to_out.0.": "out.",
        "norm_k.weight": "k_norm.weight", "norm_q.weight": "q_norm.weight",
    }  # fmt: skip
    for name, value in state.items():
        for ours, theirs in renamed.items():
            name = name.replace(ours, theirs)
        found[name] = value
    return {f"model.diffusion_model.{name}": value for name, value in found.items()}


def native_sd3(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Its weights by their first names; a norm that diffusers has as scale and shift has them the other way round."""
    state, found = dict(model.state_dict()), {"pos_embed": model.pos_embed.pos_embed}
    last = len(model.transformer_blocks) - 1
    plain = {
        "x_embedder.proj": "pos_embed.proj", "context_embedder": "context_embedder", "final_layer.linear": "proj_out",
        "t_embedder.mlp.0": "time_text_embed.timestep_embedder.linear_1",
        "t_embedder.mlp.2": "time_text_embed.timestep_embedder.linear_2",
        "y_embedder.mlp.0": "time_text_embed.text_embedder.linear_1",
        "y_embedder.mlp.2": "time_text_embed.text_embedder.linear_2",
    }  # fmt: skip
    swapped = {"final_layer.adaLN_modulation.1": "norm_out.linear"}
    for n in range(last + 1):
        ours, theirs = f"transformer_blocks.{n}", f"joint_blocks.{n}"
        for side, names, norm, feed, out in (
            ("x_block", ("to_q", "to_k", "to_v"), "norm1", "ff", "to_out.0"),
            ("context_block", ("add_q_proj", "add_k_proj", "add_v_proj"), "norm1_context", "ff_context", "to_add_out"),
        ):
            for kind in ("weight", "bias"):
                own = [state[f"{ours}.attn.{name}.{kind}"] for name in names]
                found[f"{theirs}.{side}.attn.qkv.{kind}"] = torch.cat(own)
            if side == "context_block" and n == last:
                swapped[f"{theirs}.{side}.adaLN_modulation.1"] = f"{ours}.{norm}.linear"
                continue
            plain[f"{theirs}.{side}.adaLN_modulation.1"] = f"{ours}.{norm}.linear"
            plain[f"{theirs}.{side}.attn.proj"] = f"{ours}.attn.{out}"
            plain |= {
                f"{theirs}.{side}.mlp.fc1": f"{ours}.{feed}.net.0.proj",
                f"{theirs}.{side}.mlp.fc2": f"{ours}.{feed}.net.2",
            }
    for names, turned in ((plain, False), (swapped, True)):
        for native, name in names.items():
            for kind in ("weight", "bias"):
                value = state[f"{name}.{kind}"]
                found[f"{native}.{kind}"] = torch.cat(value.chunk(2)[::-1]) if turned else value
    return {f"model.diffusion_model.{name}": value for name, value in found.items()}


def same_weights(one: torch.nn.Module, other: torch.nn.Module) -> None:
    torch.testing.assert_close(dict(one.state_dict()), dict(other.state_dict()), rtol=0, atol=0)


@pytest.mark.slow
def test_a_transformer_in_its_first_names_is_the_base_of_its_folder(tmp_path):
    """From training to drawing, by its file's name."""
    folder = tiny_families.z_image(tmp_path / "base")
    pipe = bases.load_base(str(folder))
    file = written(native_z_image(pipe.transformer), tmp_path / "z.safetensors")
    shutil.rmtree(folder / "transformer")
    pipe.transformer.save_config(folder / "transformer")  # all but its weights
    single = bases.load_base(str(file), base_config=str(folder))
    for part in ("transformer", "vae", "text_encoder"):
        same_weights(getattr(single, part), getattr(pipe, part))
    assert bases.asked_precision(None, "cuda", str(file), str(folder)) == "bf16"
    about = {"pretrained_model_name_or_path": str(file), "base_config": str(folder)}
    settings = {
        **about, "instance_data_dir": str(bases.assets() / "subject" / "train"), "instance_prompt": "a sks teddy",
        "output_dir": str(tmp_path / "out"), "max_train_steps": 1, "lr_warmup_steps": 0, "mixed_precision": "no",
        "kind": "tied", "skip_final_inference": True, "thumbnail": False,
    }  # fmt: skip
    assert not validate(ValidateConfig(**settings)).errors
    adapter = customize(TrainConfig(**settings)).adapter
    assert read_adapter(adapter).base_model == str(file)
    more = {"num_images": 1, "num_inference_steps": 1, "output_dir": str(tmp_path / "drawn")}
    made = generate(GenerateConfig(adapter=[str(adapter)], prompt=["a sks teddy"], **about, **more))
    assert json.loads(Image.open(made.files[0]).text["comcat"])["base"] == "z.safetensors"
    heavy = bases.load_base(str(file), base_config=str(folder), to_train=True)
    assert heavy.text_encoder.dtype == torch.bfloat16 and heavy.transformer.dtype == torch.float32


@pytest.mark.parametrize(
    "name",
    mostly(["klein", "qwen_image", "sd3", "flux1", "chroma", "sana"], "klein"),
)
def test_a_transformer_in_diffusers_names_stands_in_for_that_of_a_folder(name, tmp_path):
    folder = getattr(tiny_families, name)(tmp_path / "base")
    other = bases.load_base(str(folder)).transformer
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(0.9)
    file = written(other.state_dict(), tmp_path / "own.safetensors")
    single = bases.load_base(str(file), base_config=str(folder))
    same_weights(denoiser(single), other)


def test_an_autoencoder_in_the_file_counts(tmp_path):
    folder = tiny_families.sd3(tmp_path / "base")
    pipe = bases.load_base(str(folder))
    with torch.no_grad():
        for parameter in pipe.vae.parameters():
            parameter.mul_(0.9)
    tensors = native_sd3(pipe.transformer)
    for name, value in pipe.vae.state_dict().items():
        tensors[f"first_stage_model.{tiny_bases.vae_name(name, 2)}"] = tiny_bases.vae_value(name, value)
    file = written(tensors, tmp_path / "both.safetensors")
    single = bases.load_base(str(file), base_config=str(folder))
    same_weights(single.vae, pipe.vae)
    same_weights(single.transformer, pipe.transformer)


def test_what_is_not_there_is_told_in_a_sentence(tmp_path):
    folder = tiny_families.z_image(tmp_path / "base")
    model = bases.load_base(str(folder)).transformer
    file = written(native_z_image(model), tmp_path / "z.safetensors")
    some = {name: value for name, value in native_z_image(model).items() if ".layers.1." not in name}
    with pytest.raises(ValueError, match="it has not all weights of the ZImageTransformer2DModel"):
        bases.load_base(str(written(some, tmp_path / "some.safetensors")), base_config=str(folder))
    klein = tiny_families.klein(tmp_path / "klein")
    with pytest.raises(ValueError, match="z.safetensors could not be loaded"):
        bases.load_base(str(file), base_config=str(klein))
    pixart = tiny_families.pixart(tmp_path / "pixart")
    with pytest.raises(ValueError, match="diffusers reads no single file of a PixArtTransformer2DModel"):
        bases.load_base(str(file), base_config=str(pixart))
    for weights in (folder / "text_encoder").glob("*.safetensors"):
        weights.unlink()
    with pytest.raises(ValueError, match="holds no weights of the text_encoder, nor does .* --base_config"):
        bases.load_base(str(file), base_config=str(folder))
    with pytest.raises(ValueError, match="half.safetensors"):
        bases.load_base(str(tiny_bases.damaged(file)), base_config=str(folder))
