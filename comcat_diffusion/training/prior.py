"""Keeping the class as it was while one member of it is learned (DreamBooth's prior preservation, arXiv 2208.12242).

Two kinds: pictures of the class drawn by the base itself, or the base as a teacher, which needs no pictures.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from diffusers import DiffusionPipeline

from comcat_diffusion.adapters.merge import layers_of
from comcat_diffusion.training.batching import Batch, Batching
from comcat_diffusion.training.encode import Crop
from comcat_diffusion.training.objective import Objective

Forward = Callable[[torch.Tensor, torch.Tensor, list[str], torch.Tensor], torch.Tensor]


class Prior(Protocol):
    """A second loss beside the subject's."""

    def loss(self, forward: Forward, batch: Batch, number: int, process: int, processes: int) -> torch.Tensor:
        """The mean loss of one micro-batch, a scalar."""


class Teacher:
    """On the subject's own noisy latents, the class prompt must give what it gives with the adapter switched off.

    At the first step the adapter is nothing, so this loss is exactly zero there.
    """

    def __init__(self, pipe: DiffusionPipeline, class_prompts: dict[str, str]):
        self.layers, self.class_prompts = layers_of(pipe), class_prompts

    def loss(self, forward: Forward, batch: Batch, number: int, process: int, processes: int) -> torch.Tensor:
        """Mean squared difference of the two predictions, a scalar."""
        prompts = [self.class_prompts[prompt] for prompt in batch.prompts]
        for layer in self.layers:
            layer.enable_adapters(False)
        try:
            with torch.no_grad():
                wanted = forward(batch.noisy, batch.timesteps, prompts, batch.frames)
        finally:
            for layer in self.layers:
                layer.enable_adapters(True)
        found = forward(batch.noisy, batch.timesteps, prompts, batch.frames)
        return (found.float() - wanted.float()).square().mean()


class ClassPictures:
    """As many pictures of the class as of the subject in every step, learned under the class prompt."""

    def __init__(self, crops: Sequence[Crop], seed: int, batch_size: int, objective: Objective):
        self.crops, self.objective = crops, objective
        self.batching = Batching.of(crops, seed + 1, batch_size)  # its own order and noise

    def loss(self, forward: Forward, batch: Batch, number: int, process: int, processes: int) -> torch.Tensor:
        """The denoising loss on the class pictures, a scalar."""
        drawn = self.batching.batch(self.crops, self.objective, number, process, processes).to(batch.noisy.device)
        predicted = forward(drawn.noisy, drawn.timesteps, drawn.prompts, drawn.frames)
        return self.objective.loss(predicted, drawn.target, drawn.timesteps, drawn.weights).mean()
