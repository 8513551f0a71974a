"""Writing a file so that it is either the old one or the new one, whole, never something between."""

import errno
import os
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
