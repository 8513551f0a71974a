"""Learning on from an adapter file: what of it stays, and what does not go with it."""

import re

from diffusers import DiffusionPipeline
from torch import nn

from comcat_diffusion.adapters.model import adapted_layers
from comcat_diffusion.adapters.parts import denoiser
from comcat_diffusion.adapters.store import load_adapter
from comcat_diffusion.adapters.token import words_of
from comcat_diffusion.training.config import TrainConfig


def load(config: TrainConfig, pipe: DiffusionPipeline, name: str, targets: list[str] | str | None) -> None:
    """Put the adapter that is learned on into a pipeline; `targets` are those asked for, if any. Raises ValueError."""
    load_adapter(pipe, config.init_adapter, name)
    _refuse_deaf(config, pipe)
    _refuse_other_targets(config, denoiser(pipe), targets)


def _refuse_deaf(config: TrainConfig, pipe: DiffusionPipeline) -> None:
    """Raise ValueError for an adapter that waits for "sks" where "sks dog" is about to become one word."""
    if config.learn_name and not words_of(pipe):
        raise ValueError(
            f"--learn_name makes one word of the name, in which the adapter {config.init_adapter} would no longer find "
            "its trigger: leave one of the two out."
        )


def _refuse_other_targets(config: TrainConfig, model: nn.Module, names: list[str] | str | None) -> None:
    """Raise ValueError for targets that are not those of the adapter that is learned on."""
    if names is None:
        return
    pattern = names if isinstance(names, str) else rf"(.*\.)?({'|'.join(map(re.escape, names))})"
    adapted, asked = set(adapted_layers(model)), {n for n, _ in model.named_modules() if re.fullmatch(pattern, n)}
    if not asked or asked != adapted:
        raise ValueError(
            f"--init_adapter {config.init_adapter} stays on the {len(adapted)} attentions that it is on: leave "
            "--target_modules and --up_blocks_only out."
        )
