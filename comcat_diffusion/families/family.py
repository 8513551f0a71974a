"""What a family says: everything that the stories ask of a base beyond what all bases share.

What stands here is how most families do it; a page overrides what its own does otherwise.

Letters: B batch, C latent channels, h x w latent size, M context tokens, E width of the text states.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from diffusers import DiffusionPipeline
    from torch import nn
    from transformers import PreTrainedTokenizerBase

# What a denoiser hears of B prompts: "states" (B, M, E), or a list of (M, E), and what else it takes.
Condition = dict[str, "torch.Tensor | list[torch.Tensor]"]
UNET, TRANSFORMER = "unet", "transformer"  # names of the component that denoises
DENOISERS = (UNET, TRANSFORMER)
# The first Linear of a block of one stream holds its queries, keys and values, and twice three times as much for its
# feed-forward: of as many equal heights.
STREAM_ROWS = 9


@dataclass(frozen=True)
class Flow:
    """How a flow-matching family is trained: latents go straight to noise, and the answer is the way, noise - latents.

    Times are drawn as diffusers' `compute_density_for_timestep_sampling` does; the scheduler's own shift follows.
    """

    times: str = "logit_normal"
    mean: float = 0.0
    std: float = 1.0
    preconditioned: bool = False  # whether the loss is that of the clean latents, sigma^2 times that of the way


@dataclass(frozen=True)
class Native:
    """A projection in weights that fuse several of the same height: which of how many, counted from zero."""

    name: str
    place: int
    count: int
    span: int = 1  # how many of these it is itself


class Segment:
    """Some of the tokens of a text, one after the other, as one tokenizer reads it; without one they say nothing.

    `length` is how many, None for all that are left. The tokenizer is its pipeline's, and goes with it.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase | None, length: int | None = None) -> None:
        self.length = length
        self._tokenizer = None if tokenizer is None else weakref.ref(tokenizer)

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        """What reads."""
        return None if self._tokenizer is None else self._tokenizer()


@dataclass(frozen=True)
class Reading:
    """How a prompt becomes tokens: which of them each word is, so that an adapter can act from its trigger on."""

    segments: tuple[Segment, ...]
    prepared: Callable[[str], str] = str  # what is made of a prompt before it is read
    # An instruction that stands before prompts, with one segment. Of its states the first is kept alone.
    prefix: str = ""
    around: tuple[str, str] = ("", "")  # what a chat's template sets before and behind a prompt, whose states stay,
    dropped: int = 0  # but for so many of the first
    filled: bool = False  # whether the states of shorter prompts are filled up with zeros
    # Where each of at most so many tokens of a text ends, of a tokenizer that does not say so itself.
    ends: Callable[[str, int], list[int]] | None = None
    ahead: bool = False  # whether shorter prompts are filled up in front, by tokens that see all of the prompt


def moved(part: torch.Tensor | list[torch.Tensor], *where: object) -> torch.Tensor | list[torch.Tensor]:
    """A part of a condition on another device, or in another precision."""
    return [one.to(*where) for one in part] if isinstance(part, list) else part.to(*where)


