"""The subject's outline as the base finds it, held against where the sample subject stands in its pictures."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import interpolate

from comcat_diffusion import bases
from comcat_diffusion.evaluation.cutout import by_attention
from comcat_diffusion.training.encode import posterior, weighed
from comcat_diffusion.training.objective import objective_of
from comcat_diffusion.training.outline import Outliner, can_outline, otsu
from comcat_diffusion.words import Subject, is_thing

TRAIN = bases.assets() / "subject" / "train"
SIDE = 64


@pytest.fixture(scope="module")
def pipe():
    return bases.load_base("embedded")


@pytest.fixture(scope="module")
def outliner(pipe):
    return Outliner(pipe, objective_of(pipe))


def pictures():
    for path in sorted(TRAIN.glob("*.png")):
        yield Image.open(path).convert("RGB").resize((SIDE, SIDE), Image.Resampling.LANCZOS)


def drawn(picture, size):
    """What of each latent place is not of the plain background: (1, h, w)."""
    pixels = np.asarray(picture, dtype=np.float32)
    away = np.abs(pixels - pixels[0, 0]).max(-1) > 40
    return interpolate(torch.from_numpy(away.astype(np.float32))[None, None], size=size, mode="area")[0]


@pytest.mark.parametrize("class_word", ["teddy", "blorp"])  # what the base knows, and what nobody knows
def test_the_outline_holds_the_subject_and_little_else(pipe, outliner, class_word):
    assert can_outline(pipe)
    for picture in pictures():
        mean = posterior(pipe, picture)["mean"]
        share = outliner.share(mean, Subject("sks", class_word), (SIDE, SIDE, 0, 0, SIDE, SIDE))
        thing = drawn(picture, mean.shape[-2:])
        assert share.shape == thing.shape and set(share.unique().tolist()) == {0, 1}
        assert (share * thing).sum() > 0.9 * thing.sum()
        # A place of the edge is half the subject's, and one around it counts as its own: the rest is background.
        near = torch.nn.functional.max_pool2d((thing > 0).float(), 5, 1, 2)
        assert ((1 - near) * share).sum() < 0.1 * share.sum()


def test_the_same_picture_has_the_same_outline(pipe, outliner):
    mean = posterior(pipe, next(pictures()))["mean"]
    subject, frame = Subject("sks", "teddy"), (SIDE, SIDE, 0, 0, SIDE, SIDE)
    again = Outliner(pipe, objective_of(pipe)).share(mean, subject, frame)
    assert torch.equal(outliner.share(mean, subject, frame), again)
    assert not any(module._forward_pre_hooks for module in pipe.unet.modules())  # nothing is left behind


def test_the_level_parts_two_groups():
    generator = torch.Generator().manual_seed(0)
    low, high = 0.1 + 0.02 * torch.rand(90, generator=generator), 0.6 + 0.2 * torch.rand(10, generator=generator)
    assert low.max() < otsu(torch.cat([low, high])) < high.min()
    assert otsu(torch.full((4, 4), 0.5)) == pytest.approx(0.5, abs=1)  # nothing to part, and nothing is raised


def test_around_the_subject_places_weigh_as_little_as_a_mask_leaves_them():
    share = torch.zeros(1, 4, 4)
    share[:, :2] = 1
    weight = weighed(share, 0.1)
    assert weight.mean() == pytest.approx(1) and (weight[0, 3] / weight[0, 0]).tolist() == pytest.approx([0.1] * 4)


@pytest.mark.parametrize("class_word, found", [("dog", True), ("toy car", True), ("", False), ("oil Painting", False)])
def test_a_style_and_what_has_no_name_have_all_of_the_picture(class_word, found):
    assert is_thing(Subject("sks", class_word)) is found


def test_a_judged_picture_larger_than_the_bases_own_is_looked_at_in_that_size(pipe, monkeypatch):
    asked = []

    def share(self, mean, subject, frame):
        asked.append(tuple(mean.shape[-2:]))
        return torch.ones_like(mean[:1])

    monkeypatch.setattr(Outliner, "share", share)
    outline = by_attention(pipe, Subject("sks", "teddy"))
    latent = bases.native_resolution(pipe) // pipe.vae_scale_factor
    for size in ((256, 128), (48, 64)):
        assert outline(Image.new("RGB", size)).size == size
    assert asked == [(latent // 2, latent), (64 // pipe.vae_scale_factor, 48 // pipe.vae_scale_factor)]
