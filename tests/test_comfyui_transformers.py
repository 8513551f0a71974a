"""ComfyUI's transformers, seen as diffusers names them, and what their text encoders read: without ComfyUI."""

import re
import types
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from comcat_diffusion import ComcatConfig, save_adapter
from comcat_diffusion.adapters.fed import FedLayer
from comcat_diffusion.adapters.fingerprint import fingerprint
from comcat_diffusion.adapters.model import side_cars
from comcat_diffusion.adapters.store import read_fitting
from comcat_diffusion.adapters.texts import texts_of
from comcat_diffusion.comfy.beside import passing
from comcat_diffusion.comfy.blocks import FluxSingle, JointBlock, ZImageAttention, block_of
from comcat_diffusion.comfy.fed import Fed
from comcat_diffusion.comfy.guests import Guest, Guests
from comcat_diffusion.comfy.load import _guest, _of_transformer
from comcat_diffusion.comfy.places import ATTENTION, PLACES, Called, LookedEnough, Places
from comcat_diffusion.comfy.quantized import rough, rounded
from comcat_diffusion.comfy.sharing import PICTURE, Picture, masked_shares
from comcat_diffusion.comfy.text import SAID, Said, Tokenizer, joined
from comcat_diffusion.comfy.transformers import KINDS, as_diffusers, attention_names, feed_forward_names, kind_of
from comcat_diffusion.families.family import TRANSFORMER, Reading, Segment
from comcat_diffusion.families.known import FAMILIES, family_of_model
from tests.comfyui_transformers import original_names
from tests.tiny_families import (
    CHAT,
    chroma_transformer,
    flux1_transformer,
    klein_transformer,
    qwen_image_transformer,
    qwen_tokenizer,
    sd3_transformer,
    t5_tokenizer,
    z_image_transformer,
)

MADE = {
    "klein": klein_transformer,
    "flux1": flux1_transformer,
    "sd3": sd3_transformer,
    "z_image": z_image_transformer,
    "qwen_image": qwen_image_transformer,
    "chroma": chroma_transformer,
}


def native(transformer: nn.Module) -> types.SimpleNamespace:
    """A `ModelPatcher` around modules under the original names, with the sizes that ComfyUI's blocks know."""
    root, config = nn.Module(), transformer.config
    for name, tensor in original_names(transformer).items():
        *path, last = name.split(".")
        here = root
        for step in path:
            if step not in here._modules:
                here.add_module(step, nn.Module())
            here = here._modules[step]
        here.register_parameter(last, nn.Parameter(tensor, requires_grad=False))
    heads = config["n_heads"] if "n_heads" in config else config["num_attention_heads"]
    width = config["dim"] if "n_heads" in config else heads * config["attention_head_dim"]
    for module in root.modules():
        module.num_heads = module.heads = module.n_local_heads = heads
        module.hidden_size, module.head_dim = width, width // heads
    model = nn.Module()
    model.diffusion_model = root
    return types.SimpleNamespace(model=model, backup={}, object_patches={})


@pytest.mark.parametrize("name", MADE)
def test_a_transformer_has_the_fingerprint_that_it_has_in_diffusers(name):
    transformer = MADE[name]()
    patcher = native(transformer)
    kind = kind_of(patcher.model.diffusion_model)
    shell = as_diffusers(patcher, kind)
    trained = fingerprint(transformer, "flow")
    assert fingerprint(shell, "flow") == trained and len(trained["sketch"]) == 64
    names = attention_names(patcher.model.diffusion_model, kind)
    carries = family_of_model(transformer).carries or ".*"
    there = {own: theirs for own, theirs in names.items() if re.fullmatch(carries, own)}
    assert all(block_of(f"diffusion_model.{theirs}") for theirs in there.values())
    one = next(own for own in there if "1" in own)
    own = f"{one}.{family_of_model(transformer).lora_projections(one)[1]}"
    assert_close(shell.get_submodule(own).weight, transformer.get_submodule(own).weight, rtol=0, atol=0)
    theirs = ("double_blocks.1", "joint_blocks.1.context_block.attn", "layers.1.attention", "transformer_blocks.1.attn")
    assert there[one] in theirs


