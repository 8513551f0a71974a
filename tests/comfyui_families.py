"""The newer families' part of `make test-comfyui`: what the real ComfyUI draws on their transformers, with adapters.

Transformers are loaded by ComfyUI's own loader; text encoders are made small by a node of this test, and their states
are given to diffusers too, so that what is compared is the drawing, and where in a text each adapter acts, which
diffusers tells by its own tokenizers.
"""

from __future__ import annotations

import inspect
import itertools
import os
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import safetensors.torch
import torch
from diffusers import AutoencoderKLQwenImage, DiffusionPipeline

from comcat_diffusion import ComcatConfig, keep_background, load_adapter, remember_prompts, save_adapter, set_regions
from comcat_diffusion.adapters.header import Notes, called_by, read_adapter
from comcat_diffusion.adapters.merge import unload_adapters
from comcat_diffusion.adapters.model import factors
from comcat_diffusion.families.known import family_of
from tests import comfyui_transformers
from tests.comfyui_transformers import DEPTH, SMALL, WIDE

if TYPE_CHECKING:
    from tests.comfyui_check import ComfyUI

FAMILIES = {
    name: getattr(comfyui_transformers, name) for name in ("klein", "flux1", "sd3", "z_image", "qwen_image", "chroma")
}
SIDE, STEPS, GUIDANCE, SEED = 96, 4, 2.0, 5
CLOSE = 2e-5  # of the largest latent, after four steps in float32: the same sums in another order
CHANNELS = dict.fromkeys(FAMILIES, (16, 8)) | {"klein": (128, 16)}  # of latents, and pixels of a place
PACKED = ("flux1", "qwen_image", "chroma")  # those that diffusers draws in squares of latents
_FILM = inspect.signature(AutoencoderKLQwenImage.__init__).parameters
# ComfyUI's latents: scale and shift
SHAPED = dict.fromkeys(("flux1", "z_image", "chroma"), (0.3611, 0.1159)) | {
    "klein": (1.0, 0.0),
    "sd3": (1.5305, 0.0609),
}
SHAPED["qwen_image"] = (
    1 / torch.tensor(_FILM["latents_std"].default).view(16, 1, 1),
    torch.tensor(_FILM["latents_mean"].default).view(16, 1, 1),
)
GGUF = dict.fromkeys(FAMILIES, "flux") | {"sd3": "sd3", "z_image": "lumina2", "qwen_image": "qwen_image"}  # its names
ALL = r".*\.attn2?|layers\.\d+\.attention"
KINDS = {
    "tied": {"foldable": True, "tied": True, "trigger": ["sks"]},
    "free": {"trigger": ["ohwx"], "feed_forwards": 2},
    "cores": {"foldable": True, "cores": True, "trigger": ["sks"]},
    "all": {"foldable": True, "trigger": ["sks"], "target_modules": ALL, "feed_forwards": 2},
    "everywhere": {"foldable": True, "target_modules": ALL, "feed_forwards": 2},
}
PROBE = f"""
import comfy.model_detection, comfy.samplers, comfy.sd, folder_paths, os, safetensors.torch, torch
import comfy.text_encoders.flux, comfy.text_encoders.sd3_clip

SMALL = {SMALL}
detect_unet_config = comfy.model_detection.detect_unet_config

def small(*args, **kwargs):
    found = detect_unet_config(*args, **kwargs)
    return found and found | SMALL.get(found.get("image_model"), {{}})

comfy.model_detection.detect_unet_config = small

class Target:
    def __init__(self, tokenizer, clip, **params):
        self.tokenizer, self.clip, self.params = tokenizer, clip, params

T5 = {{"d_ff": 64, "num_layers": 1, "num_heads": 2, "d_kv": 8}}

class SmallClip:
    RETURN_TYPES, FUNCTION, CATEGORY = ("CLIP",), "run", "probe"

    @classmethod
    def INPUT_TYPES(cls):
        return {{"required": {{"kind": ("STRING", {{}})}}}}

    def run(self, kind):
        torch.manual_seed(3)
        few = {{"clip_l_model_config": {{"num_hidden_layers": 3}}, "clip_g_model_config": {{"num_hidden_layers": 3}}}}
        if kind == "klein":
            from comfy.text_encoders.flux import KleinTokenizer, klein_te
            small = {{"hidden_size": {WIDE}, "intermediate_size": 64, "num_hidden_layers": {DEPTH},
                     "num_attention_heads": 2, "num_key_value_heads": 1}}
            target = Target(KleinTokenizer, klein_te())
            options = {{"model_name": "qwen3_4b", "qwen3_4b_model_config": small}}
        elif kind == "z_image":
            from comfy.text_encoders.z_image import ZImageTokenizer, te
            small = {{"hidden_size": {WIDE}, "intermediate_size": 64, "num_hidden_layers": 3,
                     "num_attention_heads": 2, "num_key_value_heads": 1}}
            target, options = Target(ZImageTokenizer, te()), {{"qwen3_4b_model_config": small}}
        elif kind == "qwen_image":
            import comfy.text_encoders.llama as llama
            from comfy.text_encoders.qwen_image import QwenImageTokenizer, te
            llama.qwen_vl.Qwen2VLVisionTransformer = lambda **_: torch.nn.Module()  # its eyes, which see nothing here
            small = {{"hidden_size": {WIDE}, "intermediate_size": 64, "num_hidden_layers": 2,
                     "num_attention_heads": 2, "num_key_value_heads": 1}}
            target, options = Target(QwenImageTokenizer, te()), {{"qwen25_7b_model_config": small}}
        elif kind == "chroma":
            from comfy.text_encoders.pixart_t5 import PixArtTokenizer, pixart_te
            target, options = Target(PixArtTokenizer, pixart_te()), {{"t5xxl_model_config": T5 | {{"d_model": {WIDE}}}}}
        elif kind == "flux1":
            from comfy.text_encoders.flux import FluxTokenizer, flux_clip
            target = Target(FluxTokenizer, flux_clip())
            options = few | {{"t5xxl_model_config": T5 | {{"d_model": {WIDE}}}}}
        else:
            from comfy.text_encoders.sd3_clip import SD3Tokenizer, sd3_clip
            target = Target(SD3Tokenizer, sd3_clip(t5=kind == "sd3"))
            options = few | {{"t5xxl_model_config": T5 | {{"d_model": 4096}}}}
        made = comfy.sd.CLIP(target, model_options=options | {{"dtype": torch.float32}})
        for name, weight in made.cond_stage_model.named_parameters():
            weight.data = 1 + torch.randn(weight.shape) * 0.05 if weight.ndim == 1 else torch.randn(weight.shape) * 0.1
        if kind == "klein":
            path = os.path.join(folder_paths.base_path, "models", "text.safetensors")
            made.cond_stage_model.qwen3_4b.transformer.load_state_dict(safetensors.torch.load_file(path), strict=True)
        return (made,)

class SaveStates:
    RETURN_TYPES, FUNCTION, OUTPUT_NODE, CATEGORY = (), "run", True, "probe"

    @classmethod
    def INPUT_TYPES(cls):
        return {{"required": {{"conditioning": ("CONDITIONING",), "model": ("MODEL",), "name": ("STRING", {{}})}}}}

    def run(self, conditioning, model, name):
        states, more = conditioning[0]
        sampling = model.get_model_object("model_sampling")
        sigmas = comfy.samplers.calculate_sigmas(sampling, "simple", {STEPS})
        found = {{"states": states.contiguous(), "sigmas": sigmas}}
        if more.get("pooled_output") is not None:
            found["pooled"] = more["pooled_output"]
        safetensors.torch.save_file(found, os.path.join(folder_paths.get_output_directory(), name))
        return {{}}

NODE_CLASS_MAPPINGS = {{"SmallClip": SmallClip, "SaveStates": SaveStates}}
"""


