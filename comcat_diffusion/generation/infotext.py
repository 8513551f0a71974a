"""What a picture says of how it was made in the words that A1111, Civitai and ComfyUI's galleries look for.

Two or three lines of a PNG's `parameters`: the prompt, the negative prompt where there is one, and pairs of a name and
a value between commas. A value that would end its pair too early stands as a JSON string.
"""

import json
from collections.abc import Mapping

_ENDS = (",", ":", '"', "\\")  # which a bare value must not hold
# Samplers of diffusers whose steps are those of one of A1111's; any other keeps its own name.
_SAMPLERS = {
    "DDIMScheduler": "DDIM",
    "DDPMScheduler": "DDPM",
    "EulerAncestralDiscreteScheduler": "Euler a",
    "EulerDiscreteScheduler": "Euler",
    "HeunDiscreteScheduler": "Heun",
    "KDPM2AncestralDiscreteScheduler": "DPM2 a",
    "KDPM2DiscreteScheduler": "DPM2",
    "LCMScheduler": "LCM",
    "LMSDiscreteScheduler": "LMS",
    "PNDMScheduler": "PLMS",
    "UniPCMultistepScheduler": "UniPC",
}
_SIGMAS = {"use_karras_sigmas": "Karras", "use_exponential_sigmas": "Exponential", "use_beta_sigmas": "Beta"}


def sampler_name(kind: str, config: Mapping[str, object]) -> str:
    """A1111's name of a scheduler of diffusers, by its class and its configuration."""
    name = _SAMPLERS.get(kind) or _solver_name(kind, config) or kind.removesuffix("Scheduler")
    spacing = next((f" {told}" for flag, told in _SIGMAS.items() if config.get(flag)), "")
    return name + spacing


def _solver_name(kind: str, config: Mapping[str, object]) -> str | None:
    algorithm, order = config.get("algorithm_type"), config.get("solver_order")
    if kind == "DPMSolverMultistepScheduler" and algorithm in ("dpmsolver++", "sde-dpmsolver++"):
        return f"DPM++ {order}M" + (" SDE" if algorithm.startswith("sde") else "")
    sde = kind == "DPMSolverSinglestepScheduler" and algorithm == "sde-dpmsolver++"
    return "DPM++ SDE" if sde or kind == "DPMSolverSDEScheduler" else None


def infotext(made_by: Mapping[str, object], size: tuple[int, int]) -> str:
    """The text for what `made_by` knows, whose names are those of the `comcat` chunk; empty if it knows no prompt.

    `size` is the picture's, width and height; a sheet, which has no seed of its own, is no picture in this respect.
    """
    if "prompt" not in made_by:
        return ""
    lines = [_one_line(made_by["prompt"])]
    if made_by.get("negative_prompt"):
        lines.append(f"Negative prompt: {_one_line(made_by['negative_prompt'])}")
    named = {
        "Steps": made_by.get("num_inference_steps"),
        "Sampler": made_by.get("sampler"),
        "CFG scale": made_by.get("guidance_scale"),
        "Seed": made_by.get("seed"),
        "Size": "{}x{}".format(*size) if "seed" in made_by else None,
        "Model": made_by.get("base"),
        "COMCAT": " ".join(f"{one['file']}:{one['scale']:g}" for one in made_by.get("adapters", ())) or None,
        "LoRA": " ".join(made_by.get("loras", ())) or None,
    }
    lines.append(", ".join(f"{name}: {_value(value)}" for name, value in named.items() if value is not None))
    return "\n".join(lines)


def _one_line(prompt: str) -> str:
    """A prompt as one line that is not taken for another one; a tokenizer of CLIP reads the same of it."""
    line = " ".join(prompt.split())
    return line[:1].lower() + line[1:] if line.startswith("Negative prompt:") else line


def _value(value: object) -> str:
    text = f"{value:g}" if isinstance(value, float) else str(value)
    bare = text.isprintable() and text == text.strip() and not any(end in text for end in _ENDS)
    return text if bare else json.dumps(text, ensure_ascii=not text.isprintable())
