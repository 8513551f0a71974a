"""The subject's outline in a picture that has no mask, found by the base itself: where it looks at the subject's words.

What is around a subject is then learned as little as what a mask leaves out. Found once, while pictures are encoded,
from the base's cross-attentions (adapters/looking.py) at a few levels of noise; the level between subject and rest is
Otsu's, which parts the places into the two most distinct groups (IEEE Trans. SMC 9(1), 1979).

Letters: C latent channels, h x w latent size, M context tokens.
"""

import numpy as np
import torch
from diffusers import DiffusionPipeline
from torch.nn.functional import max_pool2d

from comcat_diffusion.adapters.looking import that_look, watched
from comcat_diffusion.adapters.texts import texts_of
from comcat_diffusion.families.known import family_of
from comcat_diffusion.training.objective import Objective
from comcat_diffusion.words import Subject, is_style

NOISE = (0.1, 0.3, 0.5)  # of the way to noise: less shows the picture better, more asks the words more
GROWN = 1  # latent places around what is found that count as the subject's: its edge is half its own
BINS = 64


def can_outline(pipe: DiffusionPipeline) -> bool:
    """Whether a base shows where it looks at words: a U-Net does."""
    family = family_of(pipe)
    return bool(that_look(getattr(pipe, family.part))) and family.flow is None


def is_thing(subject: Subject) -> bool:
    """Whether a subject has a name and a place in a picture: a style has all of the picture."""
    return bool(subject.class_word) and not is_style(subject.class_word)


class Outliner:
    """Finds subjects with a pipeline whose denoiser has no adapter yet."""

    def __init__(self, pipe: DiffusionPipeline, objective: Objective) -> None:
        self.pipe, self.objective, self.family = pipe, objective, family_of(pipe)
        self._conditions: dict[str, dict[str, torch.Tensor]] = {}

    @torch.no_grad()
    def share(self, mean: torch.Tensor, subject: Subject, frame: tuple[int, ...]) -> torch.Tensor:
        """Of a picture's latents (C, h, w), where the subject is: (1, h, w) of ones and zeros."""
        looked = self._looked(mean, subject, frame)
        inside = (looked > otsu(looked)).float()[None]  # 1, h, w
        return max_pool2d(inside, 2 * GROWN + 1, stride=1, padding=GROWN)

    def _looked(self, mean: torch.Tensor, subject: Subject, frame: tuple[int, ...]) -> torch.Tensor:
        """How much the base looks at the subject's words from each place, (h, w)."""
        denoiser = getattr(self.pipe, self.family.part)
        levels = torch.tensor([round(level * self.objective.scheduler.config.num_train_timesteps) for level in NOISE])
        clean = mean.expand(len(NOISE), *mean.shape)
        noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
        noisy = self.objective.noisy(clean, noise, levels).to(denoiser.device, denoiser.dtype)
        condition = self._condition(f"a photo of {subject.phrase}")
        states = condition["states"]
        said = texts_of(self.pipe.tokenizer).read(f"a photo of {subject.phrase}", states.shape[1])
        of_words = said.within([subject.phrase]).to(states).expand(len(NOISE), -1)
        frames = torch.tensor(frame, dtype=torch.float32).expand(len(NOISE), -1).to(denoiser.device)
        repeated = {name: part.expand(len(NOISE), *part.shape[1:]) for name, part in condition.items()}
        with watched(denoiser, of_words, tuple(mean.shape[-2:])) as seen:
            self.family.predict(denoiser, noisy, levels.to(denoiser.device), repeated, frames)
        return torch.cat(seen).mean(0)[0].cpu()

    def _condition(self, prompt: str) -> dict[str, torch.Tensor]:
        if prompt not in self._conditions:
            self._conditions[prompt] = self.family.encode(self.pipe, [prompt])
        return self._conditions[prompt]


def otsu(values: torch.Tensor) -> float:
    """The level that parts numbers into two groups with the most variance between them."""
    flat = values.flatten().double().numpy()
    counts, edges = np.histogram(flat, BINS)
    middles = (edges[:-1] + edges[1:]) / 2
    below = counts.cumsum()[:-1]
    above = len(flat) - below
    sums = (counts * middles).cumsum()[:-1]
    between = below * above * (sums / below.clip(1) - ((counts * middles).sum() - sums) / above.clip(1)) ** 2
    return float(edges[1 + int(between.argmax())])
