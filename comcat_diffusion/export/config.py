"""The settings of the commands that make another file of an adapter file."""

from dataclasses import dataclass

from comcat_diffusion.config import (
    BaseSettings,
    Group,
    option,
    require,
    require_at_least,
    require_finite,
)


@dataclass(frozen=True, kw_only=True)
class OneOutput(Group):
    """What is written"""

    output: str | None = option(None, "The file to write.")
    overwrite: bool = option(False, "Replace a file that is there already.")

    def check(self) -> None:
        """It is named."""
        require(bool(self.output), "--output is missing: name the file to write.")


@dataclass(frozen=True, kw_only=True)
class OneAdapter(OneOutput):
    """The adapter"""

    adapter: str | None = option(None, "The adapter file.")

    def check(self) -> None:
        """It is named."""
        require(bool(self.adapter), "--adapter is missing: name the adapter file.")


@dataclass(frozen=True, kw_only=True)
class ExportConfig(BaseSettings, OneAdapter):
    """The export"""

    format: str = option("diffusers-lora", "What is written.", choices=("diffusers-lora", "kohya"))
    save_precision: str = option("fp32", "Precision of the LoRA; fp32 is exact.", choices=("fp32", "fp16"))
    approximate: bool = option(False, "Of a free adapter, export the closest foldable one; needs its base.")
    prompt: list[str] = option([], "Prompts that the approximation is fitted on. Default: the adapter's own.")
    force: bool = option(False, "Write an approximation that differs by more than a tenth of the adapter's effect.")


@dataclass(frozen=True, kw_only=True)
class MergeConfig(BaseSettings):
    """The merge"""

    adapter: list[str] = option([], "Foldable adapter files, each with a weight after a colon if wanted.")
    output_dir: str | None = option(None, "Folder for the merged base; it must be new or empty.")
    any_weights: bool = option(False, "Allow a base of the same shape with other weights (a fine-tune).")

    def check(self) -> None:
        """There is something to merge, and a place for it."""
        require(bool(self.adapter), "--adapter is missing: name at least one adapter file.")
        require(bool(self.output_dir), "--output_dir is missing: name a new folder.")


@dataclass(frozen=True, kw_only=True)
class CombineConfig(OneOutput):
    """The combination"""

    adapter: list[str] = option([], "Adapter files of one base, each with a weight after a colon if wanted.")
    rank: int | None = option(None, "Cut the sum to this rank. Default: all ranks side by side, which is exact.")
    save_precision: str = option("fp16", "Precision of the file.", choices=("fp16", "bf16", "fp32"))

    def check(self) -> None:
        """There is something to combine, and a place for it."""
        require(bool(self.adapter), "--adapter is missing: name at least one adapter file.")
        require_at_least(self, 1, "rank")


@dataclass(frozen=True, kw_only=True)
class ShrinkConfig(BaseSettings, OneAdapter):
    """The size"""

    max_bytes: int | None = option(None, "The most bytes that the file may have, header included.")
    prompt: list[str] = option(
        [], "Prompts that the change is measured on, where a base is given. Default: the adapter's own."
    )

    def check(self) -> None:
        """There is a budget."""
        require(self.max_bytes is not None, "--max_bytes is missing: how large may the file be?")
        require_at_least(self, 1, "max_bytes")


@dataclass(frozen=True, kw_only=True)
class ImportConfig(BaseSettings, OneOutput):
    """The import"""

    weights: str | None = option(None, "The authors' file, comcat_weight.pt.")
    strength: float = option(1.0, "The authors' alpha; the scale of the adapter is its square.")
    instance_prompt: str | None = option(None, "The prompt it was trained with, for instance 'a photo of sks dog'.")

    def check(self) -> None:
        """File, place and base are named."""
        require(bool(self.weights), "--weights is missing: name the authors' file.")
        require(
            self.pretrained_model_name_or_path is not None,
            "--pretrained_model_name_or_path is missing: the file does not say which base it was trained on.",
        )
        require_finite(self, "strength", above=0)


@dataclass(frozen=True, kw_only=True)
class PushConfig(Group):
    """The repository"""

    adapter: str | None = option(None, "The adapter file.")
    repo_id: str | None = option(None, "The model repository, owner/name; made where there is none.")
    private: bool = option(False, "Make a new repository private.")
    sheet: str | None = option(None, "A picture of samples for the card, for instance pictures/sheet.png.")
    lora: bool = option(False, "Of a foldable adapter, also share it as LoRA files for diffusers and ComfyUI.")

    def check(self) -> None:
        """There is something to share, and a place for it."""
        require(bool(self.adapter), "--adapter is missing: name the adapter file.")
        require(bool(self.repo_id), "--repo_id is missing: name the repository, owner/name.")


@dataclass(frozen=True, kw_only=True)
class PullConfig(Group):
    """The repository"""

    repo_id: str | None = option(None, "The model repository, owner/name.")
    revision: str | None = option(None, "Branch, tag or commit.")
    output_dir: str = option(".", "Folder for the adapter files.")

    def check(self) -> None:
        """The repository is named."""
        require(bool(self.repo_id), "--repo_id is missing: name the repository, owner/name.")