def prepare(comfyui: Path, base: Path, names: tuple[str, ...]) -> dict[str, tuple[DiffusionPipeline, dict[str, Path]]]:
    """Bases of these families in a folder for ComfyUI, with random adapters; the pipelines, and the files."""
    found = {}
    for name in names:
        pipe = FAMILIES[name](comfyui / "comfy")
        comfyui_transformers.write(pipe, base / "models" / "diffusion_models" / f"{name}.safetensors")
        if name == "klein":
            safetensors.torch.save_file(
                {
                    own: tensor.contiguous()
                    for own, tensor in pipe.text_encoder.state_dict().items()
                    if "lm_head" not in own
                },
                base / "models" / "text.safetensors",
            )
        found[name] = pipe, adapters(pipe, base / "models" / "comcat" / name)
    (base / "custom_nodes" / "small").mkdir(parents=True)
    (base / "custom_nodes" / "small" / "__init__.py").write_text(PROBE)
    if os.environ.get("COMFYUI_GGUF"):
        (base / "custom_nodes" / "gguf").symlink_to(Path(os.environ["COMFYUI_GGUF"]).resolve())
    return found


def adapters(pipe: DiffusionPipeline, folder: Path) -> dict[str, Path]:
    """Random adapters of each kind, strong enough to be seen."""
    folder.mkdir(parents=True)
    files = {}
    for number, (name, options) in enumerate(KINDS.items()):
        pipe.transformer.add_adapter(ComcatConfig(r=2, alpha=3.0, **options), name)
        noise = torch.Generator().manual_seed(number)
        for own, factor in factors(pipe.transformer, name).items():
            size = 0.1 if ".feed_" in own else 1.0 if name == "cores" else 0.3  # larger ones amplify rounding
            factor.data = torch.randn(factor.shape, generator=noise) * size
        files[name] = folder / f"{name}.safetensors"
        notes = Notes((options.get("trigger") or ["sks"])[0], "a photo of sks dog", "dog")
        save_adapter(pipe, files[name], name, "somebody/base", notes)
        unload_adapters(pipe)
    return files


