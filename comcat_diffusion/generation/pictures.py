"""Drawing: prompts x seeds in batches, every picture from its own seed; and writing them with what made them."""

import base64
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from comcat_diffusion import atomic


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


def draw(pipe: StableDiffusionPipeline, drawings: list[Drawing], sampling: Sampling) -> Iterator[Image.Image]:
    """Yield the pictures in order. All noise of a picture comes from its seed, so batching does not change it."""
    for start in range(0, len(drawings), sampling.batch_size):
        batch = drawings[start : start + sampling.batch_size]
        negative = [sampling.negative_prompt] * len(batch) if sampling.negative_prompt else None
        yield from pipe(
            prompt=[drawing.prompt for drawing in batch],
            negative_prompt=negative,
            height=sampling.resolution,
            width=sampling.resolution,
            num_inference_steps=sampling.num_inference_steps,
            guidance_scale=sampling.guidance_scale,
            # on the CPU, so that a seed means the same picture on every device
            generator=[torch.Generator("cpu").manual_seed(drawing.seed) for drawing in batch],
        ).images


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


def save_png(picture: Image.Image, path: Path, made_by: dict) -> None:
    """Write a PNG whose text chunks say what made it: `parameters` for people, `comcat` as JSON for programs."""
    info = PngInfo()
    info.add_text("parameters", f"{made_by.get('prompt', '')}\nSeed: {made_by.get('seed', '')}")
    info.add_text("comcat", json.dumps(made_by, sort_keys=True))
    content = io.BytesIO()
    picture.save(content, "PNG", pnginfo=info)
    atomic.write_bytes(path, content.getvalue())
