"""Terms beside feed-forwards: the formula, who gets them, PEFT's verbs, the file, triggers and places, and learning."""

import copy
import io
import json
import warnings
from contextlib import contextmanager
from pathlib import Path

import accelerate
import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from peft.utils.hotswap import hotswap_adapter
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.functional import adaptive_avg_pool2d
from torch.testing import assert_close

from comcat_diffusion import (
    ComcatConfig,
    bases,
    keep_background,
    listen,
    load_adapter,
    merge_adapters,
    save_adapter,
    set_regions,
    unload_adapters,
    unmerge_adapters,
)
from comcat_diffusion.adapters.as_lora import lora_layers
from comcat_diffusion.adapters.beside_kinds import FEED_FORWARDS
from comcat_diffusion.adapters.beside_rows import Beside, pack_terms, rank_bytes
from comcat_diffusion.adapters.fed import FACTORS, FedLayer
from comcat_diffusion.adapters.header import AdapterFileError, Notes, read_adapter
from comcat_diffusion.adapters.merge import bake_adapters
from comcat_diffusion.adapters.model import factors, side_cars
from comcat_diffusion.adapters.shrink import least_bytes, shrink
from comcat_diffusion.adapters.store import read_tensors
from comcat_diffusion.adapters.terms import read_contents
from comcat_diffusion.cli import main
from comcat_diffusion.export.approximate import approximate
from comcat_diffusion.export.lora import export_adapter
from comcat_diffusion.families.known import family_of
from comcat_diffusion.training.becomes import becomes, budget
from comcat_diffusion.training.config import TrainConfig, ValidateConfig
from comcat_diffusion.training.customize import customize
from comcat_diffusion.training.learned import adapter_config
from comcat_diffusion.training.validate import validate
from tests import reference, tiny_families
from tests.damage import DAMAGES, damage
from tests.quick_training import QUICK
from tests.slow import mostly

GOLDEN = Path(__file__).parent / "golden" / "adapter-v5.safetensors"
EXACT = {"rtol": 0.0, "atol": 1e-12}
SAME = {"rtol": 0.0, "atol": 1e-10}
CLEAR = 0.01  # an effect on the output this large cannot be rounding
INTO, OUT = (f"single_transformer_blocks.0.attn.{name}" for name in ("to_qkv_mlp_proj", "to_out"))
STREAM = ["attn"]  # attentions of the blocks of one stream too, which the same Linears make
WITH, WITHOUT = "a photo of sks teddy on a green table", "a photo of a red ball on a green table"
WORDS = {"dog": ["sks teddy", "sks"]}


def distance(left, right) -> float:
    return (left - right).abs().max().item()


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def config(**more):
    return ComcatConfig(**{"r": 2, "feed_forwards": 3} | more)


@pytest.fixture
def live(tiny_klein, randomize):
    """`live(*names)` gives a float64 transformer with random adapters of these names and terms beside feed-forwards."""

    def build(*names, dtype=torch.float64, **more):
        model = tiny_klein(dtype)
        for seed, name in enumerate(names or ("dog",)):
            with warnings.catch_warnings():  # PEFT warns of every second adapter, diffusers' way of adding one
                warnings.simplefilter("ignore")
                model.add_adapter(config(**more), name)
            randomize(model, name, seed)
        model.set_adapters(list(names or ("dog",)))
        return model

    return build


def only_fed(model, *names):
    """Let adapters add nothing at attentions."""
    for name in names or ("dog",):
        for key, factor in factors(model, name).items():
            if key.endswith((".k_down", ".out_up", ".v_down")):
                factor.data.zero_()
    return model


def plain_forward(layer, hidden):
    """What the host alone makes."""
    return nn.Linear.forward(layer.owner, hidden)


# The formula


@torch.no_grad()
def test_a_linear_with_adapters_is_the_slow_formula(live):
    model, hidden = live("dog", "cat", alpha=3.0), noise(2, 5, 16)
    layer = side_cars(model)[INTO]
    told = [(1.5, torch.ones(2, 5), *layer.factors(name)) for name in ("dog", "cat")]
    assert_close(layer.owner(hidden), reference.fed(hidden, layer.owner, told), **EXACT)
    assert distance(layer.owner(hidden), plain_forward(layer, hidden)) > CLEAR


# Who gets them


def test_both_linears_of_every_block_of_one_stream_get_a_term(live):
    model = live()
    found = {name for name, layer in side_cars(model).items() if isinstance(layer, FedLayer)}
    assert found == {INTO, OUT} == set(FedLayer.hosts(model))
    names = {name for name in factors(model, "dog") if "feed_" in name}
    assert names == {f"{name}.{factor}" for name in found for factor in FACTORS}
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained and all(".comcat." in name for name in trained)


