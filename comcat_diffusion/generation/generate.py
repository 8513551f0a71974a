"""The generation story: a base, adapters and prompts in; pictures and a contact sheet out."""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from diffusers import DiffusionPipeline
from safetensors import SafetensorError

from comcat_diffusion import bases
from comcat_diffusion.adapters.focus import placeable
from comcat_diffusion.adapters.merge import merge_adapters, unload_adapters
from comcat_diffusion.adapters.parts import denoiser
from comcat_diffusion.adapters.placing import set_adapters
from comcat_diffusion.adapters.proportions import refuse_other_shape
from comcat_diffusion.adapters.regions import set_regions
from comcat_diffusion.adapters.store import load_adapter
from comcat_diffusion.adapters.texts import texts_of
from comcat_diffusion.families.known import family_of
from comcat_diffusion.generation.chosen import Chosen, files_of
from comcat_diffusion.generation.config import GenerateConfig
from comcat_diffusion.generation.order import Order, order_of
from comcat_diffusion.generation.pictures import (
    Drawing,
    draw,
    made_by,
    sampling_of,
    save_png,
    slug,
    use_sampler,
)
from comcat_diffusion.generation.sheet import Row, contact_sheet, footer_of
from comcat_diffusion.words import calls

OnPicture = Callable[[int, int], None]


@dataclass(frozen=True)
class Pictures:
    """What a generation run leaves behind."""

    files: list[Path]
    sheet: Path


def generate(
    config: GenerateConfig,
    on_picture: OnPicture = lambda done, total: None,
    note: Callable[[str], None] = lambda text: None,
) -> Pictures:
    """Draw every prompt from every seed; returns where the pictures and the sheet are.

    `note` is told what is worth knowing, a sentence at a time.

    Raises ValueError or OSError for bad input before anything is drawn.
    """
    return drawn(order_of(config), on_picture, note)


def drawn(
    order: Order,
    on_picture: OnPicture,
    note: Callable[[str], None],
    load: Callable[..., DiffusionPipeline] = bases.asked_base,
) -> Pictures:
    """What is ordered, drawn; see `generate`. Prompts and adapters are checked, but not against the base.

    `load` is for whoever keeps a base: it takes what `bases.asked_base` does and gives a pipeline without adapters.
    """
    for text in order.notes:
        note(text)
    config, prompts, chosen = order.config, order.prompts, order.chosen
    pipe = _pipeline(order, load)
    for text in family_of(pipe).remarks(pipe):
        note(text)
    size = bases.asked_size(pipe, config.height, config.width, config.resolution)
    for number, mask in order.masks.items():
        refuse_other_shape(chosen[number].path.stem, np.asarray(mask), *size)
    for prompt in prompts:
        _refuse_deaf(pipe, prompt, chosen, config.any_prompt)
    set_regions(pipe, {_name(number): mask for number, mask in order.masks.items()})
    drawings = [Drawing(prompt, config.seed + n) for prompt in prompts for n in range(config.num_images)]
    sampling = sampling_of(config, config.batch_size, order.base, pipe)
    sampling = replace(sampling, size=size if config.height or config.width else None)
    total = len(drawings) * (2 if config.compare else 1)

    if config.merge:
        merge_adapters(pipe)

    files, after, before = [], [], []
    settings = made_by(pipe, order.base, sampling) | {"adapters": files_of(chosen)}
    settings |= {"loras": list(config.lora), "regions": list(config.region)}
    called = {_name(n): one.words for n, one in enumerate(chosen)} if config.keep_background else {}
    words = placeable(pipe, called)
    settings |= {"keep_background": True} if words else {}
    for drawing, picture in zip(drawings, draw(pipe, drawings, sampling, words), strict=True):
        number = prompts.index(drawing.prompt)
        path = order.folder / f"{number:02d}-{slug(drawing.prompt)}-{drawing.seed}.png"
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
    seeds = range(config.seed, config.seed + config.num_images)
    sheet = contact_sheet(rows, prompts, len(seeds), footer=footer_of(settings, seeds), references=order.references)
    about = {"prompt": " | ".join(prompts), "seeds": list(seeds), **settings}
    sheet = save_png(sheet, order.folder / "sheet.png", about, keep=True)
    return Pictures(files, sheet)


def _refuse_deaf(pipe: DiffusionPipeline, prompt: str, chosen: Sequence[Chosen], any_prompt: bool) -> None:
    """Raise ValueError for a prompt that names the subject only where the text encoder does not read any more."""
    family, about = family_of(pipe), (type(pipe).__name__, denoiser(pipe).config)
    tokenizer = getattr(pipe, family.tokenizer)
    most = family.most_tokens(tokenizer, *about)
    read = texts_of(pipe.tokenizer, family.reading(pipe)).read(prompt, family.states(tokenizer, *about))
    named = [subject for one in chosen for subject in one.subjects if calls(prompt, subject)]
    if named and not any_prompt and not any(read.acts([subject.trigger]).any() for subject in named):
        count = len(tokenizer(prompt, truncation=False, verbose=False).input_ids)
        raise ValueError(
            f"The prompt '{prompt[:60]}...' has {count} tokens, of which the text encoder reads {most}, and "
            f"'{named[0].phrase}' comes later: name it earlier, or allow it with --any_prompt."
        )


def _name(number: int) -> str:
    return f"adapter_{number}"


def _pipeline(order: Order, load: Callable[..., DiffusionPipeline]) -> DiffusionPipeline:
    config, chosen = order.config, order.chosen
    device = bases.asked_device(config.device)
    pipe = load(config, bases.asked_precision(config.precision, device, order.base, config.base_config), order.base)
    use_sampler(pipe, config.scheduler)
    names = [_name(number) for number in range(len(chosen))]
    with warnings.catch_warnings():  # of adapters that wait for one word, which has been said
        warnings.filterwarnings("ignore", message=".*so their subjects mix")
        for name, one in zip(names, chosen, strict=True):
            load_adapter(pipe, one.path, name, any_weights=config.any_weights)
    loras = {f"lora_{number}": lora for number, lora in enumerate(order.loras)}
    for name, (path, _) in loras.items():
        _load_lora(pipe, path, name)
    if chosen or loras:
        weights = [one.scale for one in chosen] + [weight for _, weight in loras.values()]
        set_adapters(pipe, [*names, *loras], weights)
    return pipe.to(device)


def _load_lora(pipe: DiffusionPipeline, path: Path, name: str) -> None:
    if not hasattr(pipe, "load_lora_weights"):
        raise ValueError(f"--lora {path}: diffusers loads no LoRA into a {type(pipe).__name__}; leave it out.")
    try:
        pipe.load_lora_weights(str(path.parent), weight_name=path.name, adapter_name=name, local_files_only=True)
    except (ValueError, KeyError, RuntimeError, OSError, SafetensorError) as error:
        raise ValueError(f"--lora {path} does not load onto this base: {str(error).splitlines()[0]}") from error
