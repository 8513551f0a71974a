"""Everything that a picture and its prompt mean to the U-Net, computed once; the encoders are not needed again.

Letters: P pictures (crops), C latent channels, h x w latent size, M context tokens, E width of the text states.
"""

from dataclasses import dataclass

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline


@dataclass(frozen=True)
class Encoded:
    """The training set in latents: the posterior of every crop, what it is called, and where it came from."""

    mean: torch.Tensor  # P, C, h, w, already times the VAE's scaling factor
    std: torch.Tensor  # P, C, h, w, likewise
    context: torch.Tensor  # P, M, E
    names: tuple[str, ...]  # P names for messages

    def __len__(self) -> int:
        return len(self.names)

    def latents(self, chosen: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """A sample from the posteriors of the chosen crops: (B, C, h, w)."""
        noise = torch.randn(self.mean[chosen].shape, generator=generator)
        return self.mean[chosen] + self.std[chosen] * noise


@torch.no_grad()
def posterior(vae: AutoencoderKL, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and std of the latents of (P, 3, H, W) pixels, scaled as the U-Net wants them, float32 on the CPU."""
    shift, factor = getattr(vae.config, "shift_factor", None) or 0.0, vae.config.scaling_factor
    means, stds = [], []
    for picture in pixels:  # one at a time: the peak memory does not depend on how many pictures there are
        found = vae.encode(picture[None].to(vae.device, vae.dtype)).latent_dist
        means.append(((found.mean.float() - shift) * factor).cpu())
        stds.append((found.std.float() * factor).cpu())
    return torch.cat(means), torch.cat(stds)


@torch.no_grad()
def text_states(pipe: StableDiffusionPipeline, prompt: str) -> torch.Tensor:
    """The text states of a prompt as the pipeline itself makes them: float32 (1, M, E) on the CPU."""
    states, _ = pipe.encode_prompt(prompt, pipe.device, 1, do_classifier_free_guidance=False)
    return states.float().cpu()


def prompt_tokens(pipe: StableDiffusionPipeline, prompt: str) -> tuple[int, int]:
    """(tokens of the prompt, tokens that fit), begin and end included."""
    tokens = pipe.tokenizer(prompt, truncation=False, verbose=False).input_ids
    return len(tokens), pipe.tokenizer.model_max_length
