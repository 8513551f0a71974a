"""Adapters in ComfyUI, without it: on objects with the same names. `make test-comfyui` asks the real one."""

import copy
import json
import sys
import types
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from torch.testing import assert_close

from comcat_diffusion import ComcatConfig, load_adapter, read_adapter, save_adapter
from comcat_diffusion.adapters import looking
from comcat_diffusion.adapters.call import here
from comcat_diffusion.adapters.combine import combine
from comcat_diffusion.adapters.header import AdapterFileError, Notes
from comcat_diffusion.adapters.looking import looks_of, weights_of
from comcat_diffusion.adapters.same_base import difference
from comcat_diffusion.adapters.shrink import shrink
from comcat_diffusion.adapters.trigger import listen
from comcat_diffusion.bases import load_base
from comcat_diffusion.comfy import forge
from comcat_diffusion.comfy.guests import Guests, guests_of
from comcat_diffusion.comfy.load import encode, keep_background, load, regions, save_lora
from comcat_diffusion.comfy.names import fingerprint_of, unet_as_diffusers, unet_names
from comcat_diffusion.comfy.places import PLACES, Called, Drawing
from comcat_diffusion.comfy.quantized import linear_of, rough, rounded
from comcat_diffusion.comfy.seated import seated
from comcat_diffusion.comfy.text import SAID, Said, Tokenizer, joined
from comcat_diffusion.config import BaseSettings
from comcat_diffusion.export.lora import _original_name, export_adapter
from comcat_diffusion.export.spread import shells
from tests.slow import slow

PACK = Path(__file__).parents[1] / "integrations" / "comfyui"
EXAMPLES = {"comcat-api": PACK / "comcat-api.json", "comcat": PACK / "example_workflows" / "comcat.json"}
NOTES = Notes("sks", "a photo of sks teddy", "teddy")


class Attention(nn.Module):
    """ComfyUI's attention, as far as it can be seen from outside."""

    def __init__(self, like: nn.Module) -> None:
        super().__init__()
        self.heads, self.to_q, self.to_k, self.to_v = like.heads, like.to_q, like.to_k, like.to_v
        self.to_out = nn.Sequential(like.to_out[0], nn.Dropout(0.0))

    def forward(self, x, context=None, value=None, mask=None, transformer_options={}):  # noqa: B006 - as ComfyUI's
        context = x if context is None else context
        q, k, v = self.to_q(x), self.to_k(context), self.to_v(context if value is None else value)
        split = lambda t: t.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # by the width that it sees
        mixed = nn.functional.scaled_dot_product_attention(split(q), split(k), split(v))
        return self.to_out(mixed.transpose(1, 2).flatten(2))


def like_a_picture(attention, x):
    """What the attentions of the U-Net are given, (B, 16, C)."""
    scale = 1 + x.flatten(1).mean(1).view(-1, 1, 1)
    width = attention.to_q.in_features if hasattr(attention, "to_q") else 1
    return torch.ones(len(x), 16, width) * torch.linspace(-1, 1, 16)[:, None] * scale


def like_a_map(convolution, x):
    """What the convolutions of the U-Net are given, (B, C, 4, 4)."""
    return like_a_picture(convolution, x)[..., :1].mT.unflatten(-1, (4, 4)).repeat(1, convolution.in_channels, 1, 1)


class UNet(nn.Module):
    """Attentions and convolutions under the original code's names, one after the other."""

    def __init__(self, unet: nn.Module, places: dict[str, str]) -> None:
        super().__init__()
        self.places = places
        for own, name in places.items():
            *path, last = name.split(".")
            here = self
            for step in path:
                if step not in here._modules:
                    here.add_module(step, nn.Module())
                here = here._modules[step]
            here.add_module(last, _seen_by_comfyui(unet, own))

    def forward(self, x, timesteps=None, context=None, transformer_options={}, **kwargs):  # noqa: B006
        assert not kwargs  # what is ours does not come this far
        options = {**transformer_options, "original_shape": [len(x), 4, 4, 4]}
        found = []
        for name in self.places.values():
            attention = self.get_submodule(name)
            if isinstance(attention, Attention):
                hidden = like_a_picture(attention, x)
                own = context if name.endswith("attn2") else None
                found.append(attention(hidden, context=own, transformer_options=options))
        hosts = [self.get_submodule(name) for own, name in self.places.items() if ".conv" in own]
        self.maps = [host(like_a_map(host, x)) for host in hosts]
        self.widths = [one.shape[-1] for one in found]
        return torch.cat(found, dim=-1).movedim(-1, 1).unflatten(-1, (4, 4))  # like a picture's


def _seen_by_comfyui(unet, own):
    if ".attn" in own:
        return Attention(unet.get_submodule(own))
    return copy.deepcopy(unet.get_submodule(own)) if ".conv" in own else nn.Module()


class Model(nn.Module):
    def __init__(self, unet: nn.Module, kind: str = "V_PREDICTION") -> None:
        super().__init__()
        self.diffusion_model, self.model_type = unet, types.SimpleNamespace(name=kind)

    def extra_conds(self, **kwargs):
        return {"c_crossattn": Condition(kwargs["cross_attn"])}


class Condition:
    def __init__(self, cond: torch.Tensor) -> None:
        self.cond = cond


