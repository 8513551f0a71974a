"""The pipeline's side of a trigger: every prompt that it encodes is remembered with its text states."""

import functools
import inspect
from collections.abc import Callable

from diffusers import DiffusionPipeline

from comcat_diffusion.adapters.gate import Gate
from comcat_diffusion.adapters.model import adapted_layers
from comcat_diffusion.adapters.parts import denoiser


def listen(pipe: DiffusionPipeline) -> None:
    """Let adapters that wait for a trigger know what this pipeline's prompts say. Calling it twice does no harm.

    `load_adapter` calls it; do so after `add_adapter` with a trigger, and with another pipeline of the same parts. Of
    SDXL's two prompts the first is looked at, and text encoders wait for nothing. Raises ValueError for what encodes no
    prompts.
    """
    waiting = [layer for layer in adapted_layers(denoiser(pipe)).values() if any(layer.trigger.values())]
    if not waiting:
        return
    if not hasattr(pipe, "encode_prompt"):
        raise ValueError("An adapter that waits for its trigger needs a pipeline that encodes prompts.")
    gate = next((layer.gate for layer in waiting if layer.gate is not None), None)
    if gate is None:
        gate = Gate(pipe.tokenizer)
        denoiser(pipe).register_forward_pre_hook(gate.look, with_kwargs=True)
    for layer in waiting:
        layer.gate = gate
    pipe.encode_prompt = _remembering(type(pipe).encode_prompt.__get__(pipe), gate)
    pipe.comcat_gate = gate


def stop_listening(pipe: object) -> None:
    """Undo `listen`; without adapters that wait there is nothing to know."""
    if hasattr(pipe, "comcat_gate"):
        hooks = denoiser(pipe)._forward_pre_hooks
        for number in [n for n, hook in hooks.items() if hook == pipe.comcat_gate.look]:
            del hooks[number]
        del pipe.comcat_gate, pipe.encode_prompt


def _remembering(encode_prompt: Callable, gate: Gate) -> Callable:
    """A pipeline's `encode_prompt` that also tells the gate."""

    @functools.wraps(encode_prompt)
    def encode(*args: object, **kwargs: object) -> tuple:
        made = encode_prompt(*args, **kwargs)
        given = inspect.signature(encode_prompt).bind(*args, **kwargs).arguments
        for states, name in zip(made[:2], ("prompt", "negative_prompt"), strict=True):
            if states is not None and given.get(f"{name}_embeds") is None:
                said = given.get(name) or ""
                texts = [said] if isinstance(said, str) else said
                gate.remember(states, [text for text in texts for _ in range(len(states) // len(texts))])
        return made

    return encode
