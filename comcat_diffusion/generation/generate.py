"""The generation story: a base, adapters and prompts in; pictures and a contact sheet out."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from diffusers import DiffusionPipeline
from safetensors import SafetensorError
from transformers import CLIPTokenizer

from comcat_diffusion import atomic, bases
from comcat_diffusion.adapters.header import same_words
from comcat_diffusion.adapters.merge import merge_adapters, unload_adapters
from comcat_diffusion.adapters.regions import set_regions
from comcat_diffusion.adapters.store import load_adapter
from comcat_diffusion.adapters.texts import texts_of
from comcat_diffusion.config import weighted
from comcat_diffusion.generation.chosen import Chosen, base_of, choose, made_by
from comcat_diffusion.generation.config import GenerateConfig
from comcat_diffusion.generation.masks import asked_regions
from comcat_diffusion.generation.pictures import (
    Drawing,
    draw,
    sampling_of,
    save_png,
    slug,
    use_sampler,
)
from comcat_diffusion.generation.sheet import Row, contact_sheet
from comcat_diffusion.words import calls, filled


@dataclass(frozen=True)
class Pictures:
    """What a generation run leaves behind."""

    files: list[Path]
    sheet: Path


def generate(
    config: GenerateConfig,
    on_picture: Callable[[int, int], None] = lambda done, total: None,
    note: Callable[[str], None] = lambda text: None,
) -> Pictures:
    """Draw every prompt from every seed; returns where the pictures and the sheet are.

    `note` is told what is worth knowing, a sentence at a time.

    Raises ValueError or OSError for bad input before anything is drawn.
    """
    # Prompts and adapters are checked from the files' headers, before the base is loaded.
    chosen = [choose(text, config.scale) for text in config.adapter]
    for one in chosen if config.merge else ():
        if any(part.get("trigger") for part in one.header.config.values()):
            raise ValueError(
                f"--merge: {one.path} acts from its trigger on, which merged weights cannot tell: leave --merge out, "
                "or train it again with --everywhere."
            )
    prompts = [_checked(prompt, chosen, config.any_prompt) for prompt in config.prompt]
    masks = asked_regions(config.region, [one.path for one in chosen])
    everywhere = [(one.path.name, one.header) for number, one in enumerate(chosen) if number not in masks]
    for sentence in same_words(everywhere):
        note(f"{sentence}: train one with another word, or give each a part of the picture with --region.")
    folder = atomic.make_folder(config.output_dir, "--output_dir")

    base = base_of(config, chosen)
    pipe = _pipeline(config, chosen, base)
    bases.asked_resolution(pipe, config.resolution)
    for prompt in prompts:
        _refuse_deaf(pipe.tokenizer, prompt, chosen, config.any_prompt)
    set_regions(pipe, {_name(number): mask for number, mask in masks.items()})
    drawings = [Drawing(prompt, config.seed + n) for prompt in prompts for n in range(config.num_images)]
    sampling = sampling_of(config, config.batch_size, base)
    total = len(drawings) * (2 if config.compare else 1)

    if config.merge:
        merge_adapters(pipe)

    files, after, before = [], [], []
    settings = made_by(pipe, base, chosen, sampling) | {"loras": list(config.lora), "regions": list(config.region)}
    for drawing, picture in zip(drawings, draw(pipe, drawings, sampling), strict=True):
        number = prompts.index(drawing.prompt)
        path = folder / f"{number:02d}-{slug(drawing.prompt)}-{drawing.seed}.png"
        files.append(save_png(picture, path, {"prompt": drawing.prompt, "seed": drawing.seed, **settings}, keep=True))
        after.append(picture)
        on_picture(len(after), total)
    # The row before is drawn by the same pipeline without its adapters and their words.
    if config.compare and chosen:
        unload_adapters(pipe)
        for picture in draw(pipe, drawings, sampling):
            before.append(picture)
            on_picture(len(after) + len(before), total)
    rows = [Row("before", before), Row("after", after)] if before else [Row("", after)]
    about = {"prompt": " | ".join(prompts), **settings}
    sheet = save_png(contact_sheet(rows, prompts, config.num_images), folder / "sheet.png", about, keep=True)
    return Pictures(files, sheet)


def _checked(prompt: str, chosen: list[Chosen], any_prompt: bool) -> str:
    if not chosen:
        return prompt
    prompt = filled(prompt, chosen[0].subjects[0])
    subjects = [subject for one in chosen for subject in one.subjects]
    if any_prompt or any(calls(prompt, subject) for subject in subjects if subject.trigger):
        return prompt
    wanted = " or ".join(f"'{subject.phrase}'" for subject in subjects)
    raise ValueError(f"The prompt '{prompt}' does not name the subject: write {wanted}, or allow it with --any_prompt.")


def _refuse_deaf(tokenizer: CLIPTokenizer, prompt: str, chosen: list[Chosen], any_prompt: bool) -> None:
    """Raise ValueError for a prompt that names the subject only where the text encoder does not read any more."""
    read = texts_of(tokenizer).read(prompt, tokenizer.model_max_length)
    named = [subject for one in chosen for subject in one.subjects if calls(prompt, subject)]
    if named and not any_prompt and not any(read.acts([subject.trigger]).any() for subject in named):
        count = len(tokenizer(prompt, truncation=False, verbose=False).input_ids)
        raise ValueError(
            f"The prompt '{prompt[:60]}...' has {count} tokens, of which the text encoder reads {len(read.ends)}, and "
            f"'{named[0].phrase}' comes later: name it earlier, or allow it with --any_prompt."
        )


def _name(number: int) -> str:
    return f"adapter_{number}"


def _pipeline(config: GenerateConfig, chosen: list[Chosen], base: str) -> DiffusionPipeline:
    device = bases.asked_device(config.device)
    pipe = bases.asked_base(config, bases.asked_precision(config.precision, device, base), base)
    use_sampler(pipe, config.scheduler)
    names = [_name(number) for number in range(len(chosen))]
    with warnings.catch_warnings():  # of adapters that wait for one word, which has been said
        warnings.filterwarnings("ignore", message=".*so their subjects mix")
        for name, one in zip(names, chosen, strict=True):
            load_adapter(pipe, one.path, name, any_weights=config.any_weights)
    loras = {f"lora_{number}": weighted(text, flag="--lora") for number, text in enumerate(config.lora)}
    for name, (path, _) in loras.items():
        _load_lora(pipe, Path(path), name)
    if chosen or loras:
        weights = [one.scale for one in chosen] + [weight for _, weight in loras.values()]
        pipe.set_adapters([*names, *loras], weights)
    return pipe.to(device)


def _load_lora(pipe: DiffusionPipeline, path: Path, name: str) -> None:
    if not path.is_file() or path.suffix != ".safetensors":
        raise ValueError(f"--lora {path}: there is no such .safetensors file.")
    try:
        pipe.load_lora_weights(str(path.parent), weight_name=path.name, adapter_name=name, local_files_only=True)
    except (ValueError, KeyError, RuntimeError, OSError, SafetensorError) as error:
        raise ValueError(f"--lora {path} does not load onto this base: {str(error).splitlines()[0]}") from error
