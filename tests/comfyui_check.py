"""`make test-comfyui COMFYUI=folder`: the real ComfyUI, headless on a CPU, draws with the nodes what diffusers draws.

Small random bases of each kind of Stable Diffusion are written as checkpoints (comfyui_bases.py); ComfyUI is started on
a folder of its own and asked through its HTTP API; latents are compared with diffusers and `load_adapter` on the same
base, seed and sampler. Nothing is written into ComfyUI's folder. It takes its Python from COMFYUI_PYTHON, or this one;
PARTS="one two xl fp8" asks for some of its parts; those of transformers are in comfyui_families.py, and want a ComfyUI
that knows them (tried: 0.29); its page, in a browser, is in comfyui_editor.py.
"""

import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path

import safetensors.torch
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel

from comcat_diffusion import ComcatConfig, keep_background, load_adapter, remember_prompts, save_adapter, set_regions
from comcat_diffusion.adapters.header import Notes
from comcat_diffusion.adapters.merge import unload_adapters
from comcat_diffusion.adapters.model import factors
from tests import comfyui_editor, comfyui_families
from tests.comfyui_bases import LAYERS, SIDE, checkpoint, one, two, xl
from tests.comfyui_families import FAMILIES, with_adapters

ROOT = Path(__file__).parents[1]
CLOSE = 1e-5  # of the largest latent, after four steps in float32: the same sums in another order
STEPS, GUIDANCE, SEED = 4, 2.0, 5  # 999 is a multiple of 3, so the timesteps are whole numbers
WORDS = {
    "tied": ["sks dog", "sks"],
    "free": ["ohwx dog", "ohwx"],
    "convolved": ["ohwx dog", "ohwx"],
}  # as the notes of the files say
KINDS = ("tied", "free", "cores", "convolved")  # that act from their trigger on
BASES = {"one": one, "two": two, "xl": xl}
PARTS = (*BASES, "fp8", *FAMILIES, "editor")
PROBE = """
import comfy.sd, folder_paths, os, safetensors.torch

class SaveConditioning:
    RETURN_TYPES, FUNCTION, OUTPUT_NODE, CATEGORY = (), "run", True, "probe"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"conditioning": ("CONDITIONING",), "name": ("STRING", {})}}

    def run(self, conditioning, name):
        states, more = conditioning[0]
        found = {"states": states.contiguous()}
        if "comcat" in more:
            found["acts"] = more["comcat"].acts(["sks"]).float()
        safetensors.torch.save_file(found, os.path.join(folder_paths.get_output_directory(), name))
        return {}

class LoadFewLayers:
    RETURN_TYPES, FUNCTION, CATEGORY = ("MODEL", "CLIP"), "run", "probe"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"ckpt_name": ("STRING", {}), "layers": ("INT", {})}}

    def run(self, ckpt_name, layers):
        path = folder_paths.get_full_path_or_raise("checkpoints", ckpt_name)
        few = {f"clip_{letter}_model_config": {"num_hidden_layers": layers} for letter in "lgh"}
        return comfy.sd.load_checkpoint_guess_config(path, output_vae=False, te_model_options=few)[:2]

NODE_CLASS_MAPPINGS = {"SaveConditioning": SaveConditioning, "LoadFewLayers": LoadFewLayers}
"""
# The same nodes in ComfyUI's current form, which it does not look at where it finds the older one.
CURRENT = """
import importlib.util

spec = importlib.util.spec_from_file_location("comcat_current", {path!r})
nodes = importlib.util.module_from_spec(spec)
spec.loader.exec_module(nodes)
nodes._NODES = {{name + "Current": node for name, node in nodes._NODES.items()}}
comfy_entrypoint = nodes.comfy_entrypoint
"""


