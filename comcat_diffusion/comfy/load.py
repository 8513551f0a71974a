"""Putting an adapter file on a model and a CLIP of ComfyUI, as strictly as `load_adapter` does on a pipeline."""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn

from comcat_diffusion.adapters import cores
from comcat_diffusion.adapters.as_lora import placed
from comcat_diffusion.adapters.beside import waits_of
from comcat_diffusion.adapters.beside_kinds import FEED_FORWARDS, kind_with, split
from comcat_diffusion.adapters.config import ComcatConfig
from comcat_diffusion.adapters.fingerprint import fingerprint_as, layout_of
from comcat_diffusion.adapters.header import AdapterFileError, Header, called_by, read_adapter
from comcat_diffusion.adapters.model import of_pattern
from comcat_diffusion.adapters.regions import checked_mask
from comcat_diffusion.adapters.store import Fitting, expected_shapes, read_fitting
from comcat_diffusion.adapters.tied import scattered, sides_of
from comcat_diffusion.comfy.guests import Guest, guests_of, invited
from comcat_diffusion.comfy.names import (
    ENCODERS,
    convolution_names,
    fingerprint_of,
    prediction_of,
    roughness,
    text_as_transformers,
    text_names,
    unet_as_diffusers,
    unet_names,
)
from comcat_diffusion.comfy.quantized import linear_of, rounded
from comcat_diffusion.comfy.seated import seated
from comcat_diffusion.comfy.text import SAID, Tokenizer, Tokens, joined
from comcat_diffusion.comfy.transformers import Kind, as_diffusers, attention_names, feed_forward_names, kind_of
from comcat_diffusion.config import require_scale
from comcat_diffusion.export.lora import export_adapter
from comcat_diffusion.families.family import DENOISERS, TRANSFORMER, UNET
from comcat_diffusion.families.known import family_of_model


def load(
    model: object, clip: object, path: str | Path, strength: float = 1.0, any_weights: bool = False
) -> tuple[object, object, Header]:
    """Clones of a model and a CLIP with an adapter; those that are given stay as they are.

    Everything is checked before. Raises AdapterFileError for a damaged file or another base, ValueError for a model of
    a kind that is not known; `any_weights` admits a fine-tune of the base.
    """
    require_scale(strength, "The strength")
    path = Path(path)
    header = read_adapter(path)
    trained = header.fingerprint
    kind = kind_of(model.model.diffusion_model)
    parts, names = _of_unet(model, clip, path) if kind is None else _of_transformer(model, kind)
    present = _present(model, parts, names, trained)
    fitting = read_fitting(parts, present, path, any_weights, "the model of this node")
    if kind is not None and fitting.tokens:
        raise AdapterFileError(f"{path} brings new words, which no text encoder of {kind.denoiser} can be given here.")
    own = {}
    for part in fitting.configs:
        patcher = model if part in DENOISERS else clip.patcher
        _refuse_rough(patcher, fitting.configs[part], parts[part], names[part])
        own[part] = _guest(path, part, fitting, parts[part], names[part], strength)
    made_model, made_clip = model.clone(), clip.clone()
    if own.keys() & DENOISERS:
        made_model = seated(model, invited(guests_of(model), own.pop(UNET if kind is None else TRANSFORMER)))
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
    path = Path(path)
    trained, shell, names = read_adapter(path).fingerprint, unet_as_diffusers(patcher), _names_of(patcher)
    present = _present(patcher, {UNET: shell}, {UNET: names}, trained)
    fitting = read_fitting({UNET: shell}, present, path, any_weights, "this model")
    _refuse_rough(patcher, fitting.configs[UNET], shell, names)
    guest = _guest(path, "unet", fitting, shell, names, strength)
    return seated(patcher, invited(guests_of(patcher), guest)), fitting.header