@torch.no_grad()
@pytest.mark.parametrize(
    ("tiny", "count"),
    [("tiny_klein", 2), ("tiny_flux1", 2), ("tiny_sd3", 6), ("tiny_z_image", 6), ("tiny_qwen_image", 4)],
)
def test_each_family_says_where_they_are(tiny, count, request, randomize):
    tiny = request.getfixturevalue(tiny)
    model, alone = tiny(torch.float64), tiny.run(tiny(torch.float64))
    model.add_adapter(config(foldable=True), "dog")
    assert len([layer for layer in side_cars(model).values() if isinstance(layer, FedLayer)]) == count
    assert torch.equal(tiny.run(model), alone)
    only_fed(randomize(model, "dog"))
    full = tiny.run(model)
    assert distance(full, alone) > CLEAR
    merge_adapters(model)
    assert_close(tiny.run(model), full, rtol=1e-10, atol=1e-10)


@torch.no_grad()
def test_a_fresh_term_adds_nothing_to_the_bit(tiny_klein):
    with_terms, without = tiny_klein(torch.float32), tiny_klein(torch.float32)
    for model, rank in ((with_terms, 4), (without, 0)):
        model.add_adapter(config(feed_forwards=rank), "dog")
    for name, factor in factors(with_terms, "dog").items():
        if "feed_" not in name:
            factor.data.copy_(factors(without, "dog")[name])
    assert torch.equal(tiny_klein.run(with_terms), tiny_klein.run(without))


def test_ranks_of_single_linears(live):
    model = live(feed_forward_ranks={OUT: 5})
    assert factors(model, "dog")[f"{OUT}.feed_up"].shape == (16, 5)
    assert sum(isinstance(layer, FedLayer) for layer in side_cars(model).values()) == 1


def test_what_has_no_such_terms_is_refused_by_name(tiny_unet, tiny_clip, tiny_klein):
    for wrong in ({"feed_forwards": -1}, {"feed_forwards": True}, {"feed_forwards": 4, "feed_forward_ranks": {"a": 0}}):
        with pytest.raises(ValueError, match="rank beside feed-forwards must be a whole number"):
            ComcatConfig(**wrong)
    with pytest.raises(ValueError, match="feed_forward_ranks are of terms beside feed-forwards"):
        ComcatConfig(feed_forward_ranks={OUT: 2})
    several = {"trigger": ["a", "b"], "trigger_ranks": [[["a"], 1], [["b"], 1]]}
    with pytest.raises(ValueError, match="feed_forward_shares must share the ranks of feed_forward_ranks out"):
        ComcatConfig(r=2, feed_forwards=2, **several)
    for model in (tiny_unet(torch.float32), tiny_clip(torch.float32)):
        told = rf"beside feed-forwards are for .*FLUX.2 \[klein\].*this is a {type(model).__name__}"
        with pytest.raises(ValueError, match=told):
            model.add_adapter(config(), "dog")
        assert not side_cars(model)
    model = tiny_klein(torch.float32)
    model.single_transformer_blocks[0].attn.to_out = nn.Sequential(nn.Linear(64, 16))
    with pytest.raises(ValueError, match=rf"Cannot adapt '{OUT}' \(Sequential\): it is no Linear"):
        model.add_adapter(config(target_modules=["transformer_blocks.0.attn"]), "dog")
    assert not side_cars(model)


# PEFT's verbs


@torch.no_grad()
@pytest.mark.parametrize("targets", [None, STREAM], ids=["text", "stream"])
def test_scale_disable_delete_and_unload(tiny_klein, live, targets):
    model, base = live(target_modules=targets), tiny_klein(torch.float64)
    alone, full = tiny_klein.run(base), tiny_klein.run(model)
    assert distance(tiny_klein.run(only_fed(live(target_modules=targets))), alone) > CLEAR
    model.set_adapters(["dog"], [0.0])
    assert torch.equal(tiny_klein.run(model), alone)
    model.set_adapters(["dog"], [0.5])
    layer, hidden = side_cars(model)[INTO], noise(1, 5, 16)
    assert_close(layer.owner(hidden) - plain_forward(layer, hidden), 0.5 * layer.term("dog", hidden), **EXACT)
    model.set_adapters(["dog"], [1.0])
    assert torch.equal(tiny_klein.run(model), full)
    model.disable_adapters()
    assert torch.equal(tiny_klein.run(model), alone)
    model.enable_adapters()
    assert torch.equal(tiny_klein.run(model), full)
    model.delete_adapters("dog")
    assert torch.equal(tiny_klein.run(model), alone) and not factors(model, "dog")
    unload_adapters(model)
    assert {n: type(m) for n, m in model.named_modules()} == {n: type(m) for n, m in base.named_modules()}
    assert model.state_dict().keys() == base.state_dict().keys()


@torch.no_grad()
def test_two_adapters_add_up_and_one_can_go(tiny_klein, live):
    both = live("dog", "cat")
    layer, hidden = side_cars(both)[INTO], noise(1, 5, 16)
    own = plain_forward(layer, hidden)
    assert_close(layer.owner(hidden), own + layer.term("dog", hidden) + layer.term("cat", hidden), **EXACT)
    both.set_adapters(["cat"])
    assert_close(layer.owner(hidden), own + layer.term("cat", hidden), **EXACT)
    alone = tiny_klein.run(both)
    both.delete_adapters("dog")
    assert torch.equal(tiny_klein.run(both), alone)
    with pytest.raises(ValueError, match="already exists"):
        both.add_adapter(config(), "cat")


