"""Which bases can be taught a subject: those of a known family that hear words and see only the noisy latents."""

import inspect
import json
from collections.abc import Mapping
from pathlib import Path

import diffusers
import transformers
from diffusers import DiffusionPipeline
from transformers import PreTrainedTokenizerBase

from comcat_diffusion import bases
from comcat_diffusion.adapters.parts import denoiser
from comcat_diffusion.families.family import UNET, Family
from comcat_diffusion.families.known import FAMILIES, family_in, known_family, unknown
from comcat_diffusion.training.config import TrainConfig

WAY_OUT = "name a text-to-image base, such as the one that it was made from"


def refuse_folder(config: TrainConfig) -> None:
    """Raise ValueError for a base that cannot be taught, or not so, if files of this machine alone can tell."""
    name = config.pretrained_model_name_or_path
    if name and Path(name).expanduser().is_dir():
        refuse_settings(config, refuse_configurations(bases.config_folder(config), name))


def refuse_configurations(folder: Path, name: str) -> Family:
    """The family of a base by the configurations in its folder. Raises ValueError for one that cannot be taught."""
    kind = kind_in(folder)
    family = family_in(kind, _configs(folder))
    if family is None:
        raise ValueError(f"The base '{name}' is {unknown(kind)}: {WAY_OUT}.")
    if not (folder / family.part / "config.json").is_file():
        raise ValueError(f"The base '{name}' has no {family.noun} (it is a {kind or 'folder'}): {WAY_OUT}.")
    _refuse(kind, family, config_in(folder / family.part), config_in(folder / "vae"), name)
    return family


def _configs(folder: Path) -> dict[str, Mapping]:
    found = {path.parent.name: path for path in sorted(folder.glob("*/config.json"))}
    return {part: json.loads(path.read_text("utf-8")) for part, path in found.items()}


def config_in(folder: Path) -> Mapping:
    """The configuration of one part of a base."""
    return json.loads((folder / "config.json").read_text("utf-8"))


def kind_in(folder: Path) -> str:
    """The class of the pipeline in a folder."""
    return json.loads((folder / "model_index.json").read_text("utf-8")).get("_class_name", "")


def tokenizer_in(folder: Path, name: str) -> PreTrainedTokenizerBase:
    """A tokenizer of a base by its component's name.

    Raises ValueError for a class that neither transformers nor diffusers has, and where a package is missing that it
    needs.
    """
    library, kind = json.loads((folder / "model_index.json").read_text("utf-8"))[name]
    home = getattr(diffusers.pipelines, library, transformers)  # diffusers has some beside their pipelines
    if not hasattr(home, kind):
        raise ValueError(f"The base in {folder} has a tokenizer of class {kind}, which transformers does not know.")
    try:
        return getattr(home, kind).from_pretrained(folder / name, local_files_only=True)
    except ImportError as error:
        raise ValueError(f"The base in {folder} wants a package that is not installed: {error}") from error


def refuse_pipeline(pipe: DiffusionPipeline, name: str | None) -> None:
    """Raise ValueError for a base that cannot be taught, once it is loaded."""
    kind = type(pipe).__name__
    family = known_family(pipe)
    if family is None:
        raise ValueError(f"The base '{name}' is {unknown(kind)}: {WAY_OUT}.")
    if getattr(pipe, family.part, None) is None:
        raise ValueError(f"The base '{name}' has no {family.noun} (it is a {kind}): {WAY_OUT}.")
    _refuse(kind, family, denoiser(pipe).config, pipe.vae.config, name or bases.EMBEDDED)


def refuse_settings(config: TrainConfig, family: Family) -> None:
    """Raise ValueError for settings that a family has no use for."""
    trained = (
        ("train_text_encoder", config.train_text_encoder),
        ("placeholder_token", config.placeholder_token),
        ("learn_name", config.learn_name),
    )
    of_noise = (("snr_gamma", config.snr_gamma is not None), ("noise_offset", config.noise_offset != 0))
    if config.up_blocks_only and family.part != UNET:
        raise ValueError(f"--up_blocks_only is for U-Nets; the {family.noun} of {family.name} has none.")
    if config.convolutions and family.part != UNET:
        raise ValueError(f"--convolutions is for U-Nets; the {family.noun} of {family.name} is none: leave it out.")
    if config.feed_forwards and not family.feed_forwards:
        known = ", ".join(own.name for own in FAMILIES if own.feed_forwards)
        raise ValueError(f"--feed_forwards is for {known}, and this base is {family.name}: leave it out.")
    if config.mixed_precision == "fp16" and "fp16" not in family.precisions:
        raise ValueError(f"--mixed_precision fp16: {family.name} overflows in it; use bf16 or no.")
    for flag, asked in trained if not family.trains_text else ():
        if asked:
            raise ValueError(f"--{flag}: the text encoders of {family.name} stay as they are here; leave it out.")
    for flag, asked in of_noise if family.flow else ():
        if asked:
            raise ValueError(f"--{flag} is for bases that predict noise; {family.name} matches a flow: leave it out.")


def _refuse(kind: str, family: Family, seer: Mapping, vae: Mapping, name: str) -> None:
    seen, latents = seer.get("in_channels", 4), family.channels(vae) * family.packing**2
    if seen > latents:
        raise ValueError(
            f"The base '{name}' takes a picture or a mask beside the words: its {family.noun} sees {seen} channels, of "
            f"which the noisy latents are {latents}, as for inpainting or editing; {WAY_OUT}."
        )
    if seen != latents:
        raise ValueError(
            f"The base '{name}' does not fit together: its {family.noun} sees {seen} channels, its VAE has {latents}."
        )
    pipeline = getattr(diffusers, kind, None) if kind not in family.pipelines else None
    if pipeline is not None and "image" in inspect.signature(pipeline.__call__).parameters:
        raise ValueError(f"The base '{name}' is a {kind}, which starts from a picture: {WAY_OUT}.")