def save_lora(model: object, path: str | Path, output: str | Path, half: bool = False) -> list[Path]:
    """Write an adapter file as a LoRA that every program reads; `model` is its base. Raises as exporting does."""
    kind = kind_of(model.model.diffusion_model)
    parts = {UNET: unet_as_diffusers(model)} if kind is None else {TRANSFORMER: as_diffusers(model, kind)}
    trained = read_adapter(path)
    if layout_of(next(iter(parts.values()))) != trained.fingerprint.get("layout"):
        raise AdapterFileError(f"{path} was trained on '{trained.base_model}', which this model is not.")
    made = export_adapter(path, output, dtype=torch.float16 if half else torch.float32, models=parts)
    return list(made.files)


def _of_unet(model: object, clip: object, path: Path) -> tuple[dict[str, nn.Module], dict[str, dict[str, str]]]:
    """A U-Net and its text encoders as diffusers has them, by part, and what adapters stand beside is called here."""
    parts = {UNET: unet_as_diffusers(model)}
    names = {UNET: _names_of(model)}
    for part, root in _roots(clip).items():
        encoder, within = clip.patcher.model.get_submodule(root), _within(path, part)
        parts[part] = text_as_transformers(clip.patcher, root, within)
        here = text_names(encoder, root.partition(".")[0], within)
        names[part] = {own: f"{root}.{name}" for own, name in here.items()}
    return parts, names


def _names_of(patcher: object) -> dict[str, str]:
    """The name here of every attention and convolution of a U-Net that adapters stand beside."""
    unet = patcher.model.diffusion_model
    return {own: f"diffusion_model.{name}" for own, name in (unet_names(unet) | convolution_names(unet)).items()}


def _of_transformer(model: object, kind: Kind) -> tuple[dict[str, nn.Module], dict[str, dict[str, str]]]:
    """The same of a transformer, whose text encoders carry no adapters."""
    there = attention_names(model.model.diffusion_model, kind) | feed_forward_names(model.model.diffusion_model, kind)
    names = {TRANSFORMER: {own: f"diffusion_model.{name}" for own, name in there.items()}}
    return {TRANSFORMER: as_diffusers(model, kind)}, names


def _refuse_rough(patcher: object, config: ComcatConfig, shell: nn.Module, names: Mapping[str, str]) -> None:
    """Raise ValueError for cores on quantized weights."""
    if config.cores and roughness(patcher, _attentions(shell, names)):
        raise ValueError(cores.QUANTIZED)


def _attentions(shell: nn.Module, names: Mapping[str, str]) -> list[str]:
    """What those of a part are called here that its fingerprint is of."""
    return [name for own, name in names.items() if not isinstance(shell.get_submodule(own), nn.Linear)]


def _present(
    model: object, parts: Mapping[str, nn.Module], names: Mapping[str, Mapping[str, str]], trained: dict
) -> dict:
    """The fingerprint of a model, seen as diffusers has it, beside that of an adapter's base."""
    part = UNET if UNET in parts else TRANSFORMER
    shell = parts[part]
    if part == UNET:
        found = fingerprint_of(shell, prediction_of(model))
    else:
        found = fingerprint_as(type(shell).__name__, None, shell, "flow")
    return rounded(found, trained, roughness(model, _attentions(shell, names[part])))


def _roots(clip: object) -> dict[str, str]:
    """Where text encoders are in ComfyUI's model of all, by what we call those that are there."""
    there = clip.cond_stage_model
    found = {part: [name for name in names if hasattr(there, name)] for part, names in ENCODERS.items()}
    return {part: f"{names[0]}.transformer" for part, names in found.items() if names}


def _within(path: Path, part: str) -> str:
    """What names of a text encoder's modules in a file begin with: of some classes they have it, of some not."""
    with safe_open(path, "pt") as file:
        names = [*file.keys(), *(f"{part}.{name}" for name in read_adapter(path).packed.get(part, ()))]
    return "text_model." if any(name.startswith(f"{part}.text_model.") for name in names) else ""


