"""The adapter file: one safetensors that explains itself. Loading is strict, writing atomic and reproducible."""

import json
import struct
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
from peft.tuners.tuners_utils import check_target_module_exists
from torch import nn

from comcat_diffusion import atomic
from comcat_diffusion.adapters import beside_layers, cores, seam
from comcat_diffusion.adapters.beside_kinds import split
from comcat_diffusion.adapters.beside_rows import take_terms
from comcat_diffusion.adapters.config import ComcatConfig
from comcat_diffusion.adapters.fingerprint import fingerprint
from comcat_diffusion.adapters.header import AdapterFileError, Header, Notes, read_adapter
from comcat_diffusion.adapters.layer import factor_shapes
from comcat_diffusion.adapters.model import (
    belongings_of,
    default_targets,
    factors,
    not_carried,
    of_pattern,
    refuse_name,
    side_cars,
)
from comcat_diffusion.adapters.packing import unpack
from comcat_diffusion.adapters.parts import COMPONENTS, components, denoiser, plain_modules
from comcat_diffusion.adapters.pieces import joined
from comcat_diffusion.adapters.placing import active_adapters, add_active, part_of, refuse_wrapper, take_out
from comcat_diffusion.adapters.same_base import difference, other_weights
from comcat_diffusion.adapters.tied import gathered, scattered, sides_of, tied_shapes
from comcat_diffusion.adapters.token import ENCODERS, LearnedWord, put_token, refuse_token
from comcat_diffusion.adapters.trigger import listen
from comcat_diffusion.adapters.wholes import fill_wholes, whole_shapes, whole_tensors
from comcat_diffusion.attentions import style_of
from comcat_diffusion.families.known import family_of_denoiser
from comcat_diffusion.versions import versions_with

Tokens = dict[str, dict[str, torch.Tensor]]  # by token and text encoder: embeddings (n, E)
TOKEN = "token"
_CONFIG_FIELDS = (
    "r",
    "alpha",
    "foldable",
    "tied",
    "cores",
    "core_sets",
    "convolutions",
    "convolution_ranks",
    "convolution_shares",
    "feed_forwards",
    "feed_forward_ranks",
    "feed_forward_shares",
    "trigger",
    "trigger_ranks",
    "target_modules",
    "exclude_modules",
    "rank_pattern",
    "alpha_pattern",
    "layers_to_transform",
    "layers_pattern",
    "modules_to_save",
)
_LATER = (
    "tied",
    "cores",
    "core_sets",
    "convolutions",
    "convolution_ranks",
    "convolution_shares",
    "feed_forwards",
    "feed_forward_ranks",
    "feed_forward_shares",
    "trigger",
    "trigger_ranks",
    "modules_to_save",
)  # settings that the first version did not have


def save_adapter(
    pipe: object,
    path: str | Path,
    adapter_name: str = "default",
    base_model: str = "",
    notes: Notes | None = None,
    dtype: torch.dtype | None = None,
    revision: str = "",
    tokens: Tokens | None = None,
    thumbnail: str = "",
) -> Header:
    """Write one adapter of a pipeline to a file; `dtype` None keeps the precision that its weights have now.

    `tokens` are new words that belong to it: for each, its (n, E) embeddings by text encoder; without, those that it
    came with. What it trains whole (`modules_to_save`) is in the file as well. `thumbnail` is a small picture as a data
    URI.
    Raises ValueError if there is no such adapter, OSError if the file cannot be written (an older one stays).
    """
    if any(layer.merged for model in components(pipe).values() for layer in side_cars(model).values()):
        raise ValueError("Adapters are merged into the weights; call unmerge_adapters, then save.")
    _refuse_other_parts(pipe, adapter_name)
    tensors, config, words = {}, {}, {}
    for part, model in components(pipe).items():
        found = {name: factor.detach() for name, factor in factors(model, adapter_name).items()}
        if found:
            config[part] = plain_config(model.peft_config[adapter_name])
            found, beside = split(found)
            if model.peft_config[adapter_name].tied:
                found = gathered(found, sides_of(model, found))
            if model.peft_config[adapter_name].cores:
                found = cores.gathered(found)
            tensors |= {f"{part}.{name}": factor for name, factor in (found | beside).items()}
            tensors |= whole_tensors(model, part, adapter_name)
            luggage = belongings_of(model).brought(adapter_name)
            words |= {word.token: word.vectors() for word in luggage if isinstance(word, LearnedWord)}
    if not tensors:
        loaded = sorted({n for model in components(pipe).values() for n in getattr(model, "peft_config", {})})
        raise ValueError(f"There is no COMCAT adapter '{adapter_name}' to save; loaded: {', '.join(loaded) or 'none'}.")
    tokens = words if tokens is None else tokens
    for number, vectors in enumerate(tokens.values()):
        tensors |= {f"{TOKEN}.{number}.{encoder}": values for encoder, values in vectors.items()}
    known = present_base(pipe), notes or Notes(), library_versions()
    header = Header(config, str(base_model), revision, *known, tokens=list(tokens), thumbnail=thumbnail)
    rounded = {n: t.to(dtype) if dtype and t.is_floating_point() else t for n, t in tensors.items()}
    atomic.write_bytes(path, serialized(rounded, header))
    return header


