"""The benchmark of two subjects in one prompt: what it asks for, what it cuts out, and that it tells who is who."""

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks import together
from benchmarks.customization_runs import strip_of
from comcat_diffusion import bases
from comcat_diffusion.evaluation.features import load_features
from recipe.characters import Pose
from recipe.subject import picture

SIDE = 64


def shown(*subjects: str, background: str = "blue", places: tuple[float, ...] = (0.25, 0.75)) -> Image.Image:
    """A picture of subjects beside each other, as if an adapter had drawn them whole."""
    made = None
    for subject, across in zip(subjects, places, strict=False):
        own = picture(subject, Pose(background, "left", across, 0.5, 0.4, 20, 20, 0)).resize((SIDE, SIDE))
        part = (0 if across < 0.5 else SIDE // 2, 0, SIDE if len(subjects) == 1 or across > 0.5 else SIDE // 2, SIDE)
        made = made or own.copy()
        made.paste(own.crop(part), part[:2])
    return made


def test_prompts_say_who_is_where():
    assert together.prompts_of(["owl", "car"])[0] == (
        "a photo of a sks owl on the left and a ohwx car on the right, red background"
    )
    assert [together.prompts_of(["car"])[number] for number in (0, 3)] == [
        "a photo of a small ohwx car on the left, red background",
        "a photo of a small ohwx car on the right, red background",
    ]
    assert len(set(together.TRIGGERS.values())) == len(together.TRIGGERS)  # else both act from one word on


def test_a_half_is_left_with_the_border_s_colour_beside_it():
    whole = np.asarray(shown("owl", "car"))
    left = np.asarray(together.half(Image.fromarray(whole), "left"))
    assert (left[:, :32] == whole[:, :32]).all()
    assert (left[:, 32:] == whole[0, 0]).all() and not (whole[:, 32:] == whole[0, 0]).all()


@pytest.fixture
def drawn(tmp_path):
    """Pictures of all prompts in which every subject is as it was learned, and of a base that draws nothing."""
    for subjects in (*((one,) for one in together.TRIGGERS), *together.permutations(together.TRIGGERS, 2)):
        count = len(together.prompts_of(subjects))
        bare = [Image.new("RGB", (SIDE, SIDE), (80, 130, 215)) for _ in range(count)]
        places = [(0.25,)] * 3 + [(0.75,)] * 3 if len(subjects) == 1 else [(0.25, 0.75)] * 3
        made = [shown(*subjects, places=where) for where in places]
        strip_of([bare, made]).save(tmp_path / f"{'-'.join(subjects)}-0.png")
    return tmp_path


@pytest.mark.slow
def test_each_is_like_itself_and_not_like_its_neighbour(drawn):
    judge = load_features(bases.EMBEDDED)
    for pair in together.permutations(together.TRIGGERS, 2):
        for measure in (together.alone, together.beside):
            own = measure(*pair, 0, drawn, judge)
            assert {len(own[one]) for one in together.MEASURES} == {6}
            assert own["likeness"].min() > 0.5 > 0.3 > own["of_the_other"].max()
            assert own["background_moved"].max() < 1


@pytest.mark.slow
def test_the_table_has_a_line_for_each_alone_and_for_two_together(drawn, monkeypatch):
    monkeypatch.setattr(together, "load_features", lambda name: load_features(bases.EMBEDDED))
    rows = together.rows_of(1, drawn)
    assert [row["method"] for row in rows][:2] == ["owl and car, each alone", "owl and car, together"]
    assert len(rows) == 6 and {row["pictures"] for row in rows} == {12}
    table = together.table(
        {"rows": rows, "circumstances": together.shared.circumstances(torch.device("cpu"), "float32")}
    )
    assert table.startswith("|  | pictures | shape | colour off | likeness | of the other | background moved |")
