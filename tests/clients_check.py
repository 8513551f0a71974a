"""`make test-clients INVOKEAI=folder A1111=folder SDNEXT=folder`: what these programs' loaders do with our exports.

Their own code, imported from their checkouts, says for what it takes a file, and changes the weights of small random
bases of each family. These have to be the weights that a merged adapter has. What their packages want beside (pages,
image tools, settings) is stood in for, since nothing of it has a part in reading a LoRA.
"""

import copy
import importlib.abc
import importlib.machinery
import sys
import tempfile
import types
from collections.abc import Callable
from pathlib import Path
from unittest.mock import MagicMock

import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file
from torch import nn

from comcat_diffusion import ComcatConfig, merge_adapters, save_adapter
from comcat_diffusion.adapters.header import Notes, read_adapter
from comcat_diffusion.adapters.model import factors
from comcat_diffusion.export.clients import CLIENTS, format_of
from comcat_diffusion.export.fit import family_in
from comcat_diffusion.export.lora import export_adapter
from comcat_diffusion.families.known import family_of_model
from tests import comfyui_bases, comfyui_transformers, tiny_families
from tests.test_comfyui_transformers import native

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
        block_out_channels=(32,) * 3,
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


class StandIns(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Modules that can be imported, and hold whatever is asked of them."""

    def __init__(self, wanted: Callable[[str], bool]) -> None:
        self.wanted = wanted
        sys.meta_path.insert(0, self)

    def find_spec(self, name: str, path: object, target: object = None) -> object:
        """See importlib."""
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if self.wanted(name) else None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> MagicMock:
        """See importlib."""
        made = MagicMock(name=spec.name)
        made.__spec__, made.__path__, made.__name__ = spec, [], spec.name
        return made

    def exec_module(self, module: object) -> None:
        """See importlib."""


def invokeai(folder: Path) -> Callable[[Path, nn.Module, str], nn.Module | None]:
    """What loads a file into a copy of a base as InvokeAI does; None if it takes the file for nothing that it loads."""
    sys.path.append(str(folder))
    missing: set[str] = set()
    StandIns(lambda name: name.partition(".")[0] in missing)
    while True:
        try:
            from invokeai.backend.model_manager.configs.factory import ModelConfigFactory
            from invokeai.backend.model_manager.load.model_loaders.lora import LoRALoader
            from invokeai.backend.patches.layer_patcher import LayerPatcher
            from invokeai.backend.util.original_weights_storage import OriginalWeightsStorage

            break
        except ModuleNotFoundError as error:
            if error.name.startswith("invokeai") or error.name in missing:
                raise
            missing.add(error.name.partition(".")[0])
            for name in [name for name in sys.modules if name.partition(".")[0] == "invokeai"]:
                del sys.modules[name]

    def load(file: Path, base: nn.Module, kind: str) -> nn.Module | None:
        config = ModelConfigFactory.from_model_on_disk(file).config
        if config.base.value != kind:
            print(f"  InvokeAI takes it for one of {config.base.value}.")
            return None
        config.path = str(file)
        loader = types.SimpleNamespace(_model_base=config.base, _torch_dtype=torch.float32)
        patch = LoRALoader._load_model(loader, config)
        made = native(base).model.diffusion_model if kind == "flux" else copy.deepcopy(base)
        prefix = "lora_unet_" if isinstance(base, UNet2DConditionModel) else "lora_transformer-"
        kept = OriginalWeightsStorage()
        LayerPatcher.apply_smart_model_patch(made, prefix, patch, 1.0, kept, {}, torch.float32, True, False)
        return made

    return load


def sdnext(folder: Path) -> Callable[[Path, nn.Module, str], nn.Module | None]:
    """The same by SD.Next's native loaders."""
    sys.path.append(str(folder))
    StandIns(lambda name: name.startswith("modules.") and not f"{name}.".startswith("modules.lora."))
    from modules import sd_models, shared

    sd_models.read_state_dict = lambda file, what=None: load_file(file)
    shared.opts.extra_networks_default_multiplier, shared.compiled_model_state = 1.0, None
    from modules.lora import lora_load

    def load(file: Path, base: nn.Module, kind: str) -> nn.Module | None:
        made = copy.deepcopy(base)
        shared.sd_model = types.SimpleNamespace(**{"unet" if kind in ("sd", "sdxl") else "transformer": made})
        shared.sd_model_type = kind
        lora_load.lora_cache.clear()
        disk = types.SimpleNamespace(filename=str(file), name=file.stem, shorthash="", sd_version="", metadata={})
        network = lora_load.load_safetensors(file.stem, disk)
        if network is None:
            return None
        _apply(network)
        return made

    return load


def _apply(network: object) -> None:
    """Add what a network of A1111's classes, which SD.Next has too, does to the weights that it was found for."""
    network.te_multiplier = network.unet_multiplier = 1.0
    network.dyn_dim = None
    for module in network.modules.values():
        module.sd_module.weight.data += module.calc_updown(module.sd_module.weight)[0]


def a1111(folder: Path) -> Callable[[Path, nn.Module, str], nn.Module | None]:
    """The same by A1111's own, which knows the three kinds of Stable Diffusion of U-Nets under the original names."""
    sys.path.append(str(folder / "extensions-builtin" / "Lora"))
    beside = ("modules", "gradio", "einops")
    StandIns(lambda name: name.partition(".")[0] in beside and not name.startswith("modules.lora"))
    from modules import devices, sd_models, shared

    devices.cpu, devices.dtype = torch.device("cpu"), torch.float32
    sd_models.read_state_dict = lambda file, what=None: load_file(file)
    import networks

    def load(file: Path, base: nn.Module, kind: str) -> nn.Module | None:
        whole = nn.Module()
        whole.diffusion_model = made = _of_original_names(base)
        told = types.SimpleNamespace(embedders=[]), types.SimpleNamespace(wrapped=nn.Module())
        shared.sd_model = types.SimpleNamespace(
            model=whole, is_sdxl=kind == "sdxl", conditioner=told[0], cond_stage_model=told[1]
        )
        disk = types.SimpleNamespace(filename=str(file), name=file.stem, read_hash=lambda: None)
        network = networks.load_network(file.stem, disk)
        _apply(network)
        return made

    return load


def _of_original_names(unet: UNet2DConditionModel) -> nn.Module:
    """Modules with a U-Net's weights as the original code calls them."""
    root = nn.Module()
    for name, tensor in comfyui_bases.original_names(unet).items():
        *path, last, weight = name.split(".")
        here = root
        for step in path:
            if step not in here._modules:
                here.add_module(step, nn.Module())
            here = here._modules[step]
        if last not in here._modules:
            linear = weight == "weight" and tensor.ndim == 2
            here.add_module(last, nn.Linear(*tensor.shape[::-1], bias=False) if linear else nn.Module())
        here._modules[last].register_parameter(weight, nn.Parameter(tensor.clone(), requires_grad=False))
    return root


def trained(base: nn.Module, file: Path) -> nn.Module:
    """A random adapter in a file; the base with it merged."""
    made = copy.deepcopy(base)
    targets = family_of_model(base).usual_targets("foldable")
    made.add_adapter(ComcatConfig(r=2, alpha=3.0, foldable=True, target_modules=targets), "dog")
    noise = torch.Generator().manual_seed(0)
    for factor in factors(made, "dog").values():
        factor.data = torch.randn(factor.shape, generator=noise) * 0.2
    save_adapter(made, file, "dog", "somebody/base", Notes("sks", "a photo of sks dog", "dog"))
    merge_adapters(made)
    return made


def off(found: nn.Module, merged: nn.Module, base: nn.Module) -> tuple[float, float]:
    """How far weights are from the merged ones, and how far these are from the base's."""
    names = comfyui_bases if isinstance(base, UNet2DConditionModel) else comfyui_transformers
    named = nn.Module.state_dict if type(found) is type(base) else names.original_names
    wanted, before, there = named(merged), named(base), found.state_dict()
    far = lambda one, other: max(float((one[name] - other[name]).abs().max()) for name in before)
    return far(there, wanted), far(wanted, before)


def main(programs: dict[str, Path]) -> None:
    """Every base in every program, by the file that an export for it writes."""
    able = {"invokeai": invokeai, "sdnext": sdnext, "a1111": a1111}  # the last without a package of its own
    loaders = {name: make(programs[name]) for name, make in able.items() if name in programs}
    with tempfile.TemporaryDirectory() as place, torch.no_grad():
        for name, (make, *kinds) in BASES.items():
            torch.manual_seed(0)
            base, file = make(), Path(place) / f"{len(list(Path(place).iterdir()))}.safetensors"
            merged = trained(base, file)
            family = family_in(read_adapter(file)).name
            for program, load in loaders.items():
                kind = kinds[program != "invokeai"]
                if family in CLIENTS[program].lacks or not kind or (program == "a1111" and kind == "sd3"):
                    print(f"{name}, {program}: not asked, or none that it reads by itself")
                    continue
                lora = Path(place) / f"{file.stem}-{program}.safetensors"
                export_adapter(file, lora, format_of(program, None, family))
                found = load(lora, base, kind)
                far, change = (float("inf"), 0.0) if found is None else off(found, merged, base)
                print(f"{name}, {program}: weights off by {far:.1e}, changed by {change:.1e}", flush=True)
                if far > CLOSE or change < 0.1:
                    raise SystemExit(f"{program} reads a LoRA of {name} wrongly.")
    print("They change the weights that are meant.")


if __name__ == "__main__":
    main({name.lower(): Path(folder).resolve() for name, folder in (one.split("=", 1) for one in sys.argv[1:])})
