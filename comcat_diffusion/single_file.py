"""A base in one file: of a Stable Diffusion 1.x, 2.x or XL all its weights, of other families those of what denoises.

What a file does not hold comes from a diffusers folder of its family: configurations and tokenizer in any case, and for
a transformer also text encoders and, where the file has none, the autoencoder.
"""

from collections.abc import Callable
from pathlib import Path

import diffusers
import torch
from diffusers import DiffusionPipeline
from diffusers.loaders.single_file_utils import SingleFileComponentError, fetch_diffusers_config
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open

from comcat_diffusion.families.family import UNET, Family
from comcat_diffusion.families.known import family_in

CONFIG_FILES = ("*.json", "*.txt", "*.model")  # of a diffusers folder: everything but its weights
_AUTOENCODER = "first_stage_model."  # what names of its weights begin with


def load_single_file(
    path: Path, dtype: torch.dtype, config: str | None, heavy_dtype: torch.dtype | None = None
) -> DiffusionPipeline:
    """The whole pipeline of a base in a file; `heavy_dtype` is for text encoders of billions of weights.

    Raises ValueError and FileNotFoundError as `load_base` does.
    """
    if path.suffix != ".safetensors":
        raise ValueError(
            f"{path} is not a .safetensors file; other checkpoint formats can run code and are not loaded."
        )
    folder = config_of_single_file(path, config)
    name = DiffusionPipeline.load_config(folder)["_class_name"]
    family, kind = family_in(name, {}), getattr(diffusers, name)
    if family is not None and family.part != UNET:
        return loaded(lambda: _around(path, folder, family, dtype, heavy_dtype or dtype), path)
    if not hasattr(kind, "from_single_file"):
        raise ValueError(f"diffusers reads no single file of a {name}: name the folder of such a base.")
    return loaded(
        lambda: kind.from_single_file(path, config=str(folder), torch_dtype=dtype, local_files_only=True), path
    )


def _around(
    path: Path, folder: Path, family: Family, dtype: torch.dtype, heavy_dtype: torch.dtype
) -> DiffusionPipeline:
    """The pipeline in a folder around the transformer, and the autoencoder, in a file."""
    kind = getattr(diffusers, family.denoisers[0])
    if not hasattr(kind, "from_single_file"):
        raise ValueError(f"diffusers reads no single file of a {kind.__name__}; name the folder of such a base")
    about = {"config": str(folder), "torch_dtype": dtype, "local_files_only": True}
    missing = f"it has not all weights of the {kind.__name__} that {folder} describes"
    try:
        parts = {family.part: kind.from_single_file(path, subfolder=family.part, **about)}
    except NotImplementedError as error:  # of torch, about what is still on the meta device
        raise ValueError(missing) from error
    if any(parameter.is_meta for parameter in parts[family.part].parameters()):
        raise ValueError(missing)
    if any(name.startswith(_AUTOENCODER) for name in _shapes_in(path)):
        own = getattr(diffusers, DiffusionPipeline.load_config(folder)["vae"][1])
        parts["vae"] = own.from_single_file(path, subfolder="vae", **about)
    left_out = {part: None for part in family.optional if not (folder / part).is_dir()}
    for name in (*family.text_encoders, "vae"):
        if name not in (parts | left_out) and not any((folder / name).glob("*.safetensors")):
            raise ValueError(
                f"it holds no weights of the {name}, nor does {folder}: name a whole diffusers folder of the same "
                "family with --base_config"
            )
    kinds = {"default": dtype, **dict.fromkeys(family.heavy, heavy_dtype)}
    return DiffusionPipeline.from_pretrained(folder, torch_dtype=kinds, local_files_only=True, **parts, **left_out)


def loaded(load: Callable[[], DiffusionPipeline], path: Path) -> DiffusionPipeline:
    """What is loaded from a path, without progress bars. Raises ValueError, in a sentence, for whatever went wrong."""
    try:
        pipe = load()
    except (
        OSError, ValueError, LookupError, RuntimeError, AttributeError, ImportError, SingleFileComponentError,
    ) as error:  # fmt: skip
        raise ValueError(f"{path} could not be loaded as a Stable Diffusion base: {_first_line(error)}") from error
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def config_of_single_file(path: Path, config: str | None) -> Path:
    """Where the configuration and tokenizer of a single file are: it holds weights alone.

    Left to itself, diffusers would fetch them from the hub even when told to stay offline.
    """
    if config and (Path(config).expanduser() / "model_index.json").is_file():
        return Path(config).expanduser()
    family = config or fetch_diffusers_config(_shapes_in(path))["pretrained_model_name_or_path"]
    try:
        return Path(snapshot_download(family, local_files_only=True, allow_patterns=CONFIG_FILES))
    except (LocalEntryNotFoundError, HFValidationError) as error:
        patterns = " ".join(f"'{pattern}'" for pattern in CONFIG_FILES)
        raise FileNotFoundError(
            f"{path} holds weights without their configuration, and that of '{family}' is not in the local cache: "
            f"fetch it once with: hf download {family} --include {patterns}, or name a diffusers folder of the same "
            "family with --base_config."
        ) from error


def _shapes_in(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a file without their numbers, which may be of billions. Raises ValueError for a damaged file."""
    try:
        with safe_open(path, framework="pt") as opened:
            sizes = {name: opened.get_slice(name).get_shape() for name in opened.keys()}  # noqa: SIM118 - no mapping
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or cut short ({error}); get the file again.") from error
    return {name: torch.empty(size, device="meta") for name, size in sizes.items()}
