"""What a training run costs, from a folder of pictures to an adapter file, in time and memory.

    python -m benchmarks.training            # SD 1.5 at 512 px; estimated: ten minutes on two idle CPU cores, 16 GB of
                                             # memory, 8 GB of disk in the temporary folder (TMPDIR)
    python -m benchmarks.training --quick    # a tiny architecture at 64 px: under a minute
    python -m benchmarks.training --show F   # the tables of an earlier run

Two parts:

- recipe: our `customize()` against diffusers' DreamBooth-LoRA recipe as it works, written from its description:
  every step opens a picture, encodes it with the VAE and the prompt with the text encoder, and trains a LoRA of rank 4
  on to_q, to_k, to_v, to_out.0 of all attentions. Same base (SD 1.5's architecture, random weights), same pictures,
  steps and batch. Each runs in a process of its own, and they take turns step by step. What is measured is a run of a
  few steps; a run of 400 is extrapolated from it and called so, as are runs after which the embedded base draws a
  subject equally well, the recipe's at its script's own rate (benchmarks.customization). Each computes in its own
  default precision, the script in float32, ours in what the device is fast in, or both in --dtype. Both end with the
  adapter file: neither draws samples, ours also proves its file on a base loaded again (the recipe's script loads one
  again too; that is not counted here).
- pictures: start-up and step time of ours against the number of pictures, on the embedded base at 64 px, at the first
  start and at the second, which finds latents in --cache_dir. Every start is a process of its own.

The goals: at most 0.65 of the recipe's time at equal steps, 0.38 of it at equal fidelity, 0.6 of its peak memory, a
step time that does not grow with the pictures, and a second start in at most 0.2 of the first.
"""

import argparse
import json
import math
import shutil
import statistics
import tempfile
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from benchmarks import circumstances as shared
from benchmarks import variants
from benchmarks.training_clock import ENCODE, LOOK
from benchmarks.training_report import extrapolated, plot, tables
from benchmarks.training_runs import PRECISIONS, PROMPT, Settings, ours, quiet, recipe
from comcat_diffusion import bases
from comcat_diffusion.training.config import TrainConfig

PARTS = ("recipe", "pictures")
WHOLE_RUN = 400  # steps of the run that is extrapolated: our default
TARGETS = {  # of our adapter; `self+cross` is its default
    "cross": {"target_modules": ["attn2"]},
    "up": {"up_blocks_only": True},
    "self+cross": {},
}
# Slow to import, so imported once for all processes; what a run loads of the libraries only when it needs it is left.
MODULES = ("comcat_diffusion.training.customize", "benchmarks.variants", "diffusers.pipelines.stable_diffusion")
TINY_UNET = {
    "sample_size": 8,
    "block_out_channels": (16, 32, 32, 32),
    "norm_num_groups": 8,
    "cross_attention_dim": 32,
    "attention_head_dim": 2,
}


def main(arguments: list[str] | None = None) -> None:
    """Measure, write the JSON, print its tables."""
    flags = command_line().parse_args(arguments)
    if flags.show:
        print(tables(json.loads(flags.show.read_text())))
        return
    settings = settings_of(flags)
    shared.use_threads(settings.threads)
    quiet()
    path = flags.output or shared.results_path("training-quick" if flags.quick else "training", settings.device)
    report = {
        "circumstances": shared.circumstances(settings.device, settings.dtype or "each in its default precision"),
        "settings": {
            "architecture": "tiny" if settings.tiny else "SD 1.5",
            **{name: getattr(settings, name) for name in ("resolution", "batch", "steps", "targets")},
        },
        "rows": [],
    }
    measures = {"recipe": recipe_rows, "pictures": picture_rows}
    for part in settings.parts:
        report["rows"] += measures[part](settings)
        shared.write_json(path, report)  # a later part that fails takes nothing away
    if "pictures" in settings.parts:
        plot(report, path.with_suffix(".png"))
    print(tables(json.loads(path.read_text())))
    print(f"\nWritten to {path}")


