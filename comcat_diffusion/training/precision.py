"""The precision of the frozen base: the one that is named, that of the launcher, or what suits the device."""

import os
from collections.abc import Iterator
from dataclasses import replace

import torch
from accelerate.utils import parse_flag_from_env

from comcat_diffusion import bases
from comcat_diffusion.training.config import TrainConfig

TAKEN = ("no", "fp16", "bf16")
LAUNCHED = "ACCELERATE_MIXED_PRECISION"  # what `accelerate launch` sets, to "no" if it was told nothing


def with_precision(config: TrainConfig) -> TrainConfig:
    """The settings, with the precision of the launcher, or else the one that suits the device, where none is named.

    Raises ValueError for one of the launcher's that there is not here.
    """
    launched = os.environ.get(LAUNCHED, "no").lower()
    if config.mixed_precision is None and launched != "no":
        if launched not in TAKEN:
            raise ValueError(f"accelerate launch --mixed_precision {launched} is not supported: use no, fp16 or bf16.")
        return replace(config, mixed_precision=launched)
    gpu = torch.cuda.is_available() and not parse_flag_from_env("ACCELERATE_USE_CPU")  # as Accelerate will see it
    base = config.pretrained_model_name_or_path or bases.EMBEDDED
    suits = "bf16" if bases.suits_bf16("cuda" if gpu else "cpu", base) else "no"
    return replace(config, mixed_precision=config.mixed_precision or suits)


def launched_precision(config: TrainConfig) -> Iterator[str]:
    """What is made of the precision that `accelerate launch` was given, where the settings name none.

    It says "no" also where nobody asked for it, so what suits the device stands against that.
    """
    launched = os.environ.get(LAUNCHED, "").lower()
    if config.mixed_precision is None and launched in TAKEN:
        taken = with_precision(config).mixed_precision
        if taken == launched != "no":
            yield f"The precision is {taken}, as accelerate launch says."
        elif taken != launched:
            yield f"The precision is {taken}, as suits the device; --mixed_precision {launched} keeps the launcher's."


def refuse_precision(config: TrainConfig) -> None:
    """Raise ValueError for a precision that the device does not have."""
    if config.mixed_precision == "fp16" and not torch.accelerator.is_available():
        raise ValueError("--mixed_precision fp16 needs a GPU; on a CPU use no or bf16.")
    if config.mixed_precision == "bf16" and torch.cuda.is_available() and not torch.cuda.is_bf16_supported():
        raise ValueError("--mixed_precision bf16 is not supported by this GPU; use fp16.")
