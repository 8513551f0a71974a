"""Where in a picture a base looks at words: what its own attentions say, with no adapter in the way.

A U-Net's cross-attentions on the way up look at a thing's words from where the thing is (docs/log.md, 2026-11-28), also
at words that it hardly knows; so do a transformer's attentions over picture and text together, all of them (asking.py;
docs/log.md, 2026-11-29). So

    looks = mean over those attentions and their heads of sum_j softmax(q k^T / sqrt(D))_j        j: tokens of the words

is high on the subject and low around it. Masks are made of it (training/outline.py, evaluation), and in drawing the
places whose prediction is an adapter's (focus.py, comfy/places.py):

    w = clamp((r - LOW) / (HIGH - LOW), 0, 1)        r = (looks - min) / (max - min), of the mean over the steps

where minimum and maximum are over the places of one picture: words that a base hardly knows it looks at from everywhere
a little.

Letters: B batch, P pictures, N = h*w tokens of one attention, M context tokens, H heads, D head width, C channels.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn
from torch.nn.functional import adaptive_avg_pool2d, interpolate, max_pool2d
from torch.nn.utils.rnn import pad_sequence

from comcat_diffusion.adapters import seam
from comcat_diffusion.adapters.asking import asked, shares_softmax
from comcat_diffusion.adapters.call import given
from comcat_diffusion.adapters.regions import grid_of
from comcat_diffusion.attentions import style_of
from comcat_diffusion.families.known import family_of_model
from comcat_diffusion.heads import split_heads
from comcat_diffusion.words import says_more

WAY_UP = "up_blocks."
LOW, HIGH = 0.1, 0.4  # of r: below the one nothing of an adapter is seen, above the other all
TOKENS_LOW, TOKENS_HIGH = 0.2, 0.5  # the same of a transformer, whose words are looked at a little from everywhere


def on_the_way_up(attentions: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Those of a denoiser's attentions that look at words from where the things are: none, but in a U-Net."""
    found = ((name, module) for name, module in attentions.items() if name.startswith(WAY_UP))
    return {name: module for name, module in found if seam.is_cross_attention(module)}