class Patcher:
    """ComfyUI's `ModelPatcher`."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.object_patches, self.backup, self.wrappers = model, {}, {}, {}
        self.load_device = torch.device("cpu")

    def clone(self):
        made = type(self)(self.model)
        made.object_patches, made.backup = dict(self.object_patches), self.backup
        made.wrappers = {key: list(own) for key, own in self.wrappers.items()}
        return made

    def add_wrapper_with_key(self, kind, key, wrapper):
        self.wrappers.setdefault((kind, key), []).append(wrapper)

    def remove_wrappers_with_key(self, kind, key):
        self.wrappers.pop((kind, key), None)

    def add_object_patch(self, name, patch):
        self.object_patches[name] = patch

    def patched(self):
        """The model while ComfyUI draws with this one."""
        for name, patch in self.object_patches.items():
            owner, _, last = name.rpartition(".")
            setattr(self.model.get_submodule(owner), last, patch)
        return self.model

    def unpatch(self):
        for name in self.object_patches:
            owner, _, last = name.rpartition(".")
            vars(self.model.get_submodule(owner)).pop(last, None)


class Clip:
    """ComfyUI's CLIP, over the embedded base's tokenizer: chunks of 16 tokens."""

    def __init__(self, tokenizer) -> None:
        self.tokenizer, self.cond_stage_model = tokenizer, TextModel()
        self.patcher = Patcher(self.cond_stage_model)

    def clone(self):
        made = Clip(self.tokenizer)
        made.patcher, made.cond_stage_model = self.patcher.clone(), self.cond_stage_model
        return made

    def tokenize(self, text):
        return self.tokenizer.tokenize_with_weights(text)

    def encode_from_tokens_scheduled(self, tokens):
        states, pooled, more = self.patcher.patched().encode_token_weights(tokens)
        self.patcher.unpatch()
        return [[states, {"pooled_output": pooled, **more}]]


class TextModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.clip_l = nn.Module()
        self.clip_l.transformer = nn.Module()

    def encode_token_weights(self, tokens):
        count = sum(len(chunk) for chunk in tokens["l"])
        return torch.randn(1, count, 128, generator=torch.Generator().manual_seed(count)), None


class Words:
    """ComfyUI's tokenizer: "(word:1.2)" weighs, chunks are as long as the tokenizer's longest text."""

    def __init__(self, tokenizer) -> None:
        self.clip_l = types.SimpleNamespace(tokenizer=tokenizer)

    def tokenize_with_weights(self, text, return_word_ids=False, **kwargs):
        plain, length, chunks = self.clip_l.tokenizer, 16, []
        weight, tokens = 1.0, []
        for part in text.replace("(", "\0(").replace(")", ")\0").split("\0"):
            weight = float(part.strip("()").rpartition(":")[2]) if part.startswith("(") else 1.0
            inner = part.strip("()").rpartition(":")[0] if part.startswith("(") else part
            tokens += [(token, weight) for token in plain(inner, add_special_tokens=False).input_ids]
        while tokens or not chunks:
            chunk = [(plain.bos_token_id, 1.0), *tokens[: length - 2], (plain.eos_token_id, 1.0)]
            chunks.append(chunk + [(plain.pad_token_id, 1.0)] * (length - len(chunk)))
            tokens = tokens[length - 2 :]
        return {"l": chunks}


@pytest.fixture(scope="module")
def base():
    return load_base("embedded")


@pytest.fixture(scope="module")
def places(base):
    """Where the attentions of the embedded base are in the original code's count, and where its levels end."""
    found, config = {}, base.unet.config
    per_level = config.layers_per_block + 1
    layers = {".conv1": "in_layers.2", ".conv2": "out_layers.3"}
    for name, _ in base.unet.named_modules():
        end = name[-6:]
        if end in (".attn1", ".attn2") or (end in layers and "resnets" in name):
            side, *rest = name.split(".")
            kind = int(end not in layers)  # of a block, which has the two convolutions first
            tail = layers[end] if end in layers else name[name.index("transformer_blocks") :]
            if side == "mid_block":
                found[name] = f"middle_block.{1 if kind else 2 * int(rest[1])}.{tail}"
            else:
                number = per_level * int(rest[0]) + int(rest[2]) + (side == "down_blocks")
                found[name] = f"{'input' if side == 'down_blocks' else 'output'}_blocks.{number}.{kind}.{tail}"
    for level in range(len(config.block_out_channels) - 1):
        found[f"down {level}"] = f"input_blocks.{per_level * (level + 1)}.0.op"
        found[f"up {level}"] = f"output_blocks.{per_level * (level + 1) - 1}.1.conv"
    return found


@pytest.fixture
def model(base, places):
    return Patcher(Model(UNet(base.unet, places)))


@pytest.fixture
def clip(base):
    return Clip(Words(base.tokenizer))


@pytest.fixture(scope="module")
def files(base, tmp_path_factory, randomize):
    """Adapters by name, and what each does to the attentions in diffusers, from the third token on where it waits."""
    folder, found = tmp_path_factory.mktemp("comfy"), {}
    kinds = {
        "tied": {"foldable": True, "tied": True, "trigger": ["sks"]},
        "free": {"trigger": ["ohwx"]},
        "both": {"target_modules": ["attn1", "attn2"]},
        "everywhere": {"foldable": True, "tied": True},
        "cores": {"foldable": True, "cores": True, "trigger": ["sks"]},
        "convolved": {"convolutions": 2, "target_modules": ["attn2"], "trigger": ["sks"]},
        "tied_convolved": {"foldable": True, "tied": True, "convolutions": 2, "trigger": ["sks"]},
        "cores_convolved": {"foldable": True, "cores": True, "convolutions": 2, "trigger": ["sks"]},
    }
    for name, options in kinds.items():
        pipe = load_base("embedded")
        pipe.unet.add_adapter(ComcatConfig(r=2, alpha=3.0, **options), name)
        randomize(pipe.unet, name, 1, std=1.0 if name == "cores" else 0.3)
        found[name] = folder / f"{name}.safetensors"
        save_adapter(pipe, found[name], name, "embedded", NOTES)
        found[name].with_suffix(".pipe").touch()
        found[f"{name} pipe"] = pipe
    return found


def outputs(patcher, texts, clip, **options):
    """What the attentions give for a batch of texts, one after the other, as ComfyUI makes them."""
    conditions = [encode(clip, text)[0] for text in texts]
    model, acts = patcher.patched(), {}
    made = [model.extra_conds(cross_attn=s, prompt_type="positive", **more) for s, more in conditions]
    if SAID in made[0]:
        acts = {SAID: torch.cat([one[SAID].cond for one in made])}
    states = torch.cat([states for states, _ in conditions])
    found = model.diffusion_model(torch.zeros(len(texts), 4, 4, 4), context=states, transformer_options=options, **acts)
    patcher.unpatch()
    by_attention = found.flatten(2).movedim(1, -1).split(model.diffusion_model.widths, dim=-1)
    return torch.cat([one.flatten(1) for one in by_attention], dim=1)


