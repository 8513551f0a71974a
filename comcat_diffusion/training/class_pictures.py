"""The class that a subject belongs to: its prompt, and pictures of it, drawn by the base where they are missing."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from PIL import Image

from comcat_diffusion import atomic, bases
from comcat_diffusion.adapters.parts import denoiser
from comcat_diffusion.families.family import moved
from comcat_diffusion.families.known import family_of
from comcat_diffusion.generation.pictures import Drawing, Sampling, draw, made_by, save_png
from comcat_diffusion.training import folder
from comcat_diffusion.training.config import TrainConfig
from comcat_diffusion.training.dataset import Example
from comcat_diffusion.words import Subject, without_trigger

STEPS = 25


def class_prompt_of(config: TrainConfig, subject: Subject, subjects: Sequence[Subject]) -> str:
    """The class prompt of a subject: the one given, or its prompt without the trigger. Raises ValueError."""
    one = config.all_subjects()[list(subjects).index(subject)]
    derived = without_trigger(one.prompt or "", subject)
    if one.class_prompt or (subject.class_word and derived):
        return one.class_prompt or derived
    raise ValueError(
        f"--class_prompt is missing: what kind of thing is '{subject.trigger}'? For instance 'a photo of a dog'."
    )


def class_pictures(
    config: TrainConfig, pipe: DiffusionPipeline, subjects: Sequence[Subject], note: Callable[[str], None]
) -> list[Example]:
    """Examples of every subject's class; the folder is filled up to `num_class_images` first. A cut run goes on."""
    examples = []
    for one, subject in zip(config.all_subjects(), subjects, strict=True):
        prompt = class_prompt_of(config, subject, subjects)
        place = atomic.make_folder(one.class_data_dir or Path(config.output_dir) / "class", "--class_data_dir")
        there = sum(path.suffix.lower() in folder.SUFFIXES for path in place.iterdir())
        drawings = (Drawing(prompt, config.seed + number) for number in range(config.num_class_images))
        # the user's own pictures count as well, whatever they are called
        free = [drawing for drawing in drawings if not (place / _name(drawing)).exists()]
        missing = free[: max(0, config.num_class_images - there)]
        if missing:
            note(f"Drawing {len(missing)} pictures of '{prompt}' into {place}.")
            pipe.to(pipe.vae.device)  # drawing takes all of it
        guidance = bases.default_guidance(config.pretrained_model_name_or_path, pipe)
        sampling = Sampling(STEPS, guidance, resolution=config.resolution)
        settings = made_by(pipe, config.pretrained_model_name_or_path, sampling)
        for drawing, picture in zip(missing, _drawn(pipe, missing, sampling), strict=True):
            save_png(picture, place / _name(drawing), {"prompt": prompt, "seed": drawing.seed, **settings})
        shots = folder.find(place).shots[: config.num_class_images]
        examples += [Example(shot.path, prompt, subject) for shot in shots]
    return examples


def _drawn(pipe: DiffusionPipeline, drawings: list[Drawing], sampling: Sampling) -> Iterator[Image.Image]:
    """As `draw`, also where a heavy text encoder reads in another precision than the denoiser is in."""
    family, model = family_of(pipe), denoiser(pipe)
    if not family.heavy or not drawings:
        yield from draw(pipe, drawings, sampling)
        return
    with torch.no_grad():
        read = family.encode(pipe, [drawings[0].prompt, ""])  # they are all of one prompt
    asked = family.conditions(pipe, {name: moved(part, model.device, model.dtype) for name, part in read.items()})
    asked |= {**family.drawing(pipe), **family.guided(sampling.guidance_scale)}
    asked |= {"num_inference_steps": sampling.num_inference_steps}
    encoders = family.encoders(pipe)
    for name in encoders:  # whose precision a pipeline would go by
        setattr(pipe, name, None)
    try:
        for drawing in drawings:
            noise = torch.Generator("cpu").manual_seed(drawing.seed)
            yield pipe(**asked, height=sampling.resolution, width=sampling.resolution, generator=noise).images[0]
    finally:
        for name, encoder in encoders.items():
            setattr(pipe, name, encoder)


def _name(drawing: Drawing) -> str:
    return f"class-{drawing.seed:06d}.png"