def command_line() -> argparse.ArgumentParser:
    """The flags; a default that depends on --quick is None."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.training", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where (default: %(default)s)")
    parser.add_argument("--dtype", choices=shared.DTYPES, help="precision of both (default: of each its own default)")
    parser.add_argument("--threads", type=int, help="CPU threads (default: as many as torch finds)")
    parser.add_argument("--resolution", type=int, help="pixels, a multiple of 64 (default: 512, with --quick 64)")
    parser.add_argument("--batch", type=int, default=1, help="pictures a step (default: %(default)s)")
    parser.add_argument("--steps", type=int, help="steps of the recipe part (default: 6, with --quick 3)")
    parser.add_argument("--pictures", type=int, nargs="+", help="numbers (default: 4 32 256 1000, with --quick 4 32)")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="what to measure (default: all)")
    parser.add_argument(
        "--targets",
        choices=TARGETS,
        default="self+cross",
        help="what ours adapts (default: %(default)s-attention, its own; up is that in the way up)",
    )
    parser.add_argument("--gradient_checkpointing", action="store_true", help="in ours, which then recomputes")
    parser.add_argument("--quick", action="store_true", help="tiny and short: shows that it runs, not what it costs")
    parser.add_argument("--output", type=Path, help="the JSON (default: benchmarks/results/training-DEVICE.json)")
    parser.add_argument("--show", type=Path, metavar="JSON", help="print the tables of an earlier run and stop")
    return parser


def settings_of(flags: argparse.Namespace) -> Settings:
    """The flags as settings."""
    return Settings(
        device=torch.device(flags.device),
        dtype=shared.DTYPES.get(flags.dtype),
        threads=flags.threads,
        tiny=flags.quick,
        resolution=flags.resolution or (64 if flags.quick else 512),
        batch=flags.batch,
        steps=flags.steps or (3 if flags.quick else 6),
        small_steps=4 if flags.quick else 20,
        pictures=tuple(sorted(flags.pictures or ((4, 32) if flags.quick else (4, 32, 256, 1000)))),
        parts=tuple(part for part in PARTS if part in flags.parts),
        targets=flags.targets,
        gradient_checkpointing=flags.gradient_checkpointing,
    )


def build_base(folder: Path, tiny: bool) -> Path:
    """SD 1.5's architecture, or a tiny one of its layout, with random weights, as a diffusers folder.

    No CLIP vocabulary comes with this project, so the tokenizer is the embedded base's: the table of token embeddings
    has some 700 rows instead of 49,408, all else is of full size.
    """
    words = CLIPTokenizer.from_pretrained(bases.assets() / "tiny-sd" / "tokenizer", model_max_length=77)
    width, layers, levels = (32, 2, (8, 16, 16, 16)) if tiny else (768, 12, (128, 256, 512, 512))
    text = CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=width,
        intermediate_size=4 * width,
        projection_dim=width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64 or 1,
        max_position_embeddings=words.model_max_length,
        bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        vae = AutoencoderKL(
            block_out_channels=levels,
            down_block_types=("DownEncoderBlock2D",) * len(levels),
            up_block_types=("UpDecoderBlock2D",) * len(levels),
            layers_per_block=2,
            latent_channels=4,
            norm_num_groups=8 if tiny else 32,
            sample_size=512,
        )
        unet = UNet2DConditionModel(**TINY_UNET) if tiny else variants.bare_unet(torch.device("cpu"), torch.float32)
        encoder = CLIPTextModel(text)
    StableDiffusionPipeline(
        vae=vae,
        text_encoder=encoder,
        tokenizer=words,
        unet=unet,
        scheduler=DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    return folder


def make_pictures(folder: Path, count: int, size: tuple[int, int], suffix: str) -> Path:
    """Soft random colours, no two pictures alike; `size` is (width, height)."""
    folder.mkdir(parents=True)
    for number in range(count):
        coarse = np.random.default_rng(number).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize(size, Image.BICUBIC).save(folder / f"{number:04d}{suffix}")
    return folder


def config_of(settings: Settings, pictures: Path, folder: Path, **more: object) -> TrainConfig:
    """Settings of a run of ours that ends, as the recipe's, with a float32 file."""
    return TrainConfig(
        instance_data_dir=str(pictures),
        instance_prompt=PROMPT,
        output_dir=str(folder),
        mixed_precision=PRECISIONS.get(settings.dtype),
        save_precision="fp32",
        max_bytes=0,
        skip_final_inference=True,
        gradient_checkpointing=settings.gradient_checkpointing,
        **TARGETS[settings.targets],
        **more,
    )