class Guider:
    """ComfyUI's guider and sampler: a step is what is predicted of each conditioning, and the latents go on from it."""

    def __init__(self, patcher, positive, clip, schedules, together=True, follow=None):
        self.model_patcher, self.schedules, self.together, self.follow = patcher, iter(schedules), together, follow
        self.model_options, self.passes = {"transformer_options": {}}, []
        texts = {"positive": positive, "negative": ["a ball"]}
        made = {kind: [encode(clip, text)[0] for text in own] for kind, own in texts.items()}
        self.conds = {
            kind: [{**more, "cross_attn": states, "uuid": f"{kind} {n}"} for n, (states, more) in enumerate(own)]
            for kind, own in made.items()
        }

    def sample(self, count=2):
        """The predictions and latents of every step of all times that it was taken."""
        torch.manual_seed(3)
        noise = torch.randn(count, 4, 4, 4, generator=torch.Generator().manual_seed(1))
        around = [wrapper for own in self.model_patcher.wrappers.values() for wrapper in own]
        assert len(around) < 2
        Executor = type("Executor", (), {"class_obj": self, "__call__": lambda _, *given: self.outer_sample(*given)})
        found = around[0](Executor(), noise) if around else self.outer_sample(noise)
        assert self.model_options == {"transformer_options": {}} and found is self.passes[-1]
        return self.passes

    def outer_sample(self, noise):
        model, x, steps = self.model_patcher.patched(), noise, []
        for kind, own in self.conds.items():
            assert all("model_conds" not in one for one in own)
            self.conds[kind] = [
                one | {"model_conds": model.extra_conds(prompt_type=kind, **one)} for one in own
            ]  # as the real one does
        chunks = [(n, one) for n, own in enumerate(self.conds.values()) for one in own]
        try:
            for number, sigma in enumerate(next(self.schedules)):
                x = x if self.follow is None else self.follow[number]["x"]
                found, groups = {}, [chunks] if self.together else [[one] for one in chunks[:: -1 + 2 * (number % 2)]]
                for group in groups:
                    found |= self.predicted(model.diffusion_model, group, x, sigma)
                steps.append({"x": x, "noise": torch.randn(1), **found})
                x = x * 0.9 + sigma * 0.2 * steps[-1]["noise"] + found["positive 0"].mean(1, keepdim=True)
        finally:
            self.model_patcher.unpatch()
        self.passes.append(steps)
        return steps

    def predicted(self, unet, group, x, sigma):
        cat = lambda key: torch.cat([one["model_conds"][key].cond.expand(len(x), -1, -1) for _, one in group])
        options = {"uuids": [one["uuid"] for _, one in group], "cond_or_uncond": [n for n, _ in group]}
        options |= {"sigmas": torch.full((len(x),), sigma), **self.model_options["transformer_options"]}
        acts = {SAID: cat(SAID)} if SAID in group[0][1]["model_conds"] else {}
        many = torch.cat([x] * len(group))
        made = unet(many, context=cat("c_crossattn"), transformer_options=options, **acts)
        return dict(zip(options["uuids"], made.split(len(x)), strict=True))


def by_diffusers(files, name, places, states, said):
    """The same by the adapter's own layers; `said` are the prompts."""
    pipe, found = files[f"{name} pipe"], []
    listen(pipe)
    if hasattr(pipe, "comcat_gate"):
        pipe.comcat_gate.tell(states, said)
    for own in places:
        if ".attn" in own:
            attention = pipe.unet.get_submodule(own)
            hidden = torch.ones(len(states), 16, attention.to_q.in_features) * torch.linspace(-1, 1, 16)[:, None]
            crossed = {"encoder_hidden_states": states} if own.endswith("attn2") else {}
            found.append(attention(hidden, **crossed).flatten(1))
    here.heard = here.next = None
    return torch.cat(found, dim=1)


@torch.no_grad()
@pytest.mark.parametrize("name", ["tied", "free", "both", "cores"])
def test_attentions_do_what_they_do_in_diffusers_each_row_from_its_trigger_on(name, files, model, clip, places):
    texts = ["a photo of sks teddy, ohwx cat", "a photo of a ball"]
    base = outputs(model, texts, clip)
    made, heard, header = load(model, clip, files[name])
    states = torch.cat([encode(clip, text)[0][0] for text in texts])
    expected = by_diffusers({**files}, name, _no_attn1(places, name), states, texts)
    found = outputs(made, texts, heard)
    assert bool(header.config["unet"].get("core_sets")) == (name == "cores")  # directions by other fixed vectors
    if name != "both":  # the second lacks the trigger; a free adapter widens the heads of all rows of a batch
        assert_close(found[1], base[1], rtol=0, atol=1e-6 if name == "free" else 0)
    kept = [n for n in places if ".attn" in n]
    widths = [16 * files["tied pipe"].unet.get_submodule(n).to_q.in_features for n in kept]
    chosen = torch.cat(
        [p for n, p in zip(kept, found.split(widths, 1), strict=True) if n in _no_attn1(places, name)], 1
    )
    assert_close(chosen, expected, rtol=1e-5, atol=1e-5)
    assert (found - base).abs().max() > 0.05 and header.notes == NOTES
    assert not model.object_patches and torch.equal(outputs(model, texts, clip), base)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["convolved", "packed", "tied_convolved", "cores_convolved"])
def test_terms_beside_convolutions_do_what_they_do_in_diffusers(kind, files, model, clip, places, tmp_path):
    """Row by row from the trigger on, at their strength, where a mask is white; nothing stays on the model."""
    texts, unet = ["a photo of sks teddy", "a photo of a ball"], model.model.diffusion_model
    file = files["convolved" if kind == "packed" else kind]
    if kind == "packed":
        shrink(file, tmp_path / "small.safetensors", 12_000)
        file = tmp_path / "small.safetensors"
    outputs(model, texts, clip)
    before = unet.maps
    loaded, heard, _ = load(model, clip, file, 0.5)
    left = torch.zeros(8, 8)
    left[:, :4] = 1
    placed = regions(loaded, [(file.stem, left)])
    outputs(loaded, texts, heard)
    found, pipe = unet.maps, load_base("embedded")
    outputs(placed, texts, heard)
    inside = unet.maps
    load_adapter(pipe, file, "x")
    pipe.unet.set_adapters(["x"], [0.5])
    states = torch.cat([encode(heard, text)[0][0] for text in texts])
    pipe.comcat_gate.tell(states, texts)
    hosts = [pipe.unet.get_submodule(own) for own in places if ".conv" in own]
    expected = [host(like_a_map(host, torch.zeros(2, 4, 4, 4))) for host in hosts]
    here.heard = here.next = None
    assert len(found) == len(hosts) > 20
    for was, own, part, wanted in zip(before, found, inside, expected, strict=True):
        assert_close(own, wanted, rtol=1e-5, atol=1e-5)
        assert torch.equal(own[1], was[1]) and torch.equal(part[1], was[1])
        half = own.shape[-1] // 2
        if own.shape[-1] == 4:
            assert_close(part[..., :half], own[..., :half], rtol=1e-5, atol=1e-5)
            assert torch.equal(part[..., half:], was[..., half:])
    assert max(float((own - was).abs().max()) for own, was in zip(found, before, strict=True)) > 0.05
    outputs(model, texts, clip)
    assert all(map(torch.equal, unet.maps, before))