def with_adapters(nodes: dict, folder: str, loaded: Sequence[tuple[str, float]], clip: list) -> tuple[list, list]:
    """Nodes more of a workflow with a model "base": adapters one after the other; the model and CLIP of the last."""
    model = ["base", 0]
    for name, strength in loaded:
        inputs = {"model": model, "clip": clip, "adapter": f"{folder}/{name}.safetensors", "strength": strength}
        nodes[name] = {"class_type": "ComcatLoadAdapter", "inputs": inputs}
        model, clip = [name, 0], [name, 1]
    return model, clip


def graph(
    family: str,
    prompt: str,
    *loaded: tuple[str, float],
    encode: str = "CLIPTextEncode",
    kept: bool = False,
    masked: tuple[str, ...] = (),
    weights: str = "default",
) -> dict:
    """A workflow: transformer, text encoders, adapters one after the other, text, sampler.

    The two that are `masked` act on the left, and on the right below.
    """
    wired = {"unet_name": f"{family}.safetensors", "weight_dtype": weights}
    nodes = {"base": {"class_type": "UNETLoader", "inputs": wired}}
    nodes["text"] = {"class_type": "SmallClip", "inputs": {"kind": family}}
    model, clip = with_adapters(nodes, family, loaded, ["text", 0])
    if masked:
        half = {"value": 1.0, "width": SIDE // 2, "height": SIDE // 2}
        nodes["none"] = {"class_type": "SolidMask", "inputs": {"value": 0.0, "width": SIDE, "height": SIDE}}
        for name, x, size in (("left", 0, SIDE), ("below", SIDE // 2, SIDE // 2)):
            wires = {"destination": ["none", 0], "source": [f"{name} alone", 0], "operation": "add"}
            nodes[f"{name} alone"] = {"class_type": "SolidMask", "inputs": half | {"height": size}}
            nodes[name] = {"class_type": "MaskComposite", "inputs": {"x": x, "y": SIDE - size, **wires}}
        inputs = {"model": model, "first": masked[0], "first_mask": ["left", 0]}
        inputs |= {"second": masked[1], "second_mask": ["below", 0]}
        nodes["there"], model = {"class_type": "ComcatRegions", "inputs": inputs}, ["there", 0]
    if kept:
        nodes["keep"] = {"class_type": "ComcatKeepBackground", "inputs": {"model": model, "keep": True}}
        model = ["keep", 0]
    for name, text in (("positive", prompt), ("negative", "")):
        nodes[name] = {"class_type": encode, "inputs": {"clip": clip, "text": text}}
        save = {"conditioning": [name, 0], "model": model, "name": f"{name}.safetensors"}
        nodes[f"save {name}"] = {"class_type": "SaveStates", "inputs": save}
    latent = "EmptyFlux2LatentImage" if family == "klein" else "EmptySD3LatentImage"
    nodes["empty"] = {"class_type": latent, "inputs": {"width": SIDE, "height": SIDE, "batch_size": 1}}
    settings = {"seed": SEED, "steps": STEPS, "cfg": GUIDANCE, "sampler_name": "euler", "scheduler": "simple"}
    inputs = {"model": model, "positive": ["positive", 0], "negative": ["negative", 0], "latent_image": ["empty", 0]}
    nodes["draw"] = {"class_type": "KSampler", "inputs": {**settings, "denoise": 1, **inputs}}
    nodes["save"] = {"class_type": "SaveLatent", "inputs": {"samples": ["draw", 0], "filename_prefix": "latent"}}
    return nodes


class Drawer:
    """What is called as a pipeline to draw with its transformer."""

    def __init__(self, pipe: DiffusionPipeline, draw: Callable[[], torch.Tensor]) -> None:
        self.transformer, self.device, self.draw = pipe.transformer, pipe.device, draw

    def __call__(self) -> tuple[torch.Tensor]:
        return (self.draw(),)


def drawn(family: str, pipe: DiffusionPipeline, base: Path, prompt: str, kept: dict | None = None) -> torch.Tensor:
    """The latents that diffusers' transformer draws of the texts that ComfyUI has saved, as ComfyUI saves them.

    `kept` are the words of adapters whose background is kept.
    """
    if kept:
        return keep_background(Drawer(pipe, lambda: drawn(family, pipe, base, prompt)), kept)[0]
    channels, place = CHANNELS[family]
    own, conditions = family_of(pipe), []
    for name, text in (("positive", prompt), ("negative", "")):
        saved = safetensors.torch.load_file(base / "output" / f"{name}.safetensors")
        told = {part: saved[part] for part in ("states", "pooled") if part in saved}
        if family == "z_image":
            told["states"] = list(told["states"])
        if family in ("qwen_image", "chroma"):
            told["mask"] = torch.ones(told["states"].shape[:2])
        conditions.append(told)
        remember_prompts(pipe, told["states"], [text])
    sigmas, frames = saved["sigmas"], torch.zeros(1, 6)
    generator = torch.Generator().manual_seed(SEED)
    latents = torch.randn(1, channels, SIDE // place, SIDE // place, generator=generator) * sigmas[0]
    latents = torch.nn.functional.pixel_unshuffle(latents, 2) if family in PACKED else latents
    for sigma, then in itertools.pairwise(sigmas):
        times = (sigma * 1000).expand(1)
        one, other = (own.predict(pipe.transformer, latents, times, told, frames) for told in conditions)
        latents = latents + (then - sigma) * (other + GUIDANCE * (one - other))
    latents = torch.nn.functional.pixel_shuffle(latents, 2) if family in PACKED else latents
    scale, shift = SHAPED[family]
    latents = latents / scale + shift
    return latents.unsqueeze(2) if family == "qwen_image" else latents  # a film of one frame


def compare(running: ComfyUI, family: str, pipe: DiffusionPipeline, files: dict[str, Path], check, expect) -> None:
    """ComfyUI and diffusers, latents by latents."""
    said, without = "a photo of a sks dog, ohwx cat in the snow", "a photo of a cat"
    draw = lambda text: drawn(family, pipe, running.base, text)
    plain = running.latent(graph(family, said))
    own = draw(said)
    check(f"{family}: the base alone", plain, own)
    if family == "klein":
        same_text(running, pipe, said, expect)
    empty = running.latent(graph(family, without))
    for name in ("tied", "free", "cores", "all", "everywhere"):
        load_adapter(pipe, files[name], name)
        found = running.latent(graph(family, said, (name, 1.0)))
        check(f"{family}: {name}", found, draw(said), own)
        if name != "everywhere":
            same = torch.equal(running.latent(graph(family, without, (name, 1.0))), empty)
            expect(f"{family}: {name}, without its trigger the base", same, True)
        if name in ("tied", "free", "all"):
            freely, words = draw(said), {name: called_by(read_adapter(files[name]))}
            found = running.latent(graph(family, said, (name, 1.0), kept=True))
            check(
                f"{family}: {name}, its background kept", found, drawn(family, pipe, running.base, said, words), freely
            )
            once = torch.equal(running.latent(graph(family, without, (name, 1.0), kept=True)), empty)
            expect(f"{family}: {name}, which nobody names, with nothing to keep", once, True)
        unload_adapters(pipe)
    for name in ("all", "free"):
        load_adapter(pipe, files[name], name)
    pipe.transformer.set_adapters(["all", "free"], [0.7, 0.5])
    chained = running.latent(graph(family, said, ("all", 0.7), ("free", 0.5), encode="ComcatTextEncode"))
    check(f"{family}: two of them, at strengths of their own", chained, draw(said), own)
    unload_adapters(pipe)
    two_places(running, family, pipe, files, said, check)
    as_lora(running, family, pipe, files, said, check, expect)
    eight_bits(running, family, pipe, files, said, check, expect)
    quantized(running, family, said, check, expect)
    mistakes(running, family, files, expect)


def two_places(
    running: ComfyUI, family: str, pipe: DiffusionPipeline, files: dict[str, Path], said: str, check
) -> None:
    """Two subjects of a prompt, each where its mask is, or where it is looked at, or both; a third acts everywhere."""
    names = ("all", "free")
    left, below = torch.zeros(2, SIDE, SIDE)
    left[:, : SIDE // 2] = below[SIDE // 2 :, SIDE // 2 :] = 1
    for name in (*names, "everywhere"):
        load_adapter(pipe, files[name], name)
    loaded = [(name, 1.0) for name in (*names, "everywhere")]
    pipe.transformer.set_adapters([name for name, _ in loaded], [1.0] * 3)
    draw = lambda **more: drawn(family, pipe, running.base, said, **more)
    ask = lambda **more: running.latent(graph(family, said, *loaded, **more))
    words = {name: called_by(read_adapter(files[name])) for name in names}
    everywhere = draw()
    kept = draw(kept=words)
    check(f"{family}: two subjects, each where it is looked at", ask(kept=True), kept, everywhere)
    set_regions(pipe, {"all": left, "free": below})
    masked = draw()
    check(f"{family}: one on the left, one on the right below", ask(masked=names), masked, everywhere)
    check(f"{family}: the same, within where it is looked at", ask(masked=names, kept=True), draw(kept=words), masked)
    unload_adapters(pipe)


def as_lora(
    running: ComfyUI, family: str, pipe: DiffusionPipeline, files: dict[str, Path], said: str, check, expect
) -> None:
    """Save as LoRA, loaded by ComfyUI's own loader: alone, before an adapter and after it."""
    saved = {"model": ["base", 0], "adapter": f"{family}/everywhere.safetensors", "name": family}
    running.latent(graph(family, said) | {"lora": {"class_type": "ComcatSaveLora", "inputs": saved}})
    draw = lambda: drawn(family, pipe, running.base, said)
    wired = {"lora_name": f"{family}.safetensors", "strength_model": 1.0, "model": ["base", 0]}
    loader = {"class_type": "LoraLoaderModelOnly", "inputs": wired}

    def asked(*loaded: tuple[str, float], first: str) -> dict:
        made = graph(family, said, *loaded) | {"loader": {**loader, "inputs": dict(wired)}}
        ours = loaded[-1][0] if loaded else "loader"
        if first == "loader" and loaded:
            made[ours]["inputs"]["model"] = ["loader", 0]
        elif loaded:
            made["loader"]["inputs"]["model"] = [ours, 0]
        made["draw"]["inputs"]["model"] = [ours if first == "loader" else "loader", 0]
        return made

    base, before = draw(), len(running.log.read_text())
    load_adapter(pipe, files["everywhere"], "everywhere")
    alone = draw()
    check(f"{family}: as a LoRA, by ComfyUI's own loader", running.latent(asked(first="loader")), alone, base)
    expect(f"{family}: every weight of it is read", "NOT LOADED" in running.log.read_text()[before:], False)
    for name in ("all", "free", "cores"):
        load_adapter(pipe, files[name], name)
        pipe.transformer.set_adapters(["everywhere", name])
        both = draw()
        for first, told in (("loader", f"a LoRA, then {name}"), (name, f"{name}, then a LoRA")):
            check(f"{family}: {told}", running.latent(asked((name, 1.0), first=first)), both, alone)
        unload_adapters(pipe)
        load_adapter(pipe, files["everywhere"], "everywhere")
    unload_adapters(pipe)


def eight_bits(
    running: ComfyUI, family: str, pipe: DiffusionPipeline, files: dict[str, Path], said: str, check, expect
) -> None:
    """Weights of 8 bits, which diffusers gets too; those of the base are known in them, and cores refuse them."""
    exact, ask = {name: tensor.clone() for name, tensor in pipe.transformer.state_dict().items()}, "fp8_e4m3fn"
    pipe.transformer.load_state_dict({name: t.to(torch.float8_e4m3fn).to(t) for name, t in exact.items()})
    plain, rough = running.latent(graph(family, said, weights=ask)), drawn(family, pipe, running.base, said)
    check(f"{family}: 8 bits, the base alone", plain, rough)
    for name in ("all", "free"):
        load_adapter(pipe, files[name], name, any_weights=True)
        found = running.latent(graph(family, said, (name, 1.0), weights=ask))
        check(f"{family}: 8 bits, {name}", found, drawn(family, pipe, running.base, said), rough)
        unload_adapters(pipe)
    told = running.error(graph(family, said, ("cores", 1.0), weights=ask))
    expect(f"{family}: 8 bits, {told.strip()[:90]}...", "and here these are quantized" in told, True)
    pipe.transformer.load_state_dict(exact)


def quantized(running: ComfyUI, family: str, said: str, check, expect) -> None:
    """Files in few bits draw what a file of the very numbers that are in them draws, whose base is known in them."""
    folder = running.base / "models" / "diffusion_models"
    script = Path(__file__).with_name("comfyui_quantized.py")
    architecture = [GGUF[family]] if os.environ.get("COMFYUI_GGUF") else []
    command = [running.python, script, folder / f"{family}.safetensors", *architecture]
    kinds = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()

    def asked(kind: str, *loaded: tuple[str, float], plain: bool = False) -> dict:
        made = graph(family, said, *loaded)
        file = f"{family}-{kind}-plain.safetensors" if plain else f"{family}-{kind}.safetensors"
        if (folder / f"{family}-{kind}.gguf").exists() and not plain:
            wired = {"unet_name": f"{family}-{kind}.gguf", "dequant_dtype": "float32", "patch_dtype": "float32"}
            made["base"] = {"class_type": "UnetLoaderGGUFAdvanced", "inputs": wired | {"patch_on_device": False}}
        else:
            made["base"]["inputs"]["unet_name"] = file
        for name, _ in loaded:
            made[name]["inputs"]["any_weights"] = plain
        return made

    def after_lora(made: dict) -> dict:
        wired = {"lora_name": f"{family}.safetensors", "strength_model": 1.0, "model": ["base", 0]}
        made["all"]["inputs"]["model"] = ["lora", 0]
        return made | {"lora": {"class_type": "LoraLoaderModelOnly", "inputs": wired}}

    for kind in kinds:
        own = running.latent(asked(kind, plain=True))
        check(f"{family}: {kind}, the base alone", running.latent(asked(kind)), own)
        for name in ("all", "free"):
            both = (running.latent(asked(kind, (name, 1.0), plain=plain)) for plain in (False, True))
            check(f"{family}: {kind}, {name}", *both, own)
        if (folder / f"{family}-{kind}.gguf").exists():  # into others ComfyUI puts a LoRA's change in their few bits
            both = (running.latent(after_lora(asked(kind, ("all", 1.0), plain=plain))) for plain in (False, True))
            check(f"{family}: {kind}, a LoRA, then all", *both, own)
        told = running.error(asked(kind, ("cores", 1.0)))
        expect(f"{family}: {kind}, {told.strip()[:80]}...", "and here these are quantized" in told, True)


def same_text(running: ComfyUI, pipe: DiffusionPipeline, said: str, expect) -> None:
    """A language model is read alike."""
    states = safetensors.torch.load_file(running.base / "output" / "positive.safetensors")["states"]
    own, _ = pipe.encode_prompt([said], text_encoder_out_layers=(9, 18, 27))
    off = float((states - own).abs().max() / own.abs().max())
    expect(f"klein: the text is read alike, off by {off:.1e}", off < 1e-5 and states.shape == own.shape, True)


def mistakes(running: ComfyUI, family: str, files: dict[str, Path], expect) -> None:
    """What is wrong is one sentence at the node that it is wrong in."""
    for other in files["tied"].parent.parent.iterdir():
        if other.name != family:
            asked = graph(family, "sks", ("tied", 1.0))
            asked["tied"]["inputs"]["adapter"] = f"{other.name}/tied.safetensors"
            told = running.error(asked)
            expect(f"{family}: {told.strip()[-110:]}", "kind of model" in told, True)
    asked = graph(family, "sks", ("tied", 1.0))
    asked["positive"] = graph(family, "sks")["positive"]
    told = running.error(asked)
    expect(f"{family}: {told.strip()[:110]}...", "does not say what it was made of" in told, True)
    asked = graph(family, "sks BREAK dog", ("tied", 1.0), encode="ComcatTextEncode")
    told = running.error(asked)
    expect(f"{family}: {told.strip()[:110]}", "BREAK parts prompts for CLIP alone" in told, True)
    asked = graph(family, "sks", ("tied", 1.0), ("free", 1.0), masked=("tied", "free"))
    asked["none"]["inputs"]["height"] = SIDE // 2
    told = running.error(asked)
    expect(f"{family}: {told.strip()[:110]}", "not the proportions of the picture" in told, True)
