"""The folder that becomes a model repository: the adapter, its card, a sheet of samples, and it as a LoRA."""

from dataclasses import replace
from pathlib import Path

from safetensors.torch import load

from comcat_diffusion import atomic
from comcat_diffusion.adapters.header import Header, read_adapter
from comcat_diffusion.adapters.store import serialized
from comcat_diffusion.config import EMBEDDED, BaseSettings
from comcat_diffusion.export.card import Shared, card, public_base
from comcat_diffusion.export.fit import is_exact, needs_base
from comcat_diffusion.export.lora import export_adapter
from comcat_diffusion.export.shareable import as_png, refuse_unshareable
from comcat_diffusion.export.spread import shells


def build_folder(
    folder: Path, repo_id: str, adapter: str | Path, sheet: str | Path | None = None, lora: bool | None = None
) -> None:
    """Fill a folder with all that is shared: the adapter, the card, the sheet of samples, and it as a LoRA.

    The LoRA is there if it is asked for, or, with None, if the file is one exactly without its base. Raises
    AdapterFileError for what is no adapter, or, with True, for one that no LoRA can express; ValueError for a sheet
    that is no picture or an id that is none.
    """
    refuse_unshareable(repo_id, adapter, sheet, bool(lora))
    adapter = Path(adapter)
    header, named, words = read_adapter(adapter), "", []
    content = _without_folders(adapter.read_bytes(), header)
    if sheet is not None:
        atomic.write_bytes(folder / "sheet.png", as_png(Path(sheet)))
    if lora or (lora is None and is_exact(header) and not needs_base(header)):
        models = shells(BaseSettings(), header, adapter) if needs_base(header) else None
        made = export_adapter(adapter, folder / f"{adapter.stem}-lora.safetensors", models=models)
        named, words = made.files[0].name, [file.name for file in made.files[1:]]
    atomic.write_bytes(folder / adapter.name, content)
    there = "sheet.png" if sheet is not None else ""
    shared = Shared(repo_id, adapter.name, len(content), there, named, tuple(words))
    atomic.write_bytes(folder / "README.md", card(header, shared).encode())


def _without_folders(content: bytes, header: Header) -> bytes:
    """An adapter file that, of a base in somebody's folder, names the folder alone."""
    if header.base_model == EMBEDDED or public_base(header) or not header.base_model:
        return content
    return serialized(load(content), replace(header, base_model=Path(header.base_model).name))
