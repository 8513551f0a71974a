"""What loads a LoRA file into a base as other programs do: their own code, imported from their checkouts.

What their packages want beside (pages, image tools, settings) is stood in for, since nothing of it has a part in
reading a LoRA. Each maker of a loader takes a checkout; a loader takes a file, a base and what the program calls its
kind, and gives a copy of the base as the program changes it, or None if the program takes the file for nothing of it.
"""

import copy
import importlib.abc
import importlib.machinery
import importlib.util
import re
import sys
import types
from collections.abc import Callable
from pathlib import Path
from unittest.mock import MagicMock

import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file
from torch import nn

from tests import comfyui_bases, comfyui_transformers
from tests.test_comfyui_transformers import native

Loader = Callable[[Path, nn.Module, str], nn.Module | None]


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


def invokeai(folder: Path) -> Loader:
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


def sdnext(folder: Path) -> Loader:
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


def a1111(folder: Path) -> Loader:
    """The same by A1111's own, which knows the three kinds of Stable Diffusion of U-Nets under the original names."""
    sys.path.append(own := str(folder / "extensions-builtin" / "Lora"))
    beside = ("modules", "gradio", "einops")
    StandIns(lambda name: name.partition(".")[0] in beside and not name.startswith("modules.lora"))
    from modules import devices, sd_models, shared

    of_sd3 = importlib.import_module("modules.models.sd3.mmdit")
    of_sd3.QkvLinear = type("QkvLinear", (nn.Linear,), {})  # by whose class Linears are told apart
    shared.cmd_opts.lora_dir = own  # which is made, if it is not there
    devices.cpu, devices.dtype = torch.device("cpu"), torch.float32
    sd_models.read_state_dict = lambda file, what=None: load_file(file)
    import networks

    sys.path.remove(own)  # where it would hide the folder `networks` of kohya's

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


def _of_original_names(base: nn.Module) -> nn.Module:
    """Modules with a base's weights as the original code calls them."""
    root, names = nn.Module(), comfyui_bases if isinstance(base, UNet2DConditionModel) else comfyui_transformers
    for name, tensor in names.original_names(base).items():
        *path, weight = name.split(".")
        here = root
        for depth, step in enumerate(path, 1):
            if step not in here._modules:
                layer = depth == len(path) and weight == "weight"
                here.add_module(step, _layer(tensor) if layer else nn.Module())
            here = here._modules[step]
        here.register_parameter(weight, nn.Parameter(tensor.clone(), requires_grad=False))
    return root


