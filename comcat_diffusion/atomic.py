"""Writing a file or a folder so that it is either the old one or the new one, whole, never something between."""

import contextlib
import errno
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # the disk is full, its owner's share of it, or the longest file is


def write_bytes(path: str | Path, content: bytes) -> None:
    """Write beside the target, force to disk, then rename. Raises OSError; without room, that of `writing`."""
    path = Path(path).expanduser()
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    with writing(path, len(content), partial):
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)


@contextlib.contextmanager
def writing(target: Path, needed: int, partial: Path | None = None) -> Iterator[None]:
    """Write in this block what becomes `target`, of at least `needed` bytes; after an error `partial` is removed.

    If there is no room, which every library says in its own way, raises OSError with one sentence of what could not be
    written, how many bytes it needs and how many are free, and what became of the target.
    """
    try:
        yield
    except BaseException as error:
        if partial is not None:  # first, so that its bytes count as free
            _remove(partial)
        number = _no_room(error)
        if number is None:
            raise
        kept = "what was there before is intact" if target.exists() else "nothing was left behind"
        free = shutil.disk_usage(target.absolute().parent).free
        raise OSError(
            number,
            f"{target} could not be written ({os.strerror(number)}): it needs at least {needed:,} bytes, "
            f"{free:,} are free; {kept}.",
        ) from error


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _no_room(error: BaseException) -> int | None:
    """The system's number of an error that says that a file could not grow, whichever library says it."""
    if isinstance(error, OSError):
        return error.errno if error.errno in NO_ROOM else None
    told = re.search(r"I/O error: .*\(os error (\d+)\)", str(error))  # safetensors
    if told:
        return int(told[1])
    return errno.ENOSPC if "inline_container.cc" in str(error) else None  # torch.save does not tell why it failed


def bytes_of(models: Iterable[object]) -> int:
    """Bytes of the weights of those that have any."""
    states = [model.state_dict() for model in models if hasattr(model, "state_dict")]
    return sum(tensor.nbytes for state in states for tensor in state.values())


def make_folder(path: str | Path, flag: str) -> Path:
    """The folder of this name, made if it is not there. Raises OSError that names the flag."""
    folder = Path(path).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(error.errno, f"{flag} {folder} cannot be made ({error.strerror}).") from error
    return folder


def refuse_bad_target(target: str | Path, overwrite: bool, flag: str = "--output") -> None:
    """Raise OSError, in one sentence, if a file cannot be written there or, unless `overwrite`, if there is one."""
    target = Path(target).expanduser()
    if not target.parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, f"{flag} {target}: there is no folder {target.parent}; make it first.")
    if target.is_dir():
        raise IsADirectoryError(errno.EISDIR, f"{flag} {target} is a folder; name a file in it.")
    if target.exists() and not overwrite:
        raise FileExistsError(errno.EEXIST, f"{flag} {target} is there already: name another, or add --overwrite.")


def refuse_used(target: Path) -> None:
    """Raise FileExistsError if there is something already where a folder is to be written; an empty one is fine."""
    try:
        used = target.exists() and (not target.is_dir() or any(target.iterdir()))
    except OSError as error:
        raise OSError(error.errno, f"The folder {target} cannot be made ({error.strerror}).") from error
    if used:
        raise FileExistsError(errno.EEXIST, f"{target} holds something already; name a new or an empty folder.")


@contextlib.contextmanager
def whole_folder(target: str | Path) -> Iterator[Path]:
    """A folder beside the target, to fill; at the end of the block it takes the target's name, after an error it goes.

    Raises FileExistsError if the target holds something already, OSError if no folder can be made there.
    """
    target = Path(target).expanduser().absolute()
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    refuse_used(target)
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        raise OSError(error.errno, f"The folder {target} cannot be made ({error.strerror}).") from error
    try:
        yield partial
        os.replace(partial, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
