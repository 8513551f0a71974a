"""Adapters with terms beside convolutions, added: several in one file, from each word on its own ranks, and as sums."""

import json

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from torch.testing import assert_close

from comcat_diffusion import ComcatConfig, load_adapter, read_adapter, save_adapter, set_regions
from comcat_diffusion.adapters.combine import combine
from comcat_diffusion.adapters.convolved import FACTORS
from comcat_diffusion.adapters.effect import predictions
from comcat_diffusion.adapters.header import AdapterFileError, Notes
from comcat_diffusion.adapters.merge import unload_adapters
from comcat_diffusion.adapters.model import factors, side_cars
from comcat_diffusion.adapters.shrink import shrink
from comcat_diffusion.adapters.store import read_tensors
from comcat_diffusion.bases import load_base

CLEAR = 0.01  # an effect on the output this large cannot be rounding
SAME = {"rtol": 0.0, "atol": 1e-10}
ONE = "down_blocks.0.resnets.0.conv1"
PROMPTS = ["a photo of sks teddy", "a photo of ohwx cat", "a photo of sks teddy and ohwx cat", "a photo of a ball"]


@pytest.fixture(scope="module")
def base():
    return load_base("embedded")


@pytest.fixture(scope="module")
def files(tmp_path_factory, randomize, base):
    """By name: of three words, `a` and `c` dense, `b` packed, all with terms; `plain` without, packed."""
    folder, found = tmp_path_factory.mktemp("files"), {}
    for number, (name, word, rank, beside) in enumerate(
        (("a", "sks", 2, 3), ("b", "ohwx", 3, 4), ("c", "zwx", 1, 2), ("plain", "ohwx", 2, 0), ("d", "sks", 2, 3))
    ):
        config = ComcatConfig(r=rank, alpha=3.0, trigger=[word], target_modules=["attn2"], convolutions=beside)
        base.unet.add_adapter(config, "dog")
        randomize(base.unet, "dog", number, std=0.2)
        for index, factor in enumerate(factors(base.unet, "dog").values()):
            factor.data *= 1 + 0.2 * (index % 4)  # so that ranks differ when it is shrunk
        found[name] = folder / f"{name}.safetensors"
        save_adapter(base, found[name], "dog", "embedded", Notes(word, f"a photo of {word} teddy", "teddy"))
        unload_adapters(base)
        if name in ("b", "plain", "d"):
            shrink(found[name], folder / "small.safetensors", int(0.4 * found[name].stat().st_size))
            (folder / "small.safetensors").rename(found[name])
    return found


def predicted(base, adapters, noisy=()):
    for number, (file, _) in enumerate(adapters):
        load_adapter(base, file, f"one{number}")
    if adapters:
        base.unet.set_adapters([f"one{n}" for n in range(len(adapters))], [weight for _, weight in adapters])
    try:
        return predictions(base, PROMPTS, noisy, steps=2)
    finally:
        unload_adapters(base)


@pytest.mark.parametrize("names", ["ac", "bd", "ab", ("b", "plain"), ("plain", "a")], ids=str)
def test_one_file_does_what_two_side_by_side_do_each_from_its_own_word_on(files, base, tmp_path, names):
    both, two = (
        tmp_path / "both.safetensors",
        [(files[name], weight) for name, weight in zip(names, (0.8, -1.3), strict=True)],
    )
    combine(two, both, dtype=torch.float32)
    header = read_adapter(both)
    apart = all(name in ("b", "plain", "d") for name in names)
    assert header.format_version == (4 if apart else 1) and bool(header.pieces) == apart
    noisy, plain = predicted(base, [])
    expected, found = predicted(base, two, noisy)[1], predicted(base, [(both, 1.0)], noisy)[1]
    assert_close(found, expected, rtol=0, atol=2e-4)
    assert (expected - plain).abs().max() > 0.1
    noisy, plain = predictions(base, PROMPTS[3:], steps=2)
    load_adapter(base, both, "both")
    assert torch.equal(predictions(base, PROMPTS[3:], noisy, steps=2)[1], plain)  # nobody's word: the base, to the bit
    unload_adapters(base)


