"""What a base alone draws of a prompt, by seed: drawn once, and there for every strength that is tried later."""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from comcat_diffusion.generation.config import GenerateConfig
from comcat_diffusion.generation.generate import drawn
from comcat_diffusion.generation.order import Order, order_of

FOLDER = "base-pictures"  # inside the page's folder
_OF_ADAPTERS = ("keep_background", "any_prompt", "any_weights", "seed")


class BasePictures:
    """The pictures that belong to an order, in a folder named by all that makes them but the seed: SEED.png."""

    def __init__(self, folder: Path, order: Order, settings: Mapping[str, object]) -> None:
        self.asked = {name: value for name, value in settings.items() if name not in _OF_ADAPTERS}
        self.asked |= {"prompt": list(order.prompts), "pretrained_model_name_or_path": order.base}
        key = hashlib.sha256(json.dumps(self.asked, sort_keys=True).encode()).hexdigest()[:20]
        self.folder = folder / FOLDER / key

    def missing(self, seeds: Sequence[int]) -> list[int]:
        """Those seeds whose pictures are still to be drawn."""
        return [seed for seed in seeds if not self._file(seed).is_file()]

    def missing_runs(self, seeds: Sequence[int]) -> Iterator[list[int]]:
        """The same, as runs of neighbours."""
        run: list[int] = []
        for seed in self.missing(seeds):
            if run and seed != run[-1] + 1:
                yield run
                run = []
            run.append(seed)
        if run:
            yield run

    def draw(
        self, run: Sequence[int], count: Callable[[int, int], None], note: Callable[[str], None], load: Callable
    ) -> None:
        """Draw a run of neighbouring seeds."""
        partial = self.folder / "drawing"
        shutil.rmtree(partial, ignore_errors=True)
        config = GenerateConfig(**self.asked, seed=run[0], num_images=len(run), output_dir=str(partial))
        made = drawn(order_of(config), count, note, load)
        for seed, file in zip(run, made.files, strict=True):
            file.rename(self._file(seed))
        shutil.rmtree(partial)

    def copy(self, seeds: Sequence[int], target: Path) -> None:
        """Put them into the folder of who asked for them."""
        target.mkdir(exist_ok=True)
        for seed in seeds:
            shutil.copyfile(self._file(seed), target / f"{seed}.png")

    def _file(self, seed: int) -> Path:
        return self.folder / f"{seed}.png"
