"""Adapters put on a `ModelPatcher`: object patches, which ComfyUI sets and takes back itself.

Letters: B batch, M context tokens, T triggers, P adapters that are placed.
"""

import logging

import torch
from torch import nn
from torch.nn.functional import pad

from comcat_diffusion.comfy.attended import Attended
from comcat_diffusion.comfy.beside import Beside, passing
from comcat_diffusion.comfy.blocks import block_of
from comcat_diffusion.comfy.convolved import Convolved
from comcat_diffusion.comfy.fed import Fed
from comcat_diffusion.comfy.guests import Guests, OfGuests
from comcat_diffusion.comfy.places import OUTER_SAMPLE, PLACES, Twice
from comcat_diffusion.comfy.sharing import PICTURE, Picture, masked_shares
from comcat_diffusion.comfy.text import SAID, Said

_UNET = "diffusion_model"


def seated(patcher: object, guests: Guests) -> object:
    """A clone of a `ModelPatcher` with these adapters, and no others; the one that is given stays as it is.

    Raises ValueError if another node has put a forward of its own in the place of one that adapters act in.
    """
    made = patcher.clone()
    model, patches = made.model, made.object_patches
    for name in [name for name, patch in patches.items() if isinstance(patch, OfGuests)]:
        ours = patches.pop(name)
        if ours.foreign is not None:
            patches[name] = ours.foreign
    attended = {name: block_of(name) or (name, Attended) for guest in guests.all for name in guest.attentions}
    beside = {name: (name, _beside(model.get_submodule(name))) for guest in guests.all for name in guest.waits_beside}
    for place, kind in dict.fromkeys((attended | beside).values()):
        there = patches.get(f"{place}.forward")
        if there is not None and not isinstance(there, OfGuests):
            raise ValueError(f"Another node has changed {place} already: load the COMCAT adapter before it.")
        if there is None:
            made.add_object_patch(f"{place}.forward", kind(guests, place, model.get_submodule(place)))
    if hasattr(model, _UNET):
        for name, kind, owner in (
            ("extra_conds", _Conditions, model),
            (f"{_UNET}.forward", _Passed, getattr(model, _UNET)),
        ):
            if hasattr(type(owner), kind.own):  # Forge has no extra_conds, see comfy/forge.py
                made.add_object_patch(name, kind(guests, owner, patches.get(name)))
        if hasattr(made, "add_wrapper_with_key"):  # Forge has none
            made.remove_wrappers_with_key(OUTER_SAMPLE, PLACES)
            if guests.placed:
                made.add_wrapper_with_key(OUTER_SAMPLE, PLACES, Twice(guests.asks, guests.of_tokens))
    return made


def _beside(host: nn.Module) -> type[Beside]:
    return Convolved if isinstance(host, nn.Conv2d) else Fed


class _Conditions(OfGuests):
    """`extra_conds`: what a conditioning says goes along with its text states, row by row, however they are stacked."""

    own = "extra_conds"

    def __call__(self, **kwargs: object) -> dict:
        made = self.before(**kwargs)
        if not self.guests.triggers or kwargs.get("cross_attn") is None:
            return made
        length, said = kwargs["cross_attn"].shape[1], kwargs.get(SAID)
        if not isinstance(said, Said):
            raise ValueError(
                "This conditioning does not say what it was made of, and a COMCAT adapter waits for "
                f"'{self.guests.triggers[0][0]}': give the text encoder the CLIP that Load COMCAT adapter gives, or "
                "use COMCAT text encode."
            )
        acts = self.guests.told(said)
        if len(acts) != length:
            raise ValueError(
                f"This conditioning has {length} tokens and its text {len(acts)}, so another node has changed it: join "
                "texts with BREAK in COMCAT text encode instead."
            )
        made_length = made["c_crossattn"].cond.shape[1]
        acts = pad(acts, (0, 0, made_length - length, 0))  # FLUX.2 fills texts up before their begin
        if kwargs.get("prompt_type") == "positive":
            for words, own in zip(self.guests.triggers, acts.unbind(-1), strict=False):
                if not own.any():
                    logging.warning("COMCAT: the prompt lacks '%s', so that adapter does nothing here.", words[-1])
        cross = made["c_crossattn"]
        return made | {SAID: type(cross)(acts.unsqueeze(0).to(cross.cond.device))}


class _Passed(OfGuests):
    """The model's `forward`: hands what the texts say on to its attentions, and to what else adapters are beside."""

    own = "forward"

    def __init__(self, guests: Guests, owner: nn.Module, *foreign: object) -> None:
        super().__init__(guests, owner, *foreign)
        self.patch = owner.patch_size if guests.of_tokens else 1

    def __call__(self, *args: object, transformer_options: dict | None = None, **kwargs: object) -> torch.Tensor:
        options = dict(transformer_options or {})
        acts = kwargs.pop(SAID, None)
        taken = options.get("patches_replace", {})
        crossed = {name.rpartition(".")[2] for guest in self.guests.all for name in guest.factors}
        for kind in sorted(crossed & {kind for kind, by_block in taken.items() if by_block}):
            raise ValueError(
                f"Another node replaces the attentions ({kind}) that a COMCAT adapter is on, which would be silent: "
                "leave that node out, or the adapter."
            )
        triggers = self.guests.triggers
        columns = () if acts is None else acts.split(1, dim=-1)  # B, M, 1 each
        options[SAID] = {words: own for words, own in zip(triggers, columns, strict=False) if own.any()}
        called = {} if acts is None else self.guests.called(acts)
        latents = args[0] if args else kwargs["x"]
        if self.guests.of_tokens:
            options[PICTURE] = self._picture(latents, kwargs["context"])
        drawing = options.pop(PLACES, None)

        def run(options: dict) -> torch.Tensor:
            with passing(options, tuple(latents.shape[-2:])):
                return self.before(*args, transformer_options=options, **kwargs)

        if drawing is not None:
            return drawing.step(latents, options, called, run)
        if any(one.asks() for one in called.values()):
            raise ValueError(
                "COMCAT keep background needs ComfyUI's own sampling, as in KSampler, which it takes twice: another "
                "node samples here by itself, so leave that out, or COMCAT keep background."
            )
        return run(options)

    def _picture(self, latents: torch.Tensor, text: torch.Tensor) -> Picture:
        """What a transformer is to draw, by latents (B, C, ..., h, w) and text states (B, M, C)."""
        latent = tuple(latents.shape[-2:])
        grid = tuple(-(-side // self.patch) for side in latent)
        shares = masked_shares(self.guests.masks, latent, grid)
        return Picture(grid, text.shape[1], {name: share.to(latents) for name, share in shares.items()})
