"""A base brought from the hub into its cache: the files that diffusers loads it by, and how many bytes are there."""

from collections.abc import Callable

from huggingface_hub import snapshot_download
from tqdm import tqdm

PATTERNS = ("*.json", "README.md", "*/*.json", "*/*.txt", "*/*.model", "*/*.safetensors")
NOT = ("*.fp16.*", "*non_ema*", "*.bf16.*")  # weights of which the plain ones are fetched


def download(name: str, count: Callable[[int, int], None]) -> None:
    """Fetch a base; `count` is told of bytes. Raises OSError, in one sentence, if the hub does not give it."""

    class Bar(tqdm):
        """Tells of bytes instead of drawing."""

        def __init__(self, *arguments: object, **more: object) -> None:
            more.pop("name", None)
            super().__init__(*arguments, **more | {"disable": True})
            self.total, self.unit, self.n = more.get("total") or 0, more.get("unit"), more.get("initial") or 0

        def update(self, n: float = 1) -> None:
            self.n += n
            if self.unit == "B" and self.total:
                count(int(min(self.n, self.total)), int(self.total))

    try:
        snapshot_download(name, allow_patterns=PATTERNS, ignore_patterns=NOT, tqdm_class=Bar)
    except KeyboardInterrupt:
        raise
    except Exception as error:  # or of the HTTP library, which is another one in every version of huggingface_hub
        raise OSError(
            f"The hub did not give '{name}' ({type(error).__name__}): check the name and the connection; some bases "
            "want you to accept their license on their page and to log in (hf auth login)."
        ) from error