class Family:
    """One kind of base."""

    name = ""  # as people call it
    pipelines: tuple[str, ...] = ()  # classes of diffusers' pipelines
    denoisers: tuple[str, ...] = ()  # classes of what denoises
    part = TRANSFORMER  # the component that denoises,
    noun = "transformer"  # and what it is called in sentences
    text_encoders: tuple[str, ...] = ("text_encoder",)
    tokenizer = "tokenizer"  # the component that reads what attentions are given; of several, the first
    optional: tuple[str, ...] = ()  # components that a base may lack
    heavy: tuple[str, ...] = ()  # text encoders of billions of weights, with which training reads in bfloat16
    trains_text = False  # whether text encoders can be adapted and new words learned
    guidance = 7.5
    # What a family subtracts that is asked to subtract nothing, where its pipeline would then go without guidance.
    nothing: str | None = None
    carries = ""  # a pattern of the names of the attentions that carry adapters; none: all that can
    # A pattern of the names of the Linears of feed-forwards that terms can stand beside; none: beside none. They see
    # the picture's tokens, and the text's before or behind them.
    feed_forwards = ""
    fewest_steps = 1  # in which its pipeline draws
    same_text = False  # whether attentions are given the same text states at every step of a drawing
    precisions: tuple[str, ...] = ("fp32", "fp16", "bf16")  # in which it draws; another overflows
    flow: Flow | None = None  # None: noise, velocities or clean latents, as the scheduler says
    flow_samplers: tuple[str, ...] = ()  # of a flow-matching family: diffusers' schedulers that draw with it
    packing = 1  # side of the square of latents that the denoiser is given as one, with as many more channels
    # Where in what `encode_prompt` returns the text states are, and, where they are made with these, those of the
    # negative prompt.
    states_at: tuple[int, ...] = (0, 1)
    architecture = ""  # in the headers of files (modelspec); default: by the width of a U-Net's text states
    has_node = True  # whether the ComfyUI nodes put its adapters on
    lora_prefix = ""  # of LoRA files that diffusers loads; default: the component's name

    def usual_targets(self, kind: str, beside: bool = False) -> list[str] | None:
        """The attentions that a new adapter of a kind is on where none are named; None: all that see words.

        `beside` says whether it has terms beside convolutions or feed-forwards, too.
        """
        return None

    def usual_convolutions(self, kind: str) -> int:
        """The rank of the terms that a new adapter of a kind has beside convolutions where nothing is said of them."""
        return 0

    # Sizes; `denoiser` and `vae` are configurations, `factor` the pixels of one latent place

    def factor(self, vae: Mapping) -> int:
        """Pixels of one latent place, along a side."""
        return 2 ** (len(vae["block_out_channels"]) - 1)

    def native(self, denoiser: Mapping, vae: Mapping) -> int:
        """Side in pixels at which the base was trained."""
        return denoiser["sample_size"] * self.factor(vae)

    def grain(self, denoiser: Mapping, factor: int) -> int:
        """Pixels that the sides of pictures must be multiples of."""
        return denoiser["patch_size"] * self.packing * factor

    def largest(self, denoiser: Mapping, factor: int) -> int | None:
        """Most pixels that a side can have; None where the base sets no end."""
        return None

    def size(self, call: Mapping[str, object]) -> tuple[int, int]:
        """Height and width (h, w) of the latents that a denoiser is called with, its arguments by name."""
        return tuple(call["sample" if "sample" in call else "hidden_states"].shape[-2:])

    def heard(self, call: Mapping[str, object]) -> torch.Tensor | list[torch.Tensor]:
        """The text states that a denoiser is called with, its arguments by name."""
        return call["encoder_hidden_states"]

    def time(self, call: Mapping[str, object]) -> torch.Tensor | float:
        """The time, or noise, that a denoiser is called with, its arguments by name."""
        return call["timestep"]

    def words_at(self, call: Mapping[str, object]) -> tuple[int, ...]:
        """Where in its blocks of one stream the words of each sample begin, behind the picture; empty: before it."""
        return ()

    def channels(self, vae: Mapping) -> int:
        """Channels C of the autoencoder's latents."""
        return vae.get("latent_channels", 4)

    def is_of(self, denoiser: Mapping) -> bool:
        """Whether a denoiser of one of `denoisers`, by its configuration, is of this family."""
        return True

    # Text

    def encode(self, pipe: DiffusionPipeline, prompts: Sequence[str]) -> Condition:
        """What the denoiser hears of prompts, made by the pipeline itself. Gradients flow if the caller lets them."""
        raise NotImplementedError

    def together(self, conditions: Sequence[Condition]) -> Condition:
        """What was read of prompts one by one, each without its first axis, as that of all."""
        import torch

        return {name: torch.stack([one[name] for one in conditions]) for name in conditions[0]}  # B first

    def device_of_text(self, pipe: DiffusionPipeline) -> torch.device:
        """Where the text encoders are."""
        return next(iter(self.encoders(pipe).values())).device

    def encoders(self, pipe: DiffusionPipeline) -> dict[str, nn.Module]:
        """The text encoders that a pipeline has, by name."""
        return {name: getattr(pipe, name) for name in self.text_encoders if getattr(pipe, name, None) is not None}

    def reading(self, pipe: DiffusionPipeline) -> Reading:
        """How its prompts become tokens."""
        return Reading((Segment(pipe.tokenizer),))

    def said(self, pipe: DiffusionPipeline, prompt: str, asked: Mapping[str, object], negative: bool) -> str:
        """A (negative) prompt as it is read by a pipeline whose `encode_prompt` was called with the arguments `asked`.

        Raises ValueError where that is not told by the prompt alone.
        """
        return self.reading(pipe).prepared(prompt)

    def most_tokens(self, tokenizer: PreTrainedTokenizerBase, pipeline: str, denoiser: Mapping) -> int:
        """How many tokens of a prompt a pipeline of this class, around a denoiser of this configuration, reads."""
        return tokenizer.model_max_length

    def states(self, tokenizer: PreTrainedTokenizerBase, pipeline: str, denoiser: Mapping) -> int:
        """How many text states M it makes of them."""
        return self.most_tokens(tokenizer, pipeline, denoiser)

    def remarks(self, pipe: DiffusionPipeline) -> Sequence[str]:
        """What is worth knowing of this very base, a sentence each."""
        return ()

    # Drawing

    def drawing(self, pipe: DiffusionPipeline) -> Mapping[str, object]:
        """What its pipeline is asked for beside prompts, sizes, steps and guidance."""
        return {}

    def negative(self, pipe: DiffusionPipeline, prompts: Sequence[str]) -> Mapping[str, object]:
        """The pipeline's arguments for prompts to draw away from."""
        return {"negative_prompt": list(prompts)}

    def guided(self, strength: float) -> Mapping[str, object]:
        """The pipeline's arguments for the strength of guidance."""
        return {"guidance_scale": strength}

    def guidance_of(self, pipe: DiffusionPipeline) -> float:
        """The strength of guidance that suits this very base."""
        return self.guidance

    # Pictures and latents

    def posterior(self, vae: nn.Module, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        """Mean and std of the latents of one (1, 3, H, W) picture, (C, h, w) each, as the denoiser wants them."""
        shift, factor = getattr(vae.config, "shift_factor", None) or 0.0, vae.config.scaling_factor
        found = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist
        mean, std = (found.mean.float() - shift) * factor, found.std.float() * factor
        return {"mean": mean[0].cpu(), "std": std[0].cpu()}

    def decoded(self, vae: nn.Module, latents: torch.Tensor) -> torch.Tensor:
        """Latents as its pipeline leaves them, asked for no pictures, as (B, 3, H, W) pixels in -1 to 1."""
        shift, factor = getattr(vae.config, "shift_factor", None) or 0.0, vae.config.scaling_factor
        return vae.decode(latents.to(vae.dtype) / factor + shift).sample

    # The denoiser

    def predict(
        self,
        denoiser: nn.Module,
        noisy: torch.Tensor,
        timesteps: torch.Tensor,
        condition: Condition,
        frames: torch.Tensor,
    ) -> torch.Tensor:
        """What the denoiser answers to (B, C, h, w) latents at (B,) timesteps: (B, C, h, w).

        `frames` (B, 6) are the original height and width of each picture, where it was cut (top, left), and what is
        left of it (height, width).
        """
        raise NotImplementedError

    def conditions(self, pipe: DiffusionPipeline, condition: Condition) -> dict[str, torch.Tensor]:
        """The pipeline's arguments for what was made of two prompts, that of the picture and the one to subtract."""
        states = condition["states"]
        return {"prompt_embeds": states[:1], "negative_prompt_embeds": states[1:]}

    # Its configurations on disk, and its LoRAs

    def blank(self, folder: Path) -> nn.Module:
        """The denoiser of a diffusers folder without weights, on torch's meta device."""
        import diffusers
        import torch

        kind = getattr(diffusers, self.denoisers[0])
        with torch.device("meta"):
            return kind.from_config(kind.load_config(folder / self.part))

    def lora_projections(self, attention: str) -> tuple[str, str]:
        """What of an attention of this name a foldable adapter changes: its keys' and its values' projection."""
        return "to_k", "to_v"

    def held_by(self, projection: str) -> Native | None:
        """The module of diffusers that holds a projection among others; None where it is one itself."""
        return None

    def native_weight(self, projection: str) -> Native | None:
        """Where a projection is in the family's native weights; None where they are named and cut as a U-Net's."""
        return None
