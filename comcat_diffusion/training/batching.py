"""Which pictures, noise and timesteps a step sees: a function of its number alone, so that any step can be redone.

Every sample has a number of its own across processes and micro-batches, and all its randomness comes from that. So two
processes see what one process with batches of twice the size would have seen, and a resumed run what an unbroken one.

Letters: B batch, C latent channels, h x w latent size.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Self

import numpy as np
import torch

from comcat_diffusion.training.encode import Crop
from comcat_diffusion.training.objective import Objective

ORDER, NOISE, CYCLE = range(3)  # what a generator is for


@dataclass(frozen=True)
class Batch:
    """One micro-batch, ready for the denoiser."""

    noisy: torch.Tensor  # B, C, h, w
    target: torch.Tensor  # B, C, h, w
    timesteps: torch.Tensor  # B
    frames: torch.Tensor  # B, 6
    weights: torch.Tensor | None  # B, 1, h, w
    prompts: list[str]
    names: list[str]

    def to(self, device: torch.device) -> Self:
        """The same batch on a device."""
        tensors = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{k: v.to(device) for k, v in tensors.items() if isinstance(v, torch.Tensor)})


@dataclass(frozen=True)
class Batching:
    """Micro-batches of one size, each from one bucket of equally large crops."""

    seed: int
    batch_size: int
    buckets: tuple[tuple[int, ...], ...]  # indices of crops; a crop that is repeated stands there several times
    caption_dropout: float = 0.0  # how often a crop's plain prompt, if it has one, stands for its own

    @classmethod
    def of(cls, crops: Sequence[Crop], seed: int, batch_size: int, caption_dropout: float = 0.0) -> Self:
        """Buckets by the crops' sizes."""
        buckets: dict[tuple, list[int]] = {}
        for index, crop in enumerate(crops):
            buckets.setdefault(tuple(crop.mean.shape), []).extend([index] * crop.repeats)
        return cls(seed, batch_size, tuple(map(tuple, buckets.values())), caption_dropout)

    def generator(self, *key: int) -> torch.Generator:
        """Randomness that belongs to a key."""
        state = np.random.SeedSequence((self.seed, *key)).generate_state(1, np.uint64)
        return torch.Generator().manual_seed(int(state[0] >> 1))

    def chosen(self, number: int) -> list[int]:
        """Indices (B) of the crops of a micro-batch: every crop once per pass, in a new order each pass.

        Over a cycle of as many micro-batches as there are crops, a bucket of n crops gets n of them, in random order.
        """
        count = sum(map(len, self.buckets))
        cycle, position = divmod(number, count)
        owners = [index for index, bucket in enumerate(self.buckets) for _ in bucket]
        order = torch.randperm(count, generator=self.generator(CYCLE, cycle)).tolist()
        owner = owners[order[position]]
        bucket = self.buckets[owner]
        earlier = sum(owners[place] == owner for place in order[:position])
        first = (cycle * len(bucket) + earlier) * self.batch_size
        return [self._at(owner, place) for place in range(first, first + self.batch_size)]

    def _at(self, owner: int, place: int) -> int:
        passed, within = divmod(place, len(self.buckets[owner]))
        order = torch.randperm(len(self.buckets[owner]), generator=self.generator(ORDER, owner, passed))
        return self.buckets[owner][order[within]]

    def batch(
        self, crops: Sequence[Crop], objective: Objective, number: int, process: int = 0, processes: int = 1
    ) -> Batch:
        """The micro-batch of one process: number `number` of its own, so `number * processes + process` of all."""
        overall = number * processes + process
        picked = [crops[index] for index in self.chosen(overall)]
        samples = range(overall * self.batch_size, (overall + 1) * self.batch_size)
        generators = [self.generator(NOISE, sample) for sample in samples]
        return made(picked, objective, generators, self.caption_dropout)


def made(
    crops: Sequence[Crop], objective: Objective, generators: Sequence[torch.Generator], caption_dropout: float = 0.0
) -> Batch:
    """Latents, noise, timestep and prompt of every crop from its own generator."""
    drawn, prompts = [], []
    for crop, generator in zip(crops, generators, strict=True):
        latents = crop.latents(generator)
        drawn.append((latents, *objective.draw(latents, generator)))
        plainly = caption_dropout and crop.plain and torch.rand((), generator=generator) < caption_dropout
        prompts.append(crop.plain if plainly else crop.prompt)
    clean, noise, timesteps = map(torch.stack, zip(*drawn, strict=True))  # B, C, h, w twice; B
    weights = None
    if any(crop.weight is not None for crop in crops):
        weights = torch.stack([torch.ones_like(c.mean[:1]) if c.weight is None else c.weight for c in crops])
    return Batch(
        noisy=objective.noisy(clean, noise, timesteps),
        target=objective.target(clean, noise, timesteps),
        timesteps=timesteps,
        frames=torch.tensor([crop.frame for crop in crops], dtype=torch.float32),
        weights=weights,
        prompts=prompts,
        names=[crop.name for crop in crops],
    )
