"""How much of DINOv2-small's features is left, on photographs of which nothing was calibrated on.

    python -m benchmarks.features --methods output energy uniform matrix       # make dinov2 photographs, once before

Every way of choosing gets the same crops of the same photographs. Judged are the cosines of the class token and of the
patches to the dense model's, on crops of other photographs, and k-NN: whether the nearest class token among all other
test crops is one of the same photograph. What is measured stays in the JSON whatever happens to the rest.
"""

import argparse
import functools
import json
import random
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn

from benchmarks import circumstances as shared
from benchmarks import dinov2, photographs
from comcat_diffusion.compression import Settings, compress, cost, load_compressed, save_compressed
from comcat_diffusion.compression.by_output import Measured
from comcat_diffusion.compression.classifier import load_classifier
from comcat_diffusion.compression.finetune import OF_FEATURES
from comcat_diffusion.compression.learning import learned
from comcat_diffusion.compression.pictures import Batches, Shot
from comcat_diffusion.compression.plan import Plan
from comcat_diffusion.compression.planning import count, plan_of
from comcat_diffusion.compression.vision import FEATURES_RATE

BATCH, PIXELS = 16, 224
LEARNED = 8  # crops a step of the fine-tuning: few crops give more steps so
GOALS = (("attention", 0.4), ("attention", 0.6), ("model", 0.44), ("model", 0.61))  # measured first
BUDGETS = (*GOALS, ("attention", 0.2), ("attention", 0.8), ("model", 0.3), ("model", 0.75))
METHODS = ("output", "energy", "uniform", "matrix")


def main(arguments: list[str] | None = None) -> None:
    """Measure, write the JSON, print the table."""
    flags = command_line().parse_args(arguments)
    if flags.show:
        print("\n\n".join(table(json.loads(path.read_text())) for path in flags.show))
        return
    shared.use_threads(flags.threads)
    device = torch.device(flags.device)
    path = flags.output or shared.results_path("features-dinov2", device)
    sets = {
        "calibration": calibrating(flags.photographs, flags.more),
        "test": sorted((photographs.FOLDER / "test").iterdir()),
    }
    report = {"circumstances": shared.circumstances(device, torch.float32), "rows": []}
    for name in ("more", "learn_more"):
        folders = getattr(flags, name)
        report |= {name: " and ".join(folder.name for folder in folders)} if folders else {}
    report |= {"crops": flags.crops, "photographs": {name: len(found) for name, found in sets.items()}}
    for row in rows(flags, sets, device):
        report["rows"].append(row)
        shared.write_json(path, report)
    print(table(report))


