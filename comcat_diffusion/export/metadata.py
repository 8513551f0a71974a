"""What a LoRA file says of itself, in the keys that galleries and tools of others read: `modelspec.*` and `ss_*`.

Sources: the model metadata standard of Stability AI (modelspec), and what kohya's sd-scripts write (ss, sshs).
"""

import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import torch

from comcat_diffusion import __version__
from comcat_diffusion.adapters.header import KEY, Header
from comcat_diffusion.adapters.store import safetensors_bytes
from comcat_diffusion.config import is_hub_id

_BASE_VERSIONS = {768: "sd_v1", 1024: "sd_v2", 2048: "sdxl_base_v1-0"}  # by the width of the text states
# Which of kohya's sd-scripts a LoRA is of, if not the one of U-Nets.
_MODULES = {
    "FluxTransformer2DModel": "networks.lora_flux",
    "ChromaTransformer2DModel": "networks.lora_flux",
    "SD3Transformer2DModel": "networks.lora_sd3",
}
# How our notes call what sd-scripts' keys are for.
_TOLD = {
    "steps": ("ss_steps", "ss_max_train_steps"),
    "seed": ("ss_seed",),
    "learning_rate": ("ss_learning_rate", "ss_unet_lr"),
    "pictures": ("ss_num_train_images",),
}


def lora_metadata(
    header: Header,
    tensors: Mapping[str, torch.Tensor],
    output: Path,
    ranks: Counter,
    beside: Counter,
    alpha: float | None,
) -> dict[str, str]:
    """All pairs of a LoRA's header.

    `ranks` counts its projections by rank, `beside` its convolutions; `alpha` is None where none is written.
    """
    return _modelspec(header, tensors) | _training(header, output) | _network(ranks, beside, alpha)


def _modelspec(header: Header, tensors: Mapping[str, torch.Tensor]) -> dict[str, str]:
    pairs = {name: value for name, value in header.metadata().items() if name != KEY}
    phrase, notes = header.notes.phrase, header.notes
    pairs["modelspec.architecture"] = pairs["modelspec.architecture"].replace("/comcat", "/lora")
    pairs["modelspec.usage_hint"] = f'Prompt with "{phrase}".'
    pairs["modelspec.description"] = f"{phrase or 'A subject'}, exported from a COMCAT adapter (comcat-diffusion)."
    others = [f"{other['trigger']} {other['class_word']}".strip() for other in notes.others]
    pairs["modelspec.tags"] = ", ".join(filter(None, (notes.class_word, "subject")))
    pairs["modelspec.trigger_phrase"] = ", ".join(filter(None, (notes.trigger, *others)))
    digest = _weights_hash(tensors)
    pairs["modelspec.hash_sha256"] = f"0x{digest}"
    pairs["sshs_model_hash"] = digest
    return pairs


def _weights_hash(tensors: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 of what follows the header of a safetensors file, by which galleries know a LoRA again."""
    content = safetensors_bytes(dict(tensors), {})
    return hashlib.sha256(content[8 + int.from_bytes(content[:8], "little") :]).hexdigest()


def _network(ranks: Counter, beside: Counter, alpha: float | None) -> dict[str, str]:
    """What the scripts are told to make such a LoRA; of convolutions they make one only where they get a `conv_dim`."""
    ranks, one = ranks or beside, len(ranks) <= 1 and len(beside) <= 1
    convolutions = {}
    if len(beside) == 1:
        rank = next(iter(beside))
        convolutions = {"conv_dim": str(rank), "conv_alpha": str(rank if alpha is None else alpha)}
    return {
        "ss_network_dim": str(next(iter(ranks))) if one else "Dynamic",
        "ss_network_alpha": str(ranks.most_common(1)[0][0] if alpha is None else alpha),
        "ss_network_args": json.dumps(convolutions),
    }


def _training(header: Header, output: Path) -> dict[str, str]:
    told, phrase = header.notes.training, header.notes.phrase
    width, prediction = header.width, header.fingerprint.get("prediction_type")
    base = header.base_model
    pairs = {
        "ss_network_module": _MODULES.get(str(header.fingerprint.get("class")), "networks.lora"),
        "ss_v2": str(width == 1024),
        "ss_clip_skip": "None",
        "ss_output_name": output.stem,
        "ss_sd_model_name": base if is_hub_id(base) else Path(base).name,
        "ss_training_comment": f"exported from a COMCAT adapter by comcat-diffusion {__version__}",
    }
    if width in _BASE_VERSIONS:
        of_v = "_v" if width == 1024 and prediction == "v_prediction" else ""
        pairs["ss_base_model_version"] = _BASE_VERSIONS[width] + of_v
    if phrase:
        pairs["ss_tag_frequency"] = json.dumps({f"1_{phrase}": {phrase: 1}})
    if told.get("resolution"):
        pairs["ss_resolution"] = "({0}, {0})".format(told["resolution"])
    return pairs | {key: str(told[name]) for name, keys in _TOLD.items() if name in told for key in keys}
