"""What is trained: the denoiser, and the text that it listens to, as one module that Accelerate can wrap.

Letters: B batch, C latent channels, M context tokens, E width of the text states.
"""

from collections.abc import Iterable

import torch
from diffusers import DiffusionPipeline
from torch import nn

from comcat_diffusion.adapters.gate import Gate
from comcat_diffusion.families.family import Condition, moved
from comcat_diffusion.families.known import family_of


class Learner(nn.Module):
    """Predicts from noisy latents and prompts. The text is encoded once, or, if it is trained, at every step.

    Once means on `device`, where the encoders stand for that while only; default: where they are.
    """

    def __init__(
        self, pipe: DiffusionPipeline, prompts: Iterable[str], train_text: bool, device: torch.device | None = None
    ):
        super().__init__()
        self.family = family_of(pipe)
        self.denoiser = getattr(pipe, self.family.part)
        self.encoders = nn.ModuleDict(self.family.encoders(pipe) if train_text else {})
        self._pipe = pipe
        self._known: dict[str, Condition] = {}
        if not train_text:
            self._known = read(pipe, prompts, device)

    def forward(
        self, noisy: torch.Tensor, timesteps: torch.Tensor, prompts: list[str], frames: torch.Tensor
    ) -> torch.Tensor:
        """(B, C, h, w) latents, (B,) timesteps, B prompts and their (B, 6) frames -> (B, C, h, w)."""
        condition = self.condition(prompts, noisy.device)
        if self.gate is not None:
            self.gate.tell(condition["states"], prompts)
        return self.family.predict(self.denoiser, noisy, timesteps, condition, frames)

    @property
    def gate(self) -> Gate | None:
        """What tells adapters that wait for their trigger where it stands, if there are any."""
        return getattr(self._pipe, "comcat_gate", None)

    def condition(self, prompts: list[str], device: torch.device) -> Condition:
        """What the denoiser hears of prompts that were named at the start, or, if text is trained, of any."""
        if self.encoders:
            return self.family.encode(self._pipe, prompts)
        known, dtype = [self._known[prompt] for prompt in prompts], self.denoiser.dtype
        return {name: moved(part, device, dtype) for name, part in self.family.together(known).items()}


@torch.no_grad()
def read(pipe: DiffusionPipeline, prompts: Iterable[str], device: torch.device | None = None) -> dict[str, Condition]:
    """What the denoiser hears of every prompt, on the CPU; text encoders are on `device` for as long as they read."""
    family = family_of(pipe)
    homes = [(encoder, encoder.device) for encoder in family.encoders(pipe).values()]
    for encoder, home in homes:
        encoder.to(device or home)
    found = {prompt: _first(family.encode(pipe, [prompt])) for prompt in dict.fromkeys(prompts)}
    for encoder, home in homes:
        encoder.to(home)
    return found


def _first(condition: Condition) -> Condition:
    return {name: part[0].float().cpu() for name, part in condition.items()}
