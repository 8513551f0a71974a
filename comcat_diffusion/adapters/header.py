"""What an adapter file says of itself, readable without torch: the header of `NAME.safetensors`."""

import json
import struct
from dataclasses import asdict, dataclass, field
from pathlib import Path

from safetensors import SafetensorError, safe_open

FORMAT_VERSION = 1
KEY = "comcat"
LONGEST_HEADER = 4 << 20  # bytes; an honest header is a few tens of kilobytes


class AdapterFileError(ValueError):
    """A file that is not a usable adapter, or not for this base. The message is one sentence with the way out."""


@dataclass(frozen=True)
class Notes:
    """What the trainer wants the user of the file to know."""

    trigger: str = ""  # the word that calls the subject
    instance_prompt: str = ""  # a prompt as it was trained
    class_word: str = ""  # what kind of thing the subject is
    training: dict = field(default_factory=dict)  # resolution, steps, seed and the like


@dataclass(frozen=True)
class Header:
    """Everything needed to use an adapter, and to refuse the wrong base."""

    config: dict[str, dict]  # by pipeline component: the keyword arguments of its ComcatConfig
    base_model: str  # hub id, folder or file that the adapter was trained on
    revision: str
    fingerprint: dict  # see adapters/fingerprint.py
    notes: Notes
    versions: dict[str, str]  # of the libraries that wrote the file
    format_version: int = FORMAT_VERSION

    def metadata(self) -> dict[str, str]:
        """As the string pairs of a safetensors header; the `modelspec.*` keys are what other tools read."""
        notes = self.notes
        pairs = {
            KEY: json.dumps(asdict(self), sort_keys=True),
            "format": "pt",
            "modelspec.sai_model_spec": "1.0.1",
            "modelspec.architecture": _architecture(self.fingerprint) + "/comcat",
            "modelspec.implementation": "https://github.com/huggingface/diffusers",
            "modelspec.title": notes.instance_prompt or notes.trigger or "COMCAT adapter",
            "modelspec.prediction_type": self.fingerprint.get("prediction_type", ""),
            "modelspec.trigger_phrase": notes.trigger,
            "modelspec.usage_hint": f'Load with comcat-diffusion; prompt with "{notes.trigger} {notes.class_word}".',
        }
        if notes.training.get("resolution"):
            pairs["modelspec.resolution"] = "{0}x{0}".format(notes.training["resolution"])
        return pairs


def _architecture(fingerprint: dict) -> str:
    width = fingerprint.get("cross_attention_dim")
    known = {768: "stable-diffusion-v1", 1024: "stable-diffusion-v2-512", 2048: "stable-diffusion-xl-v1-base"}
    return known.get(width, "stable-diffusion-tiny")


def read_adapter(path: str | Path) -> Header:
    """The header of an adapter file. Raises AdapterFileError if the file is missing, damaged or something else."""
    path = Path(path)
    if not path.is_file():
        raise AdapterFileError(f"There is no adapter file {path}.")
    with path.open("rb") as file:
        start = file.read(8)
    if start[:2] == b"PK" or start[:1] == b"\x80":
        raise AdapterFileError(f"{path} is a pickle (.pt), which can run code; only .safetensors adapters are loaded.")
    if len(start) < 8 or struct.unpack("<Q", start)[0] > LONGEST_HEADER:
        raise AdapterFileError(f"{path} is not a safetensors file, or it is cut short.")
    try:
        with safe_open(path, framework="numpy") as opened:
            metadata = opened.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise AdapterFileError(f"{path} is damaged or cut short ({error}); get the file again.") from error
    if KEY not in metadata:
        raise AdapterFileError(
            f"{path} is not a COMCAT adapter: it has no '{KEY}' header (a LoRA loads with pipe.load_lora_weights)."
        )
    return _parsed(metadata[KEY], path)


def _parsed(text: str, path: Path) -> Header:
    try:
        content = json.loads(text)
        version = content["format_version"]
        if version == FORMAT_VERSION:
            content["notes"] = Notes(**content["notes"])
            header = Header(**content)
            if not (isinstance(header.config, dict) and all(isinstance(c, dict) for c in header.config.values())):
                raise TypeError("config is not a table of tables")
            return header
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise AdapterFileError(f"{path} has a header that does not make sense ({error}).") from error
    newer = isinstance(version, int) and version > FORMAT_VERSION
    way_out = "update comcat-diffusion" if newer else "the file was not written by comcat-diffusion"
    raise AdapterFileError(f"{path} has format version {version!r}, this program reads {FORMAT_VERSION}: {way_out}.")