def command_line() -> argparse.ArgumentParser:
    """The flags."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.features", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS, help="default: all")
    parser.add_argument("--parts", nargs="+", choices=("attention", "model"), default=("attention", "model"))
    parser.add_argument("--removed", nargs="+", type=float, help="fractions removed (default: four of each part)")
    parser.add_argument("--crops", type=int, default=24, help="of each calibration photograph (default: %(default)s)")
    parser.add_argument("--photographs", type=int, help="of so many to calibrate on (default: all of that folder)")
    parser.add_argument("--test_crops", type=int, default=4, help="of each test photograph (default: %(default)s)")
    parser.add_argument("--plans", type=Path, metavar="JSON", help="the widths of an earlier run, not chosen anew")
    parser.add_argument("--finetune", type=int, default=0, help="passes over fresh crops, one a photograph and pass")
    parser.add_argument("--learn", type=int, metavar="N", help="of so many photographs (default: those calibrated on)")
    parser.add_argument(
        "--more", type=Path, nargs="+", metavar="FOLDER", help="where photographs beyond the usual sixteen are taken"
    )
    parser.add_argument(
        "--learn_more", type=Path, nargs="+", metavar="FOLDER", help="likewise, for learning (default: those of --more)"
    )
    parser.add_argument(
        "--rate", type=float, default=FEATURES_RATE, help="learning rate of these (default: %(default)s)"
    )
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="put models here; a run that was cut goes on")
    parser.add_argument("--device", default="cpu", help="torch device (default: %(default)s)")
    parser.add_argument("--threads", type=int, help="CPU threads (default: as many as torch finds)")
    parser.add_argument("--output", type=Path, help="the JSON (default: one in benchmarks/results)")
    parser.add_argument("--show", type=Path, nargs="+", metavar="JSON", help="print the tables of earlier runs")
    return parser


def rows(flags: argparse.Namespace, sets: dict[str, list[Path]], device: torch.device) -> Iterator[dict]:
    """A row for every budget and method, and one more for each that learned from the dense model afterwards."""
    dense = dinov2.dense().to(device)
    seen = crops(sets["calibration"], flags.crops, seed=0).to(device).split(BATCH)
    test = crops(sets["test"], flags.test_crops, seed=1).to(device).split(BATCH)
    whose = torch.arange(len(sets["test"])).repeat(flags.test_crops)
    wanted = features(dense, test)
    yield {"part": "dense", "neighbours": neighbours(wanted, whose)} | work(dense)
    measured = functools.cache(lambda: Measured(dense, seen))  # not where all models were kept

    def judged(small: nn.Module) -> dict[str, float]:
        found = features(small, test)
        cosine = torch.cosine_similarity(found, wanted, dim=-1)  # pictures, tokens
        alike = {"class_token": float(cosine[:, 0].mean()), "patches": float(cosine[:, 1:].mean())}
        return alike | {"neighbours": neighbours(found, whose)} | work(small)

    for part, removed in budgets(flags):
        for method in flags.methods:
            parts = {"parts": ("attention",), "counted": "parts"} if part == "attention" else {}
            settings, started = Settings(method=method, **parts), time.perf_counter()
            name = f"{part}-{removed}-{method}-{len(sets['calibration'])}x{flags.crops}"
            kept = flags.keep and flags.keep / name
            taken = kept is not None and kept.exists()
            if taken:
                small, plan = load_compressed(kept)
            elif method == "output":  # what was measured serves every budget
                earlier = None if flags.plans is None else planned(dense, flags.plans, removed, settings)
                plan = earlier or measured().plan(removed, settings)
                small = measured().fitted(plan)
            else:
                small, plan = compress(dense, removed, seen, settings=settings)
            if kept is not None and not taken:
                save_compressed(small, plan, kept)
            row = {"part": part, "removed": removed, "method": method}
            row |= {} if taken else {"seconds": time.perf_counter() - started}
            yield row | judged(small) | {"widths": plan.widths}
            if flags.finetune:
                started, busy = time.perf_counter(), time.process_time()
                shown = calibrating(flags.learn or flags.photographs, flags.learn_more or flags.more)
                small = finetuned(small, dense, shown, flags, kept)
                row |= {"finetuned_on": flags.finetune * len(shown), "of_photographs": len(shown), "rate": flags.rate}
                row |= {"seconds": time.perf_counter() - started, "cpu_seconds": time.process_time() - busy}
                yield row | judged(small) | {"widths": plan.widths}


def calibrating(count: int | None, more: Sequence[Path] | None = None) -> list[Path]:
    """The photographs to calibrate on, or some of them at random: always the same, and fewer are among more.

    Beyond those there are, of the folders `more` as well. Raises ValueError if there are not so many.
    """
    found = sorted((photographs.FOLDER / "calibration").iterdir())
    if count is None:
        return found
    random.Random(0).shuffle(found)
    if count > len(found):
        folders = [sorted(folder.iterdir()) for folder in more or [photographs.FOLDER / "more"]]
        others = [path for inside in folders for path in inside if path.suffix.lower() in Image.registered_extensions()]
        random.Random(0).shuffle(others)
        found += others
    if not 0 < count <= len(found):
        raise ValueError(f"--photographs {count}: there are {len(found)} (python -m benchmarks.photographs).")
    return found[:count]


def budgets(flags: argparse.Namespace) -> list[tuple[str, float]]:
    """(part, fraction removed), the goals first."""
    asked = [(part, removed) for part in flags.parts for removed in flags.removed or ()]
    return asked or [budget for budget in BUDGETS if budget[0] in flags.parts]


def planned(dense: nn.Module, path: Path, removed: float, settings: Settings) -> Plan:
    """The plan of an earlier run. Raises ValueError if it has none for this budget."""
    part = "model" if settings.parts is None else "attention"
    for row in json.loads(path.read_text())["rows"]:
        if (row["part"], row.get("removed"), row.get("method")) == (part, removed, "output"):
            units = cost.named(dense, settings.parts or cost.BLOCK_PARTS, row["widths"])
            return plan_of(dense, units, row["widths"], removed, settings)
    raise ValueError(f"{path} has no plan for {removed:.0%} of the {part}: leave --plans out to choose one.")


def finetuned(
    small: nn.Module, dense: nn.Module, paths: Sequence[Path], flags: argparse.Namespace, kept: Path | None
) -> nn.Module:
    """What has learned from the dense model, as `comcat compress --finetune_epochs N --random_crop` does."""
    state = None if kept is None else kept.with_name(f"{kept.name}.learning.safetensors")
    processor = load_classifier(str(dinov2.FOLDER)).processor
    batches = Batches([Shot(path) for path in paths], LEARNED, processor, flags.finetune, 0, cropped=True)
    told = lambda step: print(f"step {step.step}: loss {step.loss:.4f}", flush=True)  # noqa: E731
    return learned(small, dense, batches, OF_FEATURES, flags.rate, 0, state, told)[0]


@torch.no_grad()
def features(model: nn.Module, batches: Sequence[torch.Tensor]) -> torch.Tensor:
    """(pictures, tokens, channels)."""
    return torch.cat([model(pixel_values=batch).last_hidden_state.cpu() for batch in batches])


def crops(paths: Sequence[Path], each: int, seed: int) -> torch.Tensor:
    """(each * photographs, 3, 224, 224): squares of half to all of the shorter side, of each in turn."""
    chance, made = random.Random(seed), []
    pictures = [Image.open(path).convert("RGB") for path in paths]
    mean, std = (np.array(values, np.float32) for values in (dinov2.MEAN, dinov2.STD))
    for _ in range(each):
        for picture in pictures:
            side = min(picture.size) * chance.uniform(0.5, 1.0)
            x, y = (chance.uniform(0, length - side) for length in picture.size)
            square = picture.resize((PIXELS, PIXELS), Image.Resampling.BICUBIC, box=(x, y, x + side, y + side))
            made.append(torch.from_numpy((np.asarray(square, np.float32) / 255 - mean) / std).permute(2, 0, 1))
    return torch.stack(made)


def neighbours(found: torch.Tensor, whose: torch.Tensor) -> float:
    """The part of the crops whose nearest other crop, by class token, is of the same photograph."""
    tokens = nn.functional.normalize(found[:, 0], dim=-1)
    near = (tokens @ tokens.mT).fill_diagonal_(-1).argmax(-1)
    return float((whose[near] == whose).float().mean())


def work(model: nn.Module) -> dict[str, float]:
    """Parameters and multiply-adds of one picture."""
    one = {"pixel_values": torch.zeros(1, 3, PIXELS, PIXELS, device=next(model.parameters()).device)}
    return {"parameters": count(model), "multiply_adds": cost.multiply_adds(model, one)}


def table(report: dict) -> str:
    """As markdown, with the circumstances."""
    columns = ["removed", "chosen by", "class token", "patches", "neighbours", "M parameters", "G multiply-adds", "s"]
    cells = []
    for row in sorted(report["rows"], key=lambda row: (row["part"] != "dense", row["part"], row.get("removed"))):
        size = [f"{row['parameters'] / 1e6:.2f}", f"{row['multiply_adds'] / 1e9:.2f}"]
        near = f"{row['neighbours']:.0%}"
        if row["part"] == "dense":
            cells.append(["nothing", "", "1", "1", near, *size, ""])
            continue
        whose = "of the attentions" if row["part"] == "attention" else "of the model"
        alike_ = [f"{row['class_token']:.3f}", f"{row['patches']:.3f}"]
        how = row["method"]
        if "finetuned_on" in row:
            how += f", then {row['finetuned_on']:,} crops of {row['of_photographs']} photographs"
        took = f"{row['seconds']:.0f}" if "seconds" in row else ""
        cells.append([f"{row['removed']:.0%} {whose}", how, *alike_, near, *size, took])
    sets = report["photographs"]
    without = "" if any("finetuned_on" in row for row in report["rows"]) else " no fine-tuning;"
    crops_ = "1 crop" if report["crops"] == 1 else f"{report['crops']} crops"
    title = (
        f"DINOv2-small,{without} calibrated on {crops_} of each of {sets['calibration']} "
        f"photographs, judged on {sets['test']} others:"
    )
    if "more" in report:
        title = f"{title[:-1]}; photographs beyond the sixteen are those of {report['more']}:"
    if "learn_more" in report:
        title = f"{title[:-1]}, those learned from of {report['learn_more']}:"
    return "\n\n".join(
        [title, shared.markdown_table(columns, cells), shared.circumstances_text(report["circumstances"])]
    )


if __name__ == "__main__":
    main()
