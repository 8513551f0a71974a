"""The settings of a generation run."""

from dataclasses import dataclass

from comcat_diffusion.config import (
    BaseSettings,
    Group,
    option,
    require,
    require_at_least,
    require_finite,
    require_scale,
    require_seed,
)

ADAPTERS = "Adapter files, each with a scale after a colon if wanted: dog.safetensors:0.8."
TRAINED_STEPS = 1000  # the noise levels that a base knows


@dataclass(frozen=True, kw_only=True)
class AdapterFiles(Group):
    """The adapters"""

    adapter: list[str] = option([], ADAPTERS, usual=True)
    scale: float = option(1.0, "Scale of the adapters that name none.", usual=True)
    any_weights: bool = option(False, "Allow a base of the same shape with other weights (a fine-tune).")
    keep_background: bool = option(
        True,
        "Let an adapter act only where the model looks at its subject's words: the rest stays the base's picture of "
        "the same seed, which is drawn first, in as much time again. For adapters that wait for a trigger.",
        usual=True,
    )

    def check(self) -> None:
        """A scale is a number."""
        require_scale(self.scale)


@dataclass(frozen=True, kw_only=True)
class AdapterSettings(AdapterFiles):
    """What goes with them"""

    lora: list[str] = option(
        [], "LoRA files of others (LCM, styles, ...), each with a weight after a colon if wanted.", usual=True
    )
    region: list[str] = option(
        [],
        "Where an adapter acts: the name of its file without the ending, and a mask that is white there: dog=left.png.",
        usual=True,
    )
    merge: bool = option(False, "Merge the adapters into the weights before drawing.")

    def check(self) -> None:
        """Merging has something to merge."""
        require(bool(self.adapter) or not self.merge, "--merge needs an --adapter.")
        require(
            not (self.region and self.merge), "--merge and --region exclude each other: merged ones act everywhere."
        )
        require(bool(self.adapter) or not self.region, "--region needs an --adapter.")
        require(not (self.lora and self.merge), "--merge and --lora exclude each other: a LoRA would stay outside.")


@dataclass(frozen=True, kw_only=True)
class SamplingSettings(Group):
    """How pictures are drawn"""

    negative_prompt: str | None = option(None, "What not to draw.", usual=True)
    seed: int = option(
        0, "First seed. The same seed gives a machine the same picture, whatever the batch size.", usual=True
    )
    num_inference_steps: int = option(25, "Denoising steps.", usual=True)
    guidance_scale: float | None = option(
        None, "Classifier-free guidance; 1 turns it off. Default: 7.5, on the embedded base 2.", usual=True
    )
    scheduler: str | None = option(
        None, "Sampler class of diffusers, for instance EulerDiscreteScheduler. Default: the base's.", usual=True
    )
    resolution: int | None = option(None, "Side of square pictures in pixels. Default: the base's own.")

    def check(self) -> None:
        """Numbers make sense."""
        require_at_least(self, 1, "num_inference_steps", "resolution")
        require(
            self.num_inference_steps <= TRAINED_STEPS,
            f"--num_inference_steps must be at most {TRAINED_STEPS}, not {self.num_inference_steps}.",
        )
        require_seed(self.seed)
        require_finite(self, "guidance_scale")


@dataclass(frozen=True, kw_only=True)
class DrawingSettings(SamplingSettings):
    """The pictures"""

    prompt: list[str] = option(
        [],
        "What to draw; {subject} stands for the first adapter's trigger and class.",
        required="say what to draw",
    )
    any_prompt: bool = option(False, "Allow prompts without the adapter's trigger.")
    num_images: int = option(4, "Pictures per prompt, from consecutive seeds.", usual=True)
    height: int | None = option(None, "Height of the pictures in pixels. Default: the --resolution.", usual=True)
    width: int | None = option(None, "Their width. Default: the --resolution.", usual=True)
    compare: bool = option(False, "Also draw every picture without adapters, as the row above.", usual=True)
    reference_images: list[str] = option(
        [], "Pictures of the subject to show at the left of the sheet, for instance those that it was learned from."
    )

    def check(self) -> None:
        """Prompts say something, and sizes are some."""
        require(all(p.strip() for p in self.prompt), "--prompt is empty: say what to draw.")
        require_at_least(self, 1, "num_images", "height", "width")


@dataclass(frozen=True, kw_only=True)
class MachineSettings(Group):
    """The machine"""

    batch_size: int = option(4, "Pictures drawn at once.")
    precision: str | None = option(
        None,
        "Precision of the base. Default: fp16 on a GPU, bf16 on a CPU that is fast in it, else fp32.",
        choices=("fp32", "fp16", "bf16"),
    )
    device: str | None = option(None, "cpu, cuda, mps, ... Default: the fastest that is there.")
    output_dir: str = option("pictures", "Folder for the pictures and the contact sheet.", usual=True)

    def check(self) -> None:
        """A batch holds at least one picture."""
        require_at_least(self, 1, "batch_size")


@dataclass(frozen=True, kw_only=True)
class GenerateConfig(MachineSettings, DrawingSettings, BaseSettings, AdapterSettings):
    """Settings of a generation run: prompts x seeds, with any number of adapters. The base is the first adapter's."""

    adapter: list[str] = option(
        [], f"{ADAPTERS} Required, unless a --pretrained_model_name_or_path is to draw alone.", usual=True
    )

    def check(self) -> None:
        """There is a base to draw with."""
        require(
            bool(self.adapter) or self.pretrained_model_name_or_path is not None,
            "--adapter is missing (or, to draw with a base alone, --pretrained_model_name_or_path).",
        )
