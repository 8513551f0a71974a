"""Sharing adapters through the Hugging Face hub: a folder is built here, and carried there and back by huggingface_hub.

Who may write is huggingface_hub's business (`hf auth login` or HF_TOKEN): no token passes through this code.
"""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from huggingface_hub import create_repo, snapshot_download, upload_folder
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import validate_repo_id
from PIL import Image
from safetensors.torch import load

from comcat_diffusion import atomic
from comcat_diffusion.adapters.header import AdapterFileError, Header, read_adapter
from comcat_diffusion.adapters.store import serialized
from comcat_diffusion.config import EMBEDDED
from comcat_diffusion.export.card import Shared, card, public_base
from comcat_diffusion.export.lora import export_adapter


def build_folder(
    folder: Path, repo_id: str, adapter: str | Path, sheet: str | Path | None = None, lora: bool = False
) -> None:
    """Fill a folder with all that is shared: the adapter, the card, the sheet of samples, and it as LoRAs.

    Raises AdapterFileError for what is no adapter, or, with `lora`, a free one, ValueError for a sheet that is no
    picture or an id that is none.
    """
    validate_repo_id(repo_id)
    adapter = Path(adapter)
    header, loras, words = read_adapter(adapter), {}, []
    content = _without_folders(adapter.read_bytes(), header)
    if sheet is not None:
        atomic.write_bytes(folder / "sheet.png", _png(Path(sheet)))
    for name, form in (("diffusers_lora", "diffusers-lora"), ("kohya_lora", "kohya")) if lora else ():
        made = export_adapter(adapter, folder / f"{adapter.stem}-{form.removesuffix('-lora')}-lora.safetensors", form)
        loras[name] = made.files[0].name
        words += [file.name for file in made.files[1:]]
    atomic.write_bytes(folder / adapter.name, content)
    there = "sheet.png" if sheet is not None else ""
    shared = Shared(repo_id, adapter.name, len(content), there, **loras, words=tuple(words))
    atomic.write_bytes(folder / "README.md", card(header, shared).encode())


def _without_folders(content: bytes, header: Header) -> bytes:
    """An adapter file that, of a base in somebody's folder, names the folder alone."""
    if header.base_model == EMBEDDED or public_base(header) or not header.base_model:
        return content
    return serialized(load(content), replace(header, base_model=Path(header.base_model).name))


def _png(path: Path) -> bytes:
    """The picture anew: what a file says beside its pixels (prompts, paths) stays at home."""
    try:
        content = io.BytesIO()
        with Image.open(path) as opened:
            opened.convert("RGB").save(content, "PNG")
        return content.getvalue()
    except OSError as error:
        raise ValueError(f"--sheet {path} cannot be read as a picture.") from error


def push(folder: Path, repo_id: str, private: bool) -> str:
    """Upload a folder as a model repository, made where there is none; returns its address. Raises OSError."""
    with _in_one_sentence(repo_id):
        address = create_repo(repo_id, private=private, exist_ok=True)
        upload_folder(repo_id=repo_id, folder_path=folder, commit_message="Share an adapter")
    return str(address)


def pull(repo_id: str, output_dir: str | Path, revision: str | None = None) -> list[Path]:
    """Fetch the adapter files of a model repository into a folder. Raises OSError, or ValueError as copying them does.

    `revision` is a branch, tag or commit.
    """
    validate_repo_id(repo_id)
    with _in_one_sentence(repo_id):
        there = snapshot_download(repo_id, revision=revision, allow_patterns=["*.safetensors"])
    return copy_adapters(Path(there), Path(output_dir).expanduser(), repo_id)


def copy_adapters(source: Path, target: Path, repo_id: str) -> list[Path]:
    """Copy what is a COMCAT adapter. Raises ValueError if nothing is, or if another file has its name already."""
    found = {}
    for path in sorted(source.rglob("*.safetensors")):
        try:
            read_adapter(path)
        except AdapterFileError:  # a LoRA, a base
            continue
        found[target / path.name] = path.read_bytes()
    if not found:
        raise ValueError(f"--repo_id {repo_id} holds no COMCAT adapter.")
    for path, content in found.items():
        if path.exists() and path.read_bytes() != content:
            raise ValueError(f"{path} is another file of this name; choose another --output_dir.")
    target.mkdir(parents=True, exist_ok=True)
    for path, content in found.items():
        atomic.write_bytes(path, content)
    return list(found)


@contextmanager
def _in_one_sentence(repo_id: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # or of the HTTP library, which is another one in every version of huggingface_hub
        # Where nothing in the cache can stand in for an answer, the answer is the cause of another error.
        answer = error if isinstance(error, HfHubHTTPError) else error.__cause__
        if isinstance(answer, HfHubHTTPError):
            told = f"{type(answer).__name__}, {getattr(answer.response, 'status_code', 'no status')}"
            said = f"The hub refused '{repo_id}' ({told}): check the name, and who is logged in."
        else:
            said = f"The hub did not answer for '{repo_id}' ({type(error).__name__}): check the connection."
        raise OSError(said) from error
