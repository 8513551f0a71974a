"""A subject taught as `comcat train` teaches it, with all of its defaults but those that are named."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from diffusers import DiffusionPipeline

from comcat_diffusion import bases
from comcat_diffusion.adapters.focus import placeable
from comcat_diffusion.adapters.store import load_adapter
from comcat_diffusion.training.config import TrainConfig
from comcat_diffusion.training.customize import Silent, customize
from recipe.subject import TRAIN, TRIGGER, picture


@dataclass(frozen=True)
class Taught:
    """A pipeline with an adapter, its file, and what that took: seconds of the steps alone."""

    pipe: DiffusionPipeline
    file: Path
    parameters: int
    seconds: float


def taught(
    subject: str,
    seed: int,
    folder: Path,
    name: str,
    captions: Sequence[str] | None = None,
    base: str = bases.EMBEDDED,
    trigger: str = TRIGGER,
    **settings: object,
) -> Taught:
    """Train on the pictures of a made-up subject in a folder; with captions, or from their folder's prompt alone.

    Captions name it by its trigger.
    """
    pictures = folder / "pictures"
    pictures.mkdir(parents=True, exist_ok=True)
    for number, pose in enumerate(TRAIN, start=1):
        picture(subject, pose).save(pictures / f"{number}.png")
        if captions:
            (pictures / f"{number}.txt").write_text(captions[number - 1])
    clock = _Clock()
    config = TrainConfig(
        instance_data_dir=str(pictures),
        instance_prompt=f"a photo of {trigger} {subject}",
        seed=seed,
        output_dir=str(folder),
        overwrite=True,
        skip_final_inference=True,
        pretrained_model_name_or_path=base,
        **settings,
    )
    made = customize(config, clock)
    pipe = bases.load_base(base)
    load_adapter(pipe, made.adapter, name)
    return Taught(pipe, made.adapter, made.parameters, clock.seconds)


def words(pipe: DiffusionPipeline, subject: str, name: str) -> dict:
    """What `comcat generate` places such an adapter by, to keep the background."""
    return placeable(pipe, {name: [f"{TRIGGER} {subject}", TRIGGER]})


class _Clock(Silent):
    """A watcher that adds up what steps take."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def step(self, done: object, total: int, peak_bytes: int) -> None:
        """Another step."""
        self.seconds += done.seconds
