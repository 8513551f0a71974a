"""Build the flow-matching base on the first one's VAE and judge it by its CLIP: `make flow-base`, or

    python -m recipe.build_flow --output assets/tiny-flow --state runs/flow-base

One stage, which keeps a checkpoint every two minutes in the state folder and goes on from it; `--seconds` ends it where
it is then, and exports what there is. Needs Debian's `fonts-noto-color-emoji`. A step of 32 pictures takes 0.7 s of a
CPU core with bfloat16 instructions. The rate falls to a fiftieth at `--steps`. What is shipped was cut and went on:
to step 3,000 of 3,000, to some 5,800 of 10,000, to 8,000 of 8,000. Not yet run on a GPU, where a step is of 256.
"""

import argparse
import json
import math
import shutil
from pathlib import Path

import torch
from diffusers import Flux2KleinPipeline
from transformers import CLIPModel, CLIPTokenizer

from recipe import flow
from recipe.build import circumstances, compute_in_float32, preview
from recipe.fit import Schedule, ema_weights
from recipe.score import scores
from recipe.world import PIXELS

STEPS = 8_000
GUIDANCE = 2.0
CHECKPOINT = "flow.pt"


def pipeline(state: Path, first: Path) -> Flux2KleinPipeline:
    """With the EMA weights of a checkpoint, as fp16 holds them: what is measured is what is shipped."""
    tokenizer, vae = flow.new_tokenizer(), flow.klein_vae(first / "vae")
    model = flow.new_denoiser(tokenizer)
    ema_weights(model, state / CHECKPOINT)
    flow.normalized(vae, flow.encoded(vae, flow.pictures(flow.scenes(flow.POOL, seed=21), seed=22)))
    parts = {"vae": vae, **model}
    pipe = Flux2KleinPipeline(
        scheduler=flow.new_scheduler(),
        tokenizer=tokenizer,
        **{name: part.eval().half().float() for name, part in parts.items()},
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def drawing() -> dict[str, object]:
    """What the pipeline has to be told to draw with a base of this size."""
    layers = flow.STATES_AFTER
    return {"max_sequence_length": flow.TOKENS, "text_encoder_out_layers": layers, "height": PIXELS, "width": PIXELS}


def export(state: Path, first: Path, output: Path) -> dict:
    """Write the base as a diffusers folder in fp16, its scores by the first base's CLIP, and a preview sheet."""
    pipe = pipeline(state, first)
    whole = CLIPModel.from_pretrained(first / "clip", dtype=torch.float32)
    reader = CLIPTokenizer.from_pretrained(first / "tokenizer")
    measured, made = scores(pipe, whole, reader, GUIDANCE, **drawing())
    shutil.rmtree(output, ignore_errors=True)
    for model in (pipe.vae, pipe.text_encoder, pipe.transformer):
        model.half()
    pipe.save_pretrained(output)
    compute_in_float32(output / "text_encoder" / "config.json")
    step = torch.load(state / CHECKPOINT, weights_only=True, mmap=True, map_location="cpu")["step"]
    report = {"scores": measured, "steps": {"flow": step}, **circumstances("Euler", GUIDANCE)}
    (output / "scores.json").write_text(json.dumps(report, indent=1) + "\n")
    preview(made).save(output / "preview.png")
    return report


def main() -> None:
    """Train what is not trained yet, then export."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("assets/tiny-flow"))
    parser.add_argument("--state", type=Path, default=Path("runs/flow-base"), help="folder of the checkpoint")
    parser.add_argument("--first", type=Path, default=Path("assets/tiny-sd"), help="the base whose VAE and CLIP it has")
    parser.add_argument("--steps", type=int, default=STEPS, help="optimizer steps in all; none more: export only")
    parser.add_argument("--seconds", type=float, default=math.inf, help="end training after as long, wherever it is")
    asked = parser.parse_args()
    schedule = Schedule(
        asked.steps,
        learning_rate=2e-3,
        warmup_steps=100,
        ema_decay=0.998,
        checkpoint_seconds=120,
        limit_seconds=asked.seconds,
    )
    flow.train(asked.state / CHECKPOINT, flow.klein_vae(asked.first / "vae"), flow.new_tokenizer(), schedule)
    print(json.dumps(export(asked.state, asked.first, asked.output), indent=1))


if __name__ == "__main__":
    main()
