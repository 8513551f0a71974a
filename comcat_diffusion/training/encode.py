"""Pictures as the denoiser sees them, computed once; the VAE is not needed again.

Letters: C latent channels, h x w latent size, B batch.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from torch.nn.functional import interpolate

from comcat_diffusion import bases
from comcat_diffusion.families.known import family_of
from comcat_diffusion.training import images
from comcat_diffusion.training.cache import Cache
from comcat_diffusion.training.class_pictures import class_pictures, class_prompt_of
from comcat_diffusion.training.config import TrainConfig
from comcat_diffusion.training.crops import Cut, cuts, sizes
from comcat_diffusion.training.dataset import Dataset, Example, before_others
from comcat_diffusion.training.flow import FlowObjective
from comcat_diffusion.training.names import shown
from comcat_diffusion.training.objective import Objective
from comcat_diffusion.training.outline import Outliner, can_outline
from comcat_diffusion.words import is_thing


@dataclass(frozen=True)
class Crop:
    """One cut-out in latents: the VAE's posterior, already as the denoiser wants it, and what goes with it."""

    mean: torch.Tensor  # C, h, w
    std: torch.Tensor  # C, h, w
    prompt: str
    name: str  # of the picture, for messages
    frame: tuple[int, ...]  # SDXL's micro-conditioning: original h, w, top, left, target h, w
    weight: torch.Tensor | None = None  # 1, h, w: how much each place counts, mean one
    repeats: int = 1
    plain: str | None = None  # a prompt that may stand for its own, see batching.py

    def latents(self, generator: torch.Generator) -> torch.Tensor:
        """A sample of the posterior, (C, h, w)."""
        return self.mean + self.std * torch.randn(self.mean.shape, generator=generator)


@dataclass(frozen=True)
class Material:
    """Everything encoded: what is learned, what it is judged by, and the class that is to stay as it is."""

    crops: list[Crop]
    held_out: list[Crop]
    class_crops: list[Crop]
    class_prompts: dict[str, str]  # the class prompt that goes with each prompt
    class_examples: Sequence[Example] = ()  # what the class crops were cut from

    @property
    def prompts(self) -> list[str]:
        """Every prompt that a step or a judgement may need."""
        crops = (*self.crops, *self.held_out, *self.class_crops)
        plain = [crop.plain for crop in self.crops if crop.plain]
        return list(dict.fromkeys([*(crop.prompt for crop in crops), *plain, *self.class_prompts.values()]))


def encode_all(
    config: TrainConfig,
    pipe: DiffusionPipeline,
    dataset: Dataset,
    objective: Objective | FlowObjective,
    note: Callable[[str], None],
) -> Material:
    """Encode a dataset with a pipeline's VAE, after the base has drawn the class pictures that are missing.

    Where pictures without a mask are to be outlined, the bare denoiser goes where its VAE is.
    """
    options = sizes(config.resolution, config.aspect_ratio_buckets, bases.grain(pipe))
    cache = Cache(config.cache_dir, pipe.vae)
    class_examples = []
    if config.prior_kind == "images":
        class_examples = class_pictures(config, pipe, dataset.subjects, note)
    examples = (*dataset.examples, *_before_others(config, dataset.examples, note))
    class_prompts = {}
    if config.prior_kind == "teacher":
        class_prompts = {
            prompt: class_prompt_of(config, e.subject, dataset.subjects)
            for e in examples
            for prompt in filter(None, (e.prompt, e.plain))
        }
    square = [(config.resolution, config.resolution)]
    outliner = _outliner(config, pipe, dataset, objective, note)
    return Material(
        encode(config, pipe, examples, options, cache, outliner),
        encode(config, pipe, dataset.held_out, options, cache, outliner),
        encode(config, pipe, class_examples, square, cache),
        class_prompts,
        class_examples,
    )