def adapters(pipe: StableDiffusionPipeline, folder: Path) -> dict[str, Path]:
    """Random adapters of each kind, strong enough to be seen."""
    folder.mkdir(parents=True)
    kinds = {
        "tied": {"foldable": True, "tied": True, "trigger": ["sks"]},
        "free": {"trigger": ["ohwx"]},
        "everywhere": {"foldable": True, "convolutions": 2},
        "cores": {"foldable": True, "cores": True, "trigger": ["sks"]},
        "convolved": {"convolutions": 2, "target_modules": ["attn2"], "trigger": ["ohwx"]},
    }
    files = {}
    for number, (name, options) in enumerate(kinds.items()):
        pipe.unet.add_adapter(ComcatConfig(r=2, alpha=3.0, **options), name)
        models, tokens = [pipe.unet], None
        if name == "everywhere":
            encoders = {part: getattr(pipe, part) for part in ("text_encoder", "text_encoder_2") if hasattr(pipe, part)}
            made, tokens = torch.Generator().manual_seed(9), {"<dog>": {}}
            for part, encoder in encoders.items():
                encoder.add_adapter(ComcatConfig(r=1, foldable=True), name)
                models.append(encoder)
                tokens["<dog>"][part] = torch.randn(2, encoder.config.hidden_size, generator=made) * 0.02
        noise = torch.Generator().manual_seed(number)
        for model in models:
            for factor in factors(model, name).values():
                factor.data = torch.randn(factor.shape, generator=noise) * (1.0 if name == "cores" else 0.15)
        files[name] = folder / f"{name}.safetensors"
        notes = Notes((options.get("trigger") or ["sks"])[0], "a photo of sks dog", "dog")
        save_adapter(pipe, files[name], name, "somebody/base", notes, tokens=tokens)
        unload_adapters(pipe)
    return files


