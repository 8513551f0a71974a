"""Which adapters can be added into one file, by what their headers say: nothing here waits for torch."""

import math
from collections.abc import Sequence
from pathlib import Path

from comcat_diffusion.adapters.header import Header, kind_of, read_adapter
from comcat_diffusion.adapters.same_base import difference


def refuse_unlike(adapters: Sequence[tuple[str | Path, float]], rank: int | None = None) -> None:
    """Raise ValueError unless adapter files, (file, weight) each, are of one base and kind, and weigh something.

    Those that wait for different words cannot be cut to a rank.
    """
    if not adapters:
        raise ValueError("Name at least one adapter to combine.")
    for path, weight in adapters:
        if not math.isfinite(weight) or weight == 0:
            raise ValueError(f"The weight of {path} must be a finite number other than zero, not {weight}.")
    read = [(path, read_adapter(path)) for path, _ in adapters]
    for path, header in read:
        _refuse_other_base(*read[0], path, header)
        _refuse_other_trigger(*read[0], path, header, rank)
    kinds: dict[str, str] = {}
    for path, header in read:
        for part, config in header.config.items():
            kind = kind_of(config)
            if kinds.setdefault(part, kind) != kind:
                raise ValueError(
                    f"{read[0][0]} and {path} are of different kinds, {kinds[part]} and {kind}, and cannot be one "
                    "file; load them side by side instead."
                )


def _refuse_other_base(first_path: str | Path, first: Header, path: str | Path, header: Header) -> None:
    reason = difference(first.fingerprint, header.fingerprint)
    if reason is not None:
        raise ValueError(
            f"{first_path} ('{first.base_model}') and {path} ('{header.base_model}') are of different bases: "
            f"for the second, {reason}; combine adapters of one base."
        )


def several_words(headers: Sequence[Header], part: str) -> bool:
    """Whether adapters wait in a part for words of their own."""
    found = [header.config[part] for header in headers if part in header.config]
    return any(one.get("trigger") != found[0].get("trigger") or one.get("trigger_ranks") for one in found)


def _refuse_other_trigger(
    first_path: str | Path, first: Header, path: str | Path, header: Header, rank: int | None
) -> None:
    for part in header.config.keys() & first.config.keys():
        waiting = [bool(one.config[part].get("trigger")) for one in (first, header)]
        if not several_words((first, header), part):
            continue
        if not all(waiting):
            raise ValueError(
                f"{(first_path, path)[waiting[0]]} acts everywhere and {(first_path, path)[not waiting[0]]} from its "
                "trigger on, and they cannot be one file; load them side by side instead."
            )
        if rank is not None:
            raise ValueError(
                f"{first_path} and {path} wait for words of their own, so their ranks cannot be cut together: leave "
                "--rank out."
            )