def _no_attn1(places, name):
    return [own for own in places if ".attn" in own and (name == "both" or own.endswith("attn2"))]


@torch.no_grad()
def test_several_chain_and_a_strength_of_zero_is_the_base(files, model, clip):
    texts = ["a photo of sks teddy, ohwx cat"]
    base = outputs(model, texts, clip)
    one, heard, _ = load(model, clip, files["tied"], 0.5)
    two, heard, _ = load(one, heard, files["free"], 0.7)
    swapped = load(*load(model, clip, files["free"], 0.7)[:2], files["tied"], 0.5)[0]
    assert_close(outputs(two, texts, heard), outputs(swapped, texts, heard), rtol=1e-5, atol=1e-5)
    assert [guest.name for guest in guests_of(two).all] == ["tied", "free"] and len(guests_of(one).all) == 1
    assert torch.equal(outputs(load(model, clip, files["tied"], 0.0)[0], texts, heard), base)
    with pytest.raises(ValueError, match=r"tied\.safetensors is loaded by another node already"):
        load(two, heard, files["tied"])


@torch.no_grad()
@pytest.mark.parametrize("packed", [False, True])
def test_several_subjects_in_one_file_are_several_files(packed, files, model, clip, tmp_path, randomize):
    pipe = load_base("embedded")
    pipe.unet.add_adapter(ComcatConfig(r=3, foldable=True, tied=True, trigger=["ohwx"]), "other")
    randomize(pipe.unet, "other", 7, std=0.3)
    save_adapter(pipe, tmp_path / "other.safetensors", "other", "embedded", NOTES)
    other = tmp_path / "other.safetensors"
    if packed:
        shrink(other, tmp_path / "small.safetensors", 5_000)
        other = tmp_path / "small.safetensors"
    combine([(files["tied"], 1.0), (other, 0.5)], tmp_path / "both.safetensors", dtype=torch.float32)
    assert bool(read_adapter(tmp_path / "both.safetensors").pieces) == packed
    one, heard, _ = load(*load(model, clip, files["tied"])[:2], other, 0.5)
    made, _, _ = load(model, clip, tmp_path / "both.safetensors")
    texts = ["a photo of sks teddy", "a photo of ohwx cat", "an ohwx cat, sks teddy", "a ball"]
    found, expected = outputs(made, texts, heard), outputs(one, texts, heard)
    assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert (found - outputs(model, texts, heard)).abs().amax(dim=1).gt(0.05).tolist() == [True, True, True, False]


@torch.no_grad()
@pytest.mark.parametrize("packed", [False, slow(True)])
def test_terms_of_several_subjects_wait_for_words_of_their_own(packed, files, model, clip, tmp_path, randomize):
    pipe, unet = load_base("embedded"), model.model.diffusion_model
    beside = {
        "convolutions": 1,
        "convolution_ranks": {"mid_block.resnets.0.conv1": 1, "up_blocks.0.resnets.0.conv2": 2},
    }
    pipe.unet.add_adapter(ComcatConfig(r=3, target_modules=["attn2"], trigger=["ohwx"], **beside), "other")
    randomize(pipe.unet, "other", 7, std=0.3)
    ones = [files["convolved"], tmp_path / "other.safetensors"]
    save_adapter(pipe, ones[1], "other", "embedded", NOTES)
    if packed:
        for number, (one, small) in enumerate(zip(ones, (14_000, 9_000), strict=True)):
            shrink(one, tmp_path / f"{number}.safetensors", small)
            ones[number] = tmp_path / f"{number}.safetensors"
    combine([(ones[0], 1.0), (ones[1], 0.5)], tmp_path / "both.safetensors", dtype=torch.float32)
    one, heard, _ = load(*load(model, clip, ones[0])[:2], ones[1], 0.5)
    made, _, _ = load(model, clip, tmp_path / "both.safetensors")
    texts = ["a photo of sks teddy", "a photo of ohwx cat", "an ohwx cat, sks teddy", "a ball"]
    maps = []
    for patcher in (made, one, model):
        outputs(patcher, texts, heard)
        maps.append(torch.cat([own.flatten(1) for own in unet.maps], dim=1))
    found, expected, base = maps
    assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert (found - base).abs().amax(dim=1).gt(0.01).tolist() == [True, True, True, False]
    assert torch.equal(found[3], base[3])


STEPS = [[3.0, 2.0, 1.0]] * 2  # sigmas, both times
ASKS, NONE = "a photo of sks teddy, ohwx cat", "a blue ball"  # begin, a, photo, of, sks, teddy


