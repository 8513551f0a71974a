"""The settings of a timing."""

from dataclasses import dataclass

from comcat_diffusion.config import BaseSettings, Group, option, require_at_least
from comcat_diffusion.training.config import AdapterShape


@dataclass(frozen=True, kw_only=True)
class TimingSettings(Group):
    """The timing"""

    resolution: int | None = option(None, "Side of the pictures in pixels. Default: the base's own.", usual=True)
    train_batch_size: int = option(1, "Pictures a step.", usual=True)
    lora_rank: int = option(
        4, "Rank of the LoRA to compare with; it adapts every attention, as diffusers' recipe does."
    )
    rounds: int = option(3, "Times that everything is timed, in turns; medians are reported.")
    precision: str | None = option(
        None,
        "Precision of the base. Default: fp16 on a GPU, bf16 on a CPU that is fast in it, else fp32.",
        choices=("fp32", "fp16", "bf16"),
        usual=True,
    )
    device: str | None = option(None, "cpu, cuda, mps, ... Default: the fastest that is there.", usual=True)
    output: str | None = option(None, "Also write the numbers to this JSON file.", usual=True)

    def check(self) -> None:
        """Counts are positive."""
        require_at_least(self, 1, "resolution", "train_batch_size", "lora_rank", "rounds")


@dataclass(frozen=True, kw_only=True)
class BenchConfig(TimingSettings, AdapterShape, BaseSettings):
    """Settings of a timing: one base, one shape of adapter."""