class ComfyUI:
    """A running one."""

    def __init__(self, folder: Path, base: Path, weights: str = "--fp32-unet", page: bool = False) -> None:
        with contextlib.closing(socket.socket()) as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.base = base
        flags = ["--cpu", "--base-directory", str(base), "--port", str(self.port), weights, "--fp32-text-enc"]
        flags += ["--disable-api-nodes", "--database-url", "sqlite:///:memory:"]
        if not page:
            (base / "front").mkdir(exist_ok=True)
            flags += ["--front-end-root", str(base / "front")]
        around = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "2")}
        self.log = base / "log.txt"
        self.python = os.environ.get("COMFYUI_PYTHON", sys.executable)
        with self.log.open("w") as log:
            command = [self.python, "main.py", *flags]
            self.process = subprocess.Popen(command, cwd=folder, env=around, stdout=log, stderr=subprocess.STDOUT)
        try:
            self._wait()
        except BaseException:
            self.stop()
            raise

    def _wait(self) -> None:
        for _ in range(240):
            time.sleep(0.5)
            if self.process.poll() is not None:
                raise SystemExit(f"ComfyUI ended at its start:\n{self.log.read_text()[-9000:]}")
            with contextlib.suppress(OSError):
                return self._known()
        raise SystemExit("ComfyUI did not answer.")

    def stop(self) -> None:
        """End it."""
        self.process.terminate()
        self.process.wait()

    def _known(self) -> None:
        nodes = self._ask("/object_info")
        ours = {"ComcatLoadAdapter", "ComcatTextEncode", "ComcatRegions", "ComcatSaveLora"}
        if not ours | {f"{name}Current" for name in ours} <= nodes.keys():
            raise SystemExit(f"ComfyUI has not loaded the nodes:\n{self.log.read_text()[-9000:]}")

    def _ask(self, path: str, content: dict | None = None) -> dict:
        data = None if content is None else json.dumps(content).encode()
        asked = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", data)
        with urllib.request.urlopen(asked) as answer:
            return json.loads(answer.read())

    def run(self, graph: dict) -> dict:
        """Run a workflow; what became of it."""
        number = self._ask("/prompt", {"prompt": graph})["prompt_id"]
        while True:
            found = self._ask(f"/history/{number}")
            if number in found and found[number]["status"]["completed"] is not None:
                return found[number]
            time.sleep(0.1)

    def finished(self, before: Iterable[str], seconds: float = 300) -> dict:
        """What becomes of a workflow that a page has sent, beside those that were there before."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            found = {number: one for number, one in self._ask("/history").items() if number not in before}
            if found:
                return next(iter(found.values()))
            time.sleep(0.5)
        raise SystemExit(f"Nothing was drawn:\n{self.log.read_text()[-9000:]}")

    def error(self, graph: dict) -> str:
        """What a workflow that must fail says."""
        for kind, told in self.run(graph)["status"]["messages"]:
            if kind == "execution_error":
                return told["exception_message"]
        return "nothing"

    def latent(self, graph: dict) -> torch.Tensor:
        """What a workflow with a SaveLatent node draws."""
        made = self.run(graph)
        if made["status"]["status_str"] != "success":
            raise SystemExit(json.dumps(made["status"], indent=1)[:3000])
        (file,) = made["outputs"]["save"]["latents"]
        return safetensors.torch.load_file(self.base / "output" / file["subfolder"] / file["filename"])["latent_tensor"]


def graph(
    prompt: str, *loaded: tuple[str, float], encode: str = "CLIPTextEncode", base: str = "one", **more: dict
) -> dict:
    """A workflow: checkpoint, adapters one after the other, text, sampler."""
    nodes = {"base": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": f"{base}.safetensors"}}}
    if base != "one":
        few = {"ckpt_name": f"{base}.safetensors", "layers": LAYERS}
        nodes["base"] = {"class_type": "LoadFewLayers", "inputs": few}
    model, clip = with_adapters(nodes, base, loaded, ["base", 1])
    for name, text in (("positive", prompt), ("negative", "")):
        nodes[name] = {"class_type": encode, "inputs": {"clip": clip, "text": text}}
    nodes["empty"] = {"class_type": "EmptyLatentImage", "inputs": {"width": SIDE, "height": SIDE, "batch_size": 1}}
    settings = {
        "seed": SEED,
        "steps": STEPS,
        "cfg": GUIDANCE,
        "sampler_name": "euler",
        "scheduler": "normal",
        "denoise": 1,
    }
    for name, node in more.items():
        nodes[name] = node
        if node.get("gives_model"):
            node["inputs"]["model"], model = model, [name, 0]
    wired = {"model": model, "positive": ["positive", 0], "negative": ["negative", 0], "latent_image": ["empty", 0]}
    nodes["draw"] = {"class_type": "KSampler", "inputs": settings | wired}
    nodes["save"] = {"class_type": "SaveLatent", "inputs": {"samples": ["draw", 0], "filename_prefix": "latent"}}
    return {name: {key: node[key] for key in ("class_type", "inputs")} for name, node in nodes.items()}


def drawn(
    pipe: StableDiffusionPipeline, prompt: str | None, kept: dict[str, list[str]] | None = None, **more: object
) -> torch.Tensor:
    """The latents that diffusers draws, as ComfyUI saves them; `kept`: around what these words call, the base's."""
    how = {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE, "height": SIDE, "width": SIDE}
    noise = torch.randn(1, 4, SIDE // 8, SIDE // 8, generator=torch.Generator().manual_seed(SEED))
    most = float(pipe.scheduler.sigmas.max())  # ComfyUI begins with noise of sqrt(1 + most^2), diffusers with `most`
    if isinstance(pipe, StableDiffusionXLPipeline):
        more["negative_prompt"] = ""  # without one its states would be zeros
    call = partial(keep_background, pipe, kept) if kept else pipe
    found = call(prompt, latents=noise * (1 + most**-2) ** 0.5, output_type="latent", **how, **more).images
    return found / (0.13025 if isinstance(pipe, StableDiffusionXLPipeline) else 0.18215)


def check(
    name: str, found: torch.Tensor, expected: torch.Tensor, other: torch.Tensor | None = None, close: float = CLOSE
) -> None:
    """Compare, and say how close it was and how far another picture is."""
    off = float((found - expected).abs().max())
    effect = float("inf") if other is None else float((expected - other).abs().max())
    print(
        f"{name:<52} off by {off:.1e} of {float(expected.abs().max()):.1f}; without the adapter {effect:.1e}",
        flush=True,
    )
    if not (off < close * float(expected.abs().max()) and effect > 20 * off):
        raise SystemExit(f"{name}: ComfyUI draws something else.")


def main(comfyui: Path, parts: tuple[str, ...] = PARTS) -> None:
    """All checks, one after the other."""
    if not set(parts) <= set(PARTS):
        raise SystemExit(f"PARTS are some of {' '.join(PARTS)}, not {' '.join(parts)}.")
    with tempfile.TemporaryDirectory() as place, torch.no_grad():
        base, pipes, files = Path(place), {}, {}
        for name in BASES:
            if name in parts or (name == "one" and {"fp8", "editor"} & set(parts)):
                pipes[name] = BASES[name](comfyui / "comfy" / "sd1_tokenizer")
                checkpoint(pipes[name], base / "models" / "checkpoints" / f"{name}.safetensors")
                files[name] = adapters(pipes[name], base / "models" / "comcat" / name)
        nodes = base / "custom_nodes"
        (nodes / "probe").mkdir(parents=True)
        (nodes / "probe" / "__init__.py").write_text(PROBE)
        (nodes / "current").mkdir()
        path = str(ROOT / "integrations" / "comfyui" / "nodes.py")
        (nodes / "current" / "__init__.py").write_text(CURRENT.format(path=path))
        (nodes / "comcat").symlink_to(ROOT / "integrations" / "comfyui")
        (base / "input").mkdir(), (base / "output").mkdir()
        families = comfyui_families.prepare(comfyui, base, tuple(name for name in FAMILIES if name in parts))
        if families:
            near = partial(check, close=comfyui_families.CLOSE)
            with started(comfyui, base, "--fp32-unet") as running:
                for name, own in families.items():
                    comfyui_families.compare(running, name, *own, near, expect)
        if set(parts) & set(BASES):
            with started(comfyui, base, "--fp32-unet") as running:
                for name in (name for name in BASES if name in parts):
                    (compare if name == "one" else other_kind)(running, pipes[name], files[name], name)
        if "fp8" in parts:
            with started(comfyui, base, "--fp8_e4m3fn-unet") as running:
                eight_bits(running, pipes["one"], files["one"])
        if "editor" in parts:
            comfyui_editor.prepare(base, pipes["one"], files["one"]["tied"])
            with started(comfyui, base, "--fp32-unet", page=True) as running:
                comfyui_editor.compare(running, expect)
    print("ComfyUI draws what diffusers draws.")


@contextlib.contextmanager
def started(comfyui: Path, base: Path, weights: str, page: bool = False) -> Iterator[ComfyUI]:
    """A ComfyUI that is ended afterwards, with its page or without."""
    running = ComfyUI(comfyui, base, weights, page)
    try:
        yield running
    finally:
        running.stop()


def other_kind(running: ComfyUI, pipe: StableDiffusionPipeline, files: dict[str, Path], kind: str) -> None:
    """The same of another kind of Stable Diffusion: the adapters, and what depends on its text encoders and U-Net."""
    ask = lambda *given, **more: running.latent(graph(*given, base=kind, **more))
    said, word = "a photo of sks dog, ohwx cat", "<dog> in the snow"
    own, base = drawn(pipe, said), drawn(pipe, word.replace("<dog>", "dog"))
    plain = ask(said)
    check(f"{kind}: the base alone", plain, own)
    for name in KINDS:
        load_adapter(pipe, files[name], name)
        check(f"{kind}: {name}, from its trigger on", ask(said, (name, 1.0)), drawn(pipe, said), own)
        without = "a photo of a cat"
        expect(f"{kind}: without its trigger the base", torch.equal(ask(without, (name, 1.0)), ask(without)), True)
        unload_adapters(pipe)
    backgrounds(running, pipe, files, said, kind)
    load_adapter(pipe, files["everywhere"], "everywhere")
    check(f"{kind}: text encoders too, and a new word", ask(word, ("everywhere", 1.0)), drawn(pipe, word), base)
    load_adapter(pipe, files["tied"], "tied")
    pipe.unet.set_adapters(["everywhere", "tied"], [1.0, 0.7])
    check(f"{kind}: two of them", ask(said, ("everywhere", 1.0), ("tied", 0.7)), drawn(pipe, said), own)
    unload_adapters(pipe)


def eight_bits(running: ComfyUI, pipe: StableDiffusionPipeline, files: dict[str, Path]) -> None:
    """Weights of 8 bits: ComfyUI draws what diffusers draws with the same weights, rounded to 8 bits."""
    said = "a photo of sks dog, ohwx cat"
    exact = {name: tensor.clone() for name, tensor in pipe.unet.state_dict().items()}
    own = drawn(pipe, said)
    adapted = {}
    for name in ("tied", "free"):
        load_adapter(pipe, files[name], name)
        adapted[name] = drawn(pipe, said)
        unload_adapters(pipe)
    pipe.unet.load_state_dict({name: t.to(torch.float8_e4m3fn).to(t) for name, t in exact.items()})
    rough = drawn(pipe, said)
    check("8 bits: the base alone", running.latent(graph(said)), rough)
    print(f"8 bits change the base's picture by {float((rough - own).abs().max()):.1f}", flush=True)
    for name in ("tied", "free"):
        load_adapter(pipe, files[name], name, any_weights=True)
        found = running.latent(graph(said, (name, 1.0)))
        check(f"8 bits: {name}, from its trigger on", found, drawn(pipe, said), rough)
        off, effect = (float((found - other).square().mean().sqrt()) for other in (adapted[name], rough))
        told = f"8 bits: {name}, {off:.1f} from its picture in 32 bits, {effect:.1f} from the base's in 8 bits"
        expect(told, off < effect / 2, True)
        unload_adapters(pipe)
    told = running.error(graph(said, ("cores", 1.0)))
    expect(f"8 bits: {told.strip()[:90]}...", "and here these are quantized" in told, True)
    pipe.unet.load_state_dict(exact)


def compare(running: ComfyUI, pipe: StableDiffusionPipeline, files: dict[str, Path], kind: str = "one") -> None:
    """ComfyUI and diffusers, picture by picture."""
    said = "a photo of sks dog, ohwx cat"
    plain, own = running.latent(graph(said)), drawn(pipe, said)
    check("the base alone", plain, own)
    for name in KINDS:
        load_adapter(pipe, files[name], name)
        check(f"{name}, from its trigger on", running.latent(graph(said, (name, 1.0))), drawn(pipe, said), own)
        without = "a photo of a cat"
        same = torch.equal(running.latent(graph(without, (name, 1.0))), running.latent(graph(without)))
        if not same:
            raise SystemExit(f"{name}: a prompt without the trigger is not drawn as the base draws it.")
        unload_adapters(pipe)
    asked = graph(said, ("tied", 1.0), encode="ComcatTextEncode")
    older = running.latent(asked)
    for node in asked.values():
        node["class_type"] += "Current" * node["class_type"].startswith("Comcat")
    asked["draw"]["inputs"]["cfg"] = GUIDANCE + 1e-12  # so that nothing comes from a cache
    expect("the nodes' current form does the same", torch.equal(running.latent(asked), older), True)
    word = "<dog> in the snow"
    base = drawn(pipe, word.replace("<dog>", "dog"))
    load_adapter(pipe, files["everywhere"], "everywhere")
    check("everywhere, text encoder too, and a new word", running.latent(graph(word, ("everywhere", 1.0))),
          drawn(pipe, word), base)  # fmt: skip
    for name in ("tied", "free"):
        load_adapter(pipe, files[name], name)
    pipe.unet.set_adapters(["everywhere", "tied", "free"], [1.0, 0.7, 0.5])
    three = (("everywhere", 1.0), ("tied", 0.7), ("free", 0.5))
    check("three of them, at strengths of their own", running.latent(graph(said, *three)), drawn(pipe, said), own)
    unload_adapters(pipe)
    for other in ("free", "convolved"):
        in_places(running, pipe, files, said, own, other)
    backgrounds(running, pipe, files, said, kind)
    samplers(running)
    with_weights(running, pipe, files)
    as_lora(running, pipe, files)
    mistakes(running, pipe, files)
    example(running, files)


def in_places(
    running: ComfyUI, pipe: StableDiffusionPipeline, files: dict[str, Path], said: str, own: torch.Tensor, other: str
) -> None:
    """One subject on the left, one on the right."""
    for name in ("tied", other):
        load_adapter(pipe, files[name], name)
    left = torch.zeros(SIDE, SIDE)
    left[:, : SIDE // 2] = 1
    set_regions(pipe, {"tied": left, other: 1 - left})
    solid = lambda wide, value: {"class_type": "SolidMask", "inputs": {"value": value, "width": wide, "height": SIDE}}
    wires = {"destination": ["all", 0], "source": ["half", 0]}
    left_half = {"class_type": "MaskComposite", "inputs": {"x": 0, "y": 0, "operation": "add", **wires}}
    right_half = {"class_type": "InvertMask", "inputs": {"mask": ["left", 0]}}
    inputs = {"first": "tied", "first_mask": ["left", 0], "second": other, "second_mask": ["right", 0]}
    there = {"class_type": "ComcatRegions", "inputs": inputs, "gives_model": True}
    more = {"all": solid(SIDE, 0.0), "half": solid(SIDE // 2, 1.0), "left": left_half, "right": right_half}
    asked = graph(said, ("tied", 1.0), (other, 1.0), **more, there=there)
    check(f"one on the left, one ({other}) on the right", running.latent(asked), drawn(pipe, said), own)
    unload_adapters(pipe)


def backgrounds(running: ComfyUI, pipe: StableDiffusionPipeline, files: dict[str, Path], said: str, kind: str) -> None:
    """Adapters that act where their subjects are looked at, beside the base's own picture of the same noise."""
    kept = {"class_type": "ComcatKeepBackground", "inputs": {"keep": True}, "gives_model": True}
    for names in (["tied"], ["free"], ["tied", "free"], ["tied", "convolved"]):
        for name in names:
            load_adapter(pipe, files[name], name)
        pipe.unet.set_adapters(names)
        everywhere = drawn(pipe, said)
        expected = drawn(pipe, said, {name: WORDS[name] for name in names})
        asked = graph(said, *((name, 1.0) for name in names), base=kind, kept=kept)
        check(f"{kind}: background kept, {' and '.join(names)}", running.latent(asked), expected, everywhere)
        asked["draw"]["inputs"]["seed"] = SEED + 1
        running.latent(asked)
        asked["draw"]["inputs"]["seed"] = SEED
        asked["draw"]["inputs"]["cfg"] = GUIDANCE + 1e-12  # so that nothing comes from a cache
        check("the same, after another drawing", running.latent(asked), expected, everywhere)
        unload_adapters(pipe)


def samplers(running: ComfyUI) -> None:
    """Backgrounds with a sampler that adds noise and one that chooses its own steps, and where none is asked for."""
    tied, node = ("tied", 1.0), {"class_type": "ComcatKeepBackground", "inputs": {"keep": True}, "gives_model": True}

    def asked(said: str, *loaded: tuple[str, float], sampler: str = "euler", **more: dict) -> dict:
        made = graph(said, *loaded, **more)
        made["draw"]["inputs"] |= {"sampler_name": sampler, "steps": 2}
        return made

    said, bare = "a photo of sks dog, ohwx cat", "a photo of sks dog"
    own, kept = (
        running.latent(asked(said, *loaded, sampler="euler_ancestral", **more))
        for loaded, more in (((), {}), ([tied], {"kept": {**node, "inputs": {"keep": True}}}))
    )
    off, close = (kept - own).abs().amax(1), CLOSE * float(own.abs().max())
    told = f"euler_ancestral: {int((off < close).sum())} of {off.numel()} places are the base's, off by {off.min():.1e}"
    expect(f"{told} to {off.max():.1e}", bool(off.min() < close and off.max() > 100 * close), True)
    same = torch.equal(running.latent(asked(bare, tied, kept=node)), running.latent(asked(bare, tied)))
    expect("a prompt that says nothing else is drawn as ever", same, True)
    node["inputs"] = {"keep": True}
    told = running.error(asked(said, tied, sampler="dpm_adaptive", kept=node))
    expect(told.strip()[:90] + "...", "takes other steps than without" in told, True)


def with_weights(running: ComfyUI, pipe: StableDiffusionPipeline, files: dict[str, Path]) -> None:
    """ComfyUI's own weights, chunks and BREAK: its text states, given to diffusers, draw the same."""
    load_adapter(pipe, files["tied"], "tied")

    def conditioned(text: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        save = {
            "class_type": "SaveConditioning",
            "inputs": {"conditioning": ["positive", 0], "name": "text.safetensors"},
        }
        latent = running.latent(graph(text, ("tied", 1.0), encode="ComcatTextEncode", probe=save))
        found = safetensors.torch.load_file(running.base / "output" / "text.safetensors")
        return latent, found["states"], found["acts"].bool()

    latent, states, acts = conditioned("a photo of (sks dog:1.3) in (snow:0.8)")
    empty = pipe.encode_prompt("", "cpu", 1, False)[0]
    remember_prompts(pipe, states, ["a photo of sks dog in snow"])
    given = {"prompt_embeds": states, "negative_prompt_embeds": empty}
    check("words with weights", latent, drawn(pipe, None, **given))
    expect("acts from the weighted word on", acts.tolist(), [False] * 4 + [True] * 73)
    _, states, acts = conditioned("a photo BREAK a big sks dog BREAK snow")
    expected = [False] * 77 + [False] * 3 + [True] * 74 + [False] * 77
    expect("acts in the chunk with the word alone", (states.shape[1], acts.tolist()), (231, expected))
    _, states, acts = conditioned("a " * 80 + "sks dog")
    expect("a long prompt is two chunks", (states.shape[1], int(acts.sum())), (154, 77 - 1 - 5))
    for text in ("masks, sks1 and tusks", "a dog"):
        expect(f"nothing acts in '{text}'", conditioned(text)[2].any().item(), False)
    unload_adapters(pipe)


def as_lora(running: ComfyUI, pipe: StableDiffusionPipeline, files: dict[str, Path]) -> None:
    """Save as LoRA, loaded by ComfyUI's own loader."""
    load_adapter(pipe, files["everywhere"], "everywhere")
    said, inputs = (
        "a photo of a cat",
        {"model": ["base", 0], "adapter": "one/everywhere.safetensors", "name": "exported"},
    )
    asked = graph(said)
    asked["lora"] = {"class_type": "ComcatSaveLora", "inputs": inputs}
    running.latent(asked)
    wired = {"lora_name": "exported.safetensors", "strength_model": 1.0, "strength_clip": 1.0}
    loader = {"class_type": "LoraLoader", "inputs": wired | {"model": ["base", 0], "clip": ["base", 1]}}
    asked = graph(said, loader=loader)
    asked["draw"]["inputs"]["model"] = ["loader", 0]
    for name in ("positive", "negative"):
        asked[name]["inputs"]["clip"] = ["loader", 1]
    before = len(running.log.read_text())
    check("as a LoRA, by ComfyUI's own loader", running.latent(asked), drawn(pipe, said))
    expect("every weight of the LoRA is read", "NOT LOADED" in running.log.read_text()[before:], False)
    own = drawn(pipe, "a photo of sks dog")
    for adapter in ("tied", "cores"):
        load_adapter(pipe, files[adapter], adapter)
        pipe.unet.set_adapters(["everywhere", adapter])
        expected = drawn(pipe, "a photo of sks dog")
        for order, first, then in (("before", "loader", adapter), ("after", adapter, "loader")):
            asked = graph("a photo of sks dog", (adapter, 1.0), loader=loader)
            asked[first]["inputs"] |= {"model": ["base", 0], "clip": ["base", 1]}
            asked[then]["inputs"] |= {"model": [first, 0], "clip": [first, 1]}
            asked["draw"]["inputs"]["model"] = [then, 0]
            for name in ("positive", "negative"):
                asked[name]["inputs"]["clip"] = [then, 1]
            check(f"a LoRA {order} the adapter ({adapter})", running.latent(asked), expected, own)
        unload_adapters(pipe)
        load_adapter(pipe, files["everywhere"], "everywhere")
    unload_adapters(pipe)


def mistakes(running: ComfyUI, pipe: StableDiffusionPipeline, files: dict[str, Path]) -> None:
    """What is wrong is one sentence at the node that it is wrong in."""
    other = StableDiffusionPipeline(**{**pipe.components, "unet": UNet2DConditionModel.from_config(pipe.unet.config)},
                                    requires_safety_checker=False)  # fmt: skip
    other.unet.add_adapter(ComcatConfig(r=1), "x")
    save_adapter(other, files["tied"].with_name("other.safetensors"), "x", "somebody/else")
    files["tied"].with_name("damaged.safetensors").write_bytes(files["tied"].read_bytes()[:5000])
    for name, said in (("other", "was trained on 'somebody/else'"), ("damaged", "is damaged or cut short")):
        told = running.error(graph("sks", (name, 1.0)))
        expect(f"{name}: {told.strip()[:90]}...", said in told, True)
    told = running.error(graph("sks", ("tied", 1.0)) | {"positive": graph("sks")["positive"]})
    expect(told.strip()[:110] + "...", "does not say what it was made of" in told, True)


def example(running: ComfyUI, files: dict[str, Path]) -> None:
    """The workflow that comes with the nodes runs, with names of files that are here."""
    asked = json.loads((ROOT / "integrations" / "comfyui" / "comcat-api.json").read_text())
    for node in asked.values():
        node["inputs"] |= {"ckpt_name": "one.safetensors"} if "ckpt_name" in node["inputs"] else {}
        node["inputs"] |= {"adapter": "one/tied.safetensors"} if "adapter" in node["inputs"] else {}
        node["inputs"] |= (
            {"width": SIDE, "height": SIDE, "steps": 1} if {"width", "steps"} & node["inputs"].keys() else {}
        )
    drop = [name for name, node in asked.items() if node["class_type"] in ("VAEDecode", "SaveImage")]
    (draw,) = [name for name, node in asked.items() if node["class_type"] == "KSampler"]
    asked = {name: node for name, node in asked.items() if name not in drop}  # this base has no VAE
    asked["save"] = {"class_type": "SaveLatent", "inputs": {"samples": [draw, 0], "filename_prefix": "latent"}}
    expect("the example draws", running.latent(asked).isfinite().all().item(), True)


def expect(name: str, found: object, expected: object) -> None:
    """Compare what is no picture."""
    print(f"{name}: {'yes' if found == expected else found}", flush=True)
    if found != expected:
        raise SystemExit(f"{name}: {found} instead of {expected}.")


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve(), tuple(sys.argv[2:]) or PARTS)
