"""Drawing: prompts x seeds in batches, every picture from its own seed; and writing them with what made them."""

import base64
import inspect
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import diffusers
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from comcat_diffusion import atomic, bases
from comcat_diffusion.adapters.focus import keep_background
from comcat_diffusion.adapters.once import text_once
from comcat_diffusion.adapters.parts import denoiser
from comcat_diffusion.families.known import family_of
from comcat_diffusion.generation.config import SamplingSettings
from comcat_diffusion.generation.infotext import infotext, sampler_name


@dataclass(frozen=True)
class Drawing:
    """One picture to draw: what it shows, and the seed of its noise."""

    prompt: str
    seed: int


@dataclass(frozen=True)
class Sampling:
    """How pictures are drawn."""

    num_inference_steps: int
    guidance_scale: float
    negative_prompt: str | None = None
    resolution: int | None = None
    batch_size: int = 4
    size: tuple[int, int] | None = None  # height and width, if they were asked for; else squares


def sampling_of(config: SamplingSettings, batch_size: int, base: str, pipe: DiffusionPipeline) -> Sampling:
    """How a run draws; the guidance that it leaves open is the one that suits the base.

    Raises ValueError for fewer steps than its family's pipeline draws in.
    """
    family, steps = family_of(pipe), config.num_inference_steps
    if steps < family.fewest_steps:
        raise ValueError(f"--num_inference_steps {steps}: {family.name} draws in {family.fewest_steps} or more.")
    guidance = bases.default_guidance(base, pipe) if config.guidance_scale is None else config.guidance_scale
    return Sampling(steps, guidance, config.negative_prompt, config.resolution, batch_size)


def made_by(pipe: DiffusionPipeline, base: str, sampling: Sampling) -> dict:
    """What a picture says of how it was made, beside its prompt, its seed and its adapters."""
    size = dict(zip(("height", "width"), sampling.size or (), strict=False))
    return size | {
        "negative_prompt": sampling.negative_prompt or "",
        "num_inference_steps": sampling.num_inference_steps,
        "guidance_scale": sampling.guidance_scale,
        "scheduler": type(pipe.scheduler).__name__,
        "sampler": sampler_name(type(pipe.scheduler).__name__, pipe.scheduler.config),
        "resolution": sampling.resolution,
        "precision": next(name for name, dtype in bases.PRECISIONS.items() if dtype == denoiser(pipe).dtype),
        "base": bases.public_name(base),
    }


def use_sampler(pipe: DiffusionPipeline, name: str | None) -> None:
    """Give a pipeline a sampler of diffusers by name. Raises ValueError if there is none, or it is for other models."""
    if not name:
        return
    kind = getattr(diffusers, name, None)
    if kind is None or not hasattr(kind, "set_timesteps"):
        raise ValueError(f"--scheduler {name}: diffusers has no scheduler of this name.")
    family = family_of(pipe)
    if family.flow:
        own = type(pipe.scheduler).__name__
        if name not in (own, *family.flow_samplers):
            able = " and ".join(dict.fromkeys((own, *family.flow_samplers)))
            raise ValueError(f"--scheduler {name}: {family.name} matches a flow, which {able} can draw with.")
        pipe.scheduler = kind.from_config(pipe.scheduler.config)
        return
    try:
        pipe.scheduler = kind.from_config(pipe.scheduler.config)
        needed = {n for n, p in inspect.signature(kind.step).parameters.items() if p.default is p.empty} - {"self"}
        fits = hasattr(pipe.scheduler, "init_noise_sigma") and needed <= {"model_output", "timestep", "sample"}
    except (TypeError, ValueError):
        fits = False
    if not fits:
        raise ValueError(
            f"--scheduler {name} is for other models than {family.name}; take for instance EulerDiscreteScheduler."
        )


def draw(
    pipe: StableDiffusionPipeline,
    drawings: list[Drawing],
    sampling: Sampling,
    words: Mapping[str, Sequence[str]] | None = None,
) -> Iterator[Image.Image]:
    """Yield the pictures in order. All noise of a picture comes from its seed, so batching does not change it.

    `words` are those of the adapters that are to act only where these are looked at (`keep_background`).
    """
    family, side = family_of(pipe), sampling.resolution or bases.native_resolution(pipe)
    height, width = sampling.size or (side, side)
    for start in range(0, len(drawings), sampling.batch_size):
        batch = drawings[start : start + sampling.batch_size]
        subtracted = sampling.negative_prompt or family.nothing
        away = [] if subtracted is None else [subtracted] * len(batch)
        once = text_once() if family.same_text else nullcontext()
        call = partial(keep_background, pipe, words) if words else pipe
        with once:
            drawn = call(
                prompt=[drawing.prompt for drawing in batch],
                **(family.negative(pipe, away) if away else {}),
                height=height,
                width=width,
                **family.drawing(pipe),
                num_inference_steps=sampling.num_inference_steps,
                **family.guided(sampling.guidance_scale),
                # on the CPU, so that a seed means the same picture on every device
                generator=[torch.Generator("cpu").manual_seed(drawing.seed) for drawing in batch],
            )
        yield from drawn.images


def data_uri(path: Path, most_bytes: int = 15_000) -> str:
    """A picture as a small JPEG in the form that headers hold pictures in; with base64 it is a third longer."""
    with Image.open(path) as opened:
        small = opened.convert("RGB")
    small.thumbnail((256, 256))
    for quality in (90, 75, 60, 40, 20):
        content = io.BytesIO()
        small.save(content, "JPEG", quality=quality)
        if content.tell() <= most_bytes:
            break
    return "data:image/jpeg;base64," + base64.b64encode(content.getvalue()).decode()


def save_png(picture: Image.Image, path: Path, made_by: dict, keep: bool = False) -> Path:
    """Write a PNG whose text chunks say what made it: `parameters` as other tools read it, `comcat` all of it as JSON.

    Returns where it is: with `keep`, a picture of that name that is another one stays, and this one gets a number.
    """
    info = PngInfo()
    if told := infotext(made_by, picture.size):
        info.add_text("parameters", told)
    info.add_text("comcat", json.dumps(made_by, sort_keys=True))
    content = io.BytesIO()
    picture.save(content, "PNG", pnginfo=info)
    number, wanted = 1, path
    while keep and path.exists() and path.read_bytes() != content.getvalue():
        number += 1
        path = wanted.with_stem(f"{wanted.stem}-{number}")
    atomic.write_bytes(path, content.getvalue())
    return path


def slug(prompt: str) -> str:
    """A prompt as part of a file's name."""
    kept = "".join(letter if letter.isalnum() else "-" for letter in prompt.lower())
    return "-".join(part for part in kept.split("-") if part)[:60].rstrip("-")
