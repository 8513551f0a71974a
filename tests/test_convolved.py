"""Terms beside convolutions: the formula, who gets them and where, PEFT's verbs, the file, and what they learn."""

import copy
import io
import json
import warnings
from pathlib import Path

import accelerate
import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from peft import LoraConfig, get_peft_model
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from peft.utils.hotswap import hotswap_adapter
from safetensors.torch import load_file, save_file
from torch import nn
from torch.testing import assert_close

from comcat_diffusion import (
    ComcatConfig,
    keep_background,
    load_adapter,
    merge_adapters,
    save_adapter,
    set_regions,
    unload_adapters,
    unmerge_adapters,
)
from comcat_diffusion.adapters import separable as maths
from comcat_diffusion.adapters.beside_kinds import CONVOLUTIONS
from comcat_diffusion.adapters.beside_rows import Beside, pack_terms, rank_bytes, take_terms
from comcat_diffusion.adapters.convolved import FACTORS, ConvolvedLayer
from comcat_diffusion.adapters.header import AdapterFileError, Notes, Piece, read_adapter
from comcat_diffusion.adapters.model import factors, side_cars
from comcat_diffusion.adapters.shrink import least_bytes, shrink
from comcat_diffusion.adapters.store import read_tensors
from comcat_diffusion.adapters.terms import read_contents
from comcat_diffusion.export.lora import export_adapter
from comcat_diffusion.training.becomes import budget
from comcat_diffusion.training.config import TrainConfig
from comcat_diffusion.training.customize import customize
from comcat_diffusion.training.learned import adapter_config
from tests import reference
from tests.damage import DAMAGES, damage
from tests.slow import mostly
from tests.test_trigger import WITH, WITHOUT, drawn, embedded, far, waiting  # noqa: F401

CONV_ROWS, CONV_BITS, CONV_SCALES = CONVOLUTIONS.tensors
GOLDEN = Path(__file__).parent / "golden" / "adapter-v4.safetensors"
EXACT = {"rtol": 0.0, "atol": 1e-12}
SAME = {"rtol": 0.0, "atol": 1e-10}
CLEAR = 0.01  # an effect on the output this large cannot be rounding
CONVS = 16  # of the tiny U-Net's residual blocks: two going down, two in the middle and four going up
CONFIG = ComcatConfig(r=3, target_modules=["attn2"], convolutions=4)
UP = "unet.up_blocks.2.resnets.1.conv1.conv_up"
ONE = "down_blocks.0.resnets.0.conv1"


def distance(left, right) -> float:
    return (left - right).abs().max().item()


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture
def live(tiny_unet, randomize):
    """`live(*names)` gives a float64 U-Net with random adapters of these names, with terms beside convolutions."""

    def build(*names, dtype=torch.float64, **more):
        unet = tiny_unet(dtype)
        for seed, name in enumerate(names or ("dog",)):
            with warnings.catch_warnings():  # PEFT warns of every second adapter, diffusers' way of adding one
                warnings.simplefilter("ignore")
                config = ComcatConfig(**{"r": 3, "target_modules": ["attn2"], "convolutions": 4} | more)
                unet.add_adapter(config, name)
            randomize(unet, name, seed)
        unet.set_adapters(list(names or ("dog",)))
        return unet

    return build


def only_convolutions(unet, *names):
    """Let adapters add nothing at attentions."""
    for name in names or ("dog",):
        for key, factor in factors(unet, name).items():
            if key.endswith((".k_down", ".out_up")):
                factor.data.zero_()
    return unet


# The formula


@pytest.mark.parametrize("stride", [1, 2])
def test_the_term_is_the_slow_formula_and_one_kernel(stride):
    hidden, down, taps, up = noise(2, 5, 6, 7), noise(3, 5, seed=1), noise(3, 9, seed=2), noise(4, 3, seed=3)
    made = maths.separable(hidden, down, taps, up, (stride, stride))
    assert_close(made, reference.separable(hidden, down, taps, up, stride), **EXACT)
    kernel = maths.kernel_of(down, taps, up)
    assert_close(nn.functional.conv2d(hidden, kernel, stride=stride, padding=1), made, **EXACT)
    assert_close(kernel.new_tensor([maths.kernel_of(down[r : r + 1], taps[r : r + 1], up[:, r : r + 1]).norm() ** 2
                                    for r in range(3)]), maths.energies(down, taps, up))  # fmt: skip


