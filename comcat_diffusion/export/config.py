"""The settings of the commands that make another file of an adapter file."""

from dataclasses import dataclass

from comcat_diffusion.config import (
    BaseSettings,
    Group,
    option,
    require_at_least,
    require_finite,
)
from comcat_diffusion.export.clients import CLIENTS, FORMATS, format_of


@dataclass(frozen=True, kw_only=True)
class OneOutput(Group):
    """What is written"""

    output: str | None = option(None, "The file to write.", required="name the file to write")
    overwrite: bool = option(False, "Replace a file that is there already.")


@dataclass(frozen=True, kw_only=True)
class OneAdapter(OneOutput):
    """The adapter"""

    adapter: str | None = option(None, "The adapter file.", required="name the adapter file")


@dataclass(frozen=True, kw_only=True)
class ExportConfig(BaseSettings, OneAdapter):
    """The export"""

    for_: str = option(
        "all",
        "The program that will read the LoRA; one that reads none of its base is refused. all: one file for those that "
        "do (of FLUX.2 [klein] and Z-Image InvokeAI wants one of its own).",
        choices=tuple(CLIENTS),
    )
    format: str | None = option(
        None,
        "Whose names the LoRA's tensors have, if not those that the program reads: kohya (all of them) or "
        "diffusers-lora (diffusers' load_lora_weights alone). Default: as --for says.",
        choices=FORMATS,
    )
    save_precision: str = option("fp32", "Precision of the LoRA; fp32 is exact.", choices=("fp32", "fp16"))
    preview: str | None = option(
        None,
        "A picture, written as NAME.png beside the LoRA, where galleries look for it. Default: the adapter's "
        "thumbnail, if it has one.",
    )
    approximate: bool = option(
        False,
        "Of an adapter that no LoRA can express, export the closest one, and print what that costs: of a free one the "
        "closest foldable one, of one that waits for its trigger one that acts everywhere. Needs its base.",
    )
    prompt: list[str] = option([], "Prompts that the cost is measured on. Default: the adapter's own.")
    force: bool = option(
        False,
        "Write also an approximation that is off by more than a tenth, or, of an adapter that waits for its trigger, "
        "one that keeps less than a tenth.",
    )

    def check(self) -> None:
        """The program reads the format."""
        format_of(self.for_, self.format)


@dataclass(frozen=True, kw_only=True)
class MergeConfig(BaseSettings):
    """The merge"""

    adapter: list[str] = option(
        [],
        "Foldable adapter files, each with a weight after a colon if wanted.",
        required="name at least one adapter file",
    )
    output_dir: str | None = option(
        None, "Folder for the merged base; it must be new or empty.", required="name a new folder"
    )
    any_weights: bool = option(False, "Allow a base of the same shape with other weights (a fine-tune).")


@dataclass(frozen=True, kw_only=True)
class CombineConfig(OneOutput):
    """The combination"""

    adapter: list[str] = option(
        [],
        "Adapter files of one base, each with a weight after a colon if wanted.",
        required="name at least one adapter file",
    )
    rank: int | None = option(
        None,
        "Cut the sum to this rank; terms beside convolutions keep theirs. Default: all ranks side by side, which is "
        "exact.",
    )
    save_precision: str = option("fp16", "Precision of the file.", choices=("fp16", "bf16", "fp32"))

    def check(self) -> None:
        """A rank is at least one."""
        require_at_least(self, 1, "rank")


@dataclass(frozen=True, kw_only=True)
class ShrinkConfig(BaseSettings, OneAdapter):
    """The size"""

    max_bytes: int | None = option(
        None, "The most bytes that the file may have, header included.", required="how large may the file be, in bytes"
    )
    prompt: list[str] = option([], "Prompts that the change is measured on. Default: the adapter's own.")
    pretrained_model_name_or_path: str | None = option(
        None,
        "The adapter's base, to measure on what shrinking changes: hub id, folder, .safetensors file or 'embedded'. "
        "Default: nothing is measured.",
    )

    def check(self) -> None:
        """The budget is one."""
        require_at_least(self, 1, "max_bytes")


@dataclass(frozen=True, kw_only=True)
class ImportConfig(BaseSettings, OneOutput):
    """The import"""

    weights: str | None = option(None, "The authors' file, comcat_weight.pt.", required="name the authors' file")
    pretrained_model_name_or_path: str | None = option(
        None,
        "The base it was trained on: hub id, diffusers folder or single .safetensors file.",
        required="the file does not say which base it was trained on",
    )
    strength: float = option(1.0, "The authors' alpha; the scale of the adapter is its square.")
    instance_prompt: str | None = option(None, "The prompt it was trained with, for instance 'a photo of sks dog'.")

    def check(self) -> None:
        """The strength is a number."""
        require_finite(self, "strength", above=0)


@dataclass(frozen=True, kw_only=True)
class PushConfig(Group):
    """The repository"""

    adapter: str | None = option(None, "The adapter file.", required="name the adapter file")
    repo_id: str | None = option(
        None, "The model repository, owner/name; made where there is none.", required="name the repository, owner/name"
    )
    private: bool = option(False, "Make a new repository private.")
    sheet: str | None = option(None, "A picture of samples for the card, for instance pictures/sheet.png.")
    lora: bool | None = option(
        None, "Also share it as a LoRA that every program reads. Default: where it is one exactly, without its base."
    )
    space: str | None = option(
        None,
        "Share nothing, but fill this new folder with all that a Space of the hub needs: the page that draws with the "
        "adapter. The base must be on the hub.",
    )


@dataclass(frozen=True, kw_only=True)
class PullConfig(Group):
    """The repository"""

    repo_id: str | None = option(None, "The model repository, owner/name.", required="name the repository, owner/name")
    revision: str | None = option(None, "Branch, tag or commit.")
    output_dir: str = option(".", "Folder for the adapter files. Default: the one you are in.")
