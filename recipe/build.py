"""Build the embedded base from nothing: `make base`, or

    python -m recipe.build --output assets/tiny-sd --state runs/base

Stages: VAE, CLIP, U-Net with its text encoder, then scores on 200 prompts never used in training. Each stage keeps a
checkpoint a minute in the state folder and goes on from it, so a cut costs a minute; `--further BASE` goes on from a
shipped base, `--stages` alone exports what there is. Needs Debian's `fonts-noto-color-emoji`.

Each stage trains on the GPU if there is one, in bfloat16, its updates launched as one CUDA graph. The shipped base was
made there from nothing, in nine minutes of an NVIDIA H200: 9, 5 and 18 ms a step, the U-Net's of 128 pictures. It is
the checkpoint of step 16,596 of 21,000, where the time on that machine was over. Without a GPU, expect, on two CPU
cores with bfloat16 instructions, a quarter of an hour for the VAE, 40 minutes for the CLIP and four hours for the U-Net
(0.7 s a step of 64). `assets/tiny-sd/scores.json` says what was reached: backgrounds, places and sizes 100 %, objects
96 %, VAE 34 dB, the CLIP itself 99 % on drawn scenes.
"""

import argparse
import json
import platform
import shutil
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file
from transformers import CLIPTextModel

from recipe import autoencoder, clip, unet
from recipe.fit import adopt, ema_weights
from recipe.score import GUIDANCE, held_out, scores
from recipe.score import STEPS as STEPS_DRAWN
from recipe.world import BACKGROUNDS, OBJECTS, PLACES, SIZES, TINTS, prompt

STEPS = {"vae": 3000, "clip": 5000, "unet": 21_000}


def text_tower(model: clip.CLIPModel) -> CLIPTextModel:
    """The text encoder of Stable Diffusion: the CLIP's text tower without its projection."""
    tower = CLIPTextModel(model.config.text_config)
    tower.load_state_dict(
        {
            name.removeprefix("text_model."): v
            for name, v in model.state_dict().items()
            if name.startswith("text_model.")
        }
    )
    return tower.eval()


def trained(state: Path) -> tuple:
    """Tokenizer, CLIP, VAE and denoiser with the EMA weights of their checkpoints; a stage without one stays random."""
    tokenizer = clip.new_tokenizer()
    whole, vae = clip.new_clip(tokenizer), autoencoder.new_autoencoder()
    if (state / "clip.pt").exists():
        ema_weights(whole, state / "clip.pt")
    denoiser = unet.new_denoiser(text_tower(whole))
    for model, checkpoint in ((vae, state / "vae.pt"), (denoiser, state / "unet.pt")):
        if checkpoint.exists():
            ema_weights(model, checkpoint)
    if (state / "latents.json").exists():
        vae.register_to_config(**json.loads((state / "latents.json").read_text()))
    return tokenizer, whole.eval(), vae.eval(), denoiser.eval()