def _guest(
    path: Path, part: str, fitting: Fitting, shell: nn.Module, names: Mapping[str, str], strength: float
) -> Guest:
    config = fitting.configs[part]
    if config.modules_to_save:
        raise AdapterFileError(f"{path} trains whole modules, which no ComfyUI node can put in place.")
    own = {n.removeprefix(f"{part}."): t for n, t in fitting.tensors.items() if n.startswith(f"{part}.")}
    own, beside = split(own)
    if config.tied or config.cores:
        shapes = expected_shapes(shell, replace(config.at_attentions(), tied=False, cores=False))
    if config.tied:
        own = scattered(own, shapes, sides_of(shell, shapes))
    if config.cores:
        own = _unfolded(own, shapes, shell, config)
    factors: dict[str, dict[str, nn.Linear]] = {}
    for name, tensor in (own | beside).items():
        host, _, factor = name.rpartition(".")
        factors.setdefault(host, {})[factor] = linear_of(tensor.float())
    beside = {host for host, held in factors.items() if kind_with(held)}
    scales = {names[host]: strength * _scale(config, host, host in beside) for host in factors}
    waits = tuple((tuple(words), count) for words, count in config.trigger_ranks or ())
    waits_beside = {names[host]: tuple(waits_of(config, host)) for host in sorted(beside)}
    factors = {names[host]: _in_rows(held, shell, host) for host, held in factors.items()}
    subjects = tuple(called_by(fitting.header))
    words = tuple(config.trigger or ())
    return Guest(path.stem, path.resolve(), words, waits, factors, scales, subjects, waits_beside)


def _in_rows(held: Mapping[str, nn.Linear], shell: nn.Module, host: str) -> Mapping[str, nn.Linear]:
    """The factors of a host; where it is rows of a Linear here, those of the term beside all of that."""
    up = FEED_FORWARDS.factors[-1]
    native = family_of_model(shell).native_weight(host) if up in held else None
    if native is None:
        return held
    return {**held, up: linear_of(placed(held[up].weight.data, native.place, native.count, native.span))}


def _scale(config: ComcatConfig, host: str, beside: bool) -> float:
    """Alpha by rank at an attention, or at another module, beside which it is the same for all."""
    if beside:
        return config.alpha / config.r
    return of_pattern(config.alpha_pattern, host, config.alpha) / of_pattern(config.rank_pattern, host, config.r)


def _unfolded(
    own: dict, shapes: Mapping[str, tuple], shell: nn.Module, config: ComcatConfig
) -> dict[str, torch.Tensor]:
    """Cores as the foldable adapter that they are on a base."""
    mixes = {}
    for name, (across, _) in shapes.items():
        attention, _, factor = name.rpartition(".")
        if factor == "q_core":
            mixes |= dict.fromkeys((f"{attention}.{mix}" for mix in cores.MIXES), (across, config.r))
    own, found = cores.scattered(own, mixes), {}
    for attention in sorted({name.rpartition(".")[0] for name in mixes}):
        k_mix, v_mix = (own[f"{attention}.{mix}"] for mix in cores.MIXES)
        sets = config.core_sets.get(attention, "")
        made = cores.factors_of(shell.get_submodule(attention), config.r, k_mix, v_mix, sets)
        found |= {f"{attention}.{factor}": tensor for factor, tensor in made.items()}
    return found


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
        told = {SAID: said.of_states(states.shape[1])} if said is not None else {}
        return states, pooled, (more[0] if more else {}) | told


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

    Adapters that wait for no word act as ever. Raises ValueError where none is loaded, and for a model whose sampling
    cannot be taken twice.
    """
    if not hasattr(model, "add_wrapper_with_key"):
        raise ValueError(
            "Keeping a background draws twice, and this program (Forge, or an old ComfyUI) has no place to ask for "
            "that: take a newer ComfyUI, or `comcat generate`."
        )
    guests = guests_of(model)
    if not guests.all:
        raise ValueError("There is no COMCAT adapter whose background could be kept: load one before this node.")
    return seated(model, replace(guests, keep_background=keep))
