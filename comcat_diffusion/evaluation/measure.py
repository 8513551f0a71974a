"""From pictures to measures: every one of a row's pictures is compared with what it should show, resemble or remain.

Letters: P prompts, S seeds, N = P x S pictures, F features.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from comcat_diffusion.evaluation import metrics
from comcat_diffusion.evaluation.cutout import Outline, background_moved, centred, colour_off
from comcat_diffusion.evaluation.features import Features
from comcat_diffusion.evaluation.pictures import SubjectPictures
from comcat_diffusion.evaluation.prompts import Prompts
from comcat_diffusion.evaluation.world import SIDE, SPAN, alone, asked, details, see

# What a report calls each measure and says of it.
MEANINGS = {
    "learned": "how much more like the held-out pictures a picture is than the base's of the same prompt and seed; 0 "
    "where it does not obey",
    "obeyed": "share of pictures that obey their prompt: on the embedded base background, place and size, where named, "
    "are as asked; elsewhere no other prompt for the subject is closer by the CLIP",
    "subject_fidelity": "mean cosine of a picture's features to those of the held-out pictures",
    "subject_fidelity_clip": "the same with the features of the CLIP",
    "shape": "the same with the features of the subject alone, cut out and centred on grey",
    "colour_off": "how far the cut-out subject's mean colour is from that of the held-out pictures, of 255",
    "background_moved": "how far the pixels outside the subject are from those of the base's picture of the same "
    "prompt and seed, of 255",
    "copying": "highest cosine to a training picture; near 1 is a copy",
    "prompt_fidelity": "cosine of the CLIP's features of a picture and of its prompt, the trigger left out",
    "drift": "1 - cosine to the base's picture of the same seed, over prompts that do not name the subject",
    "drift_of_class": "the same over the prompt of its class",
    "pixel_drift": "mean absolute difference of the pixels over both, black to white being 1",
    "diversity": "mean 1 - cosine between the seeds of a prompt",
    "background_right": "share of pictures whose background has the colour that their prompt asks for",
    "place_right": "share of pictures whose subject is where their prompt wants it",
    "size_right": "share of pictures whose subject has the size that their prompt asks for",
}
SCORE = "learned x (1 - drift) x (1 - background moved / 255) x (1 - colour off / 255) x shape"
RULE = (
    f"the highest score = {SCORE}, among those whose learned is above 0 with its whole interval; at equal scores the "
    "lower drift"
)
ALONE = 224  # pixels, side of a cut-out as feature models see it
DIGITS = 3  # shown, and compared: what differs by less is equal
Values = dict[str, torch.Tensor]  # by measure: (P, S)


@dataclass(frozen=True)
class Shown:
    """The pictures of a row, prompts x seeds, by kind of prompt."""

    calling: Sequence[Image.Image]
    unrelated: Sequence[Image.Image]
    of_class: Sequence[Image.Image]


class Measures:
    """Compares rows with the subject and with the base's own row."""

    def __init__(
        self,
        clip: Features,
        judge: Features,
        subject: SubjectPictures,
        prompts: Prompts,
        embedded: bool,  # whether pictures show the embedded world, which can be read without any model
        outline: Outline | None = None,  # where subjects are in pictures, if anybody can tell
    ) -> None:
        self.clip, self.judge, self.prompts, self.embedded = clip, judge, prompts, embedded
        self.subject, self.outline = subject, outline
        self.texts = clip.texts(prompts.texts)  # P, F

    def of(self, shown: Shown, before: Shown, seeds: int) -> Values:
        """Everything that can be said of a row; the base's own row has drifted by nothing."""
        own = torch.arange(len(self.texts)).repeat_interleave(seeds)  # N: the prompt of each picture
        by_clip = self.clip.images(shown.calling)
        found = {
            **self._likeness(shown.calling),
            "prompt_fidelity": metrics.prompt_fidelity(by_clip, self.texts[own]),
            "obeyed": metrics.closest(by_clip, self.texts, own),
            **self._drift(shown, before),
            **(self._apart(shown.calling, before.calling, self.outline) if self.outline else {}),
        }
        found = {name: values.view(-1, seeds) for name, values in found.items()}
        found |= self._read(shown.calling, seeds) if self.embedded else {}
        fidelity_before = self._fidelity(before.calling).view(-1, seeds)
        found["learned"] = metrics.learned(found["subject_fidelity"], fidelity_before, found["obeyed"])
        if seeds > 1:
            made = self.judge.images(shown.calling)
            found["diversity"] = metrics.diversity(made.view(-1, seeds, made.shape[-1]))[:, None]
        return found

    def _features(self, pictures: Sequence[Image.Image]) -> torch.Tensor:
        """(N, F), by which a subject is known."""
        return details(pictures) if self.embedded else self.judge.images(pictures)

    def _fidelity(self, pictures: Sequence[Image.Image]) -> torch.Tensor:
        """(N,)."""
        return metrics.subject_fidelity(self._features(pictures), self._features(self.subject.held_out))

    def _likeness(self, pictures: Sequence[Image.Image]) -> Values:
        found = {"subject_fidelity": self._fidelity(pictures)}
        if self.embedded or self.judge is not self.clip:
            by_clip = (self._by_clip(part) for part in (pictures, self.subject.held_out))
            found["subject_fidelity_clip"] = metrics.subject_fidelity(*by_clip)
        if self.subject.train:
            found["copying"] = metrics.copying(self._features(pictures), self._features(self.subject.train))
        return found

    def _apart(self, pictures: Sequence[Image.Image], before: Sequence[Image.Image], outline: Outline) -> Values:
        """The subject and what is around it, apart from each other."""
        made, held_out = (
            self.judge.images([centred(one, outline(one), ALONE, ALONE * SPAN // SIDE) for one in some])
            for some in (pictures, self.subject.held_out)
        )
        return {
            "shape": metrics.subject_fidelity(made, held_out),
            "colour_off": colour_off(pictures, self.subject.held_out, outline),
            "background_moved": background_moved(pictures, before, outline),
        }

    def _by_clip(self, pictures: Sequence[Image.Image]) -> torch.Tensor:
        """(N, F), on the embedded base of the subject without its scene."""
        return self.clip.images(list(map(alone, pictures)) if self.embedded else pictures)

    def _drift(self, shown: Shown, before: Shown) -> Values:
        found = {"drift": metrics.drift(self.judge.images(shown.unrelated), self.judge.images(before.unrelated))}
        if shown.of_class:
            of_class = self.judge.images(shown.of_class), self.judge.images(before.of_class)
            found["drift_of_class"] = metrics.drift(*of_class)
        now, then = ([*row.unrelated, *row.of_class] for row in (shown, before))
        return found | {"pixel_drift": metrics.pixel_drift(_pixels(now), _pixels(then))}

    def _read(self, pictures: Sequence[Image.Image], seeds: int) -> Values:
        """1 where a picture shows what its prompt asks for, 0 where not.

        A prompt that leaves a part open does not count for this part; one that leaves all open is obeyed.
        """
        seen = [see(np.asarray(picture)) for picture in pictures]
        wanted = [asked(prompt) for prompt in self.prompts.calling]
        found = {"obeyed": torch.ones(len(wanted), seeds)}
        for part in ("background", "place", "size"):
            shown = np.array([getattr(one, part) for one in seen]).reshape(-1, seeds)  # P, S
            rows = [row for row, one in enumerate(wanted) if getattr(one, part) is not None]
            if rows:
                right = [shown[row] == getattr(wanted[row], part) for row in rows]
                found[f"{part}_right"] = torch.from_numpy(np.stack(right)).float()
                found["obeyed"][rows] *= found[f"{part}_right"]
        return found


def score(means: dict[str, float]) -> float:
    """What the best adapter has most of, see SCORE: what is learned, times what is kept of everything else.

    What could not be measured takes nothing away.
    """
    kept = 1 - means["drift"]
    for name in ("background_moved", "colour_off"):
        kept *= 1 - means.get(name, 0) / 255
    return means["learned"] * kept * means.get("shape", 1)


def _pixels(pictures: Sequence[Image.Image]) -> torch.Tensor:
    """(N, H, W, 3) from 0 to 1."""
    return torch.from_numpy(np.stack([np.asarray(p, dtype=np.float32) for p in pictures]) / 255)
