"""The settings of a compression run, in groups."""

from dataclasses import dataclass

from comcat_diffusion.config import EMBEDDED, Group, option, require, require_at_least, require_finite

BY_OUTPUT = "output"
BUDGETS = PARAMETERS, MULTIPLY_ADDS, LATENCY = "parameters", "multiply-adds", "latency"
METHODS = (BY_OUTPUT, "energy", "search", "uniform", "matrix")
VISION, UNET = "vision", "unet-attention"


@dataclass(frozen=True, kw_only=True)
class ModelSettings(Group):
    """The model"""

    model: str | None = option(
        None,
        "Vision model of transformers, classifier or feature extractor (ViT, DeiT, BEiT, DINOv2, the picture half of "
        "CLIP or SigLIP) as hub id or folder; or a Stable Diffusion base: hub id, folder, or 'embedded'.",
        required="name the model to compress",
    )
    revision: str | None = option(None, "Branch, tag or commit of a hub model.")
    part: str = option(
        VISION,
        "A whole vision model, or the attentions of a Stable Diffusion base.",
        choices=(VISION, UNET),
        usual=True,
    )

    def check(self) -> None:
        """The model can have this part."""
        require(
            self.model != EMBEDDED or self.part == UNET,
            f"--model {EMBEDDED} is a Stable Diffusion base: compress its attentions with --part {UNET}.",
        )


@dataclass(frozen=True, kw_only=True)
class RankSettings(Group):
    """The ranks"""

    reduction: float = option(
        0.44, "Fraction of parameters to remove at least: of the whole model, or of a base's attentions.", usual=True
    )
    budget: str = option(
        PARAMETERS,
        "What the reduction is a fraction of: parameters, the multiply-adds of a picture, or the time of a pass, "
        "measured on this machine. The last two are for the method output.",
        choices=BUDGETS,
    )
    method: str | None = option(
        None,
        "How widths are chosen: by what the output loses on pictures, by energy under one threshold, by the paper's "
        "search, all alike, or by energy of every matrix without regard to heads. Default: output where a vision model "
        "has pictures to calibrate on, else energy.",
        choices=METHODS,
        usual=True,
    )
    multiple: int = option(1, "Ranks are multiples of this; 8 suits the kernels of a GPU.")
    search_steps: int = option(300, "Steps of the search.")

    def check(self) -> None:
        """Something goes and something stays."""
        require(
            0 < self.reduction < 1,
            f"--reduction must lie between 0 and 1 (0.44 removes 44 % of the parameters), not {self.reduction}.",
        )
        require_at_least(self, 1, "multiple", "search_steps")
        require(
            self.budget == PARAMETERS or self.method in (None, BY_OUTPUT),
            f"--budget {self.budget} is for --method {BY_OUTPUT}; the method {self.method} counts parameters.",
        )


@dataclass(frozen=True, kw_only=True)
class DataSettings(Group):
    """The data"""

    calibration_dir: str | None = option(
        None,
        "Folder of pictures like those to come, nested as you like: many different ones rather than many alike. "
        "Default: --train_dir, if there is one.",
        usual=True,
    )
    calibration_pictures: int | None = option(
        None, "Pictures to take from it, at random; more different ones keep more. Default: 256; for a search 1024."
    )
    train_dir: str | None = option(None, "One folder of pictures per class, to search and fine-tune on.", usual=True)
    eval_dir: str | None = option(
        None,
        "One folder of pictures per class, to measure top-1 on before and after; of a feature extractor any pictures.",
        usual=True,
    )
    calibration_prompt: list[str] = option(
        [], "Of a Stable Diffusion base: prompts like those to come. Default: a few plain ones."
    )
    num_inference_steps: int = option(20, "Of a Stable Diffusion base: denoising steps a picture.")
    batch_size: int | None = option(None, "Pictures at once. Default: 32; of a Stable Diffusion base 4.")

    def check(self) -> None:
        """Counts are positive and prompts say something."""
        require_at_least(self, 1, "calibration_pictures", "num_inference_steps", "batch_size")
        require(all(p.strip() for p in self.calibration_prompt), "--calibration_prompt is empty: say what to draw.")


@dataclass(frozen=True, kw_only=True)
class FinetuneSettings(Group):
    """The fine-tuning"""

    finetune_epochs: int = option(0, "Passes over the training data, the dense model being the teacher.", usual=True)
    random_crop: bool = option(
        False,
        "Learn from squares cut at random out of the training pictures, others every pass: few go further.",
    )
    learning_rate: float | None = option(
        None, "Peak learning rate. Default: 1e-4; of a feature extractor 2e-5, of a Stable Diffusion base 1e-5."
    )

    def check(self) -> None:
        """Numbers make sense."""
        require_at_least(self, 0, "finetune_epochs")
        require(
            self.finetune_epochs or not self.random_crop,
            "--random_crop is for the fine-tuning: say how many passes with --finetune_epochs.",
        )
        require_finite(self, "learning_rate", above=0)


@dataclass(frozen=True, kw_only=True)
class RunSettings(Group):
    """What is written"""

    output_dir: str = option(
        "compressed", "Folder for the compressed model and its report; it must be new or empty.", usual=True
    )
    seed: int = option(0, "Seed of everything random.")


@dataclass(frozen=True, kw_only=True)
class CompressConfig(RunSettings, FinetuneSettings, DataSettings, RankSettings, ModelSettings):
    """Settings of a compression run."""

    def check(self) -> None:
        """The data are of the kind that the part needs, and there are enough."""
        folders = [flag for flag in ("calibration_dir", "train_dir", "eval_dir") if getattr(self, flag) is not None]
        by_output = self.method == BY_OUTPUT or self.budget != PARAMETERS
        asked = f"--budget {self.budget}" if self.budget != PARAMETERS else f"--method {BY_OUTPUT}"
        if self.part == UNET:
            require(
                not by_output,
                f"{asked} is for vision models, whose blocks follow one another: of a base take --method energy.",
            )
            require(
                not self.random_crop,
                "--random_crop is for vision models: a Stable Diffusion base learns from its own latents.",
            )
            require(
                not folders and self.calibration_pictures is None,
                f"--{(folders or ['calibration_pictures'])[0]} is for vision models: a Stable Diffusion base is "
                "calibrated with --calibration_prompt.",
            )
            return
        require(
            not self.calibration_prompt,
            f"--calibration_prompt is for --part {UNET}: a vision model is calibrated with --calibration_dir.",
        )
        require(
            self.method != "search" or {"train_dir", "calibration_dir"} & set(folders),
            "--method search needs pictures to search on: name a --train_dir (or a --calibration_dir).",
        )
        require(
            not by_output or {"train_dir", "calibration_dir"} & set(folders),
            f"{asked} needs pictures to measure on: name a --calibration_dir (or a --train_dir).",
        )
        require(
            not self.finetune_epochs or "train_dir" in folders,
            "--finetune_epochs needs pictures to learn from: name a --train_dir.",
        )

    @property
    def pictures_seen(self) -> int:
        """How many pictures calibrate a vision model."""
        return self.calibration_pictures or (1024 if self.method == "search" else 256)

    @property
    def at_once(self) -> int:
        """Pictures in a batch."""
        return self.batch_size or (4 if self.part == UNET else 32)