@torch.no_grad()
def test_each_rank_waits_for_its_own_word(files, base, tmp_path):
    """Row by row of one convolution: the sum of the terms of those who are called, at their weights."""
    combine([(files["b"], 0.5), (files["d"], 2.0)], tmp_path / "two.safetensors")
    combine([(tmp_path / "two.safetensors", 2.0), (files["b"], 1.0)], tmp_path / "all.safetensors")
    config = read_adapter(tmp_path / "all.safetensors").config["unet"]
    assert [words for words, _ in config["trigger_ranks"]] == [["ohwx"], ["sks"], ["ohwx"]]
    name = max(config["convolution_shares"], key=lambda one: min(config["convolution_shares"][one]))
    counts = config["convolution_shares"][name]
    assert min(counts) > 0 and sum(counts) == config["convolution_ranks"][name] and counts[0] == counts[2]
    for number, (file, weight) in enumerate(((files["b"], 2.0), (files["d"], 4.0))):
        load_adapter(base, file, f"one{number}")
        base.unet.set_adapters([f"one{number}"], [weight])
    load_adapter(base, tmp_path / "all.safetensors", "all")
    layer, seen = side_cars(base.unet)[name], []
    base.unet.set_adapters(["all"])
    hook = layer.owner.register_forward_hook(lambda module, args, output: seen.append((args[0], output)))
    base(PROMPTS, num_inference_steps=1, output_type="latent", generator=torch.Generator().manual_seed(0))
    hook.remove()
    ((hidden, made),) = seen
    own = nn.Conv2d.forward(layer.owner, hidden)
    ohwx, sks = layer.term("one0", hidden), layer.term("one1", hidden)
    zero, first = torch.zeros_like(own[:1]), len(PROMPTS)  # what is subtracted comes first
    rows = [4 * sks[first], 2 * ohwx[first + 1], 4 * sks[first + 2] + 2 * ohwx[first + 2], zero[0]]
    expected = own + torch.cat([zero.expand(first, -1, -1, -1), torch.stack(rows)])
    assert_close(made, expected, rtol=0, atol=1e-4)
    assert torch.equal(made[:first], own[:first]) and torch.equal(made[-1], own[-1])
    assert all((row).abs().max() > CLEAR for row in rows[:3])
    unload_adapters(base)


def test_a_packed_sum_takes_the_bytes_of_both_and_holds_their_very_rows(files, tmp_path):
    both = tmp_path / "both.safetensors"
    combine([(files["b"], 0.3), (files["d"], 1.0)], both)
    stored = load_file(both)
    for number, name in enumerate("bd"):
        for key, tensor in load_file(files[name]).items():
            assert torch.equal(stored[f"{number}.{key}"], tensor)
    apart = sum(files[name].stat().st_size for name in "bd")
    assert both.stat().st_size < apart + 700
    header, own = read_adapter(both), [read_adapter(files[name]) for name in "bd"]
    assert [piece.convolved for piece in header.pieces] == [one.convolved for one in own]
    tensors = [read_tensors(file, read_adapter(file)) for file in (both, files["b"], files["d"])]
    name = next(iter(own[0].convolved["unet"].keys() & own[1].convolved["unet"].keys()))
    for factor, gain in zip(FACTORS, (1.0, 1.0, 0.3), strict=True):
        key, dim = f"unet.{name}.{factor}", int(factor == "conv_up")
        assert torch.equal(tensors[0][key], torch.cat([gain * tensors[1][key], tensors[2][key]], dim))


def test_it_saves_as_it_was_and_is_refused_where_words_would_mix(files, base, tmp_path):
    both = tmp_path / "both.safetensors"
    combine([(files["b"], 1.0), (files["d"], 1.0)], both)
    load_adapter(base, both, "both")
    save_adapter(base, tmp_path / "again.safetensors", "both", "embedded")
    config, again = read_adapter(both).config["unet"], read_adapter(tmp_path / "again.safetensors").config["unet"]
    assert all(again[name] == config[name] for name in ("trigger_ranks", "convolution_ranks", "convolution_shares"))
    noisy, found = predictions(base, PROMPTS[:1], steps=1)
    unload_adapters(base)
    load_adapter(base, tmp_path / "again.safetensors", "again")
    assert torch.equal(predictions(base, PROMPTS[:1], noisy, steps=1)[1], found)
    unload_adapters(base)
    with pytest.raises(AdapterFileError, match="several subjects.*shrinking would mix"):
        shrink(both, tmp_path / "small.safetensors", 9_000)


def test_those_of_one_word_are_cut_at_attentions_alone_and_shrink(files, base, tmp_path):
    both, cut = tmp_path / "both.safetensors", tmp_path / "cut.safetensors"
    combine([(files["a"], 1.0), (files["d"], 1.0)], both)
    combine([(files["a"], 1.0), (files["d"], 1.0)], cut, rank=1)
    whole, less = (read_adapter(file).config["unet"] for file in (both, cut))
    assert whole["r"] > less["r"] == 1 and whole["convolution_ranks"] == less["convolution_ranks"]
    assert not whole.get("convolution_shares") and whole["convolutions"] > 3
    made = shrink(both, tmp_path / "small.safetensors", 12_000)
    assert made.bytes <= 12_000 and made.header.format_version == 4 and made.header.convolved
    combine([(files["d"], 1.0), (files["d"], 1.0)], both)  # packed, of pieces
    made = shrink(both, tmp_path / "small.safetensors", 12_000)
    assert made.header.convolved and not made.header.pieces