def _layer(weight: torch.Tensor) -> nn.Module:
    """What has such a weight: by its class loaders decide what a LoRA of it may be."""
    if weight.ndim == 4:
        return nn.Conv2d(*weight.shape[1::-1], weight.shape[2:], padding=weight.shape[2] // 2, bias=False)
    return nn.Linear(*weight.shape[::-1], bias=False) if weight.ndim == 2 else nn.Module()


def forge(folder: Path) -> Loader:
    """The same by Forge's, which merges a LoRA when it moves a model to where it computes."""
    sys.argv = ["forge", "--always-cpu", "--all-in-fp32"]  # which Forge reads when it is imported
    sys.path[:0] = [str(folder), str(folder / "packages_3rdparty")]
    from backend.patcher.base import ModelPatcher
    from backend.patcher.lora import load_lora, model_lora_keys_unet

    def load(file: Path, base: nn.Module, kind: str) -> nn.Module | None:
        whole = nn.Module()
        whole.diffusion_model = made = _of_original_names(base)
        whole.config, made.config = types.SimpleNamespace(huggingface_repo=kind), _as_settings(base)
        patches, unread = load_lora(load_file(file), model_lora_keys_unet(whole, {}))
        if unread:
            print(f"  Forge leaves {len(unread)} tensors unread, {next(iter(unread))} first.")
        patcher = ModelPatcher(whole, torch.device("cpu"), torch.device("cpu"))
        patcher.add_patches(filename=str(file), patches=patches)
        patcher.refresh_loras()
        return made

    return load


def _as_settings(unet: UNet2DConditionModel) -> dict[str, object]:
    """Where a U-Net's attentions are, in the words of ComfyUI's settings of it, which Forge has too."""

    def depths(block: nn.Module) -> list[int]:
        attentions = getattr(block, "attentions", None)
        return [len(attentions[i].transformer_blocks) if attentions else 0 for i in range(len(block.resnets))]

    return {
        "num_res_blocks": [unet.config.layers_per_block] * len(unet.down_blocks),
        "channel_mult": [1] * len(unet.down_blocks),
        "transformer_depth": [depth for block in unet.down_blocks for depth in depths(block)],
        "transformer_depth_middle": len(unet.mid_block.attentions[0].transformer_blocks),
        "transformer_depth_output": [depth for block in unet.up_blocks for depth in depths(block)][::-1],
    }


def comfyui(folder: Path) -> Loader:
    """The same by ComfyUI's, which says by how much a weight changes and leaves the rest to its patcher."""
    sys.argv = ["comfyui", "--cpu"]  # which ComfyUI reads when it is imported
    sys.path.insert(0, str(folder))
    from comfy import options

    options.enable_args_parsing()
    from comfy import lora
    from comfy.lora_convert import convert_lora

    def load(file: Path, base: nn.Module, kind: str) -> nn.Module | None:
        whole = nn.Module()
        whole.diffusion_model = made = _of_original_names(base)
        whole.model_config = types.SimpleNamespace(unet_config=_as_settings(base))
        for name, patch in lora.load_lora(convert_lora(load_file(file)), lora.model_lora_keys_unet(whole, {})).items():
            weight = whole.get_parameter(name)
            weight.data = lora.calculate_weight([(1.0, patch, 1.0, None, None)], weight.data.clone(), name)
        return made

    return load


def kohya(folder: Path) -> Loader:
    """The same by the scripts', whose U-Net of Stable Diffusion XL is their own, here of fewer channels."""
    sys.path.insert(0, str(folder))
    sys.modules.pop("networks", None)  # A1111's, which keeps what it has
    absent = [name for name in ("cv2", "torchvision") if importlib.util.find_spec(name) is None]
    StandIns(lambda name: name.partition(".")[0] in absent)
    from library import sdxl_original_unet as xl
    from networks import lora, lora_flux, lora_sd3

    def load(file: Path, base: nn.Module, kind: str) -> nn.Module | None:
        if not isinstance(base, UNet2DConditionModel):
            made = _in_named_blocks(base)
        elif kind == "sdxl":
            xl.MODEL_CHANNELS = base.config.block_out_channels[0]
            xl.TIME_EMBED_DIM, xl.ADM_IN_CHANNELS = 4 * xl.MODEL_CHANNELS, 8
            made = xl.SdxlUNet2DConditionModel()
            _, unknown = made.load_state_dict(comfyui_bases.original_names(base), strict=False)
            assert not unknown, unknown
        else:
            made = copy.deepcopy(base)  # whose blocks have the names of the scripts' own
        scripts = {"f1": lora_flux, "chroma": lora_flux, "sd3": lora_sd3}.get(kind, lora)
        texts = nn.Module() if scripts is lora else [nn.Module()] * 3
        network, weights = scripts.create_network_from_weights(1.0, str(file), None, texts, made, for_inference=True)
        network.merge_to(texts, made, weights, torch.float32, torch.device("cpu"))
        return made

    return load


def _in_named_blocks(transformer: nn.Module) -> nn.Module:
    """A transformer under its native names, its blocks of the classes by whose names kohya's scripts find them."""
    made = _of_original_names(transformer)
    blocks = {r"double_blocks\.\d+": "DoubleStreamBlock", r"single_blocks\.\d+": "SingleStreamBlock"}
    blocks[r"joint_blocks\.\d+\.\w+_block"] = "SingleDiTBlock"
    for name, module in made.named_modules():
        for pattern, kind in blocks.items():
            if re.fullmatch(pattern, name):
                module.__class__ = type(kind, (nn.Module,), {})
    return made
