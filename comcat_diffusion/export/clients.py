"""The programs that people draw in: which names of a LoRA's tensors each of them reads, and where it looks for files.

Nothing here imports torch, so that the help and the settings can name them.
"""

from dataclasses import dataclass

FORMATS = ("diffusers-lora", "kohya")


@dataclass(frozen=True)
class Client:
    """One program, or all of them."""

    name: str
    format: str
    loras: str  # where it looks for LoRAs
    words: str = ""  # and for the embeddings of new words; their file's name is the word there


# Checked by loaders: ComfyUI's own and Forge's leave most of a U-Net's tensors unread under diffusers' names, and
# diffusers reads kohya's; so kohya's is what one file for all of them has. See docs/guide.md.
CLIENTS = {
    "all": Client("every program", "kohya", "the program's folder of LoRAs"),
    "comfyui": Client("ComfyUI", "kohya", "ComfyUI/models/loras", "ComfyUI/models/embeddings"),
    "forge": Client("Forge", "kohya", "webui/models/Lora", "webui/embeddings"),
    "a1111": Client("A1111", "kohya", "stable-diffusion-webui/models/Lora", "stable-diffusion-webui/embeddings"),
    "kohya": Client("kohya's sd-scripts", "kohya", "--network_weights of its scripts"),
    "invokeai": Client("InvokeAI", "kohya", "the model manager, which scans or imports it"),
    "diffusers": Client("diffusers", "diffusers-lora", "pipe.load_lora_weights(FILE)"),
}
GALLERIES = ("forge", "a1111")  # which read NAME.json beside the LoRA: what to write in the prompt


def format_of(client: str, format: str | None) -> str:
    """Whose names the tensors get: the client's, or those asked for. Raises ValueError if the client reads others."""
    told = CLIENTS[client]
    if format is None or client == "all":
        return format or told.format
    if format != told.format and client != "diffusers":  # which reads both
        raise ValueError(f"--format {format} is not what {told.name} reads: leave --format out.")
    return format
