"""What a generation run is asked for, checked against the files' headers: nothing here waits for torch."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from comcat_diffusion import atomic
from comcat_diffusion.adapters.header import same_words
from comcat_diffusion.config import weighted
from comcat_diffusion.generation.chosen import Chosen, base_of, choose
from comcat_diffusion.generation.config import GenerateConfig
from comcat_diffusion.generation.masks import asked_regions
from comcat_diffusion.places import place_of
from comcat_diffusion.training.images import PictureError, read
from comcat_diffusion.words import calls, filled


@dataclass(frozen=True)
class Order:
    """Settings whose words, files and folders are known to be there."""

    config: GenerateConfig
    chosen: Sequence[Chosen]
    base: str
    prompts: Sequence[str]  # with the subject's words filled in
    loras: Sequence[tuple[Path, float]]  # file and weight
    masks: dict[int, Image.Image]  # by the number of their adapter
    references: Sequence[Image.Image]  # of the subject itself, for the sheet
    folder: Path
    notes: Sequence[str]  # what is worth knowing, sentences


def order_of(config: GenerateConfig) -> Order:
    """Look at all that is named but weights; the folder of the pictures is made. Raises ValueError or OSError."""
    chosen = [choose(text, config.scale) for text in config.adapter]
    for one in chosen if config.merge else ():
        if any(part.get("trigger") for part in one.header.config.values()):
            raise ValueError(
                f"--merge: {one.path} acts from its trigger on, which merged weights cannot tell: leave --merge out, "
                "or train it again with --everywhere."
            )
    prompts = [_checked(prompt, chosen, config.any_prompt) for prompt in config.prompt]
    masks = asked_regions(config.region, [one.path for one in chosen], _shape(config))
    loras = [_lora(text) for text in config.lora]
    base = base_of(config, chosen)
    place_of(base)
    everywhere = [(one.path.name, one.header) for number, one in enumerate(chosen) if number not in masks]
    apart = "train one with another word, or give each a part of the picture with --region."
    notes = [f"{sentence}: {apart}" for sentence in same_words(everywhere)]
    references = [_reference(Path(text).expanduser()) for text in config.reference_images]
    folder = atomic.make_folder(config.output_dir, "--output_dir")
    return Order(config, chosen, base, prompts, loras, masks, references, folder, notes)


def _checked(prompt: str, chosen: Sequence[Chosen], any_prompt: bool) -> str:
    if not chosen:
        return prompt
    prompt = filled(prompt, chosen[0].subjects[0])
    subjects = [subject for one in chosen for subject in one.subjects]
    if any_prompt or any(calls(prompt, subject) for subject in subjects if subject.trigger):
        return prompt
    wanted = " or ".join(f"'{subject.phrase}'" for subject in subjects)
    raise ValueError(f"The prompt '{prompt}' does not name the subject: write {wanted}, or allow it with --any_prompt.")


def _shape(config: GenerateConfig) -> tuple[int, int] | None:
    """Height and width of the pictures, or their proportions; None where a side is the base's own."""
    height, width = config.height or config.resolution, config.width or config.resolution
    if height is None and width is None:
        return 1, 1
    return (height, width) if height and width else None


def _reference(path: Path) -> Image.Image:
    try:
        return read(path)[0]
    except PictureError as error:
        raise ValueError(f"--reference_images: {error}") from error


def _lora(text: str) -> tuple[Path, float]:
    path, weight = weighted(text, flag="--lora")
    if not Path(path).is_file() or Path(path).suffix != ".safetensors":
        raise ValueError(f"--lora {path}: there is no such .safetensors file.")
    return Path(path), weight
