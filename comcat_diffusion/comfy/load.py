"""Putting an adapter file on a model and a CLIP of ComfyUI, as strictly as `load_adapter` does on a pipeline."""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn

from comcat_diffusion.adapters.fingerprint import layout_of
from comcat_diffusion.adapters.header import AdapterFileError, Header, called_by, read_adapter
from comcat_diffusion.adapters.model import of_pattern
from comcat_diffusion.adapters.regions import checked_mask
from comcat_diffusion.adapters.store import Fitting, expected_shapes, read_fitting
from comcat_diffusion.adapters.tied import scattered, sides_of
from comcat_diffusion.comfy.guests import Guest, guests_of, invited, seated
from comcat_diffusion.comfy.names import (
    ENCODERS,
    fingerprint_of,
    prediction_of,
    text_as_transformers,
    text_names,
    unet_as_diffusers,
    unet_names,
)
from comcat_diffusion.comfy.text import SAID, Tokenizer, Tokens, joined
from comcat_diffusion.config import require_scale
from comcat_diffusion.export.lora import export_adapter


def load(
    model: object, clip: object, path: str | Path, strength: float = 1.0, any_weights: bool = False
) -> tuple[object, object, Header]:
    """Clones of a model and a CLIP with an adapter; those that are given stay as they are.

    Everything is checked before. Raises AdapterFileError for a damaged file or another base, ValueError for a model of
    a kind that is not known; `any_weights` admits a fine-tune of the base.
    """
    require_scale(strength, "The strength")
    path = Path(path)
    unet, roots = model.model.diffusion_model, _roots(clip)
    trained = read_adapter(path).fingerprint
    encoders = {part: _encoder(clip, part, root, path) for part, root in roots.items()}
    parts = {"unet": unet_as_diffusers(model)} | {part: text_as_transformers(*own) for part, own in encoders.items()}
    present = fingerprint_of(parts["unet"], prediction_of(model), trained)
    fitting = read_fitting(parts, present, path, any_weights, "the model of this node")
    names = {"unet": {own: f"diffusion_model.{name}" for own, name in unet_names(unet).items()}}
    for part, encoder in encoders.items():
        names[part] = {own: f"{roots[part]}.{name}" for own, name in text_names(*encoder).items()}
    own = {part: _guest(path, part, fitting, parts[part], names[part], strength) for part in fitting.configs}
    made_model, made_clip = model.clone(), clip.clone()
    if "unet" in own:
        made_model = seated(model, invited(guests_of(model), own.pop("unet")))
    if own:
        first, *others = own.values()
        for other in others:
            first = replace(first, factors={**first.factors, **other.factors}, scales={**first.scales, **other.scales})
        made_clip.patcher = seated(clip.patcher, invited(guests_of(clip.patcher), first))
    return made_model, listening(made_clip, fitting.tokens), fitting.header


def load_unet(
    patcher: object, path: str | Path, strength: float = 1.0, any_weights: bool = False
) -> tuple[object, Header]:
    """A clone of a model alone with an adapter of its U-Net; see `load`."""
    require_scale(strength, "The strength")
    path, shell = Path(path), unet_as_diffusers(patcher)
    present = fingerprint_of(shell, prediction_of(patcher), read_adapter(path).fingerprint)
    fitting = read_fitting({"unet": shell}, present, path, any_weights, "this model")
    names = {own: f"diffusion_model.{name}" for own, name in unet_names(patcher.model.diffusion_model).items()}
    guest = _guest(path, "unet", fitting, shell, names, strength)
    return seated(patcher, invited(guests_of(patcher), guest)), fitting.header


def save_lora(model: object, path: str | Path, output: str | Path, half: bool = False) -> list[Path]:
    """Write an adapter file as a LoRA that every program reads; `model` is its base. Raises as exporting does."""
    unet = {"unet": unet_as_diffusers(model)}
    trained = read_adapter(path)
    if layout_of(unet["unet"]) != trained.fingerprint.get("layout"):
        raise AdapterFileError(f"{path} was trained on '{trained.base_model}', which this model is not.")
    made = export_adapter(path, output, dtype=torch.float16 if half else torch.float32, models=unet)
    return list(made.files)


def _roots(clip: object) -> dict[str, str]:
    """Where text encoders are in ComfyUI's model of all, by what we call those that are there."""
    there = clip.cond_stage_model
    found = {part: [name for name in names if hasattr(there, name)] for part, names in ENCODERS.items()}
    return {part: f"{names[0]}.transformer" for part, names in found.items() if names}


