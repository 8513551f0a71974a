"""Masks by rembg, a program of others that cuts out what stands before a background, where it is installed.

It brings its model along only when it is first used, from the network, and so asks nobody but whoever said yes to that.
"""

import contextlib
import importlib.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

MODEL, MEGABYTES = "u2net", 176  # free for every use, as rembg's default is not; and the size of its file


def rembg_here() -> bool:
    """Whether rembg is installed; it is not imported."""
    return "rembg" in sys.modules or importlib.util.find_spec("rembg") is not None


def model_here() -> Path | None:
    """The file of its model where its versions look for it, so that nothing has to be downloaded; else None."""
    own, data = os.environ.get("U2NET_HOME"), os.environ.get("XDG_DATA_HOME")
    older = Path(own or Path(data or "~", ".u2net"))
    newer = Path(own or os.environ.get("REMBG_HOME") or (Path(data, "rembg") if data else "~/.rembg"))
    files = (newer / "models" / MODEL / f"{MODEL}.onnx", older / f"{MODEL}.onnx")
    return next((path for path in (file.expanduser() for file in files) if path.is_file()), None)


@contextlib.contextmanager
def _from(model: Path | None) -> Iterator[None]:
    """Have every version of rembg take this file as it is, and look for no other."""
    told = {"U2NET_HOME": str(model.parent), "MODEL_CHECKSUM_DISABLED": "1"} if model else {}
    before = {name: os.environ.get(name) for name in told}
    os.environ.update(told)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


class Cutter:
    """rembg with its model loaded, from the network only where it is not here and that was allowed.

    Raises ImportError or OSError, in one sentence, if it cannot be had.
    """

    def __init__(self, download: bool) -> None:
        model = model_here()
        if model is None and not download:
            raise FileNotFoundError("rembg's model is not here, and nobody said that it may be downloaded.")
        try:
            from rembg import new_session, remove
        except (ImportError, SystemExit) as error:  # without a runtime for its model it ends the program
            raise ImportError(
                'rembg is here, but not what it runs its model by: pip install "rembg[cpu]", or [gpu].'
            ) from error
        try:
            with _from(model):
                self.session = new_session(MODEL)
        except Exception as error:  # of the library that downloads, or of the one that reads the model
            raise OSError(
                f"rembg did not get its model, {MODEL} ({type(error).__name__}): check the connection, or put "
                f"the file {MODEL}.onnx into the folder .u2net of your home."
            ) from error
        self.remove = remove

    def mask(self, picture: Image.Image) -> Image.Image:
        """Where the subject is, of the picture's size: white is the subject, black what is behind it."""
        return self.remove(picture.convert("RGB"), session=self.session, only_mask=True).convert("L")
