"""What a step of training costs beside a LoRA's, and of drawing beside the base's: `python -m benchmarks.pace`.

The embedded base, four pictures a step, float32, one thread. All take turns, five steps each, and what is counted is
CPU time, so that other work on the machine makes little difference; ratios are medians over rounds.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Mapping
from functools import partial

import torch
from diffusers import StableDiffusionPipeline
from peft import LoraConfig

from benchmarks import circumstances as shared
from benchmarks.by_script import started
from benchmarks.customization_runs import crop_of
from comcat_diffusion import bases, keep_background, listen
from comcat_diffusion.attentions import DIFFUSERS
from comcat_diffusion.training.config import TrainConfig
from comcat_diffusion.training.learned import adapter_config
from comcat_diffusion.training.loop import Loop
from recipe.subject import TRAIN, TRIGGER, picture

NAME, STEPS = "subject", 5  # a turn
LORA = "LoRA r=16 on all projections"
DEFAULT = TrainConfig()
ADAPTERS = {
    LORA: LoraConfig(r=16, lora_alpha=16, init_lora_weights="gaussian", target_modules=DIFFUSERS.names),
    "free, rank 8, cross-attention and beside convolutions (the default)": DEFAULT,
    "free, rank 8, both attentions": TrainConfig(convolutions=0),
    "free, rank 8, cross-attention": TrainConfig(convolutions=0, target_modules=["attn2"]),
}


PROMPT = f"a photo of a big {TRIGGER} robot on the left, red background"
FREELY, KEPT = "the default's adapter, drawn freely", "the same, background kept"


def taught(config: LoraConfig | TrainConfig) -> Loop:
    """A training on a base of its own, before its first step."""
    pipe, prompt = bases.load_base(bases.EMBEDDED), f"a photo of {TRIGGER} robot"
    crops = [crop_of(pipe, picture("robot", pose), prompt) for pose in TRAIN]
    pipe.unet.requires_grad_(False)
    if isinstance(config, TrainConfig):
        with_adapter(pipe, config)
    else:
        pipe.unet.add_adapter(config, NAME)
    return started(pipe, crops, rate=1e-3, seed=0)


def with_adapter(pipe: StableDiffusionPipeline, config: TrainConfig) -> None:
    """Add the adapter that these settings train, which waits for the trigger."""
    pipe.unet.add_adapter(adapter_config(config, pipe.unet, [TRIGGER]), NAME)
    listen(pipe)


def learning(rounds: int) -> list[dict]:
    """Each adapter's CPU milliseconds of a training step, and its ratio to the LoRA's."""
    loops = {name: taught(config) for name, config in ADAPTERS.items()}

    def turn(name: str, number: int) -> None:
        for _ in loops[name].steps((number + 1) * STEPS, number * STEPS):
            pass

    return in_turns({name: partial(turn, name) for name in loops}, rounds)


def drawing(rounds: int) -> list[dict]:
    """CPU milliseconds of a step of drawing four pictures with guidance, and ratios to the base's."""
    base, pipe = bases.load_base(bases.EMBEDDED), bases.load_base(bases.EMBEDDED)
    with_adapter(pipe, DEFAULT)

    def turn(call: Callable, number: int) -> None:
        seeds = [torch.Generator().manual_seed(number + one) for one in range(4)]
        call(prompt=[PROMPT] * 4, num_inference_steps=STEPS, guidance_scale=bases.EMBEDDED_GUIDANCE, generator=seeds)

    for one in (base, pipe):
        one.set_progress_bar_config(disable=True)
    kept = partial(keep_background, pipe, {NAME: [f"{TRIGGER} robot", TRIGGER]})
    return in_turns(
        {name: partial(turn, call) for name, call in (("the base", base), (FREELY, pipe), (KEPT, kept))}, rounds
    )


def in_turns(turns: Mapping[str, Callable[[int], None]], rounds: int) -> list[dict]:
    """CPU milliseconds of a step of each, and its ratio to the first's; a turn is `STEPS` of them."""
    times: dict[str, list[float]] = {name: [] for name in turns}
    for number in range(rounds + 1):
        for name, turn in turns.items():
            start = time.process_time()
            turn(number)
            times[name].append((time.process_time() - start) / STEPS)
    warm = {name: found[1:] for name, found in times.items()}  # the first turn makes what the others find
    first = next(iter(warm.values()))
    return [
        {
            "what": name,
            "milliseconds": round(1000 * statistics.median(found), 1),
            "ratio": round(statistics.median(own / one for own, one in zip(found, first, strict=True)), 3),
        }
        for name, found in warm.items()
    ]


def table(report: dict) -> str:
    """The rows, and where they were measured."""
    made = []
    for what, beside in (("training", "LoRA's"), ("drawing", "base's")):
        cells = [(row["what"], f"{row['milliseconds']:.0f}", f"{row['ratio']:.2f}") for row in report[what]]
        made.append(shared.markdown_table([f"a step of {what}", "CPU ms", f"of the {beside}"], cells))
    return "\n\n".join([*made, shared.circumstances_text(report["circumstances"])])


def main(arguments: list[str] | None = None) -> None:
    """Measure, write, show."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=8)
    asked = parser.parse_args(arguments)
    shared.use_threads(1)
    report = {
        "circumstances": shared.circumstances(torch.device("cpu"), torch.float32),
    }
    report |= {"training": learning(asked.rounds), "drawing": drawing(asked.rounds)}
    shared.write_json(shared.results_path("pace", torch.device("cpu")), report)
    print(table(report))


if __name__ == "__main__":
    main()