def test_first_taps_are_patterns_of_norm_one_of_which_nine_are_independent():
    taps = maths.first_taps(11)
    assert_close(taps[:9] @ taps[:9].T, torch.eye(9))
    assert_close(taps[9:], taps[:2], rtol=0, atol=0)


@torch.no_grad()
@pytest.mark.parametrize("mode", ["zeros", "circular"])
def test_a_convolution_with_an_adapter_is_the_formula(live, mode):
    unet = live(alpha=1.5)
    layer = side_cars(unet)[ONE]
    host, hidden = layer.owner, noise(2, 16, 8, 8)
    host.padding_mode = mode
    host._reversed_padding_repeated_twice = [1, 1, 1, 1]
    own = [getattr(layer, f"comcat_{name}")["dog"].weight for name in FACTORS]
    kernel = host.weight + 0.5 * maths.kernel_of(*own)
    padded = nn.functional.pad(hidden, (1, 1, 1, 1), mode="constant" if mode == "zeros" else mode)
    assert_close(host(hidden), nn.functional.conv2d(padded, kernel, host.bias), **EXACT)
    assert distance(host(hidden), nn.Conv2d.forward(host, hidden)) > CLEAR


# Who gets them


def test_every_residual_block_s_two_convolutions_get_a_term(live):
    unet = live()
    found = {name for name, layer in side_cars(unet).items() if isinstance(layer, ConvolvedLayer)}
    assert len(found) == CONVS and all(".resnets." in name and name[-5:] in ("conv1", "conv2") for name in found)
    names = {name for name in factors(unet, "dog") if "conv_" in name}
    assert names == {f"{name}.{factor}" for name in found for factor in FACTORS}
    trained = {name for name, p in unet.named_parameters() if p.requires_grad}
    assert trained and all(".comcat." in name for name in trained)


@torch.no_grad()
def test_a_fresh_term_adds_nothing_to_the_bit(tiny_unet):
    with_terms, without = tiny_unet(torch.float32), tiny_unet(torch.float32)
    for unet, rank in ((with_terms, 4), (without, 0)):
        unet.add_adapter(ComcatConfig(r=3, target_modules=["attn2"], convolutions=rank), "dog")
    for name, factor in factors(with_terms, "dog").items():
        if "conv_" not in name:
            factor.data.copy_(factors(without, "dog")[name])
    assert torch.equal(tiny_unet.run(with_terms), tiny_unet.run(without))


def test_ranks_of_single_convolutions(live):
    unet = live(convolution_ranks={ONE: 3, "mid_block.resnets.0.conv2": 2})
    assert factors(unet, "dog")["mid_block.resnets.0.conv2.conv_up"].shape == (32, 2)
    assert factors(unet, "dog")[f"{ONE}.conv_taps"].shape == (3, 9)
    assert sum(isinstance(layer, ConvolvedLayer) for layer in side_cars(unet).values()) == 2


def test_what_has_no_such_terms_is_refused_by_name(tiny_unet, tiny_sd3, tiny_clip):
    several = {"trigger": ["a", "b"], "trigger_ranks": [[["a"], 1], [["b"], 1]], "convolution_ranks": {ONE: 8}}
    right = {ONE: [5, 3]}
    assert ComcatConfig(r=2, convolutions=8, convolution_shares=right, **several).convolution_shares == right
    for wrong in (None, {}, {ONE: [5, 2]}, {ONE: [8]}, {ONE: [9, -1]}, {ONE: [True, 7]}, {ONE: 8}, {"b": [5, 3]}):
        with pytest.raises(ValueError, match="convolution_shares must share the ranks of convolution_ranks out"):
            ComcatConfig(r=2, convolutions=8, convolution_shares=wrong, **several)
    with pytest.raises(ValueError, match="convolution_shares must share"):
        ComcatConfig(r=2, convolutions=8, convolution_ranks={ONE: 8}, convolution_shares=right)
    for wrong in ({"convolutions": -1}, {"convolutions": True}, {"convolutions": 4, "convolution_ranks": {"a": 0}}):
        with pytest.raises(ValueError, match="rank beside convolutions must be a whole number"):
            ComcatConfig(**wrong)
    with pytest.raises(ValueError, match="convolution_ranks are of terms beside convolutions"):
        ComcatConfig(convolution_ranks={ONE: 2})
    for model in (tiny_sd3(torch.float32), tiny_clip(torch.float32)):
        with pytest.raises(ValueError, match=f"for U-Nets, and this is a {type(model).__name__}"):
            model.add_adapter(ComcatConfig(r=2, convolutions=8), "dog")
        assert not side_cars(model)
    unet = tiny_unet(torch.float32)
    with pytest.raises(ValueError, match="no attentions of this model"):
        unet.add_adapter(ComcatConfig(r=2, target_modules=["nothing"], convolutions=8), "dog")
    unet.down_blocks[0].resnets[0].conv1 = nn.Conv2d(16, 16, 3, 1, 2, dilation=2)
    with pytest.raises(ValueError, match=rf"Cannot adapt '{ONE}' \(Conv2d\): its kernel"):
        unet.add_adapter(ComcatConfig(r=2, target_modules=["attn2"], convolutions=8), "dog")
    assert not side_cars(unet)