def recipe_rows(settings: Settings) -> list[dict]:
    """Ours and the recipe, and a row that compares them."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        base = build_base(folder / "base", settings.tiny)
        # Its own files: pages that two processes have mapped leave the memory of neither.
        other = shutil.copytree(base, folder / "recipe's base")
        side = settings.resolution
        photos = make_pictures(folder / "pictures", 4, (3 * side // 2, 2 * side), ".jpg")
        more = {"resolution": side, "train_batch_size": settings.batch, "max_train_steps": settings.steps}
        config = config_of(settings, photos, folder / "ours", pretrained_model_name_or_path=str(base), **more)
        jobs = {"ours": (ours, settings, config), "recipe": (recipe, settings, other, photos, folder / "recipe")}
        told = shared.taking_turns(jobs, MODULES)
    require_training(told, settings.steps)
    for one in told.values():
        del one["file"]
        later = [step["seconds"] for step in one["steps"][1:]]
        one |= {"first_step_seconds": one["steps"][0]["seconds"], "step_seconds": statistics.median(later)}
        one |= {"extrapolated_steps": WHOLE_RUN, "extrapolated_seconds": extrapolated(one, WHOLE_RUN)}
    told["ours"]["adapts"], told["recipe"]["adapts"] = settings.targets, "self+cross"
    return [{"part": "recipe", "variant": name, **one} for name, one in told.items()] + [compared(**told)]


def compared(ours: dict, recipe: dict) -> dict:
    """Ratios of ours to the recipe; those of steps within the same round, the first one left out."""
    pairs = zip(ours["steps"][1:], recipe["steps"][1:], strict=True)
    ratios = [mine["seconds"] / other["seconds"] for mine, other in pairs]
    names = ("total_seconds", "extrapolated_seconds", "peak_mib_of_steps", "peak_mib", "parameters", "file_bytes")
    row = {"part": "recipe", "variant": "ratio", "step_seconds": statistics.median(ratios), "step_ratios": ratios}
    return row | {name: ours[name] / recipe[name] for name in names}


def require_training(told: dict[object, dict], steps: int) -> None:
    """Raise RuntimeError unless all runs did the same work and learned something by it."""
    for name, one in told.items():
        counts = {len(one["steps"]), len(one["losses"]), one["forwards"]}
        if counts != {steps}:
            raise RuntimeError(f"'{name}' was to take {steps} steps and took {sorted(counts)}.")
        numbers = [*one["losses"], *one["gradient_norms"], one["moved"]]
        if not all(math.isfinite(number) and number > 0 for number in numbers):
            raise RuntimeError(f"'{name}' did not train: losses, gradient norms and movement are {numbers}.")
    sizes = {name: one["latents"] for name, one in told.items()}
    if len({tuple(size) for size in sizes.values()}) > 1:
        raise RuntimeError(f"The runs trained on latents of different sizes: {sizes}.")


def picture_rows(settings: Settings) -> list[dict]:
    """Starts and steps on the embedded base by the number of pictures, without and with latents in the cache."""
    rows, fewest = [], settings.pictures[0]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folders = {n: make_pictures(folder / f"pictures-{n}", n, (64, 64), ".png") for n in settings.pictures}
        starts = {}
        for start in ("first", "second"):
            jobs = {}
            for n, pictures in folders.items():
                more = {"train_batch_size": min(4, fewest), "max_train_steps": settings.small_steps}
                more["cache_dir"] = str(folder / f"cache-{n}")
                jobs[n] = ours, settings, config_of(settings, pictures, folder / f"{start}-{n}", **more)
            told = starts[start] = shared.taking_turns(jobs, MODULES)
            require_training(told, settings.small_steps)
            rows += [picture_row(n, start, told[n], told[fewest], starts["first"][n]) for n in folders]
        if settings.device.type == "cpu":
            require_same_adapters(starts["first"], starts["second"])
    return rows


def require_same_adapters(first: dict[int, dict], second: dict[int, dict]) -> None:
    """Raise RuntimeError unless a run from the cache learns to the byte what the run that filled it learned."""
    for count, one in second.items():
        if Path(one["file"]).read_bytes() != Path(first[count]["file"]).read_bytes():
            raise RuntimeError(f"With {count} pictures the cache changes what is learned.")


def picture_row(count: int, start: str, told: dict, fewest: dict, first: dict) -> dict:
    """One run; step ratios are to the run on the fewest pictures in the same round, start ratios to the first start."""
    seconds, other = ([step["seconds"] for step in one["steps"][1:]] for one in (told, fewest))
    row = {"part": "pictures", "pictures": count, "start": start, "start_seconds": told["start_seconds"]}
    row |= {"pictures_seconds": pictures_seconds(told), "phases": told["phases"]}
    row |= {"start_ratio": told["start_seconds"] / first["start_seconds"]}
    row |= {"pictures_ratio": pictures_seconds(told) / pictures_seconds(first)}
    ratios = [mine / its for mine, its in zip(seconds, other, strict=True)]
    row |= {"step_seconds": statistics.median(seconds), "step_ratio": statistics.median(ratios), "step_ratios": ratios}
    return row | {"peak_mib_of_steps": told["peak_mib_of_steps"]}


def pictures_seconds(told: dict) -> float:
    """The share of a start that the pictures make: looking at them and encoding them (with the one prompt)."""
    return told["phases"][LOOK] + told["phases"][ENCODE]


if __name__ == "__main__":
    main()
