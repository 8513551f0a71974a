"""`make test-clients INVOKEAI=folder A1111=folder ...`, whose names the Makefile has: what they do with our exports.

Their own code, imported from their checkouts (clients_loaders.py), says for what it takes a file, and changes the
weights of small random bases of each family. These have to be the weights that a merged adapter has, which on a U-Net
has terms beside convolutions as well, on a transformer beside feed-forwards where its family has them.
"""

import copy
import sys
import tempfile
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from torch import nn

from comcat_diffusion import ComcatConfig, merge_adapters, save_adapter
from comcat_diffusion.adapters.header import Notes, read_adapter
from comcat_diffusion.adapters.model import factors
from comcat_diffusion.export.clients import CLIENTS, format_of
from comcat_diffusion.export.fit import family_in
from comcat_diffusion.export.lora import export_adapter
from comcat_diffusion.families.known import family_of_model
from tests import clients_loaders, comfyui_bases, comfyui_transformers, tiny_families

CLOSE = 1e-6  # of weights of order one, in float32


def unet(width: int, **more: object) -> UNet2DConditionModel:
    """A U-Net that reads texts of a width, by which programs know its kind."""
    settings = {"block_out_channels": (32, 32), "layers_per_block": 2, "attention_head_dim": 8, "sample_size": 8}
    settings["down_block_types"] = ("CrossAttnDownBlock2D",) * 2
    settings["up_block_types"] = ("CrossAttnUpBlock2D",) * 2
    return UNet2DConditionModel(cross_attention_dim=width, **settings | more)


def xl() -> UNet2DConditionModel:
    """One whose blocks are counted as Stable Diffusion XL's are."""
    return unet(
        2048,
        block_out_channels=(32, 64, 128),
        use_linear_projection=True,
        transformer_layers_per_block=(1, 2, 10),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    )


# By name: a base, what InvokeAI calls its kind, and what SD.Next does, if not by diffusers, as the tests of exports do
BASES = {
    "SD 1.x": (lambda: unet(768), "sd-1", "sd"),
    "SD 2.x": (lambda: unet(1024), "sd-2", "sd"),
    "SD XL": (xl, "sdxl", "sdxl"),
    "SD 3": (tiny_families.sd3_transformer, "", "sd3"),
    "FLUX.2 [klein]": (tiny_families.klein_transformer, "flux2", "f2"),
    "FLUX.1": (tiny_families.flux1_transformer, "flux", "f1"),
    "Chroma": (tiny_families.chroma_transformer, "", "chroma"),
    "Z-Image": (tiny_families.z_image_transformer, "z-image", "zimage"),
    "Qwen-Image": (tiny_families.qwen_image_transformer, "qwen-image", ""),
}
# Whose blocks of one stream SD.Next, as diffusers, tells by the widths of the big model.
_BY_WIDTH = ("FLUX.1", "Chroma")


def trained(base: nn.Module, file: Path, fed: bool) -> nn.Module:
    """A random adapter in a file, or not, with terms beside feed-forwards; the base with it merged."""
    made = copy.deepcopy(base)
    family = family_of_model(base)
    beside = {"convolutions": 2 * is_unet(base), "feed_forwards": 2 * (fed and bool(family.feed_forwards))}
    config = ComcatConfig(r=2, alpha=3.0, foldable=True, target_modules=family.usual_targets("foldable"), **beside)
    made.add_adapter(config, "dog")
    noise = torch.Generator().manual_seed(0)
    for factor in factors(made, "dog").values():
        factor.data = torch.randn(factor.shape, generator=noise) * 0.3
    save_adapter(made, file, "dog", "somebody/base", Notes("sks", "a photo of sks dog", "dog"))
    merge_adapters(made)
    return made


def off(found: nn.Module, merged: nn.Module, base: nn.Module) -> tuple[float, list[float]]:
    """How far weights are from the merged ones; how far these are from the base's: of Linears, and of convolutions."""
    names = comfyui_bases if is_unet(base) else comfyui_transformers
    named = nn.Module.state_dict if type(found) is type(base) else names.original_names
    wanted, before, there = named(merged), named(base), found.state_dict()
    far = lambda one, other, names: max(float((one[name] - other[name]).abs().max()) for name in names)
    changed = [name for name in before if not torch.equal(wanted[name], before[name])]
    kinds = [[name for name in changed if before[name].ndim == ndim] for ndim in (2, 4)]
    return far(there, wanted, before), [far(wanted, before, kind) for kind in kinds if kind]


def asked(program: str, base: nn.Module, family: str, kind: str) -> bool:
    """Whether a program reads LoRAs of a base by itself, and is asked here how."""
    unets_alone = program in ("a1111", "comfyui", "forge")
    return bool(kind) and family not in CLIENTS[program].lacks and (is_unet(base) or not unets_alone)


def is_unet(base: nn.Module) -> bool:
    """Whether a base has convolutions that terms can be beside."""
    return isinstance(base, UNet2DConditionModel)


def main(programs: dict[str, Path]) -> None:
    """Every base in every program, by the file that an export for it writes."""
    # Those that bring no package `modules` or `networks` of their own name come after those that do.
    able = ("invokeai", "sdnext", "a1111", "kohya", "forge", "comfyui")
    loaders = {name: getattr(clients_loaders, name)(programs[name]) for name in able if name in programs}
    with tempfile.TemporaryDirectory() as place, torch.no_grad():
        for name, (make, *kinds) in BASES.items():
            torch.manual_seed(0)
            base, file = make(), Path(place) / f"{len(list(Path(place).iterdir()))}.safetensors"
            for program, load in loaders.items():
                kind = kinds[program != "invokeai"]
                merged = trained(base, file, program != "sdnext" or name not in _BY_WIDTH)
                family = family_in(read_adapter(file)).name
                if not asked(program, base, family, kind):
                    print(f"{name}, {program}: not asked, or none that it reads by itself")
                    continue
                lora = Path(place) / f"{file.stem}-{program}.safetensors"
                export_adapter(file, lora, format_of(program, None, family))
                found = load(lora, base, kind)
                far, changes = (float("inf"), [0.0]) if found is None else off(found, merged, base)
                told = ", its convolutions' by ".join(f"{change:.1e}" for change in changes)
                print(f"{name}, {program}: weights off by {far:.1e}, changed by {told}", flush=True)
                if far > CLOSE or min(changes) < 0.1 or (found and len(changes) < 1 + is_unet(base)):
                    raise SystemExit(f"{program} reads a LoRA of {name} wrongly.")
    print("They change the weights that are meant.")


if __name__ == "__main__":
    main({name.lower(): Path(folder).resolve() for name, folder in (one.split("=", 1) for one in sys.argv[1:])})
