"""Adapters with terms beside other modules, added: several in one file, each rank from its word on, and as sums."""

import json
from dataclasses import dataclass, replace

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from torch.testing import assert_close

from comcat_diffusion import ComcatConfig, load_adapter, read_adapter, save_adapter, set_regions
from comcat_diffusion.adapters.beside_kinds import CONVOLUTIONS, FEED_FORWARDS, Kind
from comcat_diffusion.adapters.combine import combine
from comcat_diffusion.adapters.effect import predictions
from comcat_diffusion.adapters.header import AdapterFileError, Notes, told_of
from comcat_diffusion.adapters.merge import unload_adapters
from comcat_diffusion.adapters.model import factors, side_cars
from comcat_diffusion.adapters.parts import denoiser
from comcat_diffusion.adapters.shrink import shrink
from comcat_diffusion.adapters.store import read_tensors
from comcat_diffusion.bases import load_base
from comcat_diffusion.families.known import family_of
from tests import tiny_families
from tests.slow import slow

CLEAR = 0.01  # an effect on the output this large cannot be rounding
SAME = {"rtol": 0.0, "atol": 1e-10}
ONE = "down_blocks.0.resnets.0.conv1"
LINEAR = "single_transformer_blocks.0.attn.to_qkv_mlp_proj"
PROMPTS = ["a photo of sks teddy", "a photo of ohwx cat", "a photo of sks teddy and ohwx cat", "a photo of a ball"]


@dataclass(frozen=True)
class Base:
    """A pipeline, and what terms of a kind stand beside in it."""

    pipe: object
    name: str  # as `load_adapter` and its files call it
    kind: Kind
    one: str  # a host
    targets: list[str] | None  # attentions

    @property
    def part(self) -> str:
        return family_of(self.pipe).part

    @property
    def model(self) -> nn.Module:
        return denoiser(self.pipe)

    def drawn(self, prompts) -> tuple[torch.Tensor, torch.Tensor]:
        """What the host is first given and gives while prompts are drawn."""
        seen, family = [], family_of(self.pipe)
        hook = self.model.get_submodule(self.one).register_forward_hook(
            lambda _, args, out: seen.append((args[0], out))
        )
        side = family.native(self.model.config, self.pipe.vae.config)
        how = {"num_inference_steps": 1, "output_type": "latent", "height": side, "width": side}
        self.pipe(prompt=prompts, generator=torch.Generator().manual_seed(0), **how, **family.drawing(self.pipe))
        hook.remove()
        return seen[0]

    def own(self, hidden: torch.Tensor) -> torch.Tensor:
        """What the host alone makes."""
        host = side_cars(self.model)[self.one].owner
        return type(host).host.forward(host, hidden)


@pytest.fixture(scope="module")
def unet():
    return Base(load_base("embedded"), "embedded", CONVOLUTIONS, ONE, ["attn2"])


@pytest.fixture(scope="module")
def klein(tmp_path_factory):
    name = str(tiny_families.klein(tmp_path_factory.mktemp("klein")))
    pipe = load_base(name)
    pipe.set_progress_bar_config(disable=True)
    return Base(pipe, name, FEED_FORWARDS, LINEAR, None)


@pytest.fixture(scope="module", params=["unet", "klein"])
def base(request):
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module")
def files(tmp_path_factory, randomize, base):
    """By name: of three words, `a` and `c` dense, `b` packed, all with terms; `plain` without, packed."""
    folder, found = tmp_path_factory.mktemp("files"), {}
    for number, (name, word, rank, beside) in enumerate(
        (("a", "sks", 2, 3), ("b", "ohwx", 3, 4), ("c", "zwx", 1, 2), ("plain", "ohwx", 2, 0), ("d", "sks", 2, 3))
    ):
        more = {"target_modules": base.targets, base.kind.setting: beside}
        base.model.add_adapter(ComcatConfig(r=rank, alpha=3.0, trigger=[word], **more), "dog")
        randomize(base.model, "dog", number, std=0.2)
        for index, factor in enumerate(factors(base.model, "dog").values()):
            factor.data *= 1 + 0.2 * (index % 4)  # so that ranks differ when it is shrunk
        found[name] = folder / f"{name}.safetensors"
        save_adapter(base.pipe, found[name], "dog", base.name, Notes(word, f"a photo of {word} teddy", "teddy"))
        unload_adapters(base.pipe)
        if name in ("b", "plain", "d"):
            shrink(found[name], folder / "small.safetensors", int(0.4 * found[name].stat().st_size))
            (folder / "small.safetensors").rename(found[name])
    return found


def predicted(base, adapters, noisy=()):
    for number, (file, _) in enumerate(adapters):
        load_adapter(base.pipe, file, f"one{number}")
    if adapters:
        base.model.set_adapters([f"one{n}" for n in range(len(adapters))], [weight for _, weight in adapters])
    try:
        return predictions(base.pipe, PROMPTS, noisy, steps=2)
    finally:
        unload_adapters(base.pipe)


