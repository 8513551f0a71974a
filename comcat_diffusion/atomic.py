"""Writing a file or a folder so that it is either the old one or the new one, whole, never something between."""

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path


def write_bytes(path: str | Path, content: bytes) -> None:
    """Write beside the target, force to disk, then rename. Raises OSError with how much room was needed."""
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise OSError(
                error.errno, f"The disk is full: {path} needs {len(content):,} bytes; nothing was lost."
            ) from error
        raise


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
