"""A compressed folder as transformers loads it, by `from_pretrained` and `pipeline` with trust_remote_code=True.

The modelling file in the folder (modelling.py) imports this one. What is loaded is what `load_compressed` gives, as
strictly.
"""

from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers.utils import cached_file

from comcat_diffusion.bases import fastest_device
from comcat_diffusion.compression.modelling import MODEL_TYPE
from comcat_diffusion.compression.store import PLAN, TENSORS, load_compressed

_OF_HUB = ("revision", "cache_dir", "token", "local_files_only", "force_download", "proxies", "subfolder",
           "_commit_hash")  # fmt: skip
_OURS = ("config", "dtype", "torch_dtype", "device_map", "attn_implementation")
# What transformers hands on to every class, and what changes nothing of how a model of this size is loaded.
_IDLE = ("trust_remote_code", "code_revision", "adapter_kwargs", "use_safetensors", "low_cpu_mem_usage", "_from_auto",
         "_from_pipeline")  # fmt: skip
_SAID = ("dtype", "_name_or_path", "transformers_version", "_commit_hash")  # in a configuration, of the call alone


class CompressedConfig(PreTrainedConfig):
    """The dense model's configuration under another model type. What builds the model is the plan beside it."""

    model_type = MODEL_TYPE


class CompressedModel:
    """What transformers asks for the model of a folder or hub id, which is of another class: there is no instance."""

    config_class = CompressedConfig

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoModel") -> None:
        """Nothing: that is for models whose code transformers would copy when it saves them."""

    @classmethod
    def from_pretrained(cls, name: str | Path, **wishes: object) -> nn.Module:
        """The compressed model, in evaluation mode.

        Understands where transformers looks for files, and dtype, device_map (one device) and attn_implementation.
        Raises ValueError for any other wish, also one to build the model otherwise, and what `load_compressed` raises.
        """
        place = {wish: wishes[wish] for wish in _OF_HUB if wishes.get(wish) is not None}
        config = wishes.get("config")
        strange = [n for n, wish in wishes.items() if wish and n not in (*_OF_HUB, *_OURS, *_IDLE)]
        strange += [] if config is None else _changed(config, CompressedConfig.from_pretrained(name, **place))
        if strange:
            raise ValueError(f"A compressed model is not loaded with {strange[0]}: leave it out.")
        found = [Path(cached_file(str(name), file, **place)) for file in (PLAN, TENSORS)]
        model, _ = load_compressed(found[0].parent)
        model.config._name_or_path = str(name)
        attention = wishes.get("attn_implementation") or getattr(config, "_attn_implementation", None)
        if attention:
            model.set_attn_implementation(attention)
        dtype = wishes.get("dtype") or wishes.get("torch_dtype")
        if dtype not in (None, "auto"):
            model.to(getattr(torch, dtype) if isinstance(dtype, str) else dtype)
        return model.to(_device(wishes.get("device_map")))


def _changed(config: PreTrainedConfig, stored: PreTrainedConfig) -> list[str]:
    """What a caller of transformers has said otherwise than the folder does."""
    said, there = config.to_dict(), stored.to_dict()
    return [n for n in sorted(said.keys() | there.keys()) if n not in _SAID and said.get(n) != there.get(n)]


def _device(wish: object) -> torch.device:
    """The one device of a `device_map`."""
    if isinstance(wish, dict):
        if list(wish) != [""]:
            raise ValueError("A compressed model is not spread over devices: name one as device_map.")
        wish = wish[""]
    if wish is None:
        return torch.device("cpu")
    return torch.device(fastest_device() if wish == "auto" else wish)
