"""The model card of a shared adapter: what it is, its base, its trigger, and the lines that use it. Text alone."""

import shlex
from dataclasses import dataclass
from urllib.parse import quote

from comcat_diffusion import markdown
from comcat_diffusion.adapters.beside_kinds import KINDS
from comcat_diffusion.adapters.header import Header, kind_of
from comcat_diffusion.config import EMBEDDED, EMBEDDED_FLOW, is_hub_id
from comcat_diffusion.export.clients import CLIENTS, Client, readers
from comcat_diffusion.export.fit import family_in, waits
from comcat_diffusion.families.family import UNET

_WITHOUT_PAGE = {"diffusers": "diffusers", "kohya": "kohya's scripts"}  # by client, as the card calls them
_CARD = """\
---
{front}
---

# {title}

A [COMCAT](https://arxiv.org/abs/2305.17235) adapter of {base}. Write {phrase} in a prompt to call what it learned.
{sheet}
## Where it works

{works}

## Use

With comcat-diffusion:

    comcat pull --repo_id {repo_id}
    comcat generate --adapter {file} --prompt {prompt}
{others}
## Facts

| | |
| --- | --- |
{facts}
"""
_DIFFUSERS = """
With diffusers alone:

    pipe = DiffusionPipeline.from_pretrained({base})
    pipe.load_lora_weights({repo_id}, weight_name={file})
    pipe({prompt}).images[0]
"""
_CLIENTS = """
With {clients}: put {file} into the folder of LoRAs, choose it with strength 1, and write {phrase}.
"""


@dataclass(frozen=True)
class Shared:
    """What is in the folder that a card describes, by the names of the files."""

    repo_id: str
    adapter: str
    bytes: int
    sheet: str = ""
    lora: str = ""  # which every program reads
    words: tuple[str, ...] = ()  # textual-inversion files of new words


def card(header: Header, shared: Shared) -> str:
    """The README.md of a model repository; the same file gives the same text."""
    notes, base = header.notes, public_base(header)
    words = notes.phrase
    phrase = markdown.code(words) if words else "the prompt that it was trained with"
    others = ""
    if shared.lora:
        named = {"base": base or "BASE", "repo_id": shared.repo_id, "file": shared.lora, "prompt": notes.example}
        *most, last = _programs(header)
        others += _CLIENTS.format(
            clients=f"{', '.join(most)} or {last}", file=markdown.code(shared.lora), phrase=phrase
        )
        others += _DIFFUSERS.format(**{name: markdown.quoted(value) for name, value in named.items()})
    if shared.words:
        others += f"\nIts new words are embeddings of their own: {', '.join(map(markdown.code, shared.words))}.\n"
    return _CARD.format(
        front=_front(header, base),
        title=markdown.text(words or shared.adapter.removesuffix(".safetensors")),
        base=f"[{markdown.text(base)}](https://huggingface.co/{quote(base)})" if base else unpublished(header),
        phrase=phrase,
        works=_works(header, shared),
        sheet=f"\n![Samples]({shared.sheet})\n" if shared.sheet else "",
        repo_id=shared.repo_id,
        file=_argument(shared.adapter),
        prompt=_argument(notes.example, always=True),
        others=others,
        facts="\n".join(f"| {name} | {value} |" for name, value in _facts(header, shared).items()),
    )


def public_base(header: Header) -> str:
    """The hub id of the base, or nothing: a folder of somebody's machine is nobody's business."""
    return header.base_model if is_hub_id(header.base_model) else ""


def unpublished(header: Header) -> str:
    """How a base is called that has no id on the hub."""
    known = {EMBEDDED: "embedded base", EMBEDDED_FLOW: "embedded flow-matching base"}.get(header.base_model)
    return f"the {known} of comcat-diffusion" if known else "a base that is not on the hub"


def _argument(words: str, always: bool = False) -> str:
    """Words as a shell reads them: bare where they can be, in double quotes unless these would not keep them."""
    line = markdown.printable(words)
    if any(letter in line for letter in "$`\\!"):
        return shlex.quote(line)
    return markdown.quoted(line) if always or shlex.quote(line) != line else line


def _works(header: Header, shared: Shared) -> str:
    """A table of which program reads which file."""
    rows = [(", ".join(["comcat-diffusion", *_shells(header)]), shared.adapter)]
    rows += [(", ".join([*_programs(header), *_by_command(header)]), shared.lora)] if shared.lora else []
    lines = ["| program | file |", "| --- | --- |"]
    lines += [f"| {program} | {markdown.code(file, in_table=True)} |" for program, file in rows]
    if waits(header):
        lines += [
            "",
            "It acts from its trigger on alone, which no LoRA can: a prompt without it draws the base's picture.",
        ]
    return "\n".join(lines)


def _shells(header: Header) -> list[str]:
    """Other programs in which the adapter file itself works, with what brings it there."""
    family = family_in(header)
    whole = any(config.get("modules_to_save") for config in header.config.values())
    if whole or family is None or not family.has_node:
        return []
    forge = set(header.config) == {UNET} and not header.tokens
    return ["ComfyUI with the node pack COMCAT"] + ["Forge with the extension COMCAT"] * forge


def _programs(header: Header) -> list[str]:
    """Those with a page that read the LoRA, whose names are those of most."""
    return [client.name for key, client in _readers(header).items() if key not in _WITHOUT_PAGE]


def _by_command(header: Header) -> list[str]:
    """The others, which are told of a file by a command or a program of one's own."""
    return [told for key, told in _WITHOUT_PAGE.items() if key in _readers(header)]


def _readers(header: Header) -> dict[str, Client]:
    family = family_in(header)
    return readers(family.name if family else "", CLIENTS["all"].format)


def _front(header: Header, base: str) -> str:
    """The YAML of the card."""
    lines = [f"base_model: {markdown.quoted(base)}"] if base else []
    lines += ["library_name: diffusers", "pipeline_tag: text-to-image"]
    lines += [f"instance_prompt: {markdown.quoted(header.notes.example)}", "tags:"]
    return "\n".join([*lines, *(f"- {tag}" for tag in ("comcat", "text-to-image", "stable-diffusion"))])


def _facts(header: Header, shared: Shared) -> dict[str, str]:
    facts = {"file": f"{markdown.code(shared.adapter, in_table=True)}, {shared.bytes:,} bytes"}
    for part, config in header.config.items():
        most = " at most" * (part in header.packed)
        beside = "".join(f", with terms beside {kind.noun}" for kind in KINDS if config.get(kind.setting))
        told = f"{kind_of(config)}, rank {config.get('r')}{most}{beside}"
        facts[f"adapter of {markdown.text(part)}"] = markdown.text(told)
    for name, told in (("training", header.notes.training), ("written by", header.versions)):
        facts[name] = markdown.text(", ".join(f"{key} {value}" for key, value in told.items())) or "not said"
    return facts