@torch.no_grad()
def test_copies_and_pickles_do_the_same(tiny_klein, live):
    model = live()
    full = tiny_klein.run(model)
    stored = io.BytesIO()
    torch.save(model, stored)
    stored.seek(0)
    for twin in (copy.deepcopy(model), torch.load(stored, weights_only=False)):
        assert torch.equal(tiny_klein.run(twin), full)
        factors(twin, "dog")[f"{OUT}.feed_up"].data.zero_()
        assert distance(tiny_klein.run(twin), full) > CLEAR
    assert torch.equal(tiny_klein.run(model), full)


@torch.no_grad()
@pytest.mark.parametrize("first", [True, False], ids=["before", "after"])
@pytest.mark.parametrize("targets", [None, STREAM], ids=["text", "stream"])
def test_beside_a_lora_of_the_same_linears(tiny_klein, live, first, targets):
    model = live(target_modules=targets) if first else tiny_klein(torch.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lora = LoraConfig(r=2, target_modules=[INTO, OUT], init_lora_weights=False)
        model.add_adapter(lora, "style")
        if not first:
            model.add_adapter(config(target_modules=targets), "dog")
            own = factors(live(target_modules=targets), "dog")
            for name, factor in factors(model, "dog").items():
                factor.data.copy_(own[name])
    model.set_adapters(["dog"])
    alone = tiny_klein.run(live(target_modules=targets))
    assert_close(tiny_klein.run(model), alone, **SAME)
    model.set_adapters(["dog", "style"])
    assert distance(tiny_klein.run(model), alone) > CLEAR


@torch.no_grad()
def test_peft_s_own_file_and_model(tiny_klein, live):
    model = live()
    state = {name: value.clone() for name, value in get_peft_model_state_dict(model, adapter_name="dog").items()}
    assert len([name for name in state if "feed_" in name]) == 4
    wrapped = get_peft_model(tiny_klein(torch.float64), config(), "dog")
    found = set_peft_model_state_dict(wrapped, {f"base_model.model.{n}": v for n, v in state.items()}, "dog")
    assert not found.unexpected_keys
    inner, base = wrapped.base_model.model, tiny_klein.run(tiny_klein(torch.float64))
    assert torch.equal(tiny_klein.run(inner), tiny_klein.run(model))
    with wrapped.disable_adapter():
        assert torch.equal(tiny_klein.run(inner), base)
    assert torch.equal(tiny_klein.run(wrapped.unload()), base)


@torch.no_grad()
def test_an_adapter_is_swapped_for_another_in_place(tiny_klein, live, tmp_path):
    wrapped = [get_peft_model(tiny_klein(torch.float64), config(), "default") for _ in range(2)]
    both = live("a", "b")
    for model, kept in zip(wrapped, "ab", strict=True):
        for name, factor in factors(model.base_model.model, "default").items():
            factor.data.copy_(factors(both, kept)[name])
    wrapped[1].save_pretrained(tmp_path)
    hotswap_adapter(wrapped[0], tmp_path, adapter_name="default", torch_device="cpu")
    one, other = (tiny_klein.run(model.base_model.model) for model in wrapped)
    assert torch.equal(one, other)


@torch.no_grad()
@pytest.mark.parametrize("targets", [None, STREAM], ids=["text", "stream"])
@pytest.mark.parametrize("order", [1, -1], ids=["in-order", "backwards"])
def test_merged_is_unmerged_and_the_base_s_weights_come_back(tiny_klein, live, targets, order):
    """Also where an attention that has an adapter too is merged into the same Linear, whichever comes first."""
    model, base = live(foldable=True, target_modules=targets), tiny_klein(torch.float64)
    full, alone = tiny_klein.run(model), tiny_klein.run(base)
    before = {name: p for name, p in model.named_parameters() if ".comcat." not in name}
    layers = list(side_cars(model).values())[::order]
    for layer in layers:
        layer.merge()
    assert_close(tiny_klein.run(model), full, **SAME)
    assert distance(model.get_submodule(OUT).weight, before[f"{OUT}.weight"]) > CLEAR
    model.to(torch.float64)
    for layer in layers:
        layer.unmerge()
    assert torch.equal(tiny_klein.run(model), full)
    after = {name: p for name, p in model.named_parameters() if ".comcat." not in name}
    assert before.keys() == after.keys() and all(after[name] is p for name, p in before.items())
    merge_adapters(model)
    assert_close(tiny_klein.run(model), full, **SAME)
    unmerge_adapters(model)
    assert torch.equal(tiny_klein.run(model), full)
    merge_adapters(model)
    unload_adapters(model)
    assert torch.equal(tiny_klein.run(model), alone)
    assert {n: type(m) for n, m in model.named_modules()} == {n: type(m) for n, m in base.named_modules()}


@torch.no_grad()
@pytest.mark.parametrize("targets", [None, STREAM], ids=["text", "stream"])
def test_merging_for_good_leaves_a_plain_model(tiny_klein, live, targets):
    wrapped = get_peft_model(tiny_klein(torch.float64), config(foldable=True, target_modules=targets), "dog")
    given = factors(live(foldable=True, target_modules=targets), "dog")
    for name, factor in factors(wrapped.base_model.model, "dog").items():
        factor.data.copy_(given[name])
    full = tiny_klein.run(wrapped.base_model.model)
    merged = wrapped.merge_and_unload()
    assert not side_cars(merged)
    assert_close(tiny_klein.run(merged), full, **SAME)
    model = live(foldable=True, target_modules=targets)
    bake_adapters(model)
    assert not side_cars(model) and {type(m) for m in model.modules()} == {type(m) for m in merged.modules()}
    assert_close(tiny_klein.run(model), full, **SAME)


@torch.no_grad()
def test_what_is_refused_to_merge_leaves_all_as_it_was(tiny_klein, live):
    """A free adapter of the same Linear has no weights to merge into."""
    model = live(target_modules=STREAM)
    full, weight = tiny_klein.run(model), model.get_submodule(OUT).weight
    with pytest.raises(ValueError, match="keep it live"):
        merge_adapters(model)
    assert model.get_submodule(OUT).weight is weight and torch.equal(tiny_klein.run(model), full)


@torch.no_grad()
@pytest.mark.parametrize("targets", [None, STREAM], ids=["text", "stream"])
def test_offloading_changes_nothing(live, tiny_klein, targets):
    model, still = live(target_modules=targets), live(target_modules=targets)
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))  # what enable_sequential_cpu_offload uses
    assert all(parameter.device.type == "meta" for parameter in factors(model, "dog").values())
    assert torch.equal(tiny_klein.run(model), tiny_klein.run(still))


