"""Where a base is, by the name that it goes by: an embedded one, a folder or file, or, being nowhere here, a hub id.

Nothing here imports torch, so that a name that is none is refused before anything is waited for.
"""

import json
from pathlib import Path

from comcat_diffusion.config import EMBEDDED, EMBEDDED_FLOW, BaseSettings, is_hub_id

_PACKAGE = Path(__file__).parent
_FOLDERS = {EMBEDDED: "tiny-sd", EMBEDDED_FLOW: "tiny-flow"}
EMBEDDED_BASES = tuple(_FOLDERS)


def assets() -> Path:
    """Where the embedded base and the sample subject are: inside the installed package, or beside it in a checkout."""
    for folder in (_PACKAGE / "assets", _PACKAGE.parent / "assets"):
        if any((folder / base).is_dir() for base in _FOLDERS.values()):  # of a Space, the one that it draws with
            return folder
    raise FileNotFoundError(
        f"The embedded base is missing: neither {_PACKAGE}/assets nor {_PACKAGE.parent}/assets has it."
    )


def is_embedded(name: str) -> bool:
    """Whether this names a base that comes with the package, by its word or its folder."""
    if name in _FOLDERS:
        return True
    try:
        asked = Path(name).expanduser().resolve()
        return any(asked == (assets() / folder).resolve() for folder in _FOLDERS.values())
    except FileNotFoundError:  # a copy of the package without them, as a Space has
        return False


def dense_name(name: str) -> str:
    """The base that a compressed one was made of; any other itself."""
    plan = Path(name).expanduser() / "plan.json"
    return json.loads(plan.read_text("utf-8"))["plan"]["model_id"] if plan.is_file() else name


def is_of_embedded(name: str | None) -> bool:
    """Whether this names an embedded base, as None does, or one that was compressed from it."""
    return is_embedded(dense_name(name or EMBEDDED))


def public_name(name: str) -> str:
    """A hub id as it is; of a folder of this machine only its own name, the rest is nobody's business."""
    path = Path(name).expanduser()
    return path.resolve().name if path.exists() else name


def place_of(name: str) -> Path:
    """The folder or file of a base; nothing is there only of a hub id."""
    path = assets() / _FOLDERS[name] if name in _FOLDERS else Path(name).expanduser()
    if name == EMBEDDED_FLOW and not path.is_dir():
        raise FileNotFoundError(
            f"'{name}' is not part of this copy of the package: make flow-base trains it, and 'embedded' is there."
        )
    if path.is_dir() and not (path / "model_index.json").is_file():
        raise FileNotFoundError(f"{path} is no diffusers folder: it has no model_index.json.")
    if not (path.is_dir() or path.is_file() or is_hub_id(name)):
        raise FileNotFoundError(f"There is no base at '{name}': no such folder or file, and a hub id reads owner/name.")
    return path


def asked_name(config: BaseSettings, name: str | None = None) -> str:
    """The base that the settings of a run name; `name` where they leave it open."""
    return config.pretrained_model_name_or_path or name or EMBEDDED