@torch.no_grad()
@pytest.mark.parametrize("together", [True, False])
def test_a_background_is_that_of_the_bases_own_picture(files, model, clip, monkeypatch, together):
    """Each conditioning is mixed with what the base predicted of it, also where they come one by one, in any order."""
    for name, value in (("LOW", 0.4), ("HIGH", 0.7)):  # of places that are no picture's
        monkeypatch.setattr(looking, name, value)
    loaded, heard, _ = load(model, clip, files["tied"])
    alone, found = Guider(keep_background(loaded), [ASKS, NONE], heard, STEPS, together).sample()
    (base,) = Guider(model, [ASKS, NONE], heard, STEPS).sample()
    (everywhere,) = Guider(loaded, [ASKS, NONE], heard, STEPS, follow=found).sample()
    unet = model.model.diffusion_model
    names = [name for name in unet_names(unet).values() if name.endswith("attn2") and name.startswith("output_blocks")]
    states, of_words = encode(heard, ASKS)[0][0].expand(2, -1, -1), torch.zeros(2, 16)
    of_words[:, 4:6], seen = 1, []
    for step in base:
        for attention in map(unet.get_submodule, names):
            query = attention.to_q(like_a_picture(attention, step["x"]))
            seen.append(looks_of(query, attention.to_k(states), attention.heads, of_words, (4, 4)))
    seen = torch.stack(seen).mean(0)
    least, most = seen.amin((1, 2, 3), keepdim=True), seen.amax((1, 2, 3), keepdim=True)
    weights = weights_of((seen - least) / (most - least))
    assert (weights == 0).any() and (weights == 1).any()
    for before, own, made, then in zip(base, alone, found, everywhere, strict=True):
        for key in before:
            assert_close(own[key], before[key], rtol=1e-5, atol=1e-5)
            if key != "x":  # the noise is that of all
                assert_close(
                    made[key],
                    torch.lerp(own[key], then[key], weights if made[key].ndim > 1 else 0),
                    rtol=1e-5,
                    atol=1e-5,
                )
    assert (found[0]["positive 0"] - base[0]["positive 0"]).abs().max() > 0.05
    assert (found[2]["negative 0"] - base[2]["negative 0"]).abs().max() > 1e-3  # of a picture that has changed
    (off,) = Guider(keep_background(keep_background(loaded), keep=False), [ASKS], heard, STEPS).sample()
    (as_ever,) = Guider(loaded, [ASKS], heard, STEPS).sample()
    assert_close(off, as_ever, rtol=0, atol=0)


@torch.no_grad()
@pytest.mark.parametrize("said", ["a photo of sks teddy", "a ball"])
def test_nothing_is_drawn_twice_where_no_prompt_asks_for_a_background(files, model, clip, said):
    loaded, heard, _ = load(model, clip, files["tied"])
    once = Guider(keep_background(loaded), [said], heard, STEPS).sample()
    assert_close(once, Guider(loaded, [said], heard, STEPS).sample(), rtol=0, atol=0)


@torch.no_grad()
def test_a_background_that_cannot_be_kept_is_told_of(files, model, clip):
    with pytest.raises(ValueError, match="no COMCAT adapter whose background"):
        keep_background(model)
    loaded, heard, _ = load(model, clip, files["tied"])
    kept = keep_background(loaded)
    adaptive = Guider(kept, [ASKS], heard, [[3.0, 2.0], [3.0, 1.9]])
    with pytest.raises(ValueError, match="takes other steps than without"):
        adaptive.sample()
    assert adaptive.model_options == {"transformer_options": {}}  # nothing stays
    with pytest.raises(ValueError, match="needs ComfyUI's own sampling"):
        outputs(kept, [ASKS], heard)
    with pytest.raises(ValueError, match="has no place to ask for that"):
        keep_background(types.SimpleNamespace(object_patches=loaded.object_patches))  # a patcher like Forge's


def test_areas_of_a_picture_have_places_of_their_own():
    drawing, at = Drawing(1, (4, 4)), torch.arange(8.0).view(1, 1, 2, 4)
    called = {"dog": Called(torch.ones(2, 3), torch.zeros(2, dtype=torch.bool))}

    def run(side, value, options):
        if side == 2 and options[PLACES].at is None:
            options[PLACES].seen["dog"] = [torch.cat([at, at.flip(-1)])]
        return torch.full((2, 4, side, 4), value)

    def step(side, ids, value):
        options = {"uuids": ids, "cond_or_uncond": [0, 0], "sigmas": torch.ones(1)}
        own = called if side == 2 else {}
        return drawing.step(torch.zeros(2, 4, side, 4), options, own, lambda options: run(side, value, options))

    step(2, "ab", 1.0), step(4, "cd", 1.0)
    drawing.place()
    left, right = step(2, "ab", 3.0)
    assert_close(left[0], 1 + 2 * weights_of(at / 7)[0, 0])
    assert torch.equal(right, left.flip(-1)) and step(4, "cd", 3.0).eq(3).all()
    with pytest.raises(ValueError, match="parts of a batch"):
        drawing.step(torch.zeros(1, 4, 4, 4), {"uuids": "ab"}, {}, None)


@torch.no_grad()
def test_each_acts_where_its_mask_is_white(files, model, clip):
    texts = ["a photo of sks teddy, ohwx cat"]
    made, heard, _ = load(*load(model, clip, files["tied"])[:2], files["free"])
    left = torch.zeros(8, 8)
    left[:, :4] = 1
    placed = regions(made, [("tied", left), ("free", 1 - left)])
    alone = [outputs(load(model, clip, files[name])[0], texts, heard) for name in ("tied", "free")]
    found = outputs(placed, texts, heard)
    unet = model.model.diffusion_model
    width = unet.get_submodule(list(unet_names(unet).values())[-1]).to_q.in_features
    grid = lambda t: t[0, -16 * width :].view(4, 4, width)  # of the last attention, an attn2
    assert_close(grid(found)[:, :2], grid(alone[0])[:, :2]), assert_close(grid(found)[:, 2:], grid(alone[1])[:, 2:])
    with pytest.raises(ValueError, match="no adapter 'dog' to give a region; loaded: tied, free"):
        regions(made, [("dog", left)])
    with pytest.raises(ValueError, match="not the proportions of the picture"):
        outputs(regions(made, [("tied", torch.ones(8, 16))]), texts, heard)
    assert guests_of(made).masks == {}


def test_a_lora_that_stands_in_the_weights_is_not_taken_for_another_base(files, model, clip):
    name = next(n for n in unet_names(model.model.diffusion_model).values() if n.endswith("attn2"))
    keys = model.model.diffusion_model.get_submodule(name).to_k
    before = keys.weight.data
    try:
        keys.weight.data = before + 1
        with pytest.raises(AdapterFileError, match="trained on 'embedded' and does not fit 'the model of this node'"):
            load(model, clip, files["tied"])
        model.backup[f"diffusion_model.{name}.to_k.weight"] = types.SimpleNamespace(weight=before)
        load(model, clip, files["tied"])
        assert load(Patcher(model.model), clip, files["tied"], any_weights=True)
    finally:
        keys.weight.data = before