@torch.no_grad()
def test_layerwise_casting_to_float8_leaves_the_factors_alone(live, tiny_klein):
    model, cast = live(dtype=torch.float32), {"storage_dtype": torch.float8_e4m3fn, "compute_dtype": torch.bfloat16}
    before = {name: factor.clone() for name, factor in factors(model, "dog").items()}
    model.enable_layerwise_casting(**cast)
    model.get_submodule(OUT)(noise(1, 5, 64).bfloat16())
    assert model.get_submodule(OUT).weight.dtype == torch.float8_e4m3fn
    assert all(torch.equal(factor, before[name]) for name, factor in factors(model, "dog").items())
    model = tiny_klein(torch.float32)
    model.enable_layerwise_casting(**cast)
    with pytest.raises(ValueError, match="replaced its forward; attach adapters before"):
        model.add_adapter(config(), "dog")


@torch.no_grad()
def test_torch_compile_traces_a_linear_in_one_graph(live):
    host, hidden = live().get_submodule(OUT), noise(2, 5, 64)
    compiled = torch.compile(host, backend="eager", fullgraph=True)
    assert torch.equal(compiled(hidden), host(hidden))
    torch._dynamo.reset()


# From the trigger on, and by place


FAMILIES = mostly(["klein", "flux1", "sd35", "z_image", "qwen_image", "chroma"], "klein", "sd35", "z_image")


@pytest.fixture(scope="module", params=FAMILIES)
def pipe(request, tmp_path_factory):
    made = bases.load_base(str(getattr(tiny_families, request.param)(tmp_path_factory.mktemp("family"))))
    made.set_progress_bar_config(disable=True)
    return made


@pytest.fixture
def waiting(pipe, randomize):
    """The pipeline with an adapter that waits for its trigger, which goes again."""
    targets = family_of(pipe).usual_targets("tied")
    pipe.transformer.add_adapter(config(trigger=["sks"], foldable=True, target_modules=targets), "dog")
    randomize(pipe.transformer, "dog", std=0.5)
    listen(pipe)
    yield pipe
    unload_adapters(pipe)


def drawn(pipe, prompt, call=None):
    """Latents after two steps, nothing subtracted."""
    family = family_of(pipe)
    how = {**family.drawing(pipe), **family.guided(1.0), "num_inference_steps": 2, "output_type": "latent"}
    side = bases.native_resolution(pipe)
    with torch.no_grad():
        made = (call or pipe)(
            prompt=prompt, generator=torch.Generator().manual_seed(0), height=side, width=side, **how
        ).images
    return made if isinstance(made, torch.Tensor) else torch.stack(made)


@contextmanager
def watched(module):
    """What a module is given and gives, call by call."""
    seen = []
    hook = module.register_forward_hook(lambda module, args, output: seen.append((args and args[0], output)))
    try:
        yield seen
    finally:
        hook.remove()


def a_layer(pipe) -> FedLayer:
    """Of a Linear whose input is no other one's."""
    return [layer for layer in side_cars(pipe.transformer).values() if isinstance(layer, FedLayer)][-1]


