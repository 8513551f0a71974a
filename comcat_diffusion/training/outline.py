"""The subject's outline in a picture that has no mask, found by the base itself: where it looks at the subject's words.

What is around a subject is then learned as little as what a mask leaves out. Found once, while pictures are encoded,
from the base's attentions (adapters/looking.py) at a few levels of noise; the level between subject and rest is
Otsu's, which parts the places into the two most distinct groups (IEEE Trans. SMC 9(1), 1979).

Letters: C latent channels, h x w latent size, M context tokens.
"""

from collections.abc import Iterable

import numpy as np
import torch
from diffusers import DiffusionPipeline
from torch.nn.functional import interpolate, max_pool2d

from comcat_diffusion.adapters.looking import that_look, watched
from comcat_diffusion.adapters.texts import texts_of
from comcat_diffusion.families.family import Condition, moved
from comcat_diffusion.families.known import family_of
from comcat_diffusion.training.flow import FlowObjective
from comcat_diffusion.training.learner import read
from comcat_diffusion.training.objective import Objective
from comcat_diffusion.words import Subject

NOISE = (0.1, 0.3, 0.5)  # of the way to noise: less shows the picture better, more asks the words more
GROWN = 1  # latent places around what is found that count as the subject's: its edge is half its own
BINS = 64


def can_outline(pipe: DiffusionPipeline) -> bool:
    """Whether a base shows where it looks at words: a U-Net does, and a transformer of joint attention."""
    return bool(that_look(getattr(pipe, family_of(pipe).part)))


class Outliner:
    """Finds subjects with a pipeline whose denoiser has no adapter yet."""

    def __init__(self, pipe: DiffusionPipeline, objective: Objective | FlowObjective) -> None:
        self.pipe, self.objective, self.family = pipe, objective, family_of(pipe)
        self._texts = texts_of(pipe.tokenizer, self.family.reading(pipe))
        self._conditions: dict[str, Condition] = {}  # by prompt, without the first axis

    def bring(self, subjects: Iterable[Subject], device: torch.device) -> None:
        """Read what subjects are called on a device, and then bring the denoiser there: never both at once."""
        self._conditions |= read(self.pipe, map(_prompt, subjects), device)
        getattr(self.pipe, self.family.part).to(device)

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
        prompt = _prompt(subject)
        if prompt not in self._conditions:
            self._conditions |= read(self.pipe, [prompt])
        condition = self._conditions[prompt]
        of_words = self._texts.read(prompt, len(condition["states"])).within([subject.phrase])
        of_words = of_words.to(denoiser.device, denoiser.dtype).expand(len(NOISE), -1)
        heard = self.family.together([condition] * len(NOISE))
        heard = {name: moved(part, denoiser.device, denoiser.dtype) for name, part in heard.items()}
        frames = torch.tensor(frame, dtype=torch.float32).expand(len(NOISE), -1).to(denoiser.device)
        with watched(denoiser, of_words) as seen:
            self.family.predict(denoiser, noisy, levels.to(denoiser.device), heard, frames)
        looked = torch.cat(seen).mean(0, keepdim=True)  # 1, 1, h, w, or of a transformer's squares of them
        return interpolate(looked, size=mean.shape[-2:])[0, 0].cpu()


def _prompt(subject: Subject) -> str:
    return f"a photo of {subject.phrase}"


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