def looking_among(attentions: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Those that show where words are looked at, also of a transformer, whose picture and text share one softmax."""
    joint = {name: module for name, module in attentions.items() if shares_softmax(module)}
    return joint or on_the_way_up(attentions)


def that_look(denoiser: nn.Module) -> list[nn.Module]:
    """The attentions of a bare denoiser that show where it looks at words."""
    modules = {name: module for name, module in denoiser.named_modules() if style_of(module) is not None}
    carries = family_of_model(denoiser).carries  # blocks before, of the picture or the text alone, carry nothing
    return list(
        looking_among({name: own for name, own in modules.items() if re.fullmatch(carries or ".*", name)}).values()
    )


def look(
    attention: nn.Module,
    args: tuple,
    kwargs: Mapping[str, object],
    of_words: torch.Tensor,
    latent: tuple[int, int],
    words_at: Sequence[int] = (),
) -> torch.Tensor:
    """See `looks`, of an attention of either kind by what it is called with."""
    if shares_softmax(attention):
        return asked(attention, args, kwargs, of_words, latent, words_at)
    text = kwargs["encoder_hidden_states"] if "encoder_hidden_states" in kwargs else args[1]
    return looks(attention, args[0] if args else kwargs["hidden_states"], text, of_words, latent)


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


@dataclass(frozen=True)
class Called:
    """What B texts say of an adapter's subject."""

    of_words: torch.Tensor  # (B, M), one for the tokens of its words, else zero
    bare: torch.Tensor  # (B,) of bool: it is named, and nothing is asked for around it

    def asks(self) -> bool:
        """Whether a text names it and says more."""
        return bool((self.of_words.any(1) & ~self.bare).any())


def called_in(said: Sequence[Said], words: Mapping[str, Sequence[str]]) -> dict[str, Called]:
    """The same of texts that are as long as each other, by the words that adapters are called by."""
    found = {}
    for name, own in words.items():
        of_words = pad_sequence([one.within(own) for one in said], batch_first=True)  # some are lists of own lengths
        more = torch.tensor([says_more(one.text, own) for one in said])
        found[name] = Called(of_words, of_words.any(1) & ~more)
    return found


class Looked:
    """How much an adapter's words were looked at in pictures that are drawn together, pass after pass."""

    def __init__(self) -> None:
        self.rows: list[tuple[int, torch.Tensor, bool]] = []  # of a text that has the words: (1, h, w), and if bare

    def note(self, looked: torch.Tensor, called: Called) -> None:
        """By each of B texts of one pass, (B, 1, h, w)."""
        for row in called.of_words.any(1).nonzero().flatten().tolist():
            self.rows.append((row, looked[row], bool(called.bare[row])))

    def at(self, count: int) -> torch.Tensor:
        """Where in so many pictures, see `places`. Of B texts number i is of picture i mod P."""
        maps: list[list[torch.Tensor]] = [[] for _ in range(count)]
        bare = torch.zeros(count, dtype=torch.bool)
        for row, looked, alone in self.rows:
            maps[row % count].append(looked)
            bare[row % count] |= alone
        return places(maps, bare)


def places(maps: Sequence[Sequence[torch.Tensor]], bare: torch.Tensor) -> torch.Tensor:
    """Where in each of P pictures words were looked at, r, (P, 1, h, w), by how much each step did, (1, h, w).

    It is zero where none did, and one all over a picture of `bare`, (P,) of bool, whose prompt says nothing else: that
    asks for no background that could be kept, and the one that a base makes up from its noise is none that the subject
    was learned on.
    """
    like = next(one[0] for one in maps if one)
    looked = torch.stack([torch.stack(list(one)).mean(0) if one else torch.zeros_like(like) for one in maps])
    least, most = looked.amin((1, 2, 3), keepdim=True), looked.amax((1, 2, 3), keepdim=True)
    share = (looked - least) / (most - least).clamp(min=1e-8)
    return torch.where(bare.to(share.device).view(-1, 1, 1, 1), 1.0, share)


def weights_of(seen: torch.Tensor, of_tokens: bool = False) -> torch.Tensor:
    """How much an adapter acts at each place, w, by where its words were looked at, r; both (B, 1, h, w).

    Of a transformer's tokens, of which the edge of what the base has drawn there takes a part, those above, below and
    beside count as much: else ends of the base's own thing are left beside the subject (docs/log.md, 2026-11-29).
    """
    if not of_tokens:
        return _between(seen, LOW, HIGH)
    weights = _between(seen, TOKENS_LOW, TOKENS_HIGH)
    return torch.maximum(max_pool2d(weights, (3, 1), 1, (1, 0)), max_pool2d(weights, (1, 3), 1, (0, 1)))


def _between(seen: torch.Tensor, low: float, high: float) -> torch.Tensor:
    return ((seen - low) / (high - low)).clamp(0, 1)


def spread(
    base: torch.Tensor | list[torch.Tensor], made: torch.Tensor | list[torch.Tensor], weights: torch.Tensor
) -> torch.Tensor | list[torch.Tensor]:
    """base + w (made - base), of predictions by their places, w (B, 1, h, w).

    A prediction is of latents that are one token or several, (B, C, H, W), of tokens, (B, h*w, C), or of films of one
    frame, (B, C, 1, H, W) or a list of (C, 1, H, W). Raises ValueError for one of other tokens.
    """
    if isinstance(base, list):
        return [spread(*pair, own) for *pair, own in zip(base, made, weights, strict=True)]
    if base.ndim == 3:
        weights = weights.flatten(2).mT
        fits = weights.shape[1] == base.shape[1]
    else:
        for side in (-2, -1):
            factor = -(-base.shape[side] // weights.shape[side])
            weights = weights.repeat_interleave(factor, side).narrow(side, 0, base.shape[side])
        weights, fits = weights.unsqueeze(2) if base.ndim == 5 else weights, True
    if not fits:
        raise ValueError("What is predicted has other places than the picture, so no background can be kept there.")
    return torch.lerp(base, made, weights.to(base))


def divided(seen: Mapping[str, torch.Tensor], grid: tuple[int, int]) -> dict[str, torch.Tensor]:
    """Shares, (B, N, 1) and one in sum, of adapters in each place of an attention, by r of each, (B, 1, h, w)."""
    found = {name: adaptive_avg_pool2d(one, grid).flatten(1).unsqueeze(-1) for name, one in seen.items()}
    all_of_it = sum(found.values()).clamp(min=1e-8)
    return {name: one / all_of_it for name, one in found.items()}


@contextmanager
def watched(denoiser: nn.Module, of_words: torch.Tensor) -> Iterator[list[torch.Tensor]]:
    """In this block, every forward of a bare denoiser leaves in the list how much it looks at words, see `looks`.

    The list stays empty where no attention shows it.
    """
    seen: list[torch.Tensor] = []
    pass_: dict[str, tuple] = {}

    def begin(model: nn.Module, args: tuple, kwargs: dict) -> None:
        family, call = family_of_model(model), given(model, args, kwargs)
        pass_.update(latent=family.size(call), words_at=family.words_at(call))

    def see(attention: nn.Module, args: tuple, kwargs: dict) -> None:
        seen.append(look(attention, args, kwargs, of_words, **pass_))

    hooks = [denoiser.register_forward_pre_hook(begin, with_kwargs=True)]
    hooks += [module.register_forward_pre_hook(see, with_kwargs=True) for module in that_look(denoiser)]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()