def test_without_its_trigger_no_term_is_computed_and_nothing_changes(waiting, monkeypatch):
    pipe = waiting
    own, acting = drawn(pipe, WITHOUT), drawn(pipe, WITH)
    pipe.transformer.disable_adapters()
    assert torch.equal(own, drawn(pipe, WITHOUT)) and distance(acting, drawn(pipe, WITH)) > CLEAR
    pipe.transformer.enable_adapters()
    monkeypatch.setattr(FedLayer, "added", lambda *args: pytest.fail("a term was asked for"))
    assert torch.equal(own, drawn(pipe, WITHOUT))
    with pytest.raises(pytest.fail.Exception):
        drawn(pipe, WITH)


@torch.no_grad()
def test_a_row_without_the_trigger_is_the_base_s(waiting):
    pipe, layer = waiting, a_layer(waiting)
    with watched(layer.owner) as seen:
        drawn(pipe, [WITHOUT, WITH])
    hidden, made = seen[0]
    own = plain_forward(layer, hidden)
    acts = torch.zeros(len(made), made.shape[1])
    acts[1] = 1  # of Z-Image what is subtracted comes behind
    told = [(1.0, acts, *layer.factors("dog"))]
    others = [row for row in range(len(made)) if row != 1]
    assert torch.equal(made[others], own[others])
    assert distance(made[1], own[1]) > CLEAR
    assert_close(made.double(), reference.fed(hidden, layer.owner, told), rtol=1e-5, atol=1e-4)


@torch.no_grad()
def test_a_region_holds_the_terms_and_words_have_its_mean(pipe, randomize):
    for seed, name in enumerate(("dog", "cat")):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            targets = family_of(pipe).usual_targets("tied")
            pipe.transformer.add_adapter(config(foldable=True, target_modules=targets), name)
        randomize(pipe.transformer, name, seed, std=0.5)
    pipe.transformer.set_adapters(["dog", "cat"])
    mask = torch.zeros(8, 8)
    mask[:, :6] = 1
    set_regions(pipe, {"dog": mask, "cat": 1 - mask})
    layer = a_layer(pipe)
    with watched(layer.owner) as seen:
        drawn(pipe, WITH)
    hidden, made = seen[0]
    side = 8 if hidden.shape[1] >= 64 else 4
    words, rest = hidden.shape[1] - side**2, []
    for own in (mask, 1 - mask):
        share, mean = adaptive_avg_pool2d(own[None], side).flatten(), own.mean().expand(words)
        rest.append(torch.cat([share, mean] if family_of(pipe).name == "Z-Image" else [mean, share]))
    told = [
        (1.0, own.expand(len(hidden), -1), *layer.factors(name)) for own, name in zip(rest, ("dog", "cat"), strict=True)
    ]
    assert_close(made.double(), reference.fed(hidden, layer.owner, told), rtol=1e-5, atol=1e-4)
    unload_adapters(pipe)


def test_a_background_that_is_kept_is_the_base_s(waiting):
    pipe = waiting
    with watched(pipe.transformer) as seen:
        drawn(pipe, WITH, lambda **how: keep_background(pipe, WORDS, **how))
    kept = [made[0] for _, made in seen]
    pipe.transformer.disable_adapters()
    with watched(pipe.transformer) as seen:
        drawn(pipe, WITH)
    pipe.transformer.enable_adapters()
    assert len(kept) == 2 * len(seen)
    for one, (_, own) in zip(kept, seen, strict=False):  # the base's own pass
        assert_close(one, own[0], rtol=0, atol=0)
    before, after = (torch.stack(list(kept[at])) for at in (0, len(seen)))
    assert distance(after, before) > CLEAR


def test_gradients_are_the_same_with_checkpointing(waiting):
    pipe, found = waiting, []
    if type(pipe).__name__ != "Flux2KleinPipeline":
        return
    family = family_of(pipe)
    with torch.no_grad():
        condition = family.encode(pipe, [WITH, WITHOUT])
    for again in (False, True):
        pipe.transformer.train()
        (pipe.transformer.enable_gradient_checkpointing if again else pipe.transformer.disable_gradient_checkpointing)()
        pipe.transformer.zero_grad()
        made = family.predict(
            pipe.transformer, noise(2, 16, 8, 8).float(), torch.tensor([500.0, 500]), condition, torch.zeros(2, 6)
        )
        made.square().mean().backward()
        found.append({name: factor.grad.clone() for name, factor in factors(pipe.transformer, "dog").items()})
    pipe.transformer.eval()
    pipe.transformer.disable_gradient_checkpointing()
    for name, grad in found[0].items():
        assert_close(found[1][name], grad)
    assert all(grad.abs().max() > 0 for name, grad in found[0].items() if "feed_" in name)


# The file


