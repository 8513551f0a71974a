"""What stands beside a LoRA where galleries look for it: NAME.png, its picture, and NAME.json, what to prompt with."""

import json
from pathlib import Path

from comcat_diffusion.adapters.header import AdapterFileError, Header, picture_of
from comcat_diffusion.export.clients import GALLERIES
from comcat_diffusion.export.shareable import as_png, png_of

_VERSIONS = {768: "SD1", 1024: "SD2", 2048: "SDXL"}  # by the width of the text states, as A1111 calls them


def files_beside(output: str | Path, header: Header, client: str, preview: str | Path | None) -> dict[Path, bytes]:
    """The files that go with a LoRA at `output`; nothing is written. Raises ValueError for what is no picture."""
    output, found = Path(output), {}
    thumbnail = picture_of(header)
    if preview is not None:
        found[output.with_suffix(".png")] = as_png(Path(preview), "--preview")
    elif thumbnail is not None:
        try:
            found[output.with_suffix(".png")] = png_of(thumbnail)
        except OSError as error:
            raise AdapterFileError(f"The adapter's thumbnail is no picture ({error}).") from error
    if client in GALLERIES:
        version = _VERSIONS.get(header.width, "Unknown")
        told = {"description": "exported from a COMCAT adapter", "sd version": version}
        told |= {"activation text": header.notes.phrase, "preferred weight": 1.0, "notes": ""}
        found[output.with_suffix(".json")] = (json.dumps(told, indent=4) + "\n").encode()
    return found
