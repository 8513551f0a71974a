"""What is trained: the U-Net, and the text that it listens to, as one module that Accelerate can wrap.

Letters: B batch, C latent channels, M context tokens, E width of the text states.
"""

from collections.abc import Iterable

import torch
from diffusers import DiffusionPipeline
from torch import nn

from comcat_diffusion.adapters.gate import Gate

TextStates = tuple[torch.Tensor, torch.Tensor | None]  # B, M, E; and SDXL's pooled text, B, E


def text_states(pipe: DiffusionPipeline, prompts: list[str]) -> TextStates:
    """The text states of prompts as the pipeline itself makes them. Gradients flow if the caller lets them."""
    device = next(iter(text_encoders(pipe).values())).device
    states, _, *pooled = pipe.encode_prompt(
        prompt=prompts, device=device, num_images_per_prompt=1, do_classifier_free_guidance=False
    )
    return states, pooled[0] if pooled else None


def text_encoders(pipe: DiffusionPipeline) -> dict[str, nn.Module]:
    """The text encoders of a pipeline by name."""
    names = ("text_encoder", "text_encoder_2")
    return {name: getattr(pipe, name) for name in names if getattr(pipe, name, None) is not None}


class Learner(nn.Module):
    """Predicts from noisy latents and prompts. The text is encoded once, or, if it is trained, at every step.

    Once means on `device`, where the encoders stand for that while only; default: where they are.
    """

    def __init__(
        self, pipe: DiffusionPipeline, prompts: Iterable[str], train_text: bool, device: torch.device | None = None
    ):
        super().__init__()
        self.unet = pipe.unet
        self.encoders = nn.ModuleDict(text_encoders(pipe) if train_text else {})
        self._pipe = pipe
        self._known: dict[str, TextStates] = {}
        if not train_text:
            self._known = _read(pipe, prompts, device)

    def forward(
        self, noisy: torch.Tensor, timesteps: torch.Tensor, prompts: list[str], frames: torch.Tensor
    ) -> torch.Tensor:
        """(B, C, h, w) latents, (B,) timesteps, B prompts and their (B, 6) frames -> (B, C, h, w)."""
        states, pooled = self.condition(prompts, noisy.device)
        if self.gate is not None:
            self.gate.tell(states, prompts)
        added = None if pooled is None else {"text_embeds": pooled, "time_ids": frames.to(pooled.dtype)}
        return self.unet(noisy, timesteps, states, added_cond_kwargs=added, return_dict=False)[0]

    @property
    def gate(self) -> Gate | None:
        """What tells adapters that wait for their trigger where it stands, if there are any."""
        return getattr(self._pipe, "comcat_gate", None)

    def condition(self, prompts: list[str], device: torch.device) -> TextStates:
        """The text states of prompts that were named at the start, or, if text is trained, of any."""
        if self.encoders:
            return text_states(self._pipe, prompts)
        states, pooled = zip(*(self._known[prompt] for prompt in prompts), strict=True)
        stacked = torch.stack(states).to(device, self.unet.dtype)  # B, M, E
        return stacked, None if pooled[0] is None else torch.stack(pooled).to(device, self.unet.dtype)


@torch.no_grad()
def _read(pipe: DiffusionPipeline, prompts: Iterable[str], device: torch.device | None) -> dict[str, TextStates]:
    """The text states of every prompt, on the CPU."""
    homes = [(encoder, encoder.device) for encoder in text_encoders(pipe).values()]
    for encoder, home in homes:
        encoder.to(device or home)
    found = {prompt: _parts(text_states(pipe, [prompt]), 0) for prompt in dict.fromkeys(prompts)}
    for encoder, home in homes:
        encoder.to(home)
    return found


def _parts(states: TextStates, index: int) -> TextStates:
    return tuple(None if part is None else part[index].float().cpu() for part in states)