KINDS = {
    "free": {},
    "foldable": {"foldable": True},
    "tied": {"foldable": True, "tied": True},
    "cores": {"foldable": True, "cores": True},
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_of_every_kind_brings_back_the_very_same(tiny_klein, live, tmp_path, kind):
    model = live(dtype=torch.float32, feed_forward_ranks={OUT: 2}, **KINDS[kind])
    save_adapter(model, tmp_path / "a.safetensors", "dog")
    other, seed = tiny_klein(torch.float32), torch.get_rng_state()
    header = load_adapter(other, tmp_path / "a.safetensors", "dog")
    assert torch.equal(torch.get_rng_state(), seed)
    assert header.config["transformer"]["feed_forward_ranks"] == {OUT: 2}
    with torch.no_grad():
        assert torch.equal(tiny_klein.run(other), tiny_klein.run(model))
    save_adapter(other, tmp_path / "b.safetensors", "dog")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    if kind != "cores":  # which cannot be cut
        shrink(tmp_path / "a.safetensors", tmp_path / "c.safetensors", 4_000)
        assert load_adapter(tiny_klein(torch.float32), tmp_path / "c.safetensors", "dog").format_version == 5


def test_a_file_without_such_terms_says_nothing_of_them(live, tmp_path):
    save_adapter(live(feed_forwards=0), tmp_path / "a.safetensors", "dog", dtype=torch.float32)
    content = (tmp_path / "a.safetensors").read_bytes()
    assert b"feed_forward" not in content and b"fed" not in content


@pytest.mark.parametrize("how", DAMAGES)
def test_a_damaged_file_is_refused(tiny_klein, live, tmp_path, how):
    path = tmp_path / "a.safetensors"
    save_adapter(live(dtype=torch.float32), path, "dog")
    damage(path, how, f"transformer.{OUT}.feed_down", ("feed_forwards", "feed_forward_ranks"), (3, 4), "proj_out")
    model = tiny_klein(torch.float32)
    with pytest.raises(AdapterFileError):
        load_adapter(model, path, "dog")
    assert not side_cars(model)


@pytest.fixture
def packed(live, tmp_path):
    """A dense file with terms beside feed-forwards, in float32, and the same of 6,000 bytes."""
    dense, small = tmp_path / "dense.safetensors", tmp_path / "small.safetensors"
    model = live(dtype=torch.float32, feed_forwards=16)
    for seed, factor in enumerate(factors(model, "dog").values()):
        factor.data *= 1 + seed % 3
    save_adapter(model, dense, "dog", notes=Notes("sks", "a photo of sks dog", "dog"))
    return dense, small, shrink(dense, small, 6_000)


def test_singular_directions_are_rounded_and_packed_within_their_share(tiny_klein, packed):
    dense, small, made = packed
    assert small.stat().st_size == made.bytes <= 6_000 and made.bytes > 5_800
    header = read_adapter(small)
    assert header.format_version == 5 and header.fed == made.header.fed and not header.convolved
    tensors = load_file(small)
    own = sum(tensors[name].nbytes for name in FEED_FORWARDS.tensors)
    assert 0.5 * 6_000 < own <= 0.6 * 6_000
    ranks = header.config["transformer"]["feed_forward_ranks"]
    assert header.config["transformer"]["feed_forwards"] == max(ranks.values())
    bits = tensors[FEED_FORWARDS.tensors[1]]
    assert sum(ranks.values()) == len(bits) and set(range(2, 9)) >= set(bits.tolist()) > {8}
    model, whole = tiny_klein(torch.float32), tiny_klein(torch.float32)
    load_adapter(model, small, "dog")
    load_adapter(whole, dense, "dog")
    for name in ranks:  # no worse than rounding the best matrices of these ranks
        (down, up), (d, u) = (side_cars(one)[name].factors("dog") for one in (model, whole))
        left = torch.linalg.svdvals(u.double() @ d.double())[ranks[name] :].square().sum()
        lost = (up.double() @ down.double() - u.double() @ d.double()).square().sum()
        assert left <= lost < left + 0.15 * (u @ d).square().sum()
    again = shrink(small, small.with_name("again.safetensors"), 6_000)
    assert again.bytes <= 6_000


def test_what_is_packed_takes_the_bytes_that_are_counted():
    down, up = noise(3, 7).float(), noise(5, 3, seed=1).float()
    term = Beside("transformer", OUT, 2.0, down, None, up)
    assert term.kind == FEED_FORWARDS
    whole = term.decomposed()
    assert_close(whole.up @ whole.down, 2 * (up @ down).double(), rtol=0, atol=1e-6)
    assert (whole.shares().diff() < 0).all()
    tensors, told = pack_terms([term], [[8, 0, 3]])
    assert told == {FEED_FORWARDS: {"transformer": {OUT: [2, 5, 7]}}}
    assert sum(t.nbytes for t in tensors.values()) == sum(rank_bytes(5, 7, bits, FEED_FORWARDS) for bits in (8, 3))


@pytest.mark.parametrize(
    "damage", mostly(["bits", "more", "less", "scales", "rank", "none", "version", "huge"], "bits", "rank", "huge")
)
def test_a_damaged_packed_file_is_refused(tiny_klein, packed, damage):
    _, small, _ = packed
    tensors, metadata = load_file(small), read_adapter(small).metadata()
    rows, bits, scales = FEED_FORWARDS.tensors
    if damage == "bits":
        tensors[bits][0] = 9
    elif damage == "more":
        tensors[rows] = torch.cat([tensors[rows], tensors[rows][:1]])
    elif damage == "less":
        tensors[rows] = tensors[rows][:-1].contiguous()
    elif damage == "scales":
        tensors[scales] = tensors[scales][:, :1].contiguous()
    elif damage == "rank":
        metadata["comcat"] = metadata["comcat"].replace('"fed":{"transformer":{', '"fed":{"transformer":{"x":[-1,2,3],')
    elif damage == "huge":
        metadata["comcat"] = metadata["comcat"].replace(",16,64]", ",16,99999999999]")
    elif damage == "version":
        metadata["comcat"] = metadata["comcat"].replace('"format_version":5', '"format_version":4')
    else:
        del tensors[rows]
    save_file(tensors, small, metadata)
    model = tiny_klein(torch.float32)
    with pytest.raises(AdapterFileError):
        load_adapter(model, small, "dog")
    assert not side_cars(model)


def test_without_room_for_a_rank_the_attentions_have_all_of_it(packed, tmp_path):
    dense, _, _ = packed
    least = least_bytes(read_contents(dense))
    made = shrink(dense, tmp_path / "least.safetensors", least)
    assert made.bytes <= least and made.header.format_version == 2


def test_the_golden_file_of_format_version_5_opens_for_ever():
    """Written once by `python -m tests.golden.write`; never written again."""
    header, known = read_adapter(GOLDEN), json.loads(GOLDEN.with_suffix(".json").read_text("utf-8"))
    assert header.format_version == 5 and header.config["transformer"] == known["config"]
    found = read_tensors(GOLDEN, header)
    assert found.keys() == known["sums"].keys()
    for name, (shape, total) in known["sums"].items():
        assert list(found[name].shape) == shape
        assert float(found[name].double().abs().sum()) == pytest.approx(total, rel=1e-12)
    assert len(header.fed["transformer"]) == len({name.rpartition(".")[0] for name in found if "feed_" in name})


# What is a LoRA


@torch.no_grad()
@pytest.mark.parametrize("targets", [None, STREAM], ids=["text", "stream"])
def test_a_term_that_acts_everywhere_is_a_lora_of_its_linear(tiny_klein, live, targets):
    model = live(foldable=True, alpha=3.0, target_modules=targets)
    layers, before = lora_layers(model, "dog"), {name: model.get_submodule(name).weight for name in (INTO, OUT)}
    merge_adapters(model)
    for name, weight in before.items():
        change = layers[f"{name}.lora_B.weight"] @ layers[f"{name}.lora_A.weight"]
        assert_close(weight + change, model.get_submodule(name).weight, **EXACT)
        assert change.abs().max() > CLEAR


def test_the_closest_lora_of_a_free_one_keeps_the_terms_as_they_are(tmp_path, randomize):
    """Without its attentions, which no LoRA has, it is off by nothing."""
    pipe = bases.load_base(str(tiny_families.klein(tmp_path / "base")))
    pipe.transformer.add_adapter(config(alpha=3.0), "dog")
    only_fed(randomize(pipe.transformer, "dog", std=0.5))
    save_adapter(pipe, tmp_path / "a.safetensors", "dog")
    unload_adapters(pipe)
    with pytest.raises(AdapterFileError, match="is a free adapter"):
        export_adapter(tmp_path / "a.safetensors", tmp_path / "lora.safetensors")
    assert approximate(pipe, tmp_path / "a.safetensors", tmp_path / "b.safetensors", [WITH]).error < 1e-5
    export_adapter(tmp_path / "b.safetensors", tmp_path / "lora.safetensors")
    lora, own = load_file(tmp_path / "lora.safetensors"), load_file(tmp_path / "a.safetensors")
    for name, native in ((INTO, "linear1"), (OUT, "linear2")):
        mark = f"lora_unet_single_blocks_0_{native}"
        down, up, alpha = (lora[f"{mark}.{end}"] for end in ("lora_down.weight", "lora_up.weight", "alpha"))
        expected = 1.5 * own[f"transformer.{name}.feed_up"] @ own[f"transformer.{name}.feed_down"]
        assert_close(alpha / len(down) * up @ down, expected, rtol=0, atol=1e-5)


@torch.no_grad()
def test_the_weighted_sum_is_one_more(tiny_klein, live):
    wrapped = get_peft_model(tiny_klein(torch.float64), config(), "a")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped.add_adapter("b", config())
    inner, both = wrapped.base_model.model, live("a", "b")
    for name in "ab":
        for key, factor in factors(inner, name).items():
            factor.data.copy_(factors(both, name)[key])
    wrapped.base_model.add_weighted_adapter(["a", "b"], [1.0, 0.5], "sum", "cat")
    wrapped.set_adapter("sum")
    assert factors(inner, "sum")[f"{OUT}.feed_up"].shape == (16, 6)
    layer, hidden = side_cars(inner)[OUT], noise(1, 5, 64)
    expected = layer.term("a", hidden) + 0.5 * layer.term("b", hidden)
    assert_close(layer.owner(hidden), plain_forward(layer, hidden) + expected, **EXACT)


# Learning


def test_terms_learn_what_attentions_did_not(tiny_klein):
    model = tiny_klein(torch.float32)
    target = tiny_klein.run(model) + 0.3 * noise(2, 12, 16, seed=5).float()
    model.add_adapter(config(feed_forwards=8), "dog")
    before = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    own = [factor for name, factor in factors(model, "dog").items() if "feed_" in name]
    optimizer, losses = torch.optim.AdamW(own, lr=2e-2), []
    for _ in range(40):
        loss = (tiny_klein.run(model) - target).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters() if name in before)


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    """`settings(folder)` are those of a quick run on FLUX.2's classes."""
    folder = str(tiny_families.klein(tmp_path_factory.mktemp("klein")))

    def build(output, kind=TrainConfig, **more):
        pictures = str(bases.assets() / "subject" / "train")
        own = {
            "pretrained_model_name_or_path": folder, "output_dir": str(output), "instance_data_dir": pictures,
            "instance_prompt": "a photo of sks teddy", "validation_prompt": ["a photo of sks teddy"], "rank": 2,
            "mixed_precision": "no", "max_train_steps": 5, "lr_warmup_steps": 0, "skip_final_inference": True,
            "feed_forwards": 4, **QUICK,
        }  # fmt: skip
        return kind(**own | more)

    return build