@torch.no_grad()
def test_what_would_be_silent_is_an_error(files, model, clip):
    made, heard, _ = load(model, clip, files["tied"])
    states, said = encode(heard, "a photo of sks teddy")[0]
    conditions = made.object_patches["extra_conds"]
    with pytest.raises(ValueError, match="does not say what it was made of.*'sks'"):
        conditions(cross_attn=states)
    with pytest.raises(ValueError, match="has 32 tokens and its text 16"):
        conditions(cross_attn=torch.cat([states, states], 1), **said)
    with pytest.raises(ValueError, match=r"replaces the attentions \(attn2\)"):
        outputs(made, ["sks"], heard, patches_replace={"attn2": {("input", 1): 1}})
    taken = Patcher(model.model)
    taken.add_object_patch(next(name for name in made.object_patches if ".attn2" in name), print)
    with pytest.raises(ValueError, match="Another node has changed"):
        load(taken, clip, files["tied"])
    plain = Patcher(Model(nn.Linear(2, 2)))
    with pytest.raises(ValueError, match="is no U-Net of Stable Diffusion"):
        load(plain, clip, files["tied"])
    velocity = Patcher(Model(model.model.diffusion_model, "EPS"))
    with pytest.raises(AdapterFileError, match="another prediction type"):
        load(velocity, clip, files["tied"])
    velocity.add_object_patch("model_sampling", type("V_PREDICTION", (), {})())  # by a sampling node
    load(velocity, clip, files["tied"])


def test_a_prompt_without_the_trigger_is_told_of(files, model, clip, caplog):
    made, heard, _ = load(model, clip, files["tied"])
    outputs(made, ["a photo of a ball"], heard)
    assert "the prompt lacks 'sks'" in caplog.text


def test_other_packs_keep_their_patches(files, model, clip):
    foreign = lambda **kwargs: {"c_crossattn": Condition(kwargs["cross_attn"]), "theirs": 1}
    model.add_object_patch("extra_conds", foreign)
    made, heard, _ = load(model, clip, files["tied"])
    states, said = encode(heard, "sks")[0]
    assert made.object_patches["extra_conds"](cross_attn=states, **said)["theirs"] == 1
    bare = seated(made, Guests())
    assert bare.object_patches["extra_conds"].before is foreign


# Text


@pytest.mark.parametrize(
    ("text", "first"),
    [
        ("a photo of sks teddy", 4),
        ("a photo of (sks:1.2) teddy", 4),
        ("(a photo of:0.5) sks teddy", 4),
        ("sks teddy", 1),
        ("a ball", None),
    ],
)
def test_an_adapter_acts_from_its_word_on(base, text, first):
    plain, tokenizer = base.tokenizer, Tokenizer(Words(base.tokenizer), {})
    acts = tokenizer.tokenize_with_weights(text).said.acts(["sks"])
    words = [text for text in plain.convert_ids_to_tokens(plain("a photo of").input_ids)]
    first = len(words) - 1 if first == 4 else first  # a small vocabulary may read a word as several tokens
    assert acts.tolist() == [first is not None and n >= first for n in range(16)]


def test_chunks_act_by_themselves(base):
    tokenizer = Tokenizer(Words(base.tokenizer), {})
    parts = [tokenizer.tokenize_with_weights(text) for text in ("a ball", "big sks teddy", "white")]
    acts = joined(parts).said.acts(["sks"]).view(3, 16)
    assert not acts[0].any() and not acts[2].any() and torch.equal(acts[1], parts[1].said.acts(["sks"]))


@pytest.mark.parametrize(("text", "heard"), [("masks", False), ("sks1", False), ("a,sks,b", True), ("SKS", True)])
def test_a_trigger_is_a_word_here_too(text, heard):
    said = Said(text, ((0, *range(1, len(text) + 1)),))
    assert bool(said.acts(["sks"]).any()) == heard


def test_a_new_word_is_its_vectors_and_a_word_to_its_adapter(base):
    vectors = torch.randn(2, 128)
    tokenizer = Tokenizer(Tokenizer(Words(base.tokenizer), {}), {"<dog>": {"text_encoder": vectors}})
    tokens = tokenizer.tokenize_with_weights("a (<dog>:1.2) on <dog>")
    found = [(number, *one) for number, one in enumerate(tokens["l"][0]) if not isinstance(one[0], int)]
    assert len(found) == 4 and [one[2] for one in found] == [1.2, 1.2, 1.0, 1.0]
    assert all(torch.equal(one[1], vectors[n % 2]) for n, one in enumerate(found))
    acts = tokens.said.acts(["<dog>"])
    assert acts.tolist() == [n >= found[0][0] for n in range(16)]
    with pytest.raises(ValueError, match="has no embeddings for one of the text encoders"):
        Tokenizer(Words(base.tokenizer), {"<dog>": {}} | {"<cat>": {"text_encoder_2": vectors}}).tokenize_with_weights(
            "<cat>"
        )


@torch.no_grad()
def test_the_last_layer_of_open_clip_h_is_in_comfyui_alone(base, model, clip, tmp_path, randomize):
    """Nobody reads its states, so diffusers' copies of Stable Diffusion 2.x come without it, and so do adapters."""
    pipe = load_base("embedded")
    pipe.text_encoder.add_adapter(ComcatConfig(r=1, foldable=True), "x")
    randomize(pipe.text_encoder, "x", 1)
    save_adapter(pipe, tmp_path / "x.safetensors", "x", "embedded")
    layers = nn.ModuleList(copy.deepcopy(base.text_encoder).encoder.layers)
    layers.append(copy.deepcopy(layers[-1]))
    for layer in layers:
        layer.self_attn.heads = layer.self_attn.num_heads
    del clip.cond_stage_model.clip_l
    root = clip.cond_stage_model.clip_h = nn.Module()
    root.transformer = nn.Module()
    root.transformer.text_model = nn.Module()
    root.transformer.text_model.encoder = nn.Module()
    root.transformer.text_model.encoder.layers = layers
    _, heard, _ = load(model, clip, tmp_path / "x.safetensors")
    (guest,) = guests_of(heard.patcher).all
    where = "clip_h.transformer.text_model.encoder.layers"
    assert list(guest.factors) == [f"{where}.{number}.self_attn" for number in range(len(layers) - 1)]


