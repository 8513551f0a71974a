"""The measures of an evaluation against their slow formulas, and what is read from pixels, on scenes that are drawn."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from safetensors.torch import load_file, save_file
from torch.nn.functional import cosine_similarity, normalize
from torch.testing import assert_close

from comcat_diffusion import bases
from comcat_diffusion.evaluation import metrics
from comcat_diffusion.evaluation.cutout import NEUTRAL, background_moved, colour_off
from comcat_diffusion.evaluation.features import load_features
from comcat_diffusion.evaluation.metrics import Interval, interval
from comcat_diffusion.evaluation.world import SIDE, SPAN, Seen, alone, asked, details, embedded_world, outline, see
from comcat_diffusion.training.images import to_tensor
from tests import tiny_bases

NEAR = {"left": (0, 12), "right": (38, 12), "top": (19, 0), "bottom": (19, 38), "middle": (19, 19)}


def unit(*shape, seed):
    noise = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return normalize(noise, dim=-1)


def scene(background, box, colour="#8b5fd0"):
    picture = Image.new("RGB", (64, 64), tuple(embedded_world().backgrounds[background]))
    ImageDraw.Draw(picture).rectangle(box, colour)
    return picture


def test_every_measure_is_its_slow_formula():
    made, others, before = unit(5, 7, seed=0), unit(3, 7, seed=1), unit(5, 7, seed=2)
    table = torch.stack([torch.stack([cosine_similarity(a, b, dim=0) for b in others]) for a in made])
    pairs = torch.stack([cosine_similarity(a, b, dim=0) for a, b in zip(made, before, strict=True)])
    exact = {"rtol": 0, "atol": 1e-12}
    assert_close(metrics.subject_fidelity(made, others), table.mean(1), **exact)
    assert_close(metrics.copying(made, others), table.max(1).values, **exact)
    assert_close(metrics.prompt_fidelity(made, before), pairs, **exact)
    own = torch.tensor([0, 1, 2, 0, 1])
    slow = torch.stack([(row[place] == max(row)).double() for row, place in zip(table, own, strict=True)])
    assert_close(metrics.closest(made, others, own), slow, **exact)
    assert 0 < slow.sum() < 5
    assert_close(metrics.drift(made, before), 1 - pairs, **exact)
    assert_close(metrics.drift(made, made), torch.zeros(5, dtype=torch.float64), **exact)
    a, b = torch.rand(2, 4, 3, 8, 8).unbind()
    assert_close(metrics.pixel_drift(a, b), torch.stack([(x - y).abs().mean() for x, y in zip(a, b, strict=True)]))


def test_diversity_is_over_pairs_of_seeds():
    made = unit(2, 3, 7, seed=0)
    slow = [[1 - float(p[i] @ p[j]) for i in range(3) for j in range(i)] for p in made]
    assert_close(metrics.diversity(made), torch.tensor(slow, dtype=torch.float64).mean(1), rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match="two seeds"):
        metrics.diversity(made[:, :1])


def test_an_interval_is_a_point_where_nothing_varies():
    for values in (torch.full((3, 4), 0.25), torch.tensor([[0.25]])):
        assert interval(values) == Interval(0.25, 0.25, 0.25)


def test_an_interval_resamples_prompts_and_seeds_within_them():
    same_seeds = torch.arange(4.0)[:, None].expand(4, 3)  # only prompts differ: resampling these gives this spread
    found = interval(same_seeds, draws=4000)
    rows = torch.randint(4, (4000, 4), generator=torch.Generator().manual_seed(1))
    low, high = same_seeds[:, 0][rows].mean(1).quantile(torch.tensor([0.025, 0.975])).tolist()
    assert found.mean == 1.5 and found.low == pytest.approx(low, abs=0.1) and found.high == pytest.approx(high, abs=0.1)
    same_prompts = torch.arange(4.0)[None].expand(3, 4)
    found = interval(same_prompts)
    assert found.low < 1.5 < found.high and found == interval(same_prompts)
    assert found.high - found.low < 0.8 * (high - low)  # twelve draws of it, not four


def test_an_interval_covers_the_true_mean_as_often_as_it_says():
    generator, hits = torch.Generator().manual_seed(0), 0
    for _ in range(200):
        values = torch.randn(12, 1, generator=generator) + torch.randn(12, 6, generator=generator)
        found = interval(values, draws=300)
        hits += found.low <= 0 <= found.high
    assert 175 <= hits <= 199  # of 200; a percentile bootstrap over 12 prompts is a little narrow


@pytest.mark.parametrize("place", NEAR)
@pytest.mark.parametrize(("size", "side"), [("small", 26), ("big", 40)])
@pytest.mark.parametrize("background", ["white", "black", "pink"])
def test_a_scene_is_seen_as_it_was_asked_for(background, place, size, side):
    slack = (64 - side) // 2 - 2
    across, down = {"left": (-1, 0), "right": (1, 0), "top": (0, -1), "bottom": (0, 1), "middle": (0, 0)}[place]
    x, y = (64 - side) // 2 + across * slack, (64 - side) // 2 + down * slack
    picture = scene(background, (x, y, x + side - 1, y + side - 1))
    words = embedded_world().places[place]
    wanted = asked(f"a photo of a {size} sks teddy {words}, {background} background")
    assert see(np.asarray(picture)) == wanted == Seen(background, place, size)


def test_an_empty_picture_shows_nothing_and_a_short_prompt_asks_for_nothing():
    empty = Image.new("RGB", (64, 64), "white")
    assert see(np.asarray(empty)) == Seen("white", "nowhere", "nothing")
    assert asked("a photo of a teddy on a red chair") == Seen(None, None, None)
    assert asked("a teddy on a Blue background") == Seen("blue", None, None)
    assert alone(empty).getcolors() == [(SIDE * SIDE, NEUTRAL)]


def test_a_thing_alone_is_the_same_wherever_it_stood():
    boxes = {"white": (2, 10, 27, 29), "black": (30, 40, 55, 59)}
    made = [alone(scene(background, box)) for background, box in boxes.items()]
    assert made[0].tobytes() == made[1].tobytes() != scene("white", boxes["white"]).tobytes()
    big = np.asarray(alone(scene("red", (5, 5, 44, 35))))
    thing = np.argwhere((big != NEUTRAL).any(-1))
    assert np.ptp(thing[:, 1]) + 1 == SPAN and abs(thing.mean(0) - (SIDE - 1) / 2).max() < 1


def test_what_a_thing_encloses_belongs_to_it_and_strays_do_not():
    picture = scene("white", (20, 20, 45, 45))
    pen = ImageDraw.Draw(picture)
    pen.rectangle((28, 28, 37, 37), tuple(embedded_world().backgrounds["white"]))  # a white belly
    without = alone(picture)
    assert without.getpixel((32, 32)) == tuple(embedded_world().backgrounds["white"])
    pen.point([(3, 3), (60, 5), (8, 58)], "black")
    assert alone(picture).tobytes() == without.tobytes()


def test_a_background_that_moves_is_told_apart_from_a_subject_that_does():
    before, box = scene("white", (20, 20, 45, 45)), (18, 20, 43, 45)
    white, pink = (np.array(embedded_world().backgrounds[name], dtype=float) for name in ("white", "pink"))
    other = [scene("white", box, "red"), scene("pink", box), before]
    moved = background_moved(other, [before] * 3, outline)
    assert moved.tolist() == pytest.approx([0, np.abs(white - pink).mean(), 0], abs=1e-4)
    full = Image.new("RGB", (64, 64), "white")
    moved = background_moved([full], [before], lambda picture: Image.new("L", picture.size, 255))
    slow = np.abs(np.asarray(full, dtype=float) - np.asarray(before)).mean()
    assert moved.tolist() == pytest.approx([slow], rel=1e-5)  # nothing is outside: all counts


def test_the_colour_of_a_subject_does_not_know_its_background():
    wanted = [scene("white", (20, 20, 45, 45), (200, 100, 50)), scene("black", (2, 20, 27, 45), (200, 100, 50))]
    made = [scene("blue", (5, 5, 30, 40), (200, 100, 50)), scene("white", (9, 9, 20, 20), (230, 100, 20))]
    assert colour_off(made, wanted, outline).tolist() == pytest.approx([0, 20], abs=1e-4)
    nothing = Image.new("RGB", (64, 64), "white")
    grey = np.abs(np.array([200, 100, 50]) - np.array(NEUTRAL)).mean()
    assert colour_off([nothing], wanted, outline).tolist() == pytest.approx([grey], rel=1e-6)


@pytest.fixture(scope="module")
def small_clip():
    return load_features("embedded")


def pictures(count=3):
    colours = ("red", "blue", "lime")[:count]
    return [scene("white", (4 * n, 10, 4 * n + 25, 35), colour) for n, colour in enumerate(colours)]


def test_features_are_the_embedded_clips_own(small_clip):
    found = small_clip.images(pictures())
    with torch.no_grad():
        own = small_clip.model.get_image_features(pixel_values=to_tensor(pictures())).pooler_output
    assert_close(found, normalize(own, dim=-1), rtol=0, atol=1e-5)
    texts = small_clip.texts(["a photo of a cat", "a photo of a car"])
    assert found.shape == (3, 128) and texts.shape == (2, 128) and found.dtype == texts.dtype == torch.float32
    assert_close(texts.norm(dim=-1), torch.ones(2))


def test_the_embedded_clip_tells_things_apart_by_their_words(small_clip):
    teddy = Image.open(bases.assets() / "subject/held_out/1.png").convert("RGB")
    near, far = (small_clip.images([alone(teddy)]) @ small_clip.texts(["a violet teddy", "a green car"]).T)[0]
    assert near > far + 0.1


def test_features_are_kept_by_content_of_picture_and_model(small_clip, tmp_path):
    kept = load_features("embedded", cache_dir=tmp_path)
    first = kept.images(pictures())
    files = sorted(tmp_path.iterdir())
    assert len(files) == 3 and torch.equal(first, small_clip.images(pictures()))
    kept.model = None  # so that nothing can be computed
    assert torch.equal(kept.images(pictures()), first) and torch.equal(kept.images(pictures()[:1]), first[:1])
    files[0].write_bytes(b"damaged")
    assert_close(load_features("embedded", cache_dir=tmp_path).images(pictures()), first, rtol=0, atol=1e-6)
    other = load_features("embedded", cache_dir=tmp_path)
    with torch.no_grad():
        other.model.visual_projection.weight.mul_(2)
    other.__post_init__()
    other.images(pictures())
    assert len(list(tmp_path.iterdir())) == 6


@pytest.fixture
def dino(tmp_path):
    return tiny_bases.dino(tmp_path / "dino")


def test_a_dinov2_knows_pictures_alone(dino):
    features = load_features(str(dino))
    found = features.images(pictures())
    assert found.shape == (3, 24) and not features.reads
    assert_close(found.norm(dim=-1), torch.ones(3))
    with pytest.raises(ValueError, match="knows no texts; name a CLIP"):
        features.texts(["a cat"])


def test_a_feature_model_that_is_not_there_is_one_sentence(dino, tmp_path, tiny_clip):
    (tmp_path / "empty").mkdir()
    told = {"nobody/nothing": "looked for its config.json", "nowhere": "no such folder, and a hub id reads owner/name",
            str(tmp_path / "empty"): "it has no config.json"}  # fmt: skip
    for name, message in told.items():
        with pytest.raises(FileNotFoundError, match=message) as caught:
            load_features(name)
        assert "\n" not in str(caught.value)
    weights = load_file(dino / "model.safetensors")
    weights.pop("layernorm.weight")
    save_file(weights, dino / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="is not whole: it has no weights for layernorm.weight"):
        load_features(str(dino))
    for file in ("model.safetensors", "preprocessor_config.json"):
        (dino / file).unlink()
        with pytest.raises(FileNotFoundError, match=file):
            load_features(str(dino))
    tiny_clip().save_pretrained(tmp_path / "text")
    (tmp_path / "text/preprocessor_config.json").write_text('{"image_processor_type": "BitImageProcessor"}')
    with pytest.raises(ValueError, match="is a CLIPTextModel, neither a CLIP nor a DINOv2"):
        load_features(str(tmp_path / "text"))


def test_details_know_a_subject_from_a_blob_of_its_colour():
    from recipe.subject import HELD_OUT, TRAIN, picture

    held_out, same, other = (
        details([picture(name, pose).resize((64, 64)) for pose in poses])
        for name, poses in (("teddy", HELD_OUT), ("teddy", TRAIN), ("cat", TRAIN))
    )
    blob = Image.new("RGB", (64, 64), "blue")
    ImageDraw.Draw(blob).ellipse((14, 12, 50, 52), "#8b5fd0")
    assert_close(held_out.norm(dim=-1), torch.ones(2))
    likeness = {name: float((made @ held_out.T).mean()) for name, made in (("same", same), ("other", other))}
    assert likeness["same"] > 0.7 > 0.3 > max(likeness["other"], float((details([blob]) @ held_out.T).mean()))
