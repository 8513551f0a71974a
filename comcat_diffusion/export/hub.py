"""Sharing adapters through the Hugging Face hub, to which huggingface_hub carries folders that share.py builds.

Who may write is huggingface_hub's business (`hf auth login` or HF_TOKEN): no token passes through this code.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import create_repo, snapshot_download, upload_folder
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import validate_repo_id

from comcat_diffusion import atomic
from comcat_diffusion.adapters.header import AdapterFileError, read_adapter


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
