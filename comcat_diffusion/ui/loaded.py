"""The base that was drawn with last, kept for the next pictures: what a strength slider asks for is drawn at once."""

from diffusers import DiffusionPipeline
from diffusers.training_utils import free_memory

from comcat_diffusion import bases
from comcat_diffusion.adapters.merge import unload_adapters
from comcat_diffusion.config import BaseSettings
from comcat_diffusion.places import asked_name, place_of


class Loaded:
    """Loads a base as `bases.asked_base` does, or gives the one that it has, as bare as it was."""

    def __init__(self) -> None:
        self._key: tuple | None = None
        self._pipe: DiffusionPipeline | None = None

    def __call__(self, config: BaseSettings, precision: str, name: str | None = None) -> DiffusionPipeline:
        """The base of the settings, without adapters and with a sampler of its own."""
        base = asked_name(config, name)
        place = place_of(base)
        written = place.stat().st_mtime_ns if place.exists() else 0  # another base may have come under its name
        key = base, written, precision, config.revision, config.variant, config.base_config
        if key != self._key:
            self.forget()
            self._pipe = bases.asked_base(config, precision, name)
            self._key, self._scheduler = key, self._pipe.scheduler
        unload_adapters(self._pipe)
        self._pipe.scheduler = type(self._scheduler).from_config(self._scheduler.config)
        return self._pipe

    def forget(self) -> None:
        """Let go of it: something else needs the room, or an error may have left it in any state."""
        self._key = self._pipe = None
        free_memory()


LOADED = Loaded()  # of the worker, which does one job at a time