def _encoder(clip: object, part: str, root: str, path: Path) -> tuple[nn.Module, str, str]:
    """A text encoder, its kind, and what names of its modules in a file begin with: some classes have it, some not."""
    with safe_open(path, "pt") as file:
        names = list(file.keys())
    within = "text_model." if any(name.startswith(f"{part}.text_model.") for name in names) else ""
    return clip.cond_stage_model.get_submodule(root), root.partition(".")[0], within


def _guest(
    path: Path, part: str, fitting: Fitting, shell: nn.Module, names: Mapping[str, str], strength: float
) -> Guest:
    config = fitting.configs[part]
    if config.modules_to_save:
        raise AdapterFileError(f"{path} trains whole modules, which no ComfyUI node can put in place.")
    if config.cores:
        raise AdapterFileError(f"{path} holds cores, which no ComfyUI node can put in place: make a LoRA of it first.")
    own = {n.removeprefix(f"{part}."): t for n, t in fitting.tensors.items() if n.startswith(f"{part}.")}
    if config.tied:
        shapes = expected_shapes(shell, replace(config, tied=False))
        own = scattered(own, shapes, sides_of(shell, shapes))
    factors: dict[str, dict[str, nn.Linear]] = {}
    for name, tensor in own.items():
        attention, _, factor = name.rpartition(".")
        factors.setdefault(attention, {})[factor] = _linear(tensor)
    scales = {}
    for attention in factors:
        rank = of_pattern(config.rank_pattern, attention, config.r)
        scales[names[attention]] = strength * of_pattern(config.alpha_pattern, attention, config.alpha) / rank
    waits = tuple((tuple(words), count) for words, count in config.trigger_ranks or ())
    factors = {names[attention]: own for attention, own in factors.items()}
    subjects = tuple(called_by(fitting.header))
    return Guest(path.stem, path.resolve(), tuple(config.trigger or ()), waits, factors, scales, subjects)


def _linear(weight: torch.Tensor) -> nn.Linear:
    made = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    made.weight = nn.Parameter(weight.float(), requires_grad=False)
    return made


# Text


def listening(clip: object, words: Mapping[str, Mapping[str, torch.Tensor]]) -> object:
    """A clone of a CLIP whose conditionings say what they are of, with new words, embeddings (n, E) by encoder each.

    Raises ValueError for a CLIP of another kind.
    """
    made = clip.clone()
    made.tokenizer = Tokenizer(clip.tokenizer, words)
    there = made.patcher.object_patches.get("encode_token_weights")
    if not isinstance(there, _Encoding):
        made.patcher.add_object_patch("encode_token_weights", _Encoding(made.cond_stage_model, there))
    return made


class _Encoding:
    """`encode_token_weights` of ComfyUI's text model: what the tokens say goes along with the states."""

    def __init__(self, model: object, foreign: Callable | None) -> None:
        self.before = foreign or functools.partial(type(model).encode_token_weights, model)

    def __call__(self, tokens: Tokens) -> tuple:
        states, pooled, *more = self.before(tokens)
        said = getattr(tokens, "said", None)
        return states, pooled, (more[0] if more else {}) | ({SAID: said} if said is not None else {})


def encode(clip: object, text: str) -> list:
    """A conditioning of a text, with BREAK between parts that are encoded by themselves."""
    clip = clip if isinstance(clip.tokenizer, Tokenizer) else listening(clip, {})
    parts = [part.strip() for part in text.split("BREAK")]
    made = [clip.tokenize(part) for part in parts]
    return clip.encode_from_tokens_scheduled(joined(made) if len(made) > 1 else made[0])


# Places


def regions(model: object, masks: Sequence[tuple[str, torch.Tensor]]) -> object:
    """A clone of a model whose adapters act where their masks, (name, (height, width) in 0 to 1) each, are white.

    Raises ValueError for a name that is not loaded and for what is no mask.
    """
    guests = guests_of(model)
    loaded = [guest.name for guest in guests.all]
    for name, _ in masks:
        if name not in loaded:
            raise ValueError(f"There is no adapter '{name}' to give a region; loaded: {', '.join(loaded) or 'none'}.")
    found = {**guests.masks, **{name: checked_mask(name, mask) for name, mask in masks}}
    return seated(model, replace(guests, masks=found))


def keep_background(model: object, keep: bool = True) -> object:
    """A clone of a model whose adapters act only where their subjects' words are looked at; see comfy/places.py.

    Adapters that wait for no word act as ever. Raises ValueError where none is loaded.
    """
    guests = guests_of(model)
    if not guests.all:
        raise ValueError("There is no COMCAT adapter whose background could be kept: load one before this node.")
    return seated(model, replace(guests, keep_background=keep))
