"""Which adapters can be other files, by what their headers say: nothing here waits for torch."""

from collections.abc import Sequence
from pathlib import Path

from comcat_diffusion import atomic
from comcat_diffusion.adapters.header import (
    AdapterFileError,
    Header,
    kind_of,
    read_adapter,
)
from comcat_diffusion.families.family import DENOISERS, Family
from comcat_diffusion.families.known import family_of_denoiser, names

TEXT_ENCODERS = ("text_encoder", "text_encoder_2")


def family_in(header: Header) -> Family | None:
    """The family of the base of an adapter that is on parts which LoRA files are of, or None."""
    family = family_of_denoiser(str(header.fingerprint.get("class")), header.fingerprint)
    known = {*TEXT_ENCODERS, family.part} if family else set()
    return family if set(header.config) <= known else None


def projections_of(family: Family, part: str, attention: str) -> tuple[str, str]:
    """What of an attention a foldable adapter changes."""
    return ("k_proj", "v_proj") if part in TEXT_ENCODERS else family.lora_projections(attention)


def refuse_trigger(header: Header, adapter: str | Path) -> None:
    """Raise AdapterFileError if an adapter acts on some tokens only: weights act on all."""
    waiting = [config["trigger"][0] for config in header.config.values() if config.get("trigger")]
    if waiting:
        raise AdapterFileError(f"{adapter} acts from '{waiting[0]}' on, which weights cannot tell: {_ways_out(header)}")


def _ways_out(header: Header) -> str:
    """What to do with an adapter that is no LoRA; the closest one is offered where there is one."""
    family, again = family_in(header), "train it again with --as lora"
    near = family is not None and (family.same_text or not waits(header))
    node = " or its ComfyUI node" if family is not None and family.has_node else ""
    ways = f", {again}, or take the closest LoRA (export --approximate)" if near else f", or {again}"
    return f"use it as it is with comcat-diffusion{node}{ways}."


def refuse_inexpressible(header: Header, adapter: str | Path) -> None:
    """Raise AdapterFileError for an adapter that is no LoRA of a model that other tools know."""
    refuse_trigger(header, adapter)
    if is_free(header):
        raise AdapterFileError(f"{adapter} is a free adapter, which no LoRA can express: {_ways_out(header)}")
    refuse_other_models(header, adapter)


def refuse_other_models(header: Header, adapter: str | Path) -> None:
    """Raise AdapterFileError for an adapter of what no LoRA file of other tools is for."""
    if family_in(header) is None:
        kind = str(header.fingerprint.get("class"))
        known = family_of_denoiser(kind, header.fingerprint) is not None
        told = f"adapts {', '.join(sorted(header.config))}" if known else f"is for a {kind}"
        raise AdapterFileError(
            f"{adapter} {told}; LoRA files are written for the denoisers and the CLIPs of {names()}."
        )


def is_free(header: Header) -> bool:
    """Whether an adapter adds what is outside of its base's heads."""
    return any(kind_of(config) == "free" for config in header.config.values())


def waits(header: Header) -> bool:
    """Whether an adapter acts from its trigger on alone."""
    return any(config.get("trigger") for config in header.config.values())


def is_exact(header: Header) -> bool:
    """Whether an adapter is a LoRA up to rounding: a tied one, or cores, together with its base, any other alone."""
    whole = any(config.get("modules_to_save") for config in header.config.values())
    return family_in(header) is not None and not (whole or is_free(header) or waits(header))


def needs_base(header: Header) -> bool:
    """Whether a file alone does not say what it does to each attention, see export/spread.py."""
    return any(config.get("tied") or config.get("cores") for config in header.config.values())


def refuse_exact(header: Header, adapter: str | Path) -> None:
    """Raise AdapterFileError for an adapter that need not be approximated, or that is of no model with LoRA files."""
    refuse_other_models(header, adapter)
    if is_exact(header):
        raise AdapterFileError(f"{adapter} is foldable already and exports exactly; nothing has to be approximated.")
    family = family_in(header)
    if waits(header) and not family.same_text:
        raise AdapterFileError(
            f"{adapter} waits for its trigger, and the attentions of {family.name} do not read the text encoder's own "
            "states, which --approximate bends: use it as it is, or train it again with --as lora."
        )


def refuse_foldable(header: Header, adapter: str | Path) -> None:
    """Raise AdapterFileError for an adapter that has no closest foldable one: it is one, or is of more parts."""
    if not is_free(header):
        raise AdapterFileError(f"{adapter} is foldable already and exports exactly; nothing has to be approximated.")
    others = sorted(set(header.config) - set(DENOISERS))
    if others:
        raise AdapterFileError(f"{adapter} also adapts {', '.join(others)}, for which no approximation is offered.")


def refuse_missing(weights: str | Path) -> None:
    """Raise AdapterFileError if there is no such file."""
    if not Path(weights).is_file():
        raise AdapterFileError(f"There is no file {weights}.")


def refuse_unmergeable(adapters: Sequence[tuple[str | Path, float]], output: str | Path) -> None:
    """Raise ValueError or OSError unless adapter files, (file, weight) each, fold into a base in a new folder."""
    atomic.refuse_used(Path(output).expanduser())
    if not adapters:
        raise ValueError("Name at least one adapter to merge.")
    for path, _ in adapters:
        header = read_adapter(path)
        refuse_trigger(header, path)
        free = sorted(part for part, fields in header.config.items() if not fields.get("foldable"))
        if free:
            raise AdapterFileError(
                f"{path} is a free adapter ({', '.join(free)}), which folds into no stock checkpoint: train it again "
                "with --as lora, or use it as it is with comcat-diffusion."
            )