# PEFT's verbs


@torch.no_grad()
def test_scale_disable_delete_and_unload(tiny_unet, live):
    unet, base = only_convolutions(live()), tiny_unet(torch.float64)
    alone, full = tiny_unet.run(base), tiny_unet.run(unet)
    assert distance(full, alone) > CLEAR
    unet.set_adapters(["dog"], [0.0])
    assert torch.equal(tiny_unet.run(unet), alone)
    unet.set_adapters(["dog"], [0.5])
    layer = side_cars(unet)[ONE]
    hidden = noise(1, 16, 8, 8)
    half = layer.owner(hidden) - nn.Conv2d.forward(layer.owner, hidden)
    assert_close(half, 0.5 * layer.term("dog", hidden), **EXACT)
    unet.set_adapters(["dog"], [1.0])
    assert_close(tiny_unet.run(unet), full, rtol=0, atol=0)
    unet.disable_adapters()
    assert torch.equal(tiny_unet.run(unet), alone)
    unet.enable_adapters()
    assert torch.equal(tiny_unet.run(unet), full)
    unet.delete_adapters("dog")
    assert torch.equal(tiny_unet.run(unet), alone) and not factors(unet, "dog")
    unload_adapters(unet)
    assert {n: type(m) for n, m in unet.named_modules()} == {n: type(m) for n, m in base.named_modules()}
    assert unet.state_dict().keys() == base.state_dict().keys()


@torch.no_grad()
def test_two_adapters_add_up_and_one_can_go(tiny_unet, live):
    both = live("dog", "cat")
    layer, hidden = side_cars(both)[ONE], noise(1, 16, 8, 8)
    own = nn.Conv2d.forward(layer.owner, hidden)
    assert_close(layer.owner(hidden), own + layer.term("dog", hidden) + layer.term("cat", hidden), **EXACT)
    both.set_adapters(["cat"])
    assert_close(layer.owner(hidden), own + layer.term("cat", hidden), **EXACT)
    alone = tiny_unet.run(both)
    both.delete_adapters("dog")
    assert torch.equal(tiny_unet.run(both), alone)
    with pytest.raises(ValueError, match="already exists"):
        both.add_adapter(ComcatConfig(r=2, target_modules=["attn2"], convolutions=2), "cat")


@torch.no_grad()
def test_an_adapter_beside_one_without_such_terms(tiny_unet, live, randomize):
    unet = live()
    full = tiny_unet.run(unet)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        unet.add_adapter(ComcatConfig(r=2, target_modules=["attn2"]), "plain")
    unet.set_adapters(["dog"])
    assert torch.equal(tiny_unet.run(unet), full)
    assert not [name for name in factors(unet, "plain") if "conv_" in name]


@torch.no_grad()
def test_copies_and_pickles_do_the_same(tiny_unet, live):
    unet = live()
    full = tiny_unet.run(unet)
    stored = io.BytesIO()
    torch.save(unet, stored)
    stored.seek(0)
    for twin in (copy.deepcopy(unet), torch.load(stored, weights_only=False)):
        assert torch.equal(tiny_unet.run(twin), full)
        factors(twin, "dog")[f"{ONE}.conv_up"].data.zero_()
        assert distance(tiny_unet.run(twin), full) > CLEAR
    assert torch.equal(tiny_unet.run(unet), full)