def test_channels_that_do_not_fit_and_damaged_pieces_are_refused(files, base, tmp_path):
    tensors, header = load_file(files["a"]), read_adapter(files["a"])
    key = f"unet.{ONE}.conv_up"
    save_file(tensors | {key: tensors[key][:-1].contiguous()}, tmp_path / "odd.safetensors", header.metadata())
    with pytest.raises(ValueError, match=rf"do not fit each other: unet.{ONE} has other channels"):
        combine([(files["a"], 1.0), (tmp_path / "odd.safetensors", 1.0)], tmp_path / "both.safetensors")
    save_file(tensors | {key: tensors[key][:, :2].contiguous()}, tmp_path / "odd.safetensors", header.metadata())
    with pytest.raises(AdapterFileError, match=rf"factors of unet.{ONE} that do not fit"):
        combine([(tmp_path / "odd.safetensors", 1.0)], tmp_path / "both.safetensors")
    both = tmp_path / "both.safetensors"
    combine([(files["b"], 1.0), (files["d"], 1.0)], both)
    tensors, told = load_file(both), read_adapter(both).metadata()
    first = next(iter(json.loads(told["comcat"])["pieces"][1]["convolved"]["unet"]))
    changes = (
        ('"weight":1.0', '"weight":"much"'),
        ('"format_version":4', '"format_version":3'),
        (f'"{first}":[', f'"{first}":[9'),
    )
    for old, new in changes:
        assert old in told["comcat"]
        save_file(tensors, both, told | {"comcat": told["comcat"].replace(old, new)})
        with pytest.raises(AdapterFileError):
            load_adapter(base, both, "both")
        assert not side_cars(base.unet)


@torch.no_grad()
def test_a_region_holds_every_subject_of_one_file(files, base, tmp_path):
    combine([(files["b"], 1.0), (files["d"], 1.0)], tmp_path / "both.safetensors")
    load_adapter(base, tmp_path / "both.safetensors", "both")
    layer, seen = side_cars(base.unet)[ONE], {}
    left = torch.zeros(16, 16)
    left[:, :8] = 1
    set_regions(base, {"both": left})
    hook = layer.owner.register_forward_hook(lambda module, args, output: seen.update(given=args[0], made=output))
    base(PROMPTS[2], num_inference_steps=1, output_type="latent", generator=torch.Generator().manual_seed(0))
    hook.remove()
    own = nn.Conv2d.forward(layer.owner, seen["given"])
    expected = own[1] + left * layer.term("both", seen["given"])[1]
    assert_close(seen["made"][1], expected, rtol=0, atol=1e-4)
    assert torch.equal(seen["made"][1, :, :, 8:], own[1, :, :, 8:]) and torch.equal(seen["made"][0], own[0])
    unload_adapters(base)


# Sums of live adapters


@pytest.mark.parametrize("kind", [{}, {"foldable": True}, {"foldable": True, "tied": True}], ids=str)
@torch.no_grad()
def test_the_weighted_sum_is_one_more(tiny_unet, randomize, kind):
    unet = tiny_unet(torch.float64)
    model = get_peft_model(unet, ComcatConfig(r=3, alpha=4.5, target_modules=["attn2"], convolutions=4, **kind), "dog")
    one = {"target_modules": ["attn2"], "convolutions": 2, "convolution_ranks": {ONE: 2}}
    model.add_adapter("cat", ComcatConfig(r=2, **one, **kind))
    model.add_adapter("plain", ComcatConfig(r=1, target_modules=["attn2"], **kind))
    weights = {"dog": 0.7, "cat": -1.3, "plain": 1.0}
    for seed, (name, weight) in enumerate(weights.items()):
        randomize(unet, name, seed)
        for layer in side_cars(unet).values():
            layer.set_scale(name, weight)
    model.base_model.set_adapter(list(weights))
    expected, tuner = tiny_unet.run(unet), model.base_model
    for layer in side_cars(unet).values():
        layer.set_scale("cat", 2.0)
    told = [1.0, -0.65, 1.0]
    tuner.add_weighted_adapter(list(weights), told, "sum", combination_type="cat")
    tuner.add_weighted_adapter(list(weights), told, "cut", svd_rank=1)
    assert model.peft_config["sum"].convolution_ranks[ONE] == model.peft_config["cut"].convolution_ranks[ONE] == 6
    assert model.peft_config["sum"].r > model.peft_config["cut"].r == 1
    tuner.set_adapter("sum")
    assert_close(tiny_unet.run(unet), expected, **SAME)
    tuner.set_adapter("cut")
    assert (tiny_unet.run(unet) - expected).abs().max() > 1e-4
    tuner.add_weighted_adapter(["dog", "dog"], [1.5, -1.5], "nothing", combination_type="cat")
    tuner.set_adapter("nothing")
    assert_close(tiny_unet.run(unet), tiny_unet.run(tiny_unet(torch.float64)), **SAME)
    assert (expected - tiny_unet.run(tiny_unet(torch.float64))).abs().max() > CLEAR