def _refuse_other_parts(pipe: object, adapter_name: str) -> None:
    """Raise ValueError if an adapter is also where no file of ours reaches, in a VAE for instance."""
    for name, model in getattr(pipe, "components", {}).items():
        if isinstance(model, nn.Module) and name not in COMPONENTS and factors(model, adapter_name):
            raise ValueError(
                f"'{adapter_name}' also adapts the {name}, which an adapter file does not hold: save that by PEFT's "
                "get_peft_model_state_dict, or delete it there."
            )


def library_versions() -> dict[str, str]:
    """The versions that a header names as the file's writers."""
    return versions_with("diffusers", "peft", "torch", "transformers")


def serialized(tensors: dict[str, torch.Tensor], header: Header) -> bytes:
    """The bytes of an adapter file. Raises ValueError if a tensor is not finite."""
    return safetensors_bytes(tensors, header.metadata())


def safetensors_bytes(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> bytes:
    """The bytes of a safetensors file. Same inputs, same bytes: the library shuffles metadata, here it is sorted.

    Raises ValueError if a tensor is not finite.
    """
    for name, tensor in tensors.items():
        if not _is_finite(tensor):
            raise ValueError(f"'{name}' holds NaN or infinity; nothing was written.")
    plain = safetensors.torch.save({name: tensor.cpu().contiguous() for name, tensor in sorted(tensors.items())})
    (length,) = struct.unpack("<Q", plain[:8])
    table = {"__metadata__": dict(sorted(metadata.items())), **json.loads(plain[8 : 8 + length])}
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + plain[8 + length :]


def load_adapter(pipe: object, path: str | Path, adapter_name: str = "default", any_weights: bool = False) -> Header:
    """Attach an adapter file to a pipeline, active beside the adapters already there; returns the file's header.

    Everything is checked before the pipeline is touched. Raises AdapterFileError for a damaged file or another base;
    `any_weights` admits a base of the same shape with other weights (a fine-tune of the one that was trained on).
    """
    header = read_adapter(path)
    refuse_name(adapter_name)
    if any(layer.merged for model in components(pipe).values() for layer in side_cars(model).values()):
        raise ValueError("An adapter is merged into this pipeline: call unmerge_adapters first, then load another.")
    here = getattr(getattr(denoiser(pipe), "config", None), "_name_or_path", "")
    fitting = read_fitting(components(pipe), present_base(pipe), path, any_weights, here)
    tensors, tokens, parts, configs = fitting.tensors, fitting.tokens, components(pipe), fitting.configs
    for token, vectors in tokens.items():
        refuse_token(pipe, token, vectors)
    for part in configs:
        if adapter_name in getattr(parts[part], "peft_config", {}):
            raise ValueError(f"An adapter named '{adapter_name}' is already loaded; give this one another name.")
        refuse_wrapper(part_of(pipe, part))
    _warn_of_same_words(parts, configs, adapter_name)
    active = {part: active_adapters(parts[part]) for part in configs}
    try:
        for part, config in configs.items():
            config.init_weights = False
            add_active(part_of(pipe, part), config, adapter_name)
            _fill(parts[part], config, adapter_name, part, tensors)
            config.init_weights = True
        for token, vectors in tokens.items():
            put_token(pipe, token, vectors)
            word = LearnedWord(pipe, token, len(configs))
            for part in configs:
                belongings_of(parts[part]).bring(adapter_name, word)
        listen(pipe)
    except Exception:
        for part in configs:
            take_out(part_of(pipe, part), adapter_name, active[part])
        raise
    return header


@dataclass(frozen=True)
class Fitting:
    """An adapter file that fits a base."""

    header: Header
    configs: dict[str, ComcatConfig]  # by part
    tensors: dict[str, torch.Tensor]  # by PART.ATTENTION.FACTOR
    tokens: Tokens


def read_fitting(
    parts: Mapping[str, nn.Module], present: dict, path: str | Path, any_weights: bool = False, here: str = ""
) -> Fitting:
    """Read a file for a base, its parts by name and its fingerprint, and check all that can be; nothing is touched.

    `here` is what the base is called. Raises AdapterFileError for a damaged file or another base.
    """
    header = read_adapter(path)
    _refuse_other_base(header, present, here or "the loaded base", path, any_weights)
    tensors = read_tensors(path, header)
    tokens = _taken_tokens(tensors, header, path)
    for part in header.config:
        if part not in parts:
            raise AdapterFileError(f"{path} adapts '{part}', which this pipeline does not have.")
    configs = {part: config_of(fields, path) for part, fields in header.config.items()}
    _refuse_other_tensors(tensors, parts, configs, path)
    for part, config in configs.items():
        _refuse_other_sets(parts[part], config, path)
    return Fitting(header, configs, tensors, tokens)


def _taken_tokens(tensors: dict[str, torch.Tensor], header: Header, path: str | Path) -> Tokens:
    """Take the embeddings of new words out of a file's tensors."""
    found: Tokens = {token: {} for token in header.tokens}
    for name in [name for name in tensors if name.startswith(f"{TOKEN}.")]:
        _, number, encoder = name.split(".", 2)
        values = tensors.pop(name)
        if not number.isdigit() or int(number) >= len(header.tokens) or values.ndim != 2 or encoder not in ENCODERS:
            raise AdapterFileError(f"{path} has unknown tensors: {name}; the file is damaged or was edited.")
        found[header.tokens[int(number)]][encoder] = values
    return found


def _warn_of_same_words(parts: dict[str, nn.Module], configs: dict[str, ComcatConfig], adapter_name: str) -> None:
    for part, config in configs.items():
        for name in active_adapters(parts[part]):
            there = getattr(parts[part].peft_config[name], "trigger", None) or ()
            both = {word.lower() for word in there} & {word.lower() for word in config.trigger or ()}
            if both:
                warnings.warn(
                    f"'{name}' and '{adapter_name}' both act from '{min(both)}' on, so their subjects mix: train one "
                    "with another word, give each a part of the picture (set_regions), or activate one of them.",
                    stacklevel=3,
                )


def _fill(model: nn.Module, config: ComcatConfig, adapter_name: str, part: str, tensors: dict) -> None:
    """Write a file's tensors into an adapter that is in its place, and freeze it."""
    places = factors(model, adapter_name)
    own = {name.removeprefix(f"{part}."): tensor for name, tensor in tensors.items() if name.startswith(f"{part}.")}
    shapes = {name: factor.shape for name, factor in split(places)[0].items()}
    if config.tied:
        own |= scattered(own, shapes, sides_of(model, shapes))
    if config.cores:
        own |= cores.scattered(own, shapes)
    for name, factor in places.items():
        factor.requires_grad_(False)
        factor.data = own[name].to(factor.device, factor.dtype)
    fill_wholes(model, part, adapter_name, tensors)


def present_base(pipe: object) -> dict:
    """The fingerprint of a pipeline's base."""
    model, scheduler = denoiser(pipe), getattr(pipe, "scheduler", None)
    family = family_of_denoiser(type(model).__name__, getattr(model, "config", {}))
    if family is not None and family.flow:  # whatever it is drawn with
        return fingerprint(model, "flow")
    return fingerprint(model, getattr(getattr(scheduler, "config", None), "prediction_type", "epsilon"))


def _refuse_other_base(header: Header, present: dict, here: str, path: str | Path, any_weights: bool) -> None:
    reason = difference(header.fingerprint, present)
    if reason is None:
        return
    same_shape = {**header.fingerprint, "sketch": present["sketch"]}
    if difference(same_shape, present) is None and other_weights(header.fingerprint, present):
        if any_weights:
            return
        reason += " (a fine-tune of it? then load with any_weights=True or --any_weights)"
    raise AdapterFileError(f"{path} was trained on '{header.base_model}' and does not fit '{here}': {reason}.")


def read_tensors(path: str | Path, header: Header) -> dict[str, torch.Tensor]:
    """The factors by name, PART.ATTENTION.FACTOR. Raises AdapterFileError for misfit rows, NaN and infinity."""
    tensors = safetensors.torch.load_file(path)
    bad = [name for name, tensor in tensors.items() if not _is_finite(tensor)]
    if bad:
        raise AdapterFileError(f"{path} holds NaN or infinity in {_first_three(bad)}; train again or get another copy.")
    try:
        foldable = [part for part, config in header.config.items() if config.get("foldable")]
        if header.pieces:
            return joined(tensors, header.pieces, foldable)
        if not header.head_ranks:
            return tensors
        beside = take_terms(tensors, header)
        factors = unpack(tensors, header.head_ranks, header.row_lengths, foldable)
        return {name: factor for term in beside for name, factor in term.tensors().items()} | factors
    except ValueError as error:
        raise AdapterFileError(f"{path} is damaged or was edited: {error}.") from error
    except KeyError as missing:
        raise AdapterFileError(f"{path} lacks {missing}; the file is damaged or was edited.") from missing


def _is_finite(tensor: torch.Tensor) -> bool:
    """Whether all numbers are finite, by the least and the largest: a twentieth of what looking at each would take."""
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    if tensor.itemsize == 1:  # floats of eight bits have no least and largest
        tensor = tensor.float()
    return all(bool(end.isfinite()) for end in tensor.aminmax())  # NaN is passed on


def config_of(fields: dict, path: str | Path) -> ComcatConfig:
    """The configuration that a header holds for one component. Raises AdapterFileError if it makes no sense."""
    unknown = sorted(set(fields) - set(_CONFIG_FIELDS))
    if unknown:
        raise AdapterFileError(f"{path} has settings that this version does not know: {_first_three(unknown)}.")
    told = {"core_sets": {}} if fields.get("cores") else {}  # where a file says nothing, all go by the first
    try:
        return ComcatConfig(**told | fields)
    except (TypeError, ValueError) as error:
        raise AdapterFileError(f"{path} has a configuration that does not make sense: {error}") from error


def plain_config(config: ComcatConfig) -> dict:
    """A configuration as a header holds it; the inverse of `config_of`."""
    fields = {name: getattr(config, name) for name in _CONFIG_FIELDS}
    return {name: v for name, v in fields.items() if v or name not in _LATER}  # files without these stay as they were


def expected_shapes(model: nn.Module, config: ComcatConfig) -> dict[str, tuple[int, int]]:
    """Names and shapes of the factors that a file of this configuration has for this model.

    Raises ValueError for a tied one whose attentions read different text, for attentions that its family leaves be, and
    for terms beside other modules where there are none.
    """
    if config.target_modules is None:
        config.target_modules = default_targets(model)
    shapes = {}
    for key, module in plain_modules(model).items():
        # PEFT answers "excluded" with an object that is true; only a plain match counts.
        matched = check_target_module_exists(config, key) if key else None
        if not matched or type(matched).__name__ == "_ExcludedModule" or seam.why_not(module) is not None:
            continue
        reason = not_carried(model, module, key)
        if reason is not None:
            raise ValueError(f"Cannot adapt '{key}' ({type(module).__name__}): {reason}.")
        rank = of_pattern(config.rank_pattern, key, config.r)
        made = factor_shapes(module, rank, config.foldable, config.tied, config.cores)
        shapes |= {f"{key}.{name}": (outof, into) for name, (into, outof) in made.items()}
    if config.cores:
        shapes = cores.gathered_shapes(shapes)
    elif config.tied:
        shapes = tied_shapes(shapes, sides_of(model, shapes))
    return shapes | beside_layers.expected_shapes(model, config)


def _refuse_other_tensors(tensors: dict, parts: dict, configs: dict[str, ComcatConfig], path: str | Path) -> None:
    expected = {}
    for part, config in configs.items():
        try:
            shapes = expected_shapes(parts[part], config)
        except ValueError as error:
            raise AdapterFileError(f"{path} does not fit the {part}: {error}") from error
        expected |= {f"{part}.{name}": shape for name, shape in shapes.items()}
        expected |= whole_shapes(parts[part], part, config)
    missing, extra = sorted(expected.keys() - tensors.keys()), sorted(tensors.keys() - expected.keys())
    misshapen = [
        f"{name} {tuple(tensors[name].shape)} instead of {expected[name]}"
        for name in sorted(expected.keys() & tensors.keys())
        if tuple(tensors[name].shape) != expected[name]
    ]
    for problem, names in (("lacks", missing), ("has unknown tensors", extra), ("has misshapen tensors", misshapen)):
        if names:
            raise AdapterFileError(f"{path} {problem}: {_first_three(names)}; the file is damaged or was edited.")


def _refuse_other_sets(model: nn.Module, config: ComcatConfig, path: str | Path) -> None:
    modules = plain_modules(model) if config.core_sets else {}
    for name, told in (config.core_sets or {}).items():
        style = style_of(modules[name]) if name in modules else None
        if style is None or len(told) != len(cores.first_sets(style.head_count(modules[name]))):
            raise AdapterFileError(
                f"{path} says of {name} what directions go by which no heads have; the file is damaged or was edited."
            )


def _first_three(names: list[str]) -> str:
    rest = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + rest