@pytest.mark.slow
def test_a_run_within_a_budget_is_cut_and_a_resumed_one_is_the_unbroken_one_to_the_byte(settings, tmp_path):
    few = {"max_bytes": 5_000, "checkpointing_steps": 1}
    whole = customize(settings(tmp_path / "whole", **few)).adapter
    header = read_adapter(whole)
    assert header.format_version == 5 and whole.stat().st_size <= 5_000
    assert header.config["transformer"]["trigger"] == ["sks"] and header.fed["transformer"]
    for step in (2, 3):  # before and at the cut
        resume = str(tmp_path / "whole" / "checkpoints" / f"checkpoint-{step}")
        again = customize(settings(tmp_path / f"again-{step}", resume_from_checkpoint=resume, **few)).adapter
        assert again.read_bytes() == whole.read_bytes()


@pytest.mark.slow
def test_a_run_goes_on_from_a_file_with_such_terms_and_commands_tell_of_them(settings, tmp_path, capsys):
    first = customize(settings(tmp_path / "a")).adapter
    assert read_adapter(first).format_version == 1
    assert main(["info", str(first)]) == 0
    assert "with terms beside all Linears of feed-forwards of rank 4, from sks on" in capsys.readouterr().out
    start = {"init_adapter": str(first), "feed_forwards": 0, "max_train_steps": 2}
    more = customize(settings(tmp_path / "b", **start)).adapter
    before, after = (read_tensors(file, read_adapter(file)) for file in (first, more))
    up = f"transformer.{OUT}.feed_up"
    assert before.keys() == after.keys() and distance(before[up], after[up]) > 1e-5
    with pytest.raises(ValueError, match="stays what it is, with feed_forwards 4: leave --feed_forwards out"):
        customize(settings(tmp_path / "c", **start | {"feed_forwards": 8}))