@torch.no_grad()
@pytest.mark.parametrize("first", [True, False], ids=["before", "after"])
def test_beside_a_lora_of_the_same_convolution(tiny_unet, live, first):
    unet = live() if first else tiny_unet(torch.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        unet.add_adapter(LoraConfig(r=2, target_modules=["conv1"], init_lora_weights=False), "style")
        if not first:
            unet.add_adapter(ComcatConfig(r=3, target_modules=["attn2"], convolutions=4), "dog")
            own = factors(live(), "dog")
            for name, factor in factors(unet, "dog").items():
                factor.data.copy_(own[name])
    unet.set_adapters(["dog"])
    assert_close(tiny_unet.run(unet), tiny_unet.run(live()), **SAME)
    unet.set_adapters(["dog", "style"])
    assert distance(tiny_unet.run(unet), tiny_unet.run(live())) > CLEAR


@torch.no_grad()
def test_peft_s_own_file_and_model(tiny_unet, live):
    unet = live()
    state = {name: value.clone() for name, value in get_peft_model_state_dict(unet, adapter_name="dog").items()}
    assert len([name for name in state if "conv_" in name]) == 3 * CONVS
    wrapped = get_peft_model(tiny_unet(torch.float64), CONFIG, "dog")
    found = set_peft_model_state_dict(wrapped, {f"base_model.model.{n}": v for n, v in state.items()}, "dog")
    assert not found.unexpected_keys
    assert torch.equal(tiny_unet.run(wrapped.base_model.model), tiny_unet.run(unet))
    with wrapped.disable_adapter():
        assert torch.equal(tiny_unet.run(wrapped.base_model.model), tiny_unet.run(tiny_unet(torch.float64)))
    assert torch.equal(tiny_unet.run(wrapped.unload()), tiny_unet.run(tiny_unet(torch.float64)))


@torch.no_grad()
def test_an_adapter_is_swapped_for_another_in_place(tiny_unet, live, tmp_path):
    wrapped = [get_peft_model(tiny_unet(torch.float64), CONFIG, "default") for _ in range(2)]
    both = live("a", "b")
    for model, kept in zip(wrapped, "ab", strict=True):
        for name, factor in factors(model.base_model.model, "default").items():
            factor.data.copy_(factors(both, kept)[name])
    wrapped[1].save_pretrained(tmp_path)
    hotswap_adapter(wrapped[0], tmp_path, adapter_name="default", torch_device="cpu")
    one, other = (tiny_unet.run(model.base_model.model) for model in wrapped)
    assert torch.equal(one, other)


@torch.no_grad()
def test_merged_is_unmerged_and_the_base_s_kernel_comes_back(tiny_unet, live):
    unet, base = live(), tiny_unet(torch.float64)
    full, kernel = tiny_unet.run(unet), unet.get_submodule(ONE).weight
    merge_adapters(unet)
    assert_close(tiny_unet.run(unet), full, **SAME)
    assert distance(unet.get_submodule(ONE).weight, kernel) > CLEAR
    unet.to(torch.float64)
    unmerge_adapters(unet)
    assert unet.get_submodule(ONE).weight is kernel
    assert torch.equal(tiny_unet.run(unet), full)
    unload_adapters(unet)
    assert torch.equal(tiny_unet.run(unet), tiny_unet.run(base))


@torch.no_grad()
def test_merging_for_good_leaves_a_plain_model(tiny_unet, live):
    wrapped = get_peft_model(tiny_unet(torch.float64), CONFIG, "dog")
    given = factors(live(), "dog")
    for name, factor in factors(wrapped.base_model.model, "dog").items():
        factor.data.copy_(given[name])
    full = tiny_unet.run(wrapped.base_model.model)
    merged = wrapped.merge_and_unload()
    assert not side_cars(merged)
    assert_close(tiny_unet.run(merged), full, **SAME)


@torch.no_grad()
def test_offloading_changes_nothing(live, tiny_unet):
    unet, still = live(), live()
    accelerate.cpu_offload(unet, execution_device=torch.device("cpu"))  # what enable_sequential_cpu_offload uses
    assert all(parameter.device.type == "meta" for parameter in factors(unet, "dog").values())
    assert torch.equal(tiny_unet.run(unet), tiny_unet.run(still))


@torch.no_grad()
def test_layerwise_casting_to_float8_leaves_the_factors_alone(live, tiny_unet):
    unet, cast = live(dtype=torch.float32), {"storage_dtype": torch.float8_e4m3fn, "compute_dtype": torch.bfloat16}
    before = {name: factor.clone() for name, factor in factors(unet, "dog").items()}
    unet.enable_layerwise_casting(**cast)
    unet.get_submodule(ONE)(noise(1, 16, 8, 8).bfloat16())
    assert unet.get_submodule(ONE).weight.dtype == torch.float8_e4m3fn
    assert all(torch.equal(factor, before[name]) for name, factor in factors(unet, "dog").items())
    unet = tiny_unet(torch.float32)
    unet.enable_layerwise_casting(**cast)
    with pytest.raises(ValueError, match="casting to float8.* replaced its forward; attach adapters before"):
        unet.add_adapter(copy.deepcopy(CONFIG), "dog")


@pytest.mark.slow
@torch.no_grad()
def test_torch_compile_traces_a_block_in_one_graph(live):
    block, hidden, time = live().down_blocks[0].resnets[0], noise(2, 16, 8, 8), noise(2, 64, seed=1)
    compiled = torch.compile(block, backend="eager", fullgraph=True)
    assert torch.equal(compiled(hidden, time), block(hidden, time))
    torch._dynamo.reset()


# From the trigger on, and by place


@torch.no_grad()
def test_a_row_without_the_trigger_is_the_base_s(waiting, embedded):  # noqa: F811
    pipe, seen = waiting(convolutions=4), []
    layer = side_cars(pipe.unet)[ONE]
    layer.owner.register_forward_hook(lambda module, args, output: seen.append((args[0], output)))
    drawn(pipe, [WITHOUT, WITH, WITHOUT], steps=1)
    ((hidden, made),) = seen
    own, rows = nn.Conv2d.forward(layer.owner, hidden), torch.tensor([0, 1, 2, 3, 5])  # what is subtracted comes first
    assert torch.equal(made[rows], own[rows])
    assert torch.equal(made[4], (own + layer.term("dog", hidden))[4]) and distance(made[4], own[4]) > CLEAR
    assert (drawn(pipe, WITHOUT) == drawn(embedded(), WITHOUT)).all()  # nobody is called: the host's own forward


@torch.no_grad()
def test_without_its_trigger_no_term_is_computed(waiting, monkeypatch):  # noqa: F811
    pipe = waiting(convolutions=4)
    monkeypatch.setattr(ConvolvedLayer, "added", lambda *args: pytest.fail("a term was asked for"))
    drawn(pipe, WITHOUT)
    with pytest.raises(pytest.fail.Exception):
        drawn(pipe, WITH)


@torch.no_grad()
def test_a_background_that_is_kept_is_the_base_s(waiting, embedded):  # noqa: F811
    pipe, base = waiting(convolutions=4, target_modules=["attn2"]), embedded()
    seen = []
    pipe.unet.register_forward_hook(lambda model, args, output: seen.append(output[0].clone()))

    def kept(count):
        return keep_background(
            pipe, {"dog": ["sks teddy"]}, WITH, num_inference_steps=count, output_type="np",
            generator=torch.Generator().manual_seed(0),
        ).images  # fmt: skip

    image = kept(2)
    own, hook = [], base.unet.register_forward_hook(lambda model, args, output: own.append(output[0].clone()))
    alone = drawn(base, [WITH])
    hook.remove()
    assert all(torch.equal(one, other) for one, other in zip(seen[:2], own, strict=True))  # the base's own pass
    assert far(image, alone) > CLEAR


@torch.no_grad()
def test_a_region_holds_the_terms(live, tiny_unet):
    unet = only_convolutions(live("dog", "cat"), "dog", "cat")
    left = torch.zeros(8, 8)
    left[:, :4] = 1
    set_regions(unet, {"dog": left, "cat": 1 - left})
    seen = {}
    layer = side_cars(unet)[ONE]
    layer.owner.register_forward_hook(lambda module, args, output: seen.update(given=args[0], made=output))
    tiny_unet.run(unet)
    own = nn.Conv2d.forward(layer.owner, seen["given"])
    expected = own + left * layer.term("dog", seen["given"]) + (1 - left) * layer.term("cat", seen["given"])
    assert_close(seen["made"], expected, **EXACT)
    set_regions(unet, {})
    assert_close(layer.owner(seen["given"]), own + layer.term("dog", seen["given"]) + layer.term("cat", seen["given"]))


# The file


def test_a_file_brings_back_the_very_same(tiny_unet, live, tmp_path):
    unet = live(dtype=torch.float32, convolution_ranks={ONE: 2})
    save_adapter(unet, tmp_path / "a.safetensors", "dog")
    other, seed = tiny_unet(torch.float32), torch.get_rng_state()
    header = load_adapter(other, tmp_path / "a.safetensors", "dog")
    assert torch.equal(torch.get_rng_state(), seed)
    assert header.config["unet"]["convolutions"] == 4 and header.config["unet"]["convolution_ranks"] == {ONE: 2}
    with torch.no_grad():
        assert torch.equal(tiny_unet.run(other), tiny_unet.run(unet))
    save_adapter(other, tmp_path / "b.safetensors", "dog")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_a_file_without_such_terms_says_nothing_of_them(tiny_unet, live, tmp_path):
    save_adapter(live(convolutions=0), tmp_path / "a.safetensors", "dog", dtype=torch.float32)
    assert b"convolution" not in (tmp_path / "a.safetensors").read_bytes()


@pytest.mark.parametrize("how", DAMAGES)
def test_a_damaged_file_is_refused(tiny_unet, live, tmp_path, how):
    path = tmp_path / "a.safetensors"
    save_adapter(live(dtype=torch.float32), path, "dog")
    damage(path, how, f"unet.{ONE}.conv_taps", ("convolutions", "convolution_ranks"), (4, 3), "conv_in")
    unet = tiny_unet(torch.float32)
    with pytest.raises(AdapterFileError):
        load_adapter(unet, path, "dog")
    assert not side_cars(unet)


# The packed file


@pytest.fixture
def packed(tiny_unet, live, tmp_path):
    """A dense file with terms beside convolutions, in float32, and the same of 7,500 bytes."""
    dense, small = tmp_path / "dense.safetensors", tmp_path / "small.safetensors"
    unet = live(dtype=torch.float32)
    for seed, factor in enumerate(factors(unet, "dog").values()):
        factor.data *= 1 + seed % 3
    save_adapter(unet, dense, "dog", notes=Notes("sks", "a photo of sks dog", "dog"))
    return dense, small, shrink(dense, small, 7_500)


def test_ranks_are_rounded_and_packed_within_their_share(tiny_unet, packed):
    dense, small, made = packed
    assert small.stat().st_size == made.bytes <= 7_500 and made.bytes > 7_200
    header = read_adapter(small)
    assert header.format_version == 4 and header.convolved == made.header.convolved
    tensors = load_file(small)
    own = sum(tensors[name].nbytes for name in (CONV_ROWS, CONV_BITS, CONV_SCALES))
    assert 0.58 * 7_500 < own <= 0.6 * 7_500
    assert set(tensors[CONV_BITS].tolist()) <= set(range(2, 9))
    ranks = header.config["unet"]["convolution_ranks"]
    assert header.config["unet"]["convolutions"] == max(ranks.values()) and sum(ranks.values()) == len(
        tensors[CONV_BITS]
    )
    unet, whole = tiny_unet(torch.float32), tiny_unet(torch.float32)
    load_adapter(unet, small, "dog")
    load_adapter(whole, dense, "dog")
    layers, before = side_cars(unet), side_cars(whole)
    name = max(ranks, key=lambda one: (ranks[one], one))
    hidden = noise(1, layers[name].in_features, 8, 8).float()
    with torch.no_grad():
        now, then = layers[name].term("dog", hidden), before[name].term("dog", hidden)
    assert distance(now, then) < 0.3 * then.abs().max()
    assert len([one for one in layers if "conv" in one]) == len(ranks)


def test_what_is_packed_is_unpacked_exactly():
    terms, bits = [], []
    for seed, (name, (outof, into, rank)) in enumerate({"b.conv1": (5, 7, 3), "a.conv2": (6, 4, 2)}.items()):
        down, taps, up = (noise(*shape, seed=seed).float() for shape in ((rank, into), (rank, 9), (outof, rank)))
        terms.append(Beside("unet", name, 2.0, down, taps, up))
        bits.append([8, 0, 3][:rank])
    tensors, told = pack_terms(terms, bits)
    assert told == {CONVOLUTIONS: {"unet": {"a.conv2": [1, 6, 4], "b.conv1": [2, 5, 7]}}}
    assert sum(tensor.nbytes for tensor in tensors.values()) == sum(
        rank_bytes(len(term.up), term.down.shape[1], count)
        for term, own in zip(terms, bits, strict=True) for count in own
    )  # fmt: skip
    found = {
        name: factor
        for term in take_terms(dict(tensors), Piece({}, {}, {}, told[CONVOLUTIONS]))
        for name, factor in term.tensors().items()
    }
    down, taps, up = (found[f"unet.b.conv1.{name}"] for name in FACTORS)
    was = terms[0].down[[0, 2]], terms[0].taps[[0, 2]], 2 * terms[0].up[:, [0, 2]]
    for made, before, coarse in zip((down, taps, up.T), (*was[:2], was[2].T), (0.35, 0.01, 0.35), strict=True):
        assert distance(made[0], before[0]) < 0.01 * before[0].abs().max()  # of eight bits
        assert distance(made[1], before[1]) < coarse * before[1].abs().max()  # of three; taps always of eight


@pytest.mark.parametrize("damage", mostly(["bits", "more", "less", "scales", "rank", "none"], "bits", "rank"))
def test_a_damaged_packed_file_is_refused(tiny_unet, packed, damage):
    _, small, _ = packed
    tensors, metadata = load_file(small), read_adapter(small).metadata()
    if damage == "bits":
        tensors[CONV_BITS][0] = 9
    elif damage == "more":
        tensors[CONV_ROWS] = torch.cat([tensors[CONV_ROWS], tensors[CONV_ROWS][:1]])
    elif damage == "less":
        tensors[CONV_ROWS] = tensors[CONV_ROWS][:-1].contiguous()
    elif damage == "scales":
        tensors[CONV_SCALES] = tensors[CONV_SCALES][:, :2].contiguous()
    elif damage == "rank":
        metadata["comcat"] = metadata["comcat"].replace('"convolved":{"unet":{', '"convolved":{"unet":{"mid":[-1,2,3],')
    else:
        del tensors[CONV_ROWS]
    save_file(tensors, small, metadata)
    unet = tiny_unet(torch.float32)
    with pytest.raises(AdapterFileError):
        load_adapter(unet, small, "dog")
    assert not side_cars(unet)


def test_without_room_for_a_rank_the_attentions_have_all_of_it(packed, tmp_path):
    dense, _, _ = packed
    least = least_bytes(read_contents(dense))
    made = shrink(dense, tmp_path / "least.safetensors", least)
    assert made.bytes <= least and made.header.format_version == 2


def test_the_golden_file_of_format_version_4_opens_for_ever():
    """Written once by `python -m tests.golden.write`; never written again."""
    header, known = read_adapter(GOLDEN), json.loads(GOLDEN.with_suffix(".json").read_text("utf-8"))
    assert header.format_version == 4 and header.config["unet"] == known["config"]
    found = read_tensors(GOLDEN, header)
    assert found.keys() == known["sums"].keys()
    for name, (shape, total) in known["sums"].items():
        assert list(found[name].shape) == shape
        assert float(found[name].double().abs().sum()) == pytest.approx(total, rel=1e-12)
    assert len(header.convolved["unet"]) == len({name.rpartition(".")[0] for name in found if "conv_" in name})


# What is not a LoRA


def test_a_free_one_is_no_lora_and_says_what_to_do(live, tmp_path):
    path = tmp_path / "a.safetensors"
    save_adapter(live(dtype=torch.float32), path, "dog")
    with pytest.raises(AdapterFileError, match="free adapter.*--as lora, or take the closest LoRA"):
        export_adapter(path, tmp_path / "b.safetensors")
    assert [file.name for file in tmp_path.iterdir()] == ["a.safetensors"]


# Learning


@pytest.mark.slow
def test_terms_learn_what_attentions_did_not(tiny_unet):
    unet, target = tiny_unet(torch.float32), noise(2, 4, 8, 8, seed=5).float()
    unet.add_adapter(ComcatConfig(r=2, target_modules=["attn2"], convolutions=4), "dog")
    before = {name: p.clone() for name, p in unet.named_parameters() if not p.requires_grad}
    own = [factor for name, factor in factors(unet, "dog").items() if "conv_" in name]
    optimizer, losses = torch.optim.AdamW(own, lr=2e-2), []
    for _ in range(30):
        loss = (tiny_unet.run(unet) - target).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    assert all(torch.equal(before[name], p) for name, p in unet.named_parameters() if name in before)


@pytest.mark.slow
def test_a_run_goes_on_from_a_file_with_such_terms(tmp_path):
    few = {"max_train_steps": 2, "skip_final_inference": True}
    first = customize(
        TrainConfig(convolutions=2, target_modules=["attn2"], max_bytes=12_000, output_dir=str(tmp_path / "a"), **few)
    )
    start = {"init_adapter": str(first.adapter), **few}
    more = customize(TrainConfig(output_dir=str(tmp_path / "b"), **start))
    one, other = (read_adapter(outcome.adapter).config["unet"] for outcome in (first, more))
    assert one["convolution_ranks"] == other["convolution_ranks"] and other["convolutions"] == 2
    before, after = (read_tensors(o.adapter, read_adapter(o.adapter)) for o in (first, more))
    up = UP.replace("conv1", "conv2")
    assert before.keys() == after.keys() and distance(before[up], after[up].float()) > 1e-4
    with pytest.raises(ValueError, match="stays what it is, with convolutions 2: leave --convolutions out"):
        customize(TrainConfig(output_dir=str(tmp_path / "c"), convolutions=4, **start))


def test_a_rank_that_is_none_is_refused():
    with pytest.raises(ValueError, match="--convolutions must be at least 0"):
        TrainConfig(convolutions=-1)


def test_gradients_are_the_same_with_checkpointing(waiting):  # noqa: F811
    found = []
    for again in (False, True):
        pipe: StableDiffusionPipeline = waiting(convolutions=2)
        pipe.unet.train()
        if again:
            pipe.unet.enable_gradient_checkpointing()
        states, _ = pipe.encode_prompt([WITH, WITHOUT], "cpu", 1, False)
        latents = noise(2, 16, 16, 16).float()
        pipe.unet(latents, torch.tensor(500), states).sample.square().mean().backward()
        found.append({name: factor.grad for name, factor in factors(pipe.unet, "dog").items()})
    for name, grad in found[0].items():
        assert_close(found[1][name], grad)
    assert any(grad.abs().max() > 0 for name, grad in found[0].items() if "conv_" in name)


def test_the_default_has_them_where_there_are_convolutions(tiny_unet, tiny_klein):
    unet, flow = tiny_unet(), tiny_klein()
    usual = adapter_config(TrainConfig(), unet, ["sks"])
    assert (usual.convolutions, usual.target_modules, usual.r) == (16, None, 8)  # None: cross-attention
    seconds = {name for name in ConvolvedLayer.hosts(unet) if name.endswith(".conv2")}
    assert usual.convolution_ranks == dict.fromkeys(seconds - {"down_blocks.0.resnets.0.conv2"}, 16)
    without = adapter_config(TrainConfig(convolutions=0), unet, ["sks"])
    assert (without.convolutions, sorted(without.target_modules)) == (0, ["attn1", "attn2"])
    assert budget(TrainConfig(), unet) == budget(TrainConfig(convolutions=0), unet)
    for other in (TrainConfig(kind="tied"), TrainConfig(up_blocks_only=True), TrainConfig(as_="lora")):
        assert adapter_config(other, unet, ["sks"]).convolutions == 0
    assert adapter_config(TrainConfig(), flow, ["sks"]).convolutions == 0


@pytest.mark.parametrize(
    ("kinds", "left_out"),
    [
        (("CrossAttnDownBlock2D", "DownBlock2D"), ["0.resnets.0"]),
        (("DownBlock2D", "CrossAttnDownBlock2D"), ["0.resnets.0", "0.resnets.1", "1.resnets.0"]),  # as SD XL has it
        (("DownBlock2D", "DownBlock2D"), ["0.resnets.0", "0.resnets.1", "1.resnets.0", "1.resnets.1"]),
    ],
)
def test_nothing_is_learned_beside_convolutions_before_the_first_attention(kinds, left_out):
    up = [kind.replace("Down", "Up") for kind in reversed(kinds)]
    with torch.device("meta"):
        unet = UNet2DConditionModel(
            sample_size=8,
            down_block_types=kinds,
            up_block_types=up,
            block_out_channels=(8, 16),
            layers_per_block=2,
            norm_num_groups=4,
            cross_attention_dim=8,
            attention_head_dim=2,
        )
    seconds = {name for name in ConvolvedLayer.hosts(unet) if name.endswith(".conv2")}
    learned = adapter_config(TrainConfig(), unet, ["sks"]).convolution_ranks
    assert learned.keys() == seconds - {f"down_blocks.{place}.conv2" for place in left_out}
