"""Where in a picture a base looks at words: what its own cross-attentions say, with no adapter in the way.

A U-Net's cross-attentions on the way up look at a thing's words from where the thing is (docs/log.md, 2026-11-28), also
at words that it hardly knows. So

    looks = mean over those attentions and their heads of sum_j softmax(q k^T / sqrt(D))_j        j: tokens of the words

is high on the subject and low around it. Masks are made of it (training/outline.py, evaluation), and in drawing the
places whose prediction is an adapter's (focus.py, comfy/places.py):

    w = clamp((r - LOW) / (HIGH - LOW), 0, 1)        r = looks / max over places of it, a mean over the steps so far

A mean, since a base that has no word for a thing looks at its words from everywhere once the thing is drawn.

Letters: B batch, N = h*w tokens of one attention, M context tokens, H heads, D head width, C channels.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import nn
from torch.nn.functional import adaptive_avg_pool2d, interpolate

from comcat_diffusion.adapters import seam
from comcat_diffusion.adapters.regions import grid_of
from comcat_diffusion.attentions import style_of
from comcat_diffusion.heads import split_heads
from comcat_diffusion.words import says_more

WAY_UP = "up_blocks."
LOW, HIGH = 0.15, 0.4  # of the place that looks most: below the one nothing of an adapter is seen, above the other all


def on_the_way_up(attentions: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Those of a denoiser's attentions that look at words from where the things are: none, but in a U-Net."""
    found = ((name, module) for name, module in attentions.items() if name.startswith(WAY_UP))
    return {name: module for name, module in found if seam.is_cross_attention(module)}


def that_look(denoiser: nn.Module) -> list[nn.Module]:
    """The attentions of a bare denoiser that show where it looks at words."""
    modules = {name: module for name, module in denoiser.named_modules() if style_of(module) is not None}
    return list(on_the_way_up(modules).values())


@torch.no_grad()
def looks(
    attention: nn.Module, hidden: torch.Tensor, text: torch.Tensor, of_words: torch.Tensor, latent: tuple[int, int]
) -> torch.Tensor:
    """How much each place looks at words, 0 to 1: (B, 1, h, w) of the latents' size `latent`.

    hidden (B, N, C) and text (B, M, C') are the attention's, `of_words` (B, M) is one for the words' tokens, else zero.
    Raises ValueError if N tokens are no level of the latents.
    """
    style = style_of(attention)
    q, k, _, _ = style.projections(attention)
    return looks_of(q(hidden), k(text), style.head_count(attention), of_words, latent)


def looks_of(
    query: torch.Tensor, key: torch.Tensor, heads: int, of_words: torch.Tensor, latent: tuple[int, int]
) -> torch.Tensor:
    """The same of the base's queries (B, N, H*D) and keys (B, M, H*D), whoever's attention they are of."""
    query, key = (split_heads(made, heads).transpose(1, 2) for made in (query, key))  # B, H, N, D and B, H, M, D
    attended = (query @ key.mT * query.shape[-1] ** -0.5).softmax(-1).mean(1)  # B, N, M
    looked = attended @ of_words.to(attended).unsqueeze(-1)  # B, N, 1
    grid = grid_of(latent, query.shape[2])
    looked = looked.unflatten(1, grid).movedim(-1, 1)
    return interpolate(looked.float(), size=latent, mode="bilinear", align_corners=False)


class Said(Protocol):
    """A prompt as text encoders have read it; that of diffusers is in texts.py, that of ComfyUI in comfy/text.py."""

    text: str

    def within(self, words: Sequence[str]) -> torch.Tensor:
        """(M,) of bool: the tokens of these words alone."""


def placing(said: Said, words: Sequence[str]) -> torch.Tensor:
    """(M,) of bool: the tokens by which the place of these words' subject is found, if the prompt has any of them.

    All of them, to which every place looks alike, where the prompt says nothing else: it asks for no background then
    that could be kept, and the one that a base makes up from its noise is none that the subject was learned on.
    """
    found = said.within(words)
    return found if says_more(said.text, words) else torch.ones_like(found) & found.any()


class Course:
    """Where in the pictures of one drawing words were looked at, r, step by step."""

    def __init__(self) -> None:
        self._noise: float | None = None  # timestep, or sigma, of the last step
        self._count, self._means = 0, {}

    def step(self, noise: float | None, seen: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The mean of r of the steps so far, (B, 1, h, w) by adapter, the one with these looks included.

        Where there is no less noise than before another drawing begins, or a step is taken twice, and then it begins
        anew; so it does where nobody tells the noise.
        """
        begins = self._noise is None or noise is None or noise >= self._noise
        if begins or {name: one.shape for name, one in seen.items()} != {n: m.shape for n, m in self._means.items()}:
            self._count, self._means = 0, {}
        self._noise, self._count = noise, self._count + 1
        for name, one in seen.items():
            share = one / one.amax(dim=(1, 2, 3), keepdim=True).clamp(min=1e-8)
            self._means[name] = torch.lerp(self._means.get(name, share), share, 1 / self._count)
        return dict(self._means)


def weights_of(seen: torch.Tensor) -> torch.Tensor:
    """How much an adapter acts at each place, w, by where its words were looked at, r; both (B, 1, h, w)."""
    return ((seen - LOW) / (HIGH - LOW)).clamp(0, 1)


def divided(
    seen: Mapping[str, torch.Tensor], grid: tuple[int, int], masked: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Shares, (B, N, 1) and one in sum, of adapters in each place of an attention, by r of each, (B, 1, h, w).

    An adapter with a mask, (N, 1), has its share of that.
    """
    found = {name: adaptive_avg_pool2d(one, grid).flatten(1).unsqueeze(-1) for name, one in seen.items()}
    all_of_it = sum(found.values()).clamp(min=1e-8)
    return {name: one / all_of_it * masked.get(name, 1) for name, one in found.items()}


@contextmanager
def watched(denoiser: nn.Module, of_words: torch.Tensor, latent: tuple[int, int]) -> Iterator[list[torch.Tensor]]:
    """In this block, every forward of a bare denoiser leaves in the list how much it looks at words, see `looks`.

    The list stays empty where no attention shows it.
    """
    seen: list[torch.Tensor] = []

    def see(attention: nn.Module, args: tuple, kwargs: dict) -> None:
        text = kwargs["encoder_hidden_states"] if "encoder_hidden_states" in kwargs else args[1]
        seen.append(looks(attention, args[0] if args else kwargs["hidden_states"], text, of_words, latent))

    hooks = [module.register_forward_pre_hook(see, with_kwargs=True) for module in that_look(denoiser)]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()