def test_what_is_trained_as_a_lora_is_one(settings, tmp_path):
    """Of the size that is said before."""
    config = settings(tmp_path / "a", as_="lora")
    made = customize(config).adapter
    export_adapter(made, tmp_path / "lora.safetensors")
    lora, pipe = load_file(tmp_path / "lora.safetensors"), bases.load_base(config.pretrained_model_name_or_path)
    size = sum(tensor.nbytes for name, tensor in lora.items() if not name.endswith(".alpha"))
    told = becomes(config, pipe.transformer)
    assert f"exactly, a LoRA that every program reads (at most {size / 1000:,.0f} kB" in told
    pipe.load_lora_weights(str(tmp_path), weight_name="lora.safetensors")
    found = drawn(pipe, WITHOUT)
    pipe.unload_lora_weights()
    assert distance(found, drawn(pipe, WITHOUT)) > 1e-5
    load_adapter(pipe, made, "dog")
    assert_close(found, drawn(pipe, WITHOUT), rtol=0, atol=1e-5)


def test_what_a_run_would_do_is_said_before(settings, tmp_path, tiny_klein):
    report = validate(settings(tmp_path / "a", ValidateConfig))
    assert not report.errors
    assert any("in terms beside 2 Linears of feed-forwards." in fact for fact in report.facts)
    assert any(fact.startswith("This adapter is for this tool and its ComfyUI node (about") for fact in report.facts)
    told = validate(settings(tmp_path / "a", ValidateConfig, pretrained_model_name_or_path="embedded")).errors
    assert any("--feed_forwards is for Stable Diffusion 3 and 3.5, FLUX.2 [klein]" in error for error in told)
    with pytest.raises(ValueError, match="--feed_forwards must be at least 0"):
        TrainConfig(feed_forwards=-1)
    usual, asked = TrainConfig(), TrainConfig(feed_forwards=8)
    found = [adapter_config(config, tiny_klein(), ["sks"]) for config in (usual, asked)]
    assert [(own.feed_forwards, own.target_modules) for own in found] == [(0, ["attn"]), (8, None)]
    assert budget(asked, tiny_klein()) == budget(TrainConfig(), tiny_klein()) and asked.feed_forwards == 8
