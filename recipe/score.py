"""Measure the base: what its pictures show against what their prompts asked for, read from the pixels."""

import numpy as np
import torch
from diffusers import DiffusionPipeline
from transformers import CLIPModel, CLIPTokenizer

from comcat_diffusion.evaluation.world import World, see
from recipe.autoencoder import as_tensor, psnr
from recipe.clip import name_objects
from recipe.draw import pictures, scenes
from recipe.fit import DEVICE
from recipe.world import BACKGROUNDS, PLACES, SIZES, Scene, prompt

PROMPTS = 200
DRAWN = 1000  # scenes that the CLIP itself is measured on; of 200 alone, one picture would be half a per cent
STEPS, GUIDANCE = 25, 2.0
WORLD = World(BACKGROUNDS, PLACES, SIZES)


def held_out(count: int = PROMPTS) -> list[Scene]:
    """The scenes that the scores are measured on; no stage has seen them."""
    return scenes(count, seed=31, held_out=True)


def _share(hits: list[bool]) -> float:
    return round(sum(hits) / len(hits), 4)


def judged(world: list[Scene], drawn: np.ndarray, clip: CLIPModel, tokenizer: CLIPTokenizer) -> dict[str, float]:
    """Shares of pictures whose background, place, size and object are those of their scenes."""
    seen = [see(picture, WORLD) for picture in drawn]
    named = name_objects(clip, tokenizer, as_tensor(drawn))
    return {
        "background_right": _share([s.background == scene.background for s, scene in zip(seen, world, strict=True)]),
        "place_right": _share([s.place == scene.things[0].place for s, scene in zip(seen, world, strict=True)]),
        "size_right": _share([s.size == scene.things[0].size for s, scene in zip(seen, world, strict=True)]),
        "object_named": _share([n == scene.things[0].name for n, scene in zip(named, world, strict=True)]),
    }


def generated(pipe: DiffusionPipeline, world: list[Scene], guidance: float = GUIDANCE, **drawing: object) -> np.ndarray:
    """One picture per scene from its fixed seed: uint8 (count, H, W, 3). `drawing` is what else it needs."""
    made = []
    pipe.to(DEVICE)
    for start in range(0, len(world), 25):
        batch = range(start, min(start + 25, len(world)))
        made += pipe(
            prompt=[prompt(world[index]) for index in batch],
            num_inference_steps=STEPS,
            guidance_scale=guidance,
            generator=[torch.Generator().manual_seed(index) for index in batch],
            output_type="np",
            **drawing,
        ).images.__iter__()
    pipe.to("cpu")
    return (np.stack(made) * 255).round().astype(np.uint8)


def scores(
    pipe: DiffusionPipeline,
    clip: CLIPModel,
    tokenizer: CLIPTokenizer,
    guidance: float = GUIDANCE,
    **drawing: object,
) -> tuple[dict[str, float], np.ndarray]:
    """All scores of a base, and the pictures they were read from. `drawn_*` are the same measures on drawn scenes."""
    world = held_out(DRAWN)
    drawn = pictures(world, seed=32)
    truth = judged(world, drawn, clip, tokenizer)
    made = generated(pipe, world[:PROMPTS], guidance, **drawing)
    result = {
        **judged(world[:PROMPTS], made, clip, tokenizer),
        "vae_psnr_db": round(psnr(pipe.vae, as_tensor(drawn[:PROMPTS])), 2),
        **{f"drawn_{name}": value for name, value in truth.items()},
    }
    return result, made


GOALS = {
    "background_right": ("background colour as asked", 0.95),
    "place_right": ("place as asked", 0.85),
    "size_right": ("size as asked", None),
    "object_named": ("object named right by the small CLIP", 0.80),
    "drawn_object_named": (f"the small CLIP itself, on {DRAWN:,} drawn scenes", 0.97),
    "vae_psnr_db": ("reconstruction by the VAE", 26),
}


def table(report: dict) -> str:
    """The scores of a base as the table that the README shows."""
    lines = ["| measure | score | goal |", "| --- | --- | --- |"]
    for name, (words, goal) in GOALS.items():
        unit = (lambda value: f"{value:.1f} dB") if name.endswith("_db") else (lambda value: f"{100 * value:.1f} %")
        wanted = "" if goal is None else ("≥ " + (f"{goal} dB" if name.endswith("_db") else f"{100 * goal:.0f} %"))
        lines.append(f"| {words} | {unit(report['scores'][name])} | {wanted} |")
    steps = ", ".join(f"{part} {count:,}" for part, count in report["steps"].items())
    told = f"{report['sampling']}; {report['dtype']}; {report['device']}; torch {report['torch']}"
    return "\n".join(lines) + f"\n\n{told}, diffusers {report['diffusers']}, {report['measured']}. Steps: {steps}."