@pytest.mark.parametrize("names", [slow("ac"), slow("bd"), "ab", slow(("b", "plain")), slow(("plain", "a"))], ids=str)
def test_one_file_does_what_two_side_by_side_do_each_from_its_own_word_on(files, base, tmp_path, names):
    both, two = (
        tmp_path / "both.safetensors",
        [(files[name], weight) for name, weight in zip(names, (0.8, -1.3), strict=True)],
    )
    combine(two, both, dtype=torch.float32)
    header = read_adapter(both)
    apart = all(name in ("b", "plain", "d") for name in names)
    assert header.format_version == (base.kind.version if apart else 1) and bool(header.pieces) == apart
    noisy, plain = predicted(base, [])
    expected, found = predicted(base, two, noisy)[1], predicted(base, [(both, 1.0)], noisy)[1]
    assert_close(found, expected, rtol=0, atol=2e-4)
    assert (expected - plain).abs().max() > 0.05
    noisy, plain = predictions(base.pipe, PROMPTS[3:], steps=2)
    load_adapter(base.pipe, both, "both")
    same = predictions(base.pipe, PROMPTS[3:], noisy, steps=2)[1]
    assert torch.equal(same, plain)  # nobody's word: the base, to the bit
    unload_adapters(base.pipe)


@torch.no_grad()
def test_each_rank_waits_for_its_own_word(files, base, tmp_path):
    """Row by row of one host: the sum of the terms of those who are called, at their weights."""
    combine([(files["b"], 0.5), (files["d"], 2.0)], tmp_path / "two.safetensors")
    combine([(tmp_path / "two.safetensors", 2.0), (files["b"], 1.0)], tmp_path / "all.safetensors")
    config = read_adapter(tmp_path / "all.safetensors").config[base.part]
    assert [words for words, _ in config["trigger_ranks"]] == [["ohwx"], ["sks"], ["ohwx"]]
    shares = config[base.kind.shares]
    base = replace(base, one=max(shares, key=lambda one: min(shares[one])))
    counts = shares[base.one]
    assert min(counts) > 0 and sum(counts) == config[base.kind.ranks][base.one] and counts[0] == counts[2]
    for number, (file, weight) in enumerate(((files["b"], 2.0), (files["d"], 4.0))):
        load_adapter(base.pipe, file, f"one{number}")
        base.model.set_adapters([f"one{number}"], [weight])
    load_adapter(base.pipe, tmp_path / "all.safetensors", "all")
    base.model.set_adapters(["all"])
    hidden, made = base.drawn(PROMPTS)
    own, layer = base.own(hidden), side_cars(base.model)[base.one]
    ohwx, sks = layer.term("one0", hidden), layer.term("one1", hidden)
    first = len(made) - len(PROMPTS)  # what is subtracted comes first, if not by itself
    rows = [4 * sks[first], 2 * ohwx[first + 1], 4 * sks[first + 2] + 2 * ohwx[first + 2], torch.zeros_like(own[0])]
    expected = own + torch.cat([torch.zeros_like(own[:first]), torch.stack(rows)])
    assert_close(made, expected, rtol=0, atol=1e-4)
    assert torch.equal(made[:first], own[:first]) and torch.equal(made[-1], own[-1])
    assert all((row).abs().max() > CLEAR for row in rows[:3])
    unload_adapters(base.pipe)


def test_a_packed_sum_takes_the_bytes_of_both_and_holds_their_very_rows(files, base, tmp_path):
    both = tmp_path / "both.safetensors"
    combine([(files["b"], 0.3), (files["d"], 1.0)], both)
    stored = load_file(both)
    for number, name in enumerate("bd"):
        for key, tensor in load_file(files[name]).items():
            assert torch.equal(stored[f"{number}.{key}"], tensor)
    apart = sum(files[name].stat().st_size for name in "bd")
    assert both.stat().st_size < apart + 700
    header, own = read_adapter(both), [read_adapter(files[name]) for name in "bd"]
    assert [told_of(piece, base.kind) for piece in header.pieces] == [told_of(one, base.kind) for one in own]
    tensors = [read_tensors(file, read_adapter(file)) for file in (both, files["b"], files["d"])]
    name = next(iter(told_of(own[0], base.kind)[base.part].keys() & told_of(own[1], base.kind)[base.part].keys()))
    for factor in base.kind.factors:
        key, dim = f"{base.part}.{name}.{factor}", int(factor.endswith("_up"))
        gain = 0.3 if dim else 1.0
        assert torch.equal(tensors[0][key], torch.cat([gain * tensors[1][key], tensors[2][key]], dim))


