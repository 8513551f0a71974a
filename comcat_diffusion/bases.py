"""Finding a base: the embedded one, a diffusers folder, a single file or a hub id, offline first."""

from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline, StableDiffusionXLPipeline
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

from comcat_diffusion.config import EMBEDDED

PRECISIONS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
_PACKAGE = Path(__file__).parent


def assets() -> Path:
    """Where the embedded base and the sample subject are: inside the installed package, or beside it in a checkout."""
    for folder in (_PACKAGE / "assets", _PACKAGE.parent / "assets"):
        if (folder / "tiny-sd").is_dir():
            return folder
    raise FileNotFoundError(
        f"The embedded base is missing: neither {_PACKAGE}/assets nor {_PACKAGE.parent}/assets has it."
    )


def is_embedded(name: str) -> bool:
    """Whether this names the base that comes with the package."""
    return name == EMBEDDED


def load_base(
    name: str, precision: str = "fp32", revision: str | None = None, variant: str | None = None
) -> DiffusionPipeline:
    """The whole pipeline of a base. Only a hub id that is not in the local cache asks the network.

    Raises FileNotFoundError, saying what was looked for, and ValueError for a file that holds no Stable Diffusion.
    """
    dtype = PRECISIONS[precision]
    path = assets() / "tiny-sd" if is_embedded(name) else Path(name).expanduser()
    if path.is_dir():
        if not (path / "model_index.json").is_file():
            raise FileNotFoundError(f"{path} is no diffusers folder: it has no model_index.json.")
        return _loaded(
            lambda: DiffusionPipeline.from_pretrained(path, torch_dtype=dtype, variant=variant, local_files_only=True),
            path,
        )
    if path.is_file():
        return _single_file(path, dtype)
    if path.suffix or path.is_absolute() or name.startswith((".", "~")) or name.count("/") != 1:
        raise FileNotFoundError(f"There is no base at '{name}': no such folder or file, and a hub id reads owner/name.")
    return _from_hub(name, {"torch_dtype": dtype, "revision": revision, "variant": variant})


def _loaded(load: Callable[[], DiffusionPipeline], path: Path) -> DiffusionPipeline:
    try:
        pipe = load()
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise ValueError(f"{path} could not be loaded as a Stable Diffusion base: {_first_line(error)}") from error
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _single_file(path: Path, dtype: torch.dtype) -> DiffusionPipeline:
    if path.suffix != ".safetensors":
        raise ValueError(
            f"{path} is not a .safetensors file; other checkpoint formats can run code and are not loaded."
        )
    for kind in (StableDiffusionPipeline, StableDiffusionXLPipeline):
        try:
            return _loaded(
                lambda kind=kind: kind.from_single_file(path, torch_dtype=dtype, local_files_only=True), path
            )
        except ValueError as error:
            problem = error
    raise problem


def _from_hub(name: str, settings: dict) -> DiffusionPipeline:
    try:
        pipe = DiffusionPipeline.from_pretrained(name, local_files_only=True, **settings)
    except (OSError, ValueError):  # not, or not wholly, in the cache: the user named a hub id, so ask the hub
        try:
            pipe = DiffusionPipeline.from_pretrained(name, **settings)
        except (OSError, ValueError, HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
            raise FileNotFoundError(
                f"The base '{name}' is neither a local folder or file nor in the local cache (looked for its "
                "model_index.json), and the hub did not give it: check the name and the connection."
            ) from error
    pipe.set_progress_bar_config(disable=True)
    return pipe


def native_resolution(pipe: DiffusionPipeline) -> int:
    """Side in pixels at which the base was trained."""
    return pipe.unet.config.sample_size * pipe.vae_scale_factor


def fastest_device() -> str:
    """The accelerator that is there, or the CPU."""
    return torch.accelerator.current_accelerator().type if torch.accelerator.is_available() else "cpu"
