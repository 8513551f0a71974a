"""What loading an adapter takes on FLUX.2 [klein]'s shapes, and what cores take when they first act.

    python -m benchmarks.cores                     # all 25 blocks of klein 4B: minutes, 8 GiB

Random weights in bfloat16 on one thread. Loading is that of a file into the transformer, the best of five; seconds are
one core's (`time.process_time`), which other programs do not change much. Cores look for directions in each block when
they first act, at a drawing's first step.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import Flux2Transformer2DModel

from benchmarks import circumstances as shared
from comcat_diffusion import ComcatConfig, load_adapter, save_adapter
from comcat_diffusion.adapters.merge import unload_adapters
from comcat_diffusion.adapters.model import adapted_layers
from comcat_diffusion.adapters.placing import add_adapter

KINDS = {
    "tied": {"r": 4, "foldable": True, "tied": True},
    "foldable": {"r": 4, "foldable": True},
    "free": {"r": 8},
    "cores": {"r": 4, "foldable": True, "cores": True},
}
ROUNDS = 5


def transformer(double: int, single: int) -> Flux2Transformer2DModel:
    """Blocks of klein 4B, random, in bfloat16."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)  # so that it never is in float32
    model = Flux2Transformer2DModel(
        in_channels=128, num_layers=double, num_single_layers=single, attention_head_dim=128, num_attention_heads=24,
        joint_attention_dim=7680, guidance_embeds=False,
    )  # fmt: skip
    torch.set_default_dtype(torch.float32)
    return model.eval()


def seconds_of(work: Callable[[], object]) -> float:
    """Of one core."""
    start = time.process_time()
    work()
    return time.process_time() - start


def row(kind: str, model: Flux2Transformer2DModel, folder: Path) -> dict:
    """One kind: bytes of its file, milliseconds of loading it, seconds of a core until it can act."""
    add_adapter(model, ComcatConfig(target_modules=["attn"], **KINDS[kind]), "dog")
    file = folder / f"{kind}.safetensors"
    save_adapter(model, file, "dog", "somebody/klein")
    loads = []
    for _ in range(ROUNDS):
        unload_adapters(model)
        loads.append(seconds_of(lambda: load_adapter(model, file, "dog")))
    layers = adapted_layers(model).values()
    ends = [end for one in layers for end in one.folded("dog")[:2]] if kind == "cores" else []
    first = seconds_of(lambda: [end.weight for end in ends])
    unload_adapters(model)
    told = {"kind": kind, "blocks": len(layers), "bytes": file.stat().st_size, "load_ms": 1000 * min(loads)}
    return told | {"first_use_seconds": first}


def main(arguments: list[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--double", type=int, default=5, help="blocks of two streams (default: %(default)s)")
    parser.add_argument("--single", type=int, default=20, help="blocks of one stream (default: %(default)s)")
    asked = parser.parse_args(arguments)
    shared.use_threads(1)
    model = transformer(asked.double, asked.single)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        rows = [row(kind, model, Path(folder)) for kind in KINDS]
    report = {"circumstances": shared.circumstances(torch.device("cpu"), torch.bfloat16), "rows": rows}
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