def test_it_saves_as_it_was_and_is_refused_where_words_would_mix(files, base, tmp_path):
    both = tmp_path / "both.safetensors"
    combine([(files["b"], 1.0), (files["d"], 1.0)], both)
    load_adapter(base.pipe, both, "both")
    save_adapter(base.pipe, tmp_path / "again.safetensors", "both", base.name)
    config, again = (read_adapter(file).config[base.part] for file in (both, tmp_path / "again.safetensors"))
    assert all(again[name] == config[name] for name in ("trigger_ranks", base.kind.ranks, base.kind.shares))
    noisy, found = predictions(base.pipe, PROMPTS[:1], steps=1)
    unload_adapters(base.pipe)
    load_adapter(base.pipe, tmp_path / "again.safetensors", "again")
    assert torch.equal(predictions(base.pipe, PROMPTS[:1], noisy, steps=1)[1], found)
    unload_adapters(base.pipe)
    with pytest.raises(AdapterFileError, match="several subjects.*shrinking would mix"):
        shrink(both, tmp_path / "small.safetensors", 9_000)


def test_those_of_one_word_are_cut_at_attentions_alone_and_shrink(files, base, tmp_path):
    both, cut = tmp_path / "both.safetensors", tmp_path / "cut.safetensors"
    combine([(files["a"], 1.0), (files["d"], 1.0)], both)
    combine([(files["a"], 1.0), (files["d"], 1.0)], cut, rank=1)
    whole, less = (read_adapter(file).config[base.part] for file in (both, cut))
    assert whole["r"] > less["r"] == 1 and whole[base.kind.ranks] == less[base.kind.ranks]
    assert not whole.get(base.kind.shares) and whole[base.kind.setting] > 3
    most = int(1.5 * files["d"].stat().st_size)
    made = shrink(both, tmp_path / "small.safetensors", most)
    assert made.bytes <= most and made.header.format_version == base.kind.version and told_of(made.header, base.kind)
    combine([(files["d"], 1.0), (files["d"], 1.0)], both)  # packed, of pieces
    made = shrink(both, tmp_path / "small.safetensors", most)
    assert told_of(made.header, base.kind) and not made.header.pieces


def test_channels_that_do_not_fit_and_damaged_pieces_are_refused(files, base, tmp_path):
    tensors, header = load_file(files["a"]), read_adapter(files["a"])
    host = f"{base.part}.{base.one}"
    key = f"{host}.{base.kind.factors[-1]}"
    save_file(tensors | {key: tensors[key][:-1].contiguous()}, tmp_path / "odd.safetensors", header.metadata())
    with pytest.raises(ValueError, match=rf"do not fit each other: {host} has other channels"):
        combine([(files["a"], 1.0), (tmp_path / "odd.safetensors", 1.0)], tmp_path / "both.safetensors")
    save_file(tensors | {key: tensors[key][:, :2].contiguous()}, tmp_path / "odd.safetensors", header.metadata())
    with pytest.raises(AdapterFileError, match=rf"factors of {host} that do not fit"):
        combine([(tmp_path / "odd.safetensors", 1.0)], tmp_path / "both.safetensors")
    both = tmp_path / "both.safetensors"
    combine([(files["b"], 1.0), (files["d"], 1.0)], both)
    tensors, told = load_file(both), read_adapter(both).metadata()
    first = next(iter(json.loads(told["comcat"])["pieces"][1][base.kind.told][base.part]))
    changes = (
        ('"weight":1.0', '"weight":"much"'),
        (f'"format_version":{base.kind.version}', '"format_version":3'),
        (f'"{first}":[', f'"{first}":[9'),
    )
    for old, new in changes:
        assert old in told["comcat"]
        save_file(tensors, both, told | {"comcat": told["comcat"].replace(old, new)})
        with pytest.raises(AdapterFileError):
            load_adapter(base.pipe, both, "both")
        assert not side_cars(base.model)


@torch.no_grad()
def test_a_region_holds_every_subject_of_one_file(files, base, tmp_path):
    """And words beside a picture have the mean of its places."""
    combine([(files["b"], 1.0), (files["d"], 1.0)], tmp_path / "both.safetensors")
    load_adapter(base.pipe, tmp_path / "both.safetensors", "both")
    left = torch.zeros(16, 16)
    left[:, :8] = 1
    set_regions(base.pipe, {"both": left})
    hidden, made = base.drawn([PROMPTS[2]])
    own, term = base.own(hidden)[-1], side_cars(base.model)[base.one].term("both", hidden)[-1]
    share = left
    if base.kind is FEED_FORWARDS:
        place = torch.cat([torch.ones(8, 4), torch.zeros(8, 4)], dim=1).flatten()
        share = torch.cat([torch.full((len(own) - 64,), 0.5), place]).unsqueeze(1)
    assert_close(made[-1], own + share * term, rtol=0, atol=1e-4)
    assert torch.equal(made[-1][(share == 0).expand_as(own)], own[(share == 0).expand_as(own)])
    assert (term * share).abs().max() > CLEAR
    unload_adapters(base.pipe)


# Sums of live adapters


@pytest.mark.parametrize("kind", [{}, slow({"foldable": True}), slow({"foldable": True, "tied": True})], ids=str)
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