@torch.no_grad()
@pytest.mark.parametrize("name", MADE)
def test_terms_beside_feed_forwards_are_beside_what_diffusers_have_they_are(name, randomize, tmp_path):
    """A file's, Linear by Linear; of one that is rows of a bigger one here, in these rows and no others."""
    transformer, patcher = MADE[name](), native(MADE[name]())
    transformer.add_adapter(ComcatConfig(r=2, alpha=3.0, foldable=True, feed_forwards=2), "dog")
    randomize(transformer, "dog", std=0.3)
    save_adapter(transformer, tmp_path / "dog.safetensors", "dog")
    kind = kind_of(patcher.model.diffusion_model)
    parts, names = _of_transformer(patcher, kind)
    shell, names = parts[TRANSFORMER], names[TRANSFORMER]
    fed = {own: layer for own, layer in side_cars(transformer).items() if isinstance(layer, FedLayer)}
    assert feed_forward_names(patcher.model.diffusion_model, kind).keys() == fed.keys() == FedLayer.hosts(shell).keys()
    present = fingerprint(shell, "flow")
    fitting = read_fitting({TRANSFORMER: shell}, present, tmp_path / "dog.safetensors", True, "this model")
    guest = _guest(tmp_path / "dog.safetensors", TRANSFORMER, fitting, shell, names, 0.5)
    assert guest.waits_beside.keys() == {names[own] for own in fed}
    assert set(guest.attentions) == guest.factors.keys() - guest.waits_beside.keys()
    for own, layer in fed.items():
        weight = patcher.model.get_submodule(names[own]).weight
        host = nn.Linear(*reversed(weight.shape), bias=False)
        hidden, host.weight = torch.randn(2, 3, weight.shape[1]), nn.Parameter(weight.data)
        change = Fed(Guests((guest,)), names[own], host)(hidden) - host(hidden)
        at = family_of_model(transformer).native_weight(own)
        assert at is None or f"diffusion_model.{at.name}" == names[own]
        rows = slice(None) if at is None else slice(at.place * len(weight) // at.count, None)
        assert_close(change[..., rows], 0.5 * layer.scaling["dog"] * layer.term("dog", hidden), rtol=1e-4, atol=1e-5)
        assert change[..., rows].abs().max() > 0.05 and (rows.start is None or not change[..., : rows.start].any())


@torch.no_grad()
@pytest.mark.parametrize(
    ("place", "around"),
    [("single_blocks.0.linear1", (3, 2)), ("layers.0.feed_forward.w1", (32, 26)),
     ("joint_blocks.0.x_block.mlp.fc1", (0, 0)), ("transformer_blocks.0.img_mlp.net.2", (0, 4))],
)  # fmt: skip
def test_a_term_beside_a_feed_forward_acts_row_by_row_rank_by_rank_and_token_by_token(place, around):
    """In float64, against the formula; words have the mean of a mask, and so has what is behind the picture."""
    torch.manual_seed(0)
    host, place, grid = nn.Linear(8, 6).double(), f"diffusion_model.{place}", (2, 3)
    factors = {name: nn.Linear(*size, bias=False).double() for name, size in (("down", (8, 2)), ("up", (2, 6)))}
    waits = ((("sks",), 1), (("ohwx",), 1))
    own = {place: {f"feed_{name}": factor for name, factor in factors.items()}}
    guest = Guest("dog", Path("dog"), ("sks", "ohwx"), waits, own, {place: 0.7}, (), {place: waits})
    masks = {"dog": torch.tensor([[1.0, 0.5, 0], [1, 0, 0]]).double()}
    fed, hidden = Fed(Guests((guest,), masks), place, host), torch.randn(3, sum(around) + 6, 8).double()
    said = {("sks",): torch.tensor([[0.0, 1, 1], [0, 0, 0], [0, 0, 0]]).double().unsqueeze(-1)}
    said[("ohwx",)] = torch.tensor([[0.0, 0, 1], [0, 1, 1], [0, 0, 0]]).double().unsqueeze(-1)
    picture = Picture(grid, around[0], masked_shares(masks, grid, grid))
    with passing({SAID: said, PICTURE: picture}, grid):
        found = fed(hidden)
    share = masks["dog"].flatten()
    share = torch.cat([share.mean().expand(around[0]), share, share.mean().expand(around[1])]).view(1, -1, 1)
    rows = torch.tensor([[1.0, 1], [0, 1], [0, 0]]).double().unsqueeze(1)
    wanted = host(hidden) + 0.7 * factors["up"](share * rows * factors["down"](hidden))
    assert_close(found, wanted)
    assert torch.equal(found[2], host(hidden)[2]) and (found[:2] - host(hidden)[:2]).abs().max() > 0.1
    with passing({SAID: {}, PICTURE: picture}, grid):
        assert torch.equal(fed(hidden), host(hidden))
    called = {"dog": Called(torch.ones(3, 3), torch.zeros(3, dtype=torch.bool))}
    with passing({SAID: said, PICTURE: picture, PLACES: Places(called, None, grid)}, grid):  # the base draws
        assert torch.equal(fed(hidden), host(hidden))


def test_a_lora_in_the_weights_is_looked_past():
    transformer = klein_transformer()
    patcher, name = native(transformer), "double_blocks.0.txt_attn.qkv"
    there = patcher.model.diffusion_model.get_submodule(name)
    patcher.backup[f"diffusion_model.{name}.weight"] = types.SimpleNamespace(weight=there.weight.data.clone())
    there.weight.data += 1
    shell = as_diffusers(patcher, kind_of(patcher.model.diffusion_model))
    assert fingerprint(shell, "flow") == fingerprint(transformer, "flow")


class Packed(torch.Tensor):
    """A weight of few bits in a class of its own, as ComfyUI's: its numbers are bytes."""

    made = 0

    def dequantize(self) -> torch.Tensor:
        Packed.made += 1
        return self.as_subclass(torch.Tensor).float() / 40 - 3


class Ggml(torch.Tensor):
    """A weight as GGUF nodes have it: its bytes have another shape, its layer makes the numbers, LoRAs lie beside."""

    def __new__(cls, held, tensor_type, tensor_shape, patches=()):
        return super().__new__(cls, held)

    def __init__(self, held, tensor_type, tensor_shape, patches=()):
        self.tensor_type, self.tensor_shape, self.patches = tensor_type, tensor_shape, list(patches)

    @property
    def shape(self):
        return self.tensor_shape

    @property
    def ndim(self):
        return len(self.tensor_shape)


def packed(weight: torch.Tensor) -> torch.Tensor:
    """Numbers of a weight in a byte each, and what they are."""
    return ((weight + 3) * 40).round().clamp(0, 255).to(torch.uint8)


def unpacked(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What a layer of a GGUF node makes of its weight."""
    assert tensor.tensor_type == 8 and not tensor.patches
    return (torch.Tensor(tensor).reshape(tensor.tensor_shape) / 40 - 3).to(dtype)


@pytest.mark.parametrize("of", ["comfyui", "gguf"])
@pytest.mark.parametrize("name", MADE)
def test_weights_of_few_bits_are_made_one_by_one_and_cut_as_tensors_are(name, of):
    transformer = MADE[name]()
    expected, patcher = native(transformer), native(transformer)
    kind = kind_of(patcher.model.diffusion_model)
    for own, module in patcher.model.diffusion_model.named_modules():
        weight = module._parameters.get("weight")
        if weight is None or weight.ndim != 2:
            continue
        held, shape = packed(weight.data), weight.shape
        expected.model.diffusion_model.get_submodule(own).weight.data = held.float() / 40 - 3
        del module.weight
        module.get_weight = unpacked
        module.weight = held.as_subclass(Packed) if of == "comfyui" else Ggml(held.reshape(-1, 2), 8, shape, ["a LoRA"])
    before = Packed.made
    shell, plain = as_diffusers(patcher, kind), as_diffusers(expected, kind)
    assert Packed.made == before  # shapes are known without the numbers
    names = [own for own, module in plain.named_modules() if getattr(module, "in_features", 0)]
    for own in names:
        theirs, ours = plain.get_submodule(own), shell.get_submodule(own)
        assert (ours.in_features, ours.out_features) == (theirs.in_features, theirs.out_features)
        assert_close(ours.weight.as_subclass(torch.Tensor), theirs.weight.data, rtol=0, atol=0)
    found = fingerprint(shell, "flow")
    assert names and found == fingerprint(plain, "flow") != fingerprint(transformer, "flow")


def test_weights_of_four_bits_are_known_for_their_base_and_not_for_another():
    weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(0)) * 0.02
    blocks = weight.reshape(-1, 32)
    step = blocks.abs().amax(1, keepdim=True) / 8
    rough_weight = ((blocks / step).round().clamp(-8, 7) * step).reshape(64, 64)
    sketch = lambda tensor: {"sketch": [float(f"{v:.4g}") for v in tensor.reshape(-1)[:: 64 + 1][:64].tolist()]}
    trained, present = sketch(weight), sketch(rough_weight)
    quantized = rough(packed(weight).as_subclass(Packed))
    assert rounded(present, trained, quantized) == trained
    assert rounded(present, trained, rough(weight)) == rounded(present, trained, rough(weight.bfloat16())) == present
    assert 0 < rough(weight.to(torch.float8_e4m3fn)) < quantized
    for off in (0.25, 1.0):  # a fine-tune that is far from it, and another base
        noise = torch.randn(64, 64, generator=torch.Generator().manual_seed(1)) * 0.02
        other = sketch(weight * (1 - off**2) ** 0.5 + off * noise)
        assert rounded(other, trained, quantized) == other
    assert rounded(present, {"sketch": [0.1]}, quantized) == present


def test_blocks_are_known_by_their_names():
    assert block_of("diffusion_model.joint_blocks.3.x_block.attn2") == ("diffusion_model.joint_blocks.3", JointBlock)
    assert block_of("diffusion_model.single_blocks.12") == ("diffusion_model.single_blocks.12", FluxSingle)
    assert block_of("diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2") is None


def inner(template: str | None = None, **readers: object) -> types.SimpleNamespace:
    """ComfyUI's tokenizer over some of transformers'."""

    def tokenize_with_weights(text: str, return_word_ids: bool = False, **kwargs: object) -> dict:
        text = (template or "{}").replace("{}", text)
        made = {key: [[(token, 1.0) for token in own(text).input_ids]] for key, own in readers.items()}
        return {key: [chunk + [(0, 1.0)] * (40 - len(chunk)) for chunk in chunks] for key, chunks in made.items()}

    held = {name: types.SimpleNamespace(tokenizer=own) for name, own in readers.items()}
    more = {"llama_template": template} if template else {}
    return types.SimpleNamespace(tokenize_with_weights=tokenize_with_weights, **held, **more)


@pytest.mark.parametrize("prompt", ["a photo of sks dog", "sks", "user sks user", "a photo of a ball", "(sks, a)sks"])
def test_a_t5_and_a_language_model_act_where_diffusers_says(prompt):
    words = t5_tokenizer()
    tokens = Tokenizer(inner(t5xxl=words), {}).tokenize_with_weights(prompt)
    expected = texts_of(words, Reading((Segment(words),))).read(prompt, 40)
    assert torch.equal(tokens.said.acts(["sks"]), expected.acts(["sks"]).flatten().bool())
    chat = qwen_tokenizer()
    template = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    assert "<think>" in CHAT
    said = Tokenizer(inner(template, qwen3_4b=chat), {}).tokenize_with_weights(prompt).said
    start = len(chat(template.partition("{}")[0] + prompt.partition("sks")[0].rstrip()).input_ids)
    acts = said.acts(["sks"])
    assert int(acts.sum()) == (len(acts) - start if "sks" in prompt else 0)
    assert not Tokenizer(inner(template, qwen3_4b=chat), {}).tokenize_with_weights("a dog").said.acts(["user"]).any()


def test_what_is_said_is_of_the_states_that_there_are():
    said = Said("a sks", ((0, 1, 5, 0),), Said("a sks", ((1, 5, 0),)))
    assert said.acts(["sks"]).tolist() == [False, False, True, True, False, True, True]
    assert said.of_states(4).acts(["sks"]).tolist() == [False, False, True, True]  # a T5 that is not there
    assert said.of_states(7) == said
    assert said.behind.of_states(2).chunks == ((5, 0),)  # a template's begin


def test_people_are_told_of_a_node_where_there_is_one():
    assert {
        name for family in FAMILIES if family.has_node for name in family.denoisers if family.part == TRANSFORMER
    } == {kind.denoiser for kind in KINDS}


def test_words_that_are_read_whole_are_not_parted():
    parts = [Tokenizer(inner(t5xxl=t5_tokenizer()), {}).tokenize_with_weights(text) for text in ("a", "b")]
    with pytest.raises(ValueError, match="BREAK parts prompts for CLIP alone"):
        joined(parts)
    with pytest.raises(ValueError, match="is none whose prompts are read here"):
        Tokenizer(types.SimpleNamespace(), {})


@torch.no_grad()
@pytest.mark.parametrize("shape", ["heads apart", "in a row", "values apart"])
def test_where_a_transformer_looks_is_its_softmax_over_the_text(shape):
    """Against logits in float64; the function in whose place it stands is asked twice, and gives what it gave."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = torch.randn(3, 2, 4, 5 + 6 + 1, 8, generator=generator)  # B, H, N: 5 words, 2x3 places, 1 more
    of_words = torch.tensor([[0.0, 1, 1, 0, 0], [0, 0, 0, 0, 0]])
    rows = lambda own: own.transpose(1, 2).flatten(2)  # B, N, H*D
    given = [query, key, value] if shape == "heads apart" else [*map(rows, (query, key)), rows(value)]
    given[2] = value.transpose(1, 2) if shape == "values apart" else given[2]

    def own(q, k, v, heads, skip_reshape=False):
        if not skip_reshape:
            q, k, v = (one.reshape(*one.shape[:2], heads, -1).transpose(1, 2) for one in (q, k, v))
        return rows(nn.functional.scaled_dot_product_attention(q, k, v))

    places = Places({"dog": Called(of_words, torch.zeros(2, dtype=torch.bool))}, None, (2, 3))
    options = places.watching({"sigmas": 1}, ["dog"], lambda tokens, count, words: words)
    more = {"skip_reshape": True} if shape == "heads apart" else {}
    assert torch.equal(options[ATTENTION](own, *given, 4, **more), own(*given, 4, **more)) and options["sigmas"] == 1
    small = [one[:, :, :6] if shape == "heads apart" else one[:, :6] for one in given]
    options[ATTENTION](own, *small, heads=4, **more)  # of the picture alone
    shares = (query.double() @ key.double().mT * 8**-0.5).softmax(-1)[:, :, 5:11]
    text = torch.tensor([1.0] * 5 + [0] * 6 + [1]).double()
    words = torch.nn.functional.pad(of_words, (0, 7)).double()[:, None, None]
    wanted = ((shares * words).sum(-1) / (shares * text).sum(-1)).mean(1).view(2, 1, 2, 3)
    (found,) = places.seen["dog"]
    assert_close(found.double(), wanted, rtol=1e-5, atol=1e-6)
    assert not found[1].any()
    with pytest.raises(LookedEnough):
        places.watching({}, ["dog"], lambda tokens, count, words: words, False)[ATTENTION](own, *given, 4, **more)
    assert len(places.seen["dog"]) == 2


class ZImage(nn.Module):
    """ComfyUI's attention of Z-Image, as far as it can be seen from outside; it knows norms in two forms."""

    def __init__(self, heads: int, width: int) -> None:
        super().__init__()
        self.n_local_heads, self.n_local_kv_heads, self.head_dim, self.qk_norm = heads, heads, width, True
        self.qkv, self.out = nn.Linear(heads * width, 3 * heads * width), nn.Linear(heads * width, heads * width)
        self.q_norm, self.k_norm = nn.RMSNorm(width), nn.RMSNorm(width)

    def forward(self, x, x_mask, freqs_cis, transformer_options={}):  # noqa: B006 - as ComfyUI's
        parts = self.qkv(x).split([self.n_local_heads * self.head_dim] * 3, dim=-1)
        q, k, v = (own.view(*x.shape[:2], self.n_local_heads, self.head_dim) for own in parts)
        if self.qk_norm:  # one kernel, of these norms' weights
            q, k = (
                nn.functional.rms_norm(a, n.weight.shape, n.weight) for a, n in ((q, self.q_norm), (k, self.k_norm))
            )
        else:
            q, k = self.q_norm(q), self.k_norm(k)
        turned = [torch.einsum("...dij,...dj->...di", freqs_cis, a.unflatten(-1, (-1, 2))).flatten(-2) for a in (q, k)]
        q, k, v = (a.movedim(1, 2) for a in (*turned, v))
        return self.out(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


@torch.no_grad()
@pytest.mark.parametrize("free", [False, True])
def test_an_adapter_of_z_image_acts_on_words_from_its_trigger_on_and_all_that_is_no_word(free):
    """Against an attention whose keys and values are changed by hand, in float64."""
    torch.manual_seed(0)
    heads, width, rank, words, tokens = 2, 8, 2, 3, 9
    host, channels = ZImage(heads, width).double(), heads * width
    linear = lambda into, out: nn.Linear(into, out, bias=False).double()
    names = {"q_down": channels, "k_down": channels, "v_down": channels}
    factors = {name: linear(into, heads * rank) for name, into in names.items()} | {
        "out_up": linear(heads * rank, channels)
    }
    if not free:
        factors = {name: factors[name] for name in ("k_down", "v_down")}
        factors |= {name: linear(width, heads * rank) for name in ("q_core", "out_core")}
    place = "diffusion_model.layers.0.attention"
    guest = Guest("dog", Path("dog"), ("sks",), (), {place: factors}, {place: 0.7})
    acts = torch.tensor([[0.0], [1.0], [1.0]]).double()[None]
    x, angle = torch.randn(1, tokens, channels).double(), torch.randn(1, tokens, 1, width // 2).double()
    cos, sin = angle.cos(), angle.sin()
    table = torch.stack([cos, -sin, sin, cos], dim=-1).unflatten(-1, (2, 2))
    block = ZImageAttention(Guests((guest,)), place, host)
    found = block(x, None, table, transformer_options={SAID: {("sks",): acts}})
    assert torch.equal(block(x, None, table, transformer_options={SAID: {}}), host(x, None, table))
    on = torch.cat([acts, torch.ones(1, tokens - words, 1).double()], dim=1) * 0.7
    q, k, v = host.qkv(x).chunk(3, dim=-1)
    split = lambda own: own.unflatten(-1, (heads, -1)).transpose(1, 2)  # B, H, N, D or R
    lowered = {name: split(factors[name](x)) for name in factors if name.endswith("_down")}
    if not free:
        mixed = [factors[name].weight.unflatten(0, (heads, rank)) for name in ("q_core", "out_core")]  # H, R, D
        change = [lowered[f"{a}_down"] @ mix for a, mix in zip("kv", mixed, strict=True)]
        k, v = (own + on * split_back(more) for own, more in zip((k, v), change, strict=True))
    turn = lambda own: torch.einsum("bndij,bhndj->bhndi", table[:, :, 0], own.unflatten(-1, (-1, 2))).flatten(-2)
    logits = turn(host.q_norm(split(q))) @ turn(host.k_norm(split(k))).mT
    if free:
        logits = logits + lowered["q_down"] @ (lowered["k_down"] * on[:, None]).mT
    shares = (logits * width**-0.5).softmax(-1)
    wanted = host.out(split_back(shares @ split(v)))
    if free:
        wanted = wanted + factors["out_up"](split_back(shares @ (lowered["v_down"] * on[:, None])))
    assert_close(found, wanted)


@torch.no_grad()
def test_adapters_of_parts_of_a_picture_are_attentions_of_their_own_weighed_by_place(monkeypatch):
    """In float64, against one attention for each part; words, which have no place, have the shares' means."""
    torch.manual_seed(0)
    heads, width, words, filled, grid = 2, 8, 3, 4, (2, 3)
    host, channels = ZImage(heads, width).double(), heads * width
    place, guests = "diffusion_model.layers.0.attention", {}
    for name, rank, free in (("left", 2, False), ("right", 4, True), ("all over", 2, True)):
        linear = lambda into, out: nn.Linear(into, out, bias=False).double()
        own = {name: linear(channels, heads * rank) for name in ("k_down", "v_down")}
        rest = {"q_down": (channels, heads * rank), "out_up": (heads * rank, channels)}
        rest = rest if free else dict.fromkeys(("q_core", "out_core"), (width, heads * rank))
        own |= {name: linear(*size) for name, size in rest.items()}
        guests[name] = Guest(name, Path(name), (), (), {place: own}, {place: 0.7})
    x, angle = torch.randn(2, words + 6 + filled, channels).double(), torch.randn(1, 13, 1, width // 2).double()
    cos, sin = angle.cos(), angle.sin()
    table = torch.stack([cos, -sin, sin, cos], dim=-1).unflatten(-1, (2, 2))
    masks = {"left": torch.tensor([[1.0, 0.5, 0], [1, 0, 0]]), "right": torch.tensor([[0.0, 1, 1], [0, 0, 0]])}
    shares = masked_shares({name: mask.double() for name, mask in masks.items()}, (4, 6), grid)
    assert_close(shares["left"].flatten().tolist(), [1.0, 1 / 3, 0.0, 1.0, 0.0, 0.0])

    def attended(*names: str, masked: bool = False) -> torch.Tensor:
        own = Guests(tuple(guests[name] for name in names), masks if masked else {})
        options = {SAID: {}, PICTURE: Picture(grid, words, shares)}
        return ZImageAttention(own, place, host)(x, None, table, transformer_options=options)

    monkeypatch.setattr(ZImageAttention, "begin", lambda self, tokens, places, words: words)
    found = attended(*guests, masked=True)
    rest = 1 - shares["left"] - shares["right"]
    wanted = 0
    for share, names in ((shares["left"], ["left"]), (shares["right"], ["right"]), (rest, [])):
        mean = share.mean().view(1, 1)
        share = torch.cat([mean.expand(words, 1), share, mean.expand(filled, 1)])
        wanted = wanted + share * attended(*names, "all over")
    assert_close(found, wanted)
    assert (found - attended(*guests)).abs().max() > 0.1
    with pytest.raises(ValueError, match="not the proportions of the picture"):
        masked_shares({"left": torch.ones(2, 9)}, (4, 6), grid)


def split_back(own: torch.Tensor) -> torch.Tensor:
    """(B, H, N, D) -> (B, N, H*D)."""
    return own.transpose(1, 2).flatten(2)
