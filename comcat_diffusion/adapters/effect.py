"""What an adapter does to a denoiser, measured: what it predicts on a few pictures while these are drawn.

Another adapter, or none, is shown the very same noisy latents, so that only what is compared differs.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from comcat_diffusion.adapters.merge import layers_of, unload_adapters
from comcat_diffusion.adapters.parts import denoiser
from comcat_diffusion.adapters.store import load_adapter
from comcat_diffusion.families.known import family_of

STEPS, SEED = 4, 0  # of the sampled pictures


@torch.no_grad()
def predictions(
    pipe: object, prompts: Sequence[str], noisy: Sequence[torch.Tensor] = (), steps: int = STEPS, seed: int = SEED
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Draw prompts with a pipeline as it is: the noisy latents that its denoiser saw, and all it predicted as a vector.

    Given `noisy` latents, the denoiser is shown these instead, call by call.
    """
    seen, given = [], iter(noisy)

    def show(model: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        name = next((name for name in ("sample", "hidden_states") if name in kwargs), None)
        seen.append(next(given, args[0] if name is None else kwargs[name]))
        return ((seen[-1], *args[1:]), kwargs) if name is None else (args, kwargs | {name: seen[-1]})

    predicted = []
    model, family = denoiser(pipe), family_of(pipe)
    side = family.native(model.config, pipe.vae.config)
    hooks = [
        model.register_forward_pre_hook(show, with_kwargs=True),
        model.register_forward_hook(lambda _, args, output: predicted.append(_together(output[0]))),
    ]
    try:
        generator = torch.Generator().manual_seed(seed)
        asked = {"height": side, "width": side, **family.drawing(pipe)}
        pipe(prompt=list(prompts), num_inference_steps=steps, generator=generator, output_type="latent", **asked)
    finally:
        for hook in hooks:
            hook.remove()
    return seen, torch.cat(predicted)


def _together(predicted: torch.Tensor | list[torch.Tensor]) -> torch.Tensor:
    """What a denoiser predicts, of whose pictures some make a list, as one vector."""
    whole = torch.stack(predicted) if isinstance(predicted, list) else predicted
    return whole.double().flatten()


def change(pipe: object, adapter: str | Path, others: Sequence[str | Path], prompts: Sequence[str]) -> list[float]:
    """How far the denoiser with each of the other files is from the one with the adapter, over the adapter's effect.

    The pipeline must carry no adapter, and carries none afterwards. Raises ValueError if it does, or if the adapter
    has no effect, AdapterFileError for a damaged file or another base.
    """
    if layers_of(pipe):
        raise ValueError("The pipeline carries adapters already; measure on a freshly loaded base.")

    def with_file(path: str | Path, noisy: Sequence[torch.Tensor] = ()) -> tuple[list[torch.Tensor], torch.Tensor]:
        load_adapter(pipe, path)
        try:
            return predictions(pipe, prompts, noisy)
        finally:
            unload_adapters(pipe)

    noisy, whole = with_file(adapter)
    effect = (whole - predictions(pipe, prompts, noisy)[1]).norm()
    if effect == 0:
        raise ValueError(f"{adapter} adds nothing to its base.")
    return [float((with_file(other, noisy)[1] - whole).norm() / effect) for other in others]
