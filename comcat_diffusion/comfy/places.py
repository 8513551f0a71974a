"""Where in the picture adapters act, found by the model itself, in ComfyUI: as adapters/focus.py does it in diffusers.

Each step is placed by what the step before it has seen, of the same conditionings; the first of a drawing by a pass of
the base alone.

Letters: B batch, N = h*w tokens of one attention, M context tokens, C channels.
"""

from collections.abc import Callable, Mapping

import torch
from torch import nn

from comcat_diffusion.adapters.looking import looks_of, weights_of
from comcat_diffusion.adapters.regions import grid_of

PLACES = "comcat_places"  # key in a model's options
WAY_UP = "diffusion_model.output_blocks."
_REMEMBERED = 8  # groups of conditionings that are drawn together; the oldest are forgotten


class Places:
    """One pass of the U-Net: where each adapter acts, and where its words are looked at meanwhile."""

    def __init__(self, of_words: Mapping[str, torch.Tensor], maps: Mapping[str, torch.Tensor]) -> None:
        self.of_words, self.maps = of_words, maps  # (B, M) of ones and zeros and (B, 1, h, w), by adapter
        self._seen: dict[str, list[torch.Tensor]] = {}

    def look(
        self, name: str, attention: nn.Module, hidden: torch.Tensor, text: torch.Tensor, latent: tuple[int, int]
    ) -> None:
        """Note where a cross-attention of ComfyUI looks at an adapter's words: hidden (B, N, C), text (B, M, C')."""
        query, key = attention.to_q(hidden), attention.to_k(text)
        self._seen.setdefault(name, []).append(looks_of(query, key, attention.heads, self.of_words[name], latent))

    def weights(self, name: str, latent: tuple[int, int], hidden: torch.Tensor) -> torch.Tensor:
        """How much an adapter acts at each place of an attention, (B, N, 1): nowhere, if nothing was looked at yet."""
        if name not in self.maps:
            return hidden.new_zeros(len(hidden), hidden.shape[1], 1)
        return weights_of(self.maps[name], grid_of(latent, hidden.shape[1])).to(hidden)

    def found(self) -> dict[str, torch.Tensor]:
        """What was seen, for the next step."""
        return {name: torch.stack(maps).mean(0) for name, maps in self._seen.items()}


class Course:
    """The drawing that a model is in: what its last pass has seen, by the conditionings that it was of."""

    def __init__(self) -> None:
        self._last: dict[tuple, tuple[float, dict[str, torch.Tensor]]] = {}

    def step(
        self, latents: torch.Tensor, options: Mapping, of_words: Mapping[str, torch.Tensor], run: Callable
    ) -> torch.Tensor:
        """One pass; `run` takes the options of it, and whether it is only to look."""
        key = (*options.get("uuids", ()), *options.get("cond_or_uncond", ()), *latents.shape)
        noise = _noise(options)
        before, maps = self._last.pop(key, (None, {}))
        if before is None or noise is None or noise > before or _begins(options, noise):
            look = Places(of_words, {})
            run({**options, PLACES: look}, True)
            maps = look.found()
        now = Places(of_words, maps)
        made = run({**options, PLACES: now}, False)
        self._last[key] = noise, now.found()
        while len(self._last) > _REMEMBERED:
            del self._last[next(iter(self._last))]
        return made


def _noise(options: Mapping) -> float | None:
    """How much noise is in the latents; None where nobody tells."""
    return float(options["sigmas"].max()) if options.get("sigmas") is not None else None


def _begins(options: Mapping, noise: float) -> bool:
    """Whether a drawing begins here: another one may have ended at as much noise, after a single step."""
    course = options.get("sample_sigmas")
    return course is None or noise >= float(course.max())
