"""The programs that people draw in: which names of a LoRA's tensors each of them reads, and where it looks for files.

Nothing here imports torch, so that the help and the settings can name them.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

FORMATS = ("diffusers-lora", "kohya")


@dataclass(frozen=True)
class Client:
    """One program, or all of them."""

    name: str
    format: str
    loras: str  # where it looks for LoRAs
    words: str = ""  # and for the embeddings of new words; their file's name is the word there
    others: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))  # format by family, if another
    lacks: tuple[str, ...] = ()  # families of whose LoRAs it reads none


# Checked by loaders: ComfyUI's own and Forge's leave most of a U-Net's tensors unread under diffusers' names, and
# diffusers reads kohya's; so kohya's is what one file for all of them has. InvokeAI takes a FLUX.2 [klein] of native
# names for a FLUX.1 and changes nothing with it, and knows no such Z-Image; SD.Next gives what Stable Diffusion 3 does
# to its text to the picture instead (tests/clients_check.py). Forge of June 2025 has engines for Stable Diffusion 1 to
# 3.5 and XL, FLUX.1 and Chroma alone, and of ours sd-scripts of February 2026 know the same; these, told no
# --dim_from_weights, train on without the LoRAs of convolutions. See docs/guide.md.
_INVOKEAI = MappingProxyType(dict.fromkeys(("FLUX.2 [klein]", "Z-Image"), "diffusers-lora"))
_NO_ENGINE = (
    "FLUX.2 [klein]",
    "Z-Image",
    "Qwen-Image",
    "Kolors",
    "PixArt-alpha and PixArt-Sigma",
    "Sana 1.x",
)
_RARE = ("Chroma", "PixArt-alpha and PixArt-Sigma", "Sana 1.x")
CLIENTS = {
    "all": Client("every program", "kohya", "the program's folder of LoRAs"),
    "comfyui": Client("ComfyUI", "kohya", "ComfyUI/models/loras", "ComfyUI/models/embeddings"),
    "forge": Client(
        "Forge",
        "kohya",
        "webui/models/Lora",
        "webui/embeddings",
        lacks=_NO_ENGINE,
    ),
    "a1111": Client(
        "A1111",
        "kohya",
        "stable-diffusion-webui/models/Lora",
        "stable-diffusion-webui/embeddings",
        lacks=("FLUX.2 [klein]", "FLUX.1", "Z-Image", "Qwen-Image", "Kolors", *_RARE),
    ),
    "kohya": Client(
        "kohya's sd-scripts",
        "kohya",
        "--network_weights of its scripts, in training with --dim_from_weights",
        lacks=_NO_ENGINE,
    ),
    "invokeai": Client(
        "InvokeAI",
        "kohya",
        "the model manager, which scans or imports it",
        others=_INVOKEAI,
        lacks=("Stable Diffusion 3 and 3.5", "Kolors", *_RARE),
    ),
    "sdnext": Client(
        "SD.Next",
        "kohya",
        "models/Lora",
        others=MappingProxyType({"Sana 1.x": "diffusers-lora"}),  # which it leaves to diffusers
        lacks=("Stable Diffusion 3 and 3.5", "PixArt-alpha and PixArt-Sigma"),
    ),
    "diffusers": Client("diffusers", "diffusers-lora", "pipe.load_lora_weights(FILE)"),
}
GALLERIES = ("forge", "a1111")  # which read NAME.json beside the LoRA: what to write in the prompt


def format_of(client: str, format: str | None, family: str = "") -> str:
    """Whose names the tensors get: the client's for a family of bases, called as there, or those asked for.

    Raises ValueError if the client reads others, or no LoRAs of the family.
    """
    told = CLIENTS[client]
    own = told.others.get(family, told.format)
    if family in told.lacks:
        raise ValueError(f"There are no LoRAs of {family} for {told.name}: choose another program, or --for all.")
    if format is None or client == "all":
        return format or own
    if format != own and client != "diffusers" and (family or not told.others):  # diffusers reads both
        raise ValueError(f"--format {format} is not what {told.name} reads: leave --format out.")
    return format


def readers(family: str, format: str) -> dict[str, Client]:
    """The programs that read all of a LoRA of the family whose tensors have these names; diffusers takes both."""
    able = {key: client for key, client in CLIENTS.items() if key != "all" and family not in client.lacks}
    return {key: one for key, one in able.items() if key == "diffusers" or one.others.get(family, one.format) == format}


def asked_for(client: str, family: str, format: str) -> str:
    """The name of a client; of all, the names of those that read such a file, unless these are all."""
    able = [one.name for one in readers(family, format).values()]
    if client != "all" or len(able) == len(CLIENTS) - 1:
        return CLIENTS[client].name
    return " and ".join(filter(None, (", ".join(able[:-1]), able[-1])))
