"""The pipeline's side of a trigger: every prompt that it encodes is remembered with its text states."""

import functools
import inspect
import weakref
from collections.abc import Callable, Sequence

from diffusers import DiffusionPipeline

from comcat_diffusion.adapters.gate import Gate
from comcat_diffusion.adapters.model import side_cars
from comcat_diffusion.adapters.parts import denoiser
from comcat_diffusion.adapters.texts import States, Texts, texts_of
from comcat_diffusion.families.family import Family
from comcat_diffusion.families.known import known_family


def listen(pipe: DiffusionPipeline) -> None:
    """Let adapters that wait for a trigger know what this pipeline's prompts say. Calling it twice does no harm.

    `load_adapter` calls it; do so after `add_adapter` with a trigger, and with another pipeline of the same parts, of
    which threads may have one each. Of SDXL's two prompts the first is looked at, and text encoders wait for nothing.
    Raises ValueError for what encodes no prompts.
    """
    waiting = [layer for layer in side_cars(denoiser(pipe)).values() if any(layer.trigger.values())]
    if not waiting:
        return
    if not hasattr(pipe, "encode_prompt"):
        raise ValueError("An adapter that waits for its trigger needs a pipeline that encodes prompts.")
    gate = next((layer.gate for layer in waiting if layer.gate is not None), None) or Gate(pipe.tokenizer)
    gate.triggers |= {words for layer in waiting for words in layer.trigger.values() if words}
    gate.follow(denoiser(pipe), waiting)
    texts = _texts_of(pipe)
    if texts.whole_of(pipe.tokenizer):  # else its text encoder alone does not make the states
        gate.hear(pipe.text_encoder)
    for layer in waiting:
        layer.gate = gate
    encode_prompt = type(pipe).encode_prompt.__get__(pipe)
    pipe.encode_prompt = _remembering(pipe, encode_prompt, texts)
    pipe.comcat_gate = gate
    gate.pipes.add(pipe)


def stop_listening(pipe: object) -> None:
    """Undo `listen`; without adapters that wait there is nothing to know."""
    if hasattr(pipe, "comcat_gate"):
        pipe.comcat_gate.stop()


def remember_prompts(pipe: DiffusionPipeline, prompt_embeds: States, prompts: str | Sequence[str]) -> None:
    """Say which prompts text states (B, M, E) are of that were made outside of the pipeline: interpolated, or changed.

    Z-Image's are a list of (M, E). An adapter then acts on them from its trigger on, as if the pipeline had made them
    of these prompts. States that the pipeline or its text encoder has made are known anyhow, also in another precision
    or with single words weighted. Raises ValueError unless there is one prompt for each.
    """
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    if len(prompt_embeds) != len(prompts) or any(one.ndim != 2 for one in prompt_embeds):
        shape = tuple(getattr(prompt_embeds, "shape", (len(prompt_embeds),)))
        raise ValueError(
            f"prompt_embeds of shape {shape} for {len(prompts)} prompts: give one (M, E) block of "
            "text states for each prompt."
        )
    # A pipeline that listens may have given its text encoders away since, by which a family tells how it reads.
    texts = texts_of(pipe.tokenizer) if hasattr(pipe, "comcat_gate") else _texts_of(pipe)
    texts.remember(prompt_embeds, prompts)


def _texts_of(pipe: DiffusionPipeline) -> Texts:
    family = known_family(pipe)
    return texts_of(pipe.tokenizer, family.reading(pipe) if family else None)


def _remembering(pipe: DiffusionPipeline, encode_prompt: Callable, texts: Texts) -> Callable:
    """A pipeline's `encode_prompt` that also remembers, one thread at a time where they share a tokenizer."""

    family, known = known_family(pipe) or Family(), weakref.ref(pipe)

    @functools.wraps(encode_prompt)
    def encode(*args: object, **kwargs: object) -> tuple:
        given = inspect.signature(encode_prompt).bind(*args, **kwargs).arguments
        given = {n: list(value) if isinstance(value, list) else value for n, value in given.items()}  # Z-Image writes
        with texts.lock:
            made = encode_prompt(*args, **kwargs)
            for place, name in zip(family.states_at, ("prompt", "negative_prompt"), strict=False):
                states = made[place]
                if states is not None and given.get(f"{name}_embeds") is None:
                    said = given.get(name) or ""
                    said = [said] if isinstance(said, str) else said
                    read = [family.said(known(), text, given, name != "prompt") for text in said]
                    read = [text for text in read for _ in range(len(states) // len(said))]
                    texts.remember(states, read, prepared=True)
        return made

    return encode
