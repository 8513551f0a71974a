"""What a training step of the default costs beside one of a LoRA: `python -m benchmarks.pace`, two minutes on one core.

The embedded base, four pictures a step, float32, one thread. All take turns, five steps each, and what is counted is
CPU time, so that other work on the machine makes little difference; the ratio to the LoRA is a median over rounds.
"""

import argparse
import statistics
import time

import torch
from peft import LoraConfig

from benchmarks import circumstances as shared
from benchmarks.by_script import started
from benchmarks.customization_runs import crop_of
from comcat_diffusion import ComcatConfig, bases, listen
from comcat_diffusion.attentions import DIFFUSERS
from comcat_diffusion.training.learned import SELF_AND_CROSS
from comcat_diffusion.training.loop import Loop
from recipe.subject import TRAIN, TRIGGER, picture

NAME, STEPS = "subject", 5  # a turn
LORA = "LoRA r=16 on all projections"
ADAPTERS = {
    LORA: LoraConfig(r=16, lora_alpha=16, init_lora_weights="gaussian", target_modules=DIFFUSERS.names),
    "free, rank 8, both attentions (the default)": ComcatConfig(r=8, trigger=[TRIGGER], target_modules=SELF_AND_CROSS),
    "free, rank 8, cross-attention": ComcatConfig(r=8, trigger=[TRIGGER]),
}


def taught(config: LoraConfig | ComcatConfig) -> Loop:
    """A training on a base of its own, before its first step."""
    pipe, prompt = bases.load_base(bases.EMBEDDED), f"a photo of {TRIGGER} robot"
    crops = [crop_of(pipe, picture("robot", pose), prompt) for pose in TRAIN]
    pipe.unet.requires_grad_(False)
    pipe.unet.add_adapter(config, NAME)
    if isinstance(config, ComcatConfig):
        listen(pipe)
    return started(pipe, crops, rate=1e-3, seed=0)


def measured(rounds: int) -> list[dict]:
    """Each adapter's CPU milliseconds of a step, and its ratio to the LoRA's."""
    loops = {name: taught(config) for name, config in ADAPTERS.items()}
    times: dict[str, list[float]] = {name: [] for name in loops}
    for turn in range(rounds + 1):
        for name, loop in loops.items():
            start = time.process_time()
            for _ in loop.steps((turn + 1) * STEPS, turn * STEPS):
                pass
            times[name].append((time.process_time() - start) / STEPS)
    warm = {name: found[1:] for name, found in times.items()}  # the first turn makes what the others find
    return [
        {
            "adapter": name,
            "milliseconds": round(1000 * statistics.median(found), 1),
            "ratio": round(statistics.median(own / lora for own, lora in zip(found, warm[LORA], strict=True)), 3),
        }
        for name, found in warm.items()
    ]


def table(report: dict) -> str:
    """The rows, and where they were measured."""
    cells = [(row["adapter"], f"{row['milliseconds']:.0f}", f"{row['ratio']:.2f}") for row in report["rows"]]
    made = shared.markdown_table(["a training step", "CPU ms", "of the LoRA's"], cells)
    return f"{made}\n\n{shared.circumstances_text(report['circumstances'])}"


def main(arguments: list[str] | None = None) -> None:
    """Measure, write, show."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=8)
    asked = parser.parse_args(arguments)
    shared.use_threads(1)
    report = {"circumstances": shared.circumstances(torch.device("cpu"), torch.float32), "rows": measured(asked.rounds)}
    shared.write_json(shared.results_path("pace", torch.device("cpu")), report)
    print(table(report))


if __name__ == "__main__":
    main()