@torch.no_grad()
def test_names_of_text_encoders_are_those_of_the_file(base, model, clip, tmp_path, randomize):
    """transformers' classes with a projection, as XL's second, have all within `text_model`; others, by version."""
    pipe = load_base("embedded")
    pipe.text_encoder.add_adapter(ComcatConfig(r=1, foldable=True), "x")
    randomize(pipe.text_encoder, "x", 1)
    header = save_adapter(pipe, tmp_path / "x.safetensors", "x", "embedded")
    tensors = {f"text_encoder.text_model.{name.removeprefix('text_encoder.')}": tensor
               for name, tensor in load_file(tmp_path / "x.safetensors").items()}  # fmt: skip
    save_file(tensors, tmp_path / "within.safetensors", header.metadata())
    layers = copy.deepcopy(base.text_encoder).encoder.layers
    for layer in layers:
        layer.self_attn.heads = layer.self_attn.num_heads
    root = clip.cond_stage_model.clip_l.transformer.text_model = nn.Module()
    root.encoder = nn.Module()
    root.encoder.layers = layers
    guests = [
        guests_of(load(model, clip, tmp_path / f"{name}.safetensors")[1].patcher).all[0] for name in ("x", "within")
    ]
    shrink(tmp_path / "within.safetensors", tmp_path / "packed.safetensors", 100_000)
    (packed,) = guests_of(load(model, clip, tmp_path / "packed.safetensors")[1].patcher).all
    assert [*packed.factors] == [*guests[1].factors]
    where = "clip_l.transformer.text_model.encoder.layers"
    assert [*guests[0].factors] == [*guests[1].factors] == [f"{where}.{n}.self_attn" for n in range(len(layers))]
    for factors in zip(*(guest.factors.values() for guest in guests), strict=True):
        one, other = ({name: factor.weight for name, factor in own.items()} for own in factors)
        assert_close(one, other, rtol=0, atol=0)


# Names


@pytest.mark.parametrize("kind", ["1.5", "XL"])
def test_blocks_are_counted_as_the_original_code_does(kind):
    """Three blocks are a level in both; export/lora.py names those of XL for loaders that know them by these names."""
    xl = {
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 10),
    }
    widths = (32, 64, 64) if kind == "XL" else (32, 64, 64, 64)
    with torch.device("meta"):
        unet = UNet2DConditionModel(cross_attention_dim=768, block_out_channels=widths, **(xl if kind == "XL" else {}))
    names = [name for name, _ in unet.named_modules() if name.endswith((".attn1", ".attn2"))]
    expected = {name: _original_name(name) for name in names}
    levels = len(widths) - 1
    ends = {f"d{n}": f"input_blocks.{3 * (n + 1)}.0.op" for n in range(levels)}
    first = 2 if kind == "XL" else 1  # where the level has attentions, the block that doubles stands behind them
    ends |= {f"u{n}": f"output_blocks.{3 * n + 2}.{first if n == 0 else 2}.conv" for n in range(levels)}
    assert list(unet_names(UNet(unet, expected | ends)).items()) == list(expected.items())
    assert len(expected) == {"1.5": 32, "XL": 140}[kind]


def test_an_adapter_that_acts_everywhere_is_saved_as_a_lora(files, model, tmp_path):
    with pytest.raises(AdapterFileError, match="acts from 'sks' on"):
        save_lora(model, files["tied"], tmp_path / "lora.safetensors")
    (made,) = save_lora(model, files["everywhere"], tmp_path / "lora.safetensors")
    models = shells(BaseSettings(), read_adapter(files["everywhere"]), "x")
    export_adapter(files["everywhere"], tmp_path / "same.safetensors", models=models)
    ours, same = load_file(made), load_file(tmp_path / "same.safetensors")
    assert ours.keys() == same.keys() and all(torch.equal(ours[name], same[name]) for name in same)


def test_eight_bits_of_the_base_are_the_base(base, files, model):
    trained = read_adapter(files["tied"]).fingerprint
    shell = unet_as_diffusers(model)
    for module in shell.modules():
        if getattr(module, "to_k", None) is not None:
            module.to_k = linear_of(module.to_k.weight.detach().to(torch.float8_e4m3fn))
    eight = rough(torch.zeros(1, dtype=torch.float8_e4m3fn))
    found = fingerprint_of(shell, "v_prediction")
    assert difference(trained, rounded(found, trained, eight)) is None
    other = {**trained, "sketch": [value + 0.05 for value in trained["sketch"]]}
    assert difference(other, rounded(found, other, eight)) == "it has the same shape but other weights"


@torch.no_grad()
def test_cores_are_of_the_weights_without_loras_and_of_none_of_8_bits(files, model, clip):
    texts = ["a photo of sks teddy"]
    made, heard, _ = load(model, clip, files["cores"])
    expected = outputs(made, texts, heard)
    unet, changed = model.model.diffusion_model, {}
    for name in unet_names(unet).values():
        for projection in ("to_k", "to_v"):
            weight = unet.get_submodule(f"{name}.{projection}").weight
            changed[weight] = weight.data
            model.backup[f"diffusion_model.{name}.{projection}.weight"] = types.SimpleNamespace(weight=weight.data)
            weight.data = weight.data + torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)) * 0.1
    again, heard, _ = load(model, clip, files["cores"])
    for weight, before in changed.items():
        weight.data = before
    assert torch.equal(outputs(again, texts, heard), expected)
    model.backup.clear()
    for weight in changed:
        weight.data = weight.data.to(torch.float8_e4m3fn)
    try:
        with pytest.raises(ValueError, match="and here these are quantized"):
            load(model, clip, files["cores"])
    finally:
        for weight, before in changed.items():
            weight.data = before


# Forge


class Condition77(Condition):
    """Forge's condition of text states."""