def export(state: Path, output: Path) -> dict:
    """Write the base as a diffusers folder in fp16, its CLIP, its world, its scores and a preview sheet."""
    tokenizer, whole, vae, denoiser = trained(state)
    pipe = StableDiffusionPipeline(
        vae=vae,
        text_encoder=denoiser["text_encoder"],
        tokenizer=tokenizer,
        unet=denoiser["unet"],
        scheduler=unet.new_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    # What is measured is what is shipped: the weights as fp16 holds them.
    for model in (pipe.vae, pipe.text_encoder, pipe.unet, whole):
        model.half().float()
    pipe.set_progress_bar_config(disable=True)
    measured, made = scores(pipe, whole, tokenizer)
    shutil.rmtree(output, ignore_errors=True)
    for model in (pipe.vae, pipe.text_encoder, pipe.unet):
        model.half()
    pipe.save_pretrained(output)
    compute_in_float32(output / "text_encoder" / "config.json")
    whole.half().save_pretrained(output / "clip")
    clip.new_processor().save_pretrained(output / "clip")
    world = {"objects": list(OBJECTS), "backgrounds": BACKGROUNDS, "places": PLACES, "sizes": SIZES, "tints": TINTS}
    (output / "world.json").write_text(json.dumps(world, indent=1) + "\n")
    report = {"scores": measured, "steps": steps_taken(state), **circumstances()}
    (output / "scores.json").write_text(json.dumps(report, indent=1) + "\n")
    preview(made).save(output / "preview.png")
    (output / "prompts.txt").write_text("\n".join(prompt(scene) for scene in held_out()) + "\n")
    return report


def compute_in_float32(config: Path) -> None:
    """Let transformers raise the text encoder's weights to float32, as diffusers does with the other parts'."""
    told = json.loads(config.read_text())
    config.write_text(json.dumps({**told, "dtype": "float32"}, indent=2) + "\n")


def preview(made: np.ndarray) -> Image.Image:
    """The first forty pictures that the scores were read from, eight a row, at twice their size."""
    rows = made[:40].reshape(5, 8, *made.shape[1:]).transpose(0, 2, 1, 3, 4)
    sheet = Image.fromarray(rows.reshape(5 * made.shape[1], 8 * made.shape[2], 3))
    return sheet.resize((sheet.width * 2, sheet.height * 2), Image.BICUBIC)


def train_further(base: Path, state: Path) -> None:
    """Make a shipped base the starting point of every stage that has no checkpoint yet."""
    state.mkdir(parents=True, exist_ok=True)
    taken = json.loads((base / "scores.json").read_text())["steps"]
    scaling = json.loads((base / "vae" / "config.json").read_text())["scaling_factor"]
    (state / "latents.json").write_text(json.dumps({"scaling_factor": scaling}))
    tokenizer = clip.new_tokenizer()
    whole, vae = clip.new_clip(tokenizer), autoencoder.new_autoencoder()
    denoiser = unet.new_denoiser(text_tower(whole))
    shipped = {
        "clip": [(whole, "clip/model")],
        "vae": [(vae, "vae/diffusion_pytorch_model")],
        "unet": [
            (denoiser["unet"], "unet/diffusion_pytorch_model"),
            (denoiser["text_encoder"], "text_encoder/model"),
        ],
    }
    for (name, parts), stage in zip(shipped.items(), (whole, vae, denoiser), strict=True):
        if not (state / f"{name}.pt").exists():
            for model, file in parts:
                model.load_state_dict({key: v.float() for key, v in load_file(base / f"{file}.safetensors").items()})
            adopt(stage, taken[name], state / f"{name}.pt")


def steps_taken(state: Path) -> dict[str, int]:
    """Optimizer steps behind each stage's weights."""
    return {name: _saved(state / f"{name}.pt")["step"] for name in STEPS}


def _saved(checkpoint: Path) -> dict:
    """Without reading its weights, on whichever device they were trained."""
    return torch.load(checkpoint, weights_only=True, mmap=True, map_location="cpu")


def circumstances(sampler: str = "DDIM", guidance: float = GUIDANCE) -> dict:
    """Where and with what this was measured."""
    import diffusers

    return {
        "device": f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads",
        "measured": time.strftime("%Y-%m-%d"),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "dtype": "weights rounded to float16, computed in float32",
        "sampling": f"{STEPS_DRAWN} {sampler} steps, guidance {guidance}, one fixed seed per prompt",
    }


def main() -> None:
    """Train what is not trained yet, then export."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("assets/tiny-sd"))
    parser.add_argument("--state", type=Path, default=Path("runs/base"), help="folder of the checkpoints")
    parser.add_argument("--stages", nargs="*", choices=STEPS, default=list(STEPS), help="none: export only")
    for stage, steps in STEPS.items():
        parser.add_argument(f"--{stage}_steps", type=int, default=steps)
    parser.add_argument("--further", type=Path, metavar="BASE", help="train this shipped base further")
    asked = parser.parse_args()
    if asked.further:
        train_further(asked.further, asked.state)
    if "vae" in asked.stages:
        autoencoder.train(asked.state / "vae.pt", asked.vae_steps)
    if "clip" in asked.stages:
        clip.train(asked.state / "clip.pt", asked.clip_steps, trained(asked.state)[2])
    if "unet" in asked.stages:
        tokenizer, whole, vae, _ = trained(asked.state)
        unet.train(asked.state / "unet.pt", asked.unet_steps, vae, text_tower(whole), tokenizer)
    print(json.dumps(export(asked.state, asked.output), indent=1))


if __name__ == "__main__":
    main()
