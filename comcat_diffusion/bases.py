"""Finding a base: the embedded one, a diffusers folder, a single file or a hub id, offline first."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
)

from comcat_diffusion.adapters.parts import denoiser
from comcat_diffusion.config import EMBEDDED, BaseSettings  # noqa: F401 - found here too
from comcat_diffusion.families.family import Family
from comcat_diffusion.families.known import family_in, family_of, known_family
from comcat_diffusion.places import (  # noqa: F401 - found here too
    asked_name,
    assets,
    is_embedded,
    is_of_embedded,
    place_of,
    public_name,
)
from comcat_diffusion.single_file import CONFIG_FILES, config_of_single_file, load_single_file, loaded

PRECISIONS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
EMBEDDED_GUIDANCE = 2.0  # above, colours glare and shapes burst (docs/log.md)
_NOT_GIVEN = (OSError, ValueError, HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled)


def load_base(
    name: str,
    precision: str = "fp32",
    revision: str | None = None,
    variant: str | None = None,
    base_config: str | None = None,
    to_train: bool = False,
) -> DiffusionPipeline:
    """The whole pipeline of a base. Only a hub id that is not in the local cache asks the network.

    `to_train` leaves what a family has of heavy text encoders in bfloat16: they read a few prompts and go.
    `base_config` is for single files: a diffusers folder, or the hub id of a cached one, of the same family; a whole
    one where the file holds a transformer alone. Raises FileNotFoundError, saying what was looked for, and ValueError
    for a file that holds no Stable Diffusion.
    """
    dtype, path = PRECISIONS[precision], place_of(name)
    if path.is_dir():
        own = _compressed_unet(path, dtype) if _is_compressed(path) else {}
        kinds = _dtypes(_family_in(path), dtype) if to_train else dtype
        about = {"torch_dtype": kinds, "variant": variant, "local_files_only": True} | _left_out(path)
        return loaded(lambda: DiffusionPipeline.from_pretrained(path, **about, **own), path)
    if path.is_file():
        return load_single_file(path, dtype, base_config, torch.bfloat16 if to_train else None)
    settings = {"torch_dtype": dtype, "revision": revision, "variant": variant}
    if to_train:
        settings["torch_dtype"] = _dtypes(_family_of_hub(name, revision), dtype)
    return _from_hub(name, settings)


def _left_out(path: Path) -> dict[str, None]:
    """The parts that a folder lacks and its family can do without, of which diffusers wants to be told."""
    family = _family_in(path)
    return {part: None for part in (family.optional if family else ()) if not (path / part).is_dir()}


def _family_in(path: Path) -> Family | None:
    """The family of a diffusers folder by its pipeline's class, or None."""
    index = path / "model_index.json"
    return family_in(json.loads(index.read_text("utf-8")).get("_class_name", ""), {}) if index.is_file() else None


def _family_of_hub(name: str, revision: str | None) -> Family | None:
    """That of a hub's base, of which one small file is fetched unless it is in the cache."""
    for local in (True, False):
        try:
            asked = {"revision": revision, "local_files_only": local, "allow_patterns": ("model_index.json",)}
            return _family_in(Path(snapshot_download(name, **asked)))
        except _NOT_GIVEN:
            pass
    return None  # which loading it will say better


def _dtypes(family: Family | None, dtype: torch.dtype) -> torch.dtype | dict[str, torch.dtype]:
    """One precision for all parts but the heavy ones."""
    heavy = family.heavy if family is not None else ()
    return {"default": dtype, **dict.fromkeys(heavy, torch.bfloat16)} if heavy else dtype


def _is_compressed(path: Path) -> bool:
    """Whether this is a base that `comcat compress` has left: its denoiser is in files of its own."""
    return (path / "plan.json").is_file()


def _compressed_unet(path: Path, dtype: torch.dtype) -> dict[str, torch.nn.Module]:
    from comcat_diffusion.compression import load_compressed  # which stands above this file, for this one case

    return {"unet": load_compressed(path)[0].to(dtype)}


def asked_base(
    config: BaseSettings, precision: str, name: str | None = None, to_train: bool = False
) -> DiffusionPipeline:
    """The base that the settings of a run name; `name` where they leave it open.

    Raises ValueError for a precision in which its family overflows, and as `load_base` does.
    """
    asked = asked_name(config, name), precision, config.revision, config.variant, config.base_config
    pipe = load_base(*asked, to_train)
    family = known_family(pipe)
    if family is not None and precision not in family.precisions:
        able = " or ".join(family.precisions)
        raise ValueError(f"--precision {precision}: {family.name} overflows in it; use {able}.")
    return pipe


def config_folder(config: BaseSettings, name: str | None = None) -> Path:
    """Where the configurations and tokenizers of a base are; of a hub base, these small files alone are fetched.

    `name` is the base where the settings leave it open.

    Raises FileNotFoundError or ValueError as `load_base` does.
    """
    name = asked_name(config, name)
    path = place_of(name)
    if path.is_dir():
        return path
    if path.is_file():
        return config_of_single_file(path, config.base_config)
    for local in (True, False):
        try:
            asked = {"revision": config.revision, "local_files_only": local, "allow_patterns": CONFIG_FILES}
            return Path(snapshot_download(name, **asked))
        except _NOT_GIVEN as error:
            problem = error
    raise _nowhere(name) from problem


