"""The settings of an evaluation, in groups."""

from dataclasses import dataclass

from comcat_diffusion.config import BaseSettings, Group, option, require, require_at_least
from comcat_diffusion.generation.config import ADAPTERS, AdapterFiles, MachineSettings, SamplingSettings

NONE = "none"


@dataclass(frozen=True, kw_only=True)
class SubjectSettings(Group):
    """What is asked for"""

    run_dir: str | None = option(
        None, "Folder of a training run: its checkpoints and its adapter, side by side.", usual=True
    )
    subject_dir: str | None = option(
        None,
        "Folder with pictures of the subject that nothing was trained on.",
        required="name a folder with pictures of the subject that no adapter was trained on",
    )
    instance_data_dir: str | None = option(
        None, "Folder with the training pictures. Default: the one that run.toml beside an adapter names."
    )
    force: bool = option(False, "Allow training pictures in --subject_dir; the report says so.")
    prompts: str | None = option(
        None,
        "Text file of prompts for the subject, one a line, with {subject} or its trigger. Default: a few.",
        usual=True,
    )
    drift_prompts: str | None = option(
        None, "Text file of prompts that have nothing to do with the subject. Default: a few."
    )
    class_prompt: str | None = option(
        None, "Prompt of the class. Default: the instance prompt without the trigger.", usual=True
    )
    seeds: int = option(4, "Pictures per prompt, from consecutive seeds.", usual=True)

    def check(self) -> None:
        """There are seeds, and words for the class."""
        require(self.class_prompt is None or bool(self.class_prompt.strip()), "--class_prompt is empty: say the class.")
        require_at_least(self, 1, "seeds")


@dataclass(frozen=True, kw_only=True)
class FeatureSettings(Group):
    """How they are compared"""

    clip_model: str | None = option(
        None,
        "CLIP that compares pictures with prompts: hub id, folder, or 'embedded'. Default: "
        "openai/clip-vit-base-patch32; on the embedded base its own.",
    )
    dino_model: str | None = option(
        None,
        "DINOv2 that compares pictures with each other: hub id, folder, or 'none' to leave that to the CLIP. Default: "
        "facebook/dinov2-small; on the embedded base none.",
    )
    cache_dir: str | None = option(None, "Folder for the features of pictures. Default: features in --output_dir.")


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(MachineSettings, FeatureSettings, SamplingSettings, SubjectSettings, BaseSettings, AdapterFiles):
    """Settings of an evaluation: adapters side by side, prompts x seeds. The base is the first adapter's."""

    adapter: list[str] = option([], f"{ADAPTERS} Required, unless there is a --run_dir.", usual=True)
    output_dir: str = option("evaluation", "Folder for the report, its pictures and the features.", usual=True)

    def check(self) -> None:
        """There is an adapter to judge."""
        require(
            bool(self.adapter) or self.run_dir is not None, "--adapter is missing (or --run_dir, the folder of a run)."
        )