@torch.no_grad()
def test_forge_s_conditionings_say_what_they_are_of(files, model, base, tmp_path):
    plain, states = base.tokenizer, torch.randn(2, 77, 128)
    chunk = types.SimpleNamespace(
        tokens=[plain.bos_token_id, *plain("a sks teddy", add_special_tokens=False).input_ids]
    )
    chunk.tokens += [plain.eos_token_id] * (77 - len(chunk.tokens))
    text = types.SimpleNamespace(tokenizer=plain, tokenize_line=lambda line: ([chunk], 3))
    engine = types.SimpleNamespace(text_processing_engine=text, get_learned_conditioning=lambda prompts: states)
    memory = forge.listen(engine)
    assert forge.listen(engine) is memory and engine.get_learned_conditioning(["a sks teddy", "a ball"]) is states
    patcher = Patcher(model.model)
    patcher.model_options = {"conditioning_modifiers": [print]}
    patcher.clone = lambda: _with_options(patcher)
    made, header = forge.load(patcher, memory, files["tied"])
    assert header.notes == NOTES and "extra_conds" in made.object_patches  # the stub's model has ComfyUI's too
    first, telling = made.model_options["conditioning_modifiers"]
    assert first is print and patcher.model_options == {"conditioning_modifiers": [print]}
    cond = [{"cross_attn": states, "model_conds": {"c_crossattn": Condition77(states)}}]
    told = telling(1, 2, 3, [], cond, 7.0, {}, 0)
    assert told == (1, 2, 3, [], cond, 7.0, {}, 0)
    acts = cond[0]["model_conds"][SAID].cond[..., 0].bool()
    word = len(plain("a").input_ids) - 1
    assert acts[0].tolist() == [n >= word for n in range(77)] and not acts[1].any()
    assert telling(1, 2, 3, None, cond, 1.0, {}, 0)[3] is None  # without guidance, as in the second pass of a hires fix
    with pytest.raises(ValueError, match="does not know the prompt of these text states"):
        telling(1, 2, 3, [], [{"cross_attn": states + 1, "model_conds": {"c_crossattn": Condition77(states)}}])
    with pytest.raises(ValueError, match="nothing is drawn"):
        forge.refuse(patcher, ValueError("nothing is drawn")).model_options["conditioning_modifiers"][0]()
    pipe = load_base("embedded")
    pipe.text_encoder.add_adapter(ComcatConfig(r=1), "x"), pipe.unet.add_adapter(ComcatConfig(r=1), "x")
    save_adapter(pipe, tmp_path / "text.safetensors", "x", "embedded")
    with pytest.raises(AdapterFileError, match="also adapts text_encoder, which this extension"):
        forge.load(patcher, memory, tmp_path / "text.safetensors")


def _with_options(patcher):
    made = Patcher(patcher.model)
    made.object_patches, made.backup = dict(patcher.object_patches), patcher.backup
    made.model_options = copy.deepcopy(patcher.model_options)
    return made


# The pack


def test_the_nodes_in_both_forms_and_the_example(monkeypatch, tmp_path):
    paths = types.ModuleType("folder_paths")
    paths.models_dir, paths.folder_names_and_paths = str(tmp_path), {}
    paths.get_folder_paths = lambda kind: [str(tmp_path / kind)]
    paths.add_model_folder_path = lambda kind, path: paths.folder_names_and_paths.setdefault(kind, ([], set()))[
        0
    ].append(path)
    paths.get_filename_list = lambda kind: ["dog.safetensors"]
    monkeypatch.setitem(sys.modules, "folder_paths", paths)
    monkeypatch.syspath_prepend(str(PACK.parent))
    import comfyui

    nodes = comfyui.NODE_CLASS_MAPPINGS
    assert comfyui.NODE_DISPLAY_NAME_MAPPINGS["ComcatLoadAdapter"] == "Load COMCAT adapter" and len(nodes) == 5
    for node in nodes.values():
        inputs = node.INPUT_TYPES()
        names = {name for fields in inputs.values() for name in fields}
        assert {*node.run.__code__.co_varnames[1 : node.run.__code__.co_argcount]} <= names
    for name, file in EXAMPLES.items():
        content = json.loads(file.read_text())
        kinds = {node["class_type"] for node in content.values()} if name == "comcat-api" else {
            node["type"] for node in content["nodes"]}  # fmt: skip
        assert {"ComcatLoadAdapter", "ComcatTextEncode", "ComcatKeepBackground"} <= kinds
        assert all(kind in nodes for kind in kinds if kind.startswith("Comcat"))
    with pytest.raises(ValueError, match="is no name of a file"):
        nodes["ComcatSaveLora"]().run(None, "dog.safetensors", "../dog")


def test_the_example_of_the_editor_is_that_of_the_api():
    api, editor = (json.loads(EXAMPLES[name].read_text()) for name in ("comcat-api", "comcat"))
    kinds = {str(node["id"]): node["type"] for node in editor["nodes"]}
    assert kinds == {name: node["class_type"] for name, node in api.items()}
    found, links = {}, {number: (*places, kind) for number, *places, kind in editor["links"]}
    for node in editor["nodes"]:
        for place, entry in enumerate(node["inputs"]):
            source, output, target, there, kind = links[entry["link"]]
            assert (target, there, kind) == (node["id"], place, entry["type"])
            found[str(node["id"]), entry["name"]] = [str(source), output]
        for place, entry in enumerate(node["outputs"]):
            assert sorted(entry["links"]) == sorted(n for n, link in links.items() if link[:2] == (node["id"], place))
    wires = {(n, name): value for n, node in api.items() for name, value in node["inputs"].items()}
    assert found == {where: value for where, value in wires.items() if isinstance(value, list)}


def test_the_picture_has_the_workflow_inside():
    with Image.open(PACK / "example_workflows" / "comcat.png") as picture:
        for key, name in (("workflow", "comcat"), ("prompt", "comcat-api")):
            assert json.loads(picture.text[key]) == json.loads(EXAMPLES[name].read_text())


def test_a_damaged_file_is_told_of_before_anything_is_read_of_it(files, model, clip, tmp_path):
    (tmp_path / "cut.safetensors").write_bytes(files["tied"].read_bytes()[:5000])
    with pytest.raises(AdapterFileError, match="is damaged or cut short"):
        load(model, clip, tmp_path / "cut.safetensors")