def _from_hub(name: str, settings: dict) -> DiffusionPipeline:
    try:
        pipe = DiffusionPipeline.from_pretrained(name, local_files_only=True, **settings)
    except (OSError, ValueError):  # not, or not wholly, in the cache: the user named a hub id, so ask the hub
        try:
            pipe = DiffusionPipeline.from_pretrained(name, **settings)
        except _NOT_GIVEN as error:
            raise _nowhere(name) from error
    except ImportError as error:
        raise ValueError(f"The base '{name}' wants a package that is not installed: {error}") from error
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _nowhere(name: str) -> FileNotFoundError:
    return FileNotFoundError(
        f"The base '{name}' is neither a local folder or file nor in the local cache (looked for its "
        "model_index.json), and the hub did not give it: check the name and the connection."
    )


def native_resolution(pipe: DiffusionPipeline) -> int:
    """Side in pixels at which the base was trained."""
    return family_of(pipe).native(denoiser(pipe).config, pipe.vae.config)


def grain(pipe: DiffusionPipeline) -> int:
    """Pixels that the sides of its pictures must be multiples of."""
    return family_of(pipe).grain(denoiser(pipe).config, pipe.vae_scale_factor)


def asked_resolution(pipe: DiffusionPipeline, resolution: int | None) -> int:
    """Side in pixels: the one asked for, or the base's own. Raises ValueError if the base cannot do it."""
    resolution = resolution or native_resolution(pipe)
    if resolution % grain(pipe):
        raise ValueError(f"--resolution {resolution} must be a multiple of {grain(pipe)} for this base.")
    refuse_large(family_of(pipe), denoiser(pipe).config, pipe.vae_scale_factor, [(resolution, resolution)])
    return resolution


def asked_size(pipe: DiffusionPipeline, height: int | None, width: int | None, side: int | None) -> tuple[int, int]:
    """Height and width in pixels; what is left open is `side`, or the base's own. Raises as `asked_resolution` does."""
    for flag, asked in (("height", height), ("width", width)):
        if asked is not None and asked % grain(pipe):
            raise ValueError(f"--{flag} {asked} must be a multiple of {grain(pipe)} for this base.")
    side = None if height and width else asked_resolution(pipe, side)
    size = height or side, width or side
    flag = "height" if size[0] > size[1] else "width"
    refuse_large(family_of(pipe), denoiser(pipe).config, pipe.vae_scale_factor, [size], flag)
    return size


def refuse_large(
    family: Family, config: Mapping, factor: int, sizes: Iterable[tuple[int, int]], flag: str = "resolution"
) -> None:
    """Raise ValueError if a picture of one of these sizes has a side for which a denoiser has no places."""
    most, asked = family.largest(config, factor), max(max(size) for size in sizes)
    if most is not None and asked > most:
        raise ValueError(
            f"--{flag} asks for sides of up to {asked} pixels, and this base has places for {most}: choose a "
            "smaller one."
        )


def default_guidance(name: str | None, pipe: DiffusionPipeline | None = None) -> float:
    """The strength of classifier-free guidance that suits a base: its family's, or the embedded one's.

    Without its pipeline it counts as a Stable Diffusion.
    """
    if is_of_embedded(name):
        return EMBEDDED_GUIDANCE
    return Family.guidance if pipe is None else family_of(pipe).guidance_of(pipe)


def forget_folder(config: Path) -> None:
    """diffusers notes where each part came from: a hub id may stay, a folder of this machine is nobody's business."""
    content = json.loads(config.read_text("utf-8"))
    if Path(content.get("_name_or_path") or "").is_absolute():
        del content["_name_or_path"]
        config.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def asked_device(name: str | None) -> str:
    """The device of this name, or the fastest. Raises ValueError if there is none of this name here."""
    if name is None:
        return fastest_device()
    try:
        torch.empty(1, device=name).cpu()
    except (RuntimeError, AssertionError) as error:  # NotImplementedError among them, of a device that holds nothing
        raise ValueError(
            f"--device {name}: torch knows no such device here; leave it out for the fastest, '{fastest_device()}'."
        ) from error
    return name


def asked_precision(name: str | None, device: str, base: str, base_config: str | None = None) -> str:
    """The precision of this name, or what suits a device for drawing: half where that is much faster."""
    if name:
        return name
    if torch.device(device).type == "cuda":
        family = _family_ahead(base, base_config)
        return "fp16" if family is None or "fp16" in family.precisions else "bf16"
    return "bf16" if suits_bf16(device, base) else "fp32"


def _family_ahead(base: str, base_config: str | None) -> Family | None:
    """The family of a base that is on this machine, before it is loaded; None where that is not known."""
    try:
        path = place_of(base)
        if path.is_file() and base_config:
            path = Path(base_config).expanduser()
        if not path.exists():
            path = Path(snapshot_download(base, local_files_only=True, allow_patterns=("model_index.json",)))
        return family_in(json.loads((path / "model_index.json").read_text("utf-8")).get("_class_name", ""), {})
    except _NOT_GIVEN:
        return None


def suits_bf16(device: str, base: str) -> bool:
    """Whether a device has instructions of its own for bfloat16, and a base is large enough to gain by it.

    The embedded one is not, on a CPU: there it stays in float32.
    """
    gains = torch.device(device).type != "cpu" or not is_of_embedded(base)
    return gains and has_bf16(device)


def has_bf16(device: str) -> bool:
    """Whether a device has instructions of its own for bfloat16."""
    kind = torch.device(device).type
    if kind == "cpu":
        able = getattr(torch.cpu, "get_capabilities", dict)()  # not in torch 2.6
        return bool(able.get("avx512_bf16") or able.get("amx_bf16"))
    return kind == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def fastest_device() -> str:
    """The accelerator that is there, or the CPU."""
    return torch.accelerator.current_accelerator().type if torch.accelerator.is_available() else "cpu"
