"""What an adapter costs on a few blocks of FLUX.2 [klein] 4B and of Stable Diffusion 3.5 medium, at their real widths.

    python -m benchmarks.blocks                    # a quarter of an hour on a CPU core, 4 GiB

Random weights in float32 on one thread: of klein a block of two streams and one of one, of 3.5 medium two blocks. A
step of drawing is a forward pass; one of training also goes back to the adapter, and of the frozen model as far: to
the text that comes into the first block. Adapters are where they are by default, rank 4, free ones 8. Seconds are one
core's (`time.process_time`), in rounds in which all kinds take turns, since other programs share the machine; ratios
are to the bare model's in the same round. Both are medians. `operations` are counted and not timed, a ratio too, and
all that `--rounds 0` prints.
"""

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable

import torch
from diffusers import Flux2Transformer2DModel, SD3Transformer2DModel
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import circumstances as shared
from comcat_diffusion import ComcatConfig
from comcat_diffusion.adapters.model import adapted_layers, factors
from comcat_diffusion.adapters.placing import add_adapter
from comcat_diffusion.families.known import family_of_model

KINDS = {
    "tied": {"r": 4, "foldable": True, "tied": True},
    "foldable": {"r": 4, "foldable": True},
    "free": {"r": 8},
}
SIDE, WORDS = 12, 77  # tokens of the picture along a side, and of the text


def klein() -> tuple[nn.Module, dict]:
    """Two blocks, and what they are called with."""
    model = Flux2Transformer2DModel(
        in_channels=128, num_layers=1, num_single_layers=1, attention_head_dim=128, num_attention_heads=24,
        joint_attention_dim=7680, guidance_embeds=False,
    )  # fmt: skip
    places = torch.cartesian_prod(*(torch.arange(n) for n in (1, SIDE, SIDE, 1)))
    call = {
        "hidden_states": torch.randn(1, SIDE * SIDE, 128), "encoder_hidden_states": torch.randn(1, WORDS, 7680),
        "timestep": torch.tensor([0.5]), "img_ids": places, "txt_ids": torch.zeros(WORDS, 4, dtype=torch.long),
    }  # fmt: skip
    return model, call


def medium() -> tuple[nn.Module, dict]:
    """Two blocks of 3.5 medium, the first with its self-attention beside."""
    model = SD3Transformer2DModel(
        sample_size=128, num_layers=2, num_attention_heads=24, attention_head_dim=64, in_channels=16, out_channels=16,
        caption_projection_dim=1536, joint_attention_dim=4096, pooled_projection_dim=2048, pos_embed_max_size=384,
        qk_norm="rms_norm", dual_attention_layers=(0,),
    )  # fmt: skip
    call = {
        "hidden_states": torch.randn(1, 16, 2 * SIDE, 2 * SIDE),
        "encoder_hidden_states": torch.randn(1, WORDS, 4096),
        "pooled_projections": torch.randn(1, 2048),
        "timestep": torch.tensor([500.0]),
    }
    return model, call


BASES = {"FLUX.2 [klein]": klein, "Stable Diffusion 3.5 medium": medium}


def adapted(model: nn.Module, kind: str) -> nn.Module:
    """A copy that shares the base's weights, with a random adapter."""
    made = copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})
    targets = family_of_model(made).usual_targets(kind)
    add_adapter(made, ComcatConfig(target_modules=targets, **KINDS[kind]), "dog")
    for factor in factors(made, "dog").values():
        factor.data.normal_(std=0.02)
    return made


def forward(model: nn.Module, call: dict) -> None:
    """A step of drawing."""
    with torch.no_grad():
        model(**call)


def step(model: nn.Module, call: dict) -> None:
    """Forward and backward."""
    bare = not adapted_layers(model)
    hooks = [model.context_embedder.register_forward_hook(_wanted)] * bare
    model(**call).sample.square().mean().backward()
    for hook in hooks:
        hook.remove()


def _wanted(module: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
    return output.detach().requires_grad_()


def seconds_of(work: Callable[[], object]) -> float:
    """Of one core."""
    start = time.process_time()
    work()
    return time.process_time() - start


def rows_of(name: str, rounds: int) -> list[dict]:
    """Seconds of both steps by kind, and what they are to the bare model's."""
    torch.manual_seed(0)
    model, call = BASES[name]()
    model.requires_grad_(False)
    models = {"bare": model} | {kind: adapted(model, kind) for kind in KINDS}
    found = {(kind, work): [] for work in (forward, step) for kind in models}
    for number in range(rounds + 1) if rounds else ():
        for kind, work in found:
            seconds = seconds_of(lambda kind=kind, work=work: work(models[kind], call))
            found[kind, work] += [seconds] if number else []  # the first one warms up
    rows = []
    for (kind, work), own in found.items():
        told = {"base": name, "kind": kind, "what": work.__name__}
        told["operations"] = operations(models[kind], work, call) / operations(model, work, call)
        if own:
            ratios = [one / bare for one, bare in zip(own, found["bare", work], strict=True)]
            told |= {"seconds": statistics.median(own), "ratio": statistics.median(ratios)}
        rows.append(told)
    return rows


def operations(model: nn.Module, work: Callable[[nn.Module, dict], None], call: dict) -> int:
    """Of the matrix products and attentions of a step, as torch counts them."""
    with FlopCounterMode(display=False) as counted:
        work(model, call)
    return counted.get_total_flops()


def table(report: dict) -> str:
    """The rows, drawing and training side by side, and where they were measured."""
    found = {(row["base"], row["kind"], row["what"]): row for row in report["rows"]}
    cells = []
    for base, kind in dict.fromkeys(key[:2] for key in found):
        both = [found[base, kind, work.__name__] for work in (forward, step)]
        cells.append([f"{base}, {kind}", *(f"{row[told]:.3f}" for row in both for told in ("operations", "ratio"))])
    columns = ["blocks, kind", "drawing: operations", "CPU time", "training: operations", "CPU time"]
    return f"{shared.markdown_table(columns, cells)}\n\n{shared.circumstances_text(report['circumstances'])}"


def main(arguments: list[str] | None = None) -> None:
    """Measure, write and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--results", default="blocks", help="name of the JSON (default: %(default)s)")
    asked = parser.parse_args(arguments)
    shared.use_threads(1)
    report = {"circumstances": shared.circumstances(torch.device("cpu"), torch.float32)}
    report["rows"] = [row for name in BASES for row in rows_of(name, asked.rounds)]
    if asked.rounds:
        shared.write_json(shared.results_path(asked.results, torch.device("cpu")), report)
    print(json.dumps(report["rows"], indent=1))


if __name__ == "__main__":
    main()
