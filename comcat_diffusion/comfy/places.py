"""Where in the picture adapters act, found by the model itself, in ComfyUI: as adapters/focus.py does it in diffusers.

Each step takes the base first, to know what it predicts and where it looks; then the adapters. Where it looked before
in the same drawing is known by the conditionings.

Letters: B batch, N = h*w tokens of one attention, M context tokens, C channels.
"""

from collections.abc import Callable, Mapping

import torch
from torch import nn

from comcat_diffusion.adapters.looking import Course, divided, looks_of, weights_of
from comcat_diffusion.adapters.regions import grid_of

PLACES = "comcat_places"  # key in a model's options
WAY_UP = "diffusion_model.output_blocks."
_REMEMBERED = 8  # groups of conditionings that are drawn together; the oldest are forgotten


class Places:
    """One step: where each adapter's words, (B, M) of ones and zeros, are looked at while the base predicts."""

    def __init__(self, of_words: Mapping[str, torch.Tensor]) -> None:
        self.of_words = of_words
        self.looking = True  # until the base has predicted
        self._means: dict[str, torch.Tensor] = {}
        self._seen: dict[str, list[torch.Tensor]] = {}

    def look(
        self, name: str, attention: nn.Module, hidden: torch.Tensor, text: torch.Tensor, latent: tuple[int, int]
    ) -> None:
        """Note where a cross-attention of ComfyUI looks at an adapter's words: hidden (B, N, C), text (B, M, C')."""
        query, key = attention.to_q(hidden), attention.to_k(text)
        self._seen.setdefault(name, []).append(looks_of(query, key, attention.heads, self.of_words[name], latent))

    def shares(
        self, named: list[str], latent: tuple[int, int], hidden: torch.Tensor, masked: Mapping[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """Shares of each place of an attention, (B, N, 1), of those adapters that are placed, within their masks."""
        if self.looking:
            return {name: hidden.new_zeros(1, hidden.shape[1], 1) for name in named}
        if len(self._means) < 2:
            return {}
        found = divided(self._means, grid_of(latent, hidden.shape[1]), masked)  # also of who is not in this one
        return {name: found[name] for name in named}

    def step(self, course: Course, noise: float | None, run: Callable[[bool], torch.Tensor]) -> torch.Tensor:
        """A prediction that is the base's around the subjects; `run` takes a pass, told whether another one follows."""
        base = run(True)
        if not self._seen:  # no adapter is at work
            return base
        self.looking = False
        self._means = course.step(noise, {name: torch.stack(maps).mean(0) for name, maps in self._seen.items()})
        weights = sum(map(weights_of, self._means.values())).clamp(max=1).to(base)
        return torch.lerp(base, run(False), weights)


class Courses:
    """The drawings that a model is in, by the conditionings that are drawn together."""

    def __init__(self) -> None:
        self._known: dict[tuple, Course] = {}

    def step(
        self, latents: torch.Tensor, options: Mapping, places: Places, run: Callable[[bool], torch.Tensor]
    ) -> torch.Tensor:
        """One step of one of them; see `Places`."""
        key = (*options.get("uuids", ()), *options.get("cond_or_uncond", ()), *latents.shape)
        course = self._known[key] = self._known.pop(key, None) or Course()
        while len(self._known) > _REMEMBERED:
            del self._known[next(iter(self._known))]
        noise = float(options["sigmas"].max()) if options.get("sigmas") is not None else None
        return places.step(course, noise, run)