def encode(
    config: TrainConfig,
    pipe: DiffusionPipeline,
    examples: Sequence[Example],
    sizes: list[tuple[int, int]],
    cache: Cache,
    outliner: Outliner | None = None,
) -> list[Crop]:
    """All crops of the examples, one picture at a time; what has no mask is outlined, where somebody can.

    Raises ValueError if latents are no numbers.
    """
    crops = []
    for example in examples:
        picture, mask, _ = example.read()
        rng = random.Random(f"{config.seed} {example.name}")
        for cut in cuts(picture, mask, sizes, config.center_crop, config.random_flip, rng):
            found = cache.find(cut.image) or cache.keep(cut.image, posterior(pipe, cut.image))
            mean, std = found["mean"], found["std"]
            if not (torch.isfinite(mean).all() and torch.isfinite(std).all()):
                raise ValueError(f"The VAE gives latents of {shown(example.path)} that are no numbers; encode in fp32.")
            frame = (*cut.original, *cut.corner, *cut.size)
            weight = None
            if cut.mask:
                weight = _weight(cut, mean.shape[-2:], config, example)
            elif outliner and is_thing(example.subject):
                weight = weighed(outliner.share(mean, example.subject, frame), config.unmasked_weight)
            told = example.prompt, example.name, frame, weight, example.repeats, example.plain
            crops.append(Crop(mean, std, *told))
    return crops


def _before_others(config: TrainConfig, examples: Sequence[Example], note: Callable[[str], None]) -> list[Example]:
    """The examples on other backgrounds, where that is wanted and can be; notes that it is so."""
    found = before_others(examples) if config.background_augmentation else []
    if found:
        note(
            "Pictures on a plain background are also learned from before others, which their prompts name "
            "(--no-background_augmentation: before their own alone)."
        )
    return found


def _outliner(
    config: TrainConfig,
    pipe: DiffusionPipeline,
    dataset: Dataset,
    objective: Objective | FlowObjective,
    note: Callable[[str], None],
) -> Outliner | None:
    """Who finds the subject in pictures that have no mask, if that is wanted and this base can; notes what is so."""
    without = [example for example in (*dataset.examples, *dataset.held_out) if not example.mask]
    if not config.auto_mask or not without:
        return None
    if not can_outline(pipe):
        note("This base does not show where a subject is, so all of a picture without a mask counts alike.")
        return None
    wanted = [example.subject for example in without if is_thing(example.subject)]
    if not wanted:
        return None
    note(
        f"The base looks for the subject in pictures without a mask; what is around it weighs "
        f"{config.unmasked_weight:g} (--no-auto_mask: all counts alike)."
    )
    outliner = Outliner(pipe, objective)
    outliner.bring(wanted, pipe.vae.device)
    return outliner


def _weight(cut: Cut, size: tuple[int, int], config: TrainConfig, example: Example) -> torch.Tensor:
    try:
        return weight_map(cut, size, config.unmasked_weight)
    except ValueError as error:
        raise ValueError(f"{shown(example.path)}: {error}") from error


def weight_map(cut: Cut, size: tuple[int, int], unmasked_weight: float) -> torch.Tensor:
    """The weight of every latent place, (1, h, w) with mean one: one under the mask, `unmasked_weight` elsewhere.

    Raises ValueError if nothing has any weight.
    """
    shown = torch.from_numpy(np.asarray(cut.mask, dtype=np.float32) / 255)[None, None]  # 1, 1, H, W
    return weighed(interpolate(shown, size=tuple(size), mode="area")[0], unmasked_weight)


def weighed(share: torch.Tensor, unmasked_weight: float) -> torch.Tensor:
    """Weights, mean one, of places of which a share (1, h, w) is learned from. See `weight_map`."""
    weight = share + (1 - share) * unmasked_weight
    if weight.mean() <= 0:
        raise ValueError("its mask is black wherever the picture is cut: nothing would be learned from it.")
    return weight / weight.mean()


@torch.no_grad()
def posterior(pipe: DiffusionPipeline, picture: Image.Image) -> dict[str, torch.Tensor]:
    """Mean and std of the latents of one picture, (C, h, w) each, as the denoiser wants them."""
    return family_of(pipe).posterior(pipe.vae, images.to_tensor([picture]))
