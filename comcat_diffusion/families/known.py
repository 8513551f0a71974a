"""Which families there are, and of which one a base is: by its pipeline's class, or by that of its denoiser."""

from __future__ import annotations

from collections.abc import Mapping

from comcat_diffusion.families.chroma import Chroma
from comcat_diffusion.families.family import DENOISERS, UNET, Family
from comcat_diffusion.families.flux_1 import Flux1
from comcat_diffusion.families.flux_2_klein import Flux2Klein
from comcat_diffusion.families.kolors import Kolors
from comcat_diffusion.families.pixart import PixArt
from comcat_diffusion.families.qwen_image import QwenImage
from comcat_diffusion.families.sana import Sana
from comcat_diffusion.families.stable_diffusion import StableDiffusion
from comcat_diffusion.families.stable_diffusion_3 import StableDiffusion3
from comcat_diffusion.families.stable_diffusion_xl import StableDiffusionXL
from comcat_diffusion.families.z_image import ZImage

FAMILIES: tuple[Family, ...] = (
    StableDiffusion(),
    StableDiffusionXL(),
    Kolors(),
    StableDiffusion3(),
    Flux2Klein(),
    Flux1(),
    Chroma(),
    ZImage(),
    QwenImage(),
    PixArt(),
    Sana(),
)


def names() -> str:
    """All of them in a sentence."""
    return ", ".join(family.name for family in FAMILIES)


def family_of(pipe: object) -> Family:
    """The family of a pipeline. Raises ValueError, naming its class and those that are known, if there is none."""
    found = known_family(pipe)
    if found is None:
        raise ValueError(f"This is {unknown(type(pipe).__name__)}.")
    return found


def known_family(pipe: object) -> Family | None:
    """The family of a pipeline, or None."""
    found = _of_pipeline(type(pipe).__name__)
    for part in DENOISERS if found is None else ():
        denoiser = getattr(pipe, part, None)
        if denoiser is not None and found is None:
            bare = getattr(denoiser, "_orig_mod", denoiser)
            found = family_of_denoiser(type(bare).__name__, getattr(bare, "config", {}))
    return found


def family_in(kind: str, configs: Mapping[str, Mapping]) -> Family | None:
    """The family of a diffusers folder by its pipeline's class and, by component, its configurations; None: unknown."""
    found = _of_pipeline(kind)
    for part in DENOISERS if found is None else ():
        config = configs.get(part)
        if config is not None and found is None:
            found = family_of_denoiser(config.get("_class_name", ""), config)
    return found


def family_of_denoiser(kind: str, config: Mapping) -> Family | None:
    """The family of a denoiser by its class and its configuration, or None."""
    return next((family for family in FAMILIES if kind in family.denoisers and family.is_of(config)), None)


def family_of_model(model: object) -> Family:
    """The family of a denoiser; one of no known family is like most."""
    return family_of_denoiser(type(model).__name__, getattr(model, "config", {})) or Family()


def part_of_denoiser(kind: str) -> str:
    """The component that a denoiser of a class is in; one of no known family counts as a U-Net."""
    return next((family.part for family in FAMILIES if kind in family.denoisers), UNET)


def unknown(kind: str) -> str:
    """What a base of a class is, at the end of a sentence, if it is of no known family."""
    return f"a {kind or 'folder of another kind'}, which is of no family that is known here ({names()})"


def _of_pipeline(kind: str) -> Family | None:
    return next((family for family in FAMILIES if kind in family.pipelines), None)
