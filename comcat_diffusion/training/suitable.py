"""Which bases can be taught a subject: those whose U-Net hears words and sees nothing but the noisy latents."""

import inspect
import json
from collections.abc import Mapping
from pathlib import Path

import diffusers
from diffusers import AutoencoderKL, DiffusionPipeline, UNet2DConditionModel

from comcat_diffusion import bases
from comcat_diffusion.config import BaseSettings

WAY_OUT = "name a text-to-image base, such as the one that it was made from"


def refuse_folder(config: BaseSettings) -> None:
    """Raise ValueError for a base that cannot be taught, if that can be told from files of this machine alone."""
    name = config.pretrained_model_name_or_path
    if name and Path(name).expanduser().is_dir():
        refuse_configurations(bases.config_folder(config), name)


def refuse_configurations(folder: Path, name: str) -> None:
    """Raise ValueError for a base that cannot be taught, by the configurations in its folder."""
    kind = json.loads((folder / "model_index.json").read_text("utf-8")).get("_class_name", "")
    if not (folder / "unet" / "config.json").is_file():
        raise ValueError(f"The base '{name}' has no U-Net (it is a {kind or 'folder of another kind'}): {WAY_OUT}.")
    unet = UNet2DConditionModel.load_config(folder / "unet")
    vae = AutoencoderKL.load_config(folder / "vae")
    _refuse(kind, unet, vae, name)


def refuse_pipeline(pipe: DiffusionPipeline, name: str | None) -> None:
    """Raise ValueError for a base that cannot be taught, once it is loaded."""
    kind = type(pipe).__name__
    if getattr(pipe, "unet", None) is None:
        raise ValueError(f"The base '{name}' has no U-Net (it is a {kind}): {WAY_OUT}.")
    _refuse(kind, pipe.unet.config, pipe.vae.config, name or bases.EMBEDDED)


def _refuse(kind: str, unet: Mapping, vae: Mapping, name: str) -> None:
    seen, latents = unet.get("in_channels", 4), vae.get("latent_channels", 4)
    if seen > latents:
        raise ValueError(
            f"The base '{name}' takes a picture or a mask beside the words: its U-Net sees {seen} channels, of which "
            f"the noisy latents are {latents}, as for inpainting or editing; {WAY_OUT}."
        )
    if seen != latents:
        raise ValueError(
            f"The base '{name}' does not fit together: its U-Net sees {seen} channels, its VAE has {latents}."
        )
    pipeline = getattr(diffusers, kind, None)
    if pipeline is not None and "image" in inspect.signature(pipeline.__call__).parameters:
        raise ValueError(f"The base '{name}' is a {kind}, which starts from a picture: {WAY_OUT}.")
