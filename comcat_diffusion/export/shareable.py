"""What can be shared on the hub, by its header, its picture and its name: nothing here waits for torch."""

import io
from pathlib import Path

from huggingface_hub.utils import validate_repo_id
from PIL import Image

from comcat_diffusion.adapters.header import read_adapter
from comcat_diffusion.export.fit import refuse_inexpressible


def refuse_unshareable(repo_id: str, adapter: str | Path, sheet: str | Path | None = None, lora: bool = False) -> None:
    """Raise ValueError for an id that is none and a sheet that is no picture, AdapterFileError for what is no adapter.

    With `lora` also for one that no LoRA can express.
    """
    validate_repo_id(repo_id)
    header = read_adapter(adapter)
    if sheet is not None:
        as_png(Path(sheet))
    if lora:
        refuse_inexpressible(header, adapter)


def as_png(path: Path, flag: str = "--sheet") -> bytes:
    """The picture anew: what a file says beside its pixels (prompts, paths) stays at home. Raises ValueError."""
    try:
        return png_of(path.read_bytes())
    except OSError as error:
        raise ValueError(f"{flag} {path} cannot be read as a picture.") from error


def png_of(picture: bytes) -> bytes:
    """A picture's file content as a PNG of its pixels alone. Raises OSError for what is none."""
    content = io.BytesIO()
    try:
        with Image.open(io.BytesIO(picture)) as opened:
            opened.convert("RGB").save(content, "PNG")
    except (Image.DecompressionBombError, SyntaxError, ValueError) as error:
        raise OSError(f"no picture ({error})") from error
    return content.getvalue()
