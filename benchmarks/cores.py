"""What loading an adapter takes on FLUX.2 [klein]'s shapes, and what cores take when they first act.

    python -m benchmarks.cores                     # all 25 blocks of klein 4B: minutes, 8 GiB

Random weights in bfloat16 on one thread. Loading is that of a file into the transformer, the best of nine in turns,
and beside it diffusers loads a LoRA on the same attentions. Seconds are one core's (`time.process_time`), which other
programs do not change much. Cores look for directions in each block when they first act, at a drawing's first step.
"""

import argparse
import json
import tempfile
from pathlib import Path

import torch
from diffusers import Flux2Transformer2DModel
from peft import LoraConfig

from benchmarks import circumstances as shared
from benchmarks.blocks import seconds_of
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
LORA = "LoRA r=4"  # diffusers' own, on all projections of the same attentions
LORA_TARGETS = (
    r"transformer_blocks\.\d+\.attn\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)"
    r"|single_transformer_blocks\.\d+\.attn\.(to_qkv_mlp_proj|to_out)"
)
ROUNDS = 9
ALL = (5, 20)  # blocks of two streams, and of one


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


def saved(kind: str, model: Flux2Transformer2DModel, folder: Path) -> Path:
    """A file of this kind; the model is left without it."""
    if kind == LORA:
        model.add_adapter(LoraConfig(r=4, target_modules=LORA_TARGETS), "dog")
        model.save_lora_adapter(folder, "dog", weight_name="lora.safetensors")
        model.unload_lora()
        return folder / "lora.safetensors"
    add_adapter(model, ComcatConfig(target_modules=["attn"], **KINDS[kind]), "dog")
    file = folder / f"{kind}.safetensors"
    save_adapter(model, file, "dog", "somebody/klein")
    unload_adapters(model)
    return file


def load_seconds(kind: str, model: Flux2Transformer2DModel, file: Path) -> float:
    """Of loading it once; the model is left without it."""
    if kind == LORA:
        took = seconds_of(lambda: model.load_lora_adapter(file, prefix=None, adapter_name="dog"))
        model.unload_lora()
        return took
    took = seconds_of(lambda: load_adapter(model, file, "dog"))
    unload_adapters(model)
    return took


def first_use_seconds(model: Flux2Transformer2DModel, file: Path) -> float:
    """Of finding the directions that cores are between."""
    load_adapter(model, file, "dog")
    ends = [end for layer in adapted_layers(model).values() for end in layer.folded("dog")[:2]]
    took = seconds_of(lambda: [end.weight for end in ends])
    unload_adapters(model)
    return took


def rows_of(model: Flux2Transformer2DModel, blocks: int, folder: Path) -> list[dict]:
    """Each kind: bytes of its file, milliseconds of loading it, seconds of a core until it can act."""
    files = {kind: saved(kind, model, folder) for kind in (*KINDS, LORA)}
    rounds = [{kind: load_seconds(kind, model, file) for kind, file in files.items()} for _ in range(ROUNDS)]
    rows = [
        {"kind": kind, "blocks": blocks, "bytes": file.stat().st_size, "load_ms": 1000 * min(r[kind] for r in rounds)}
        for kind, file in files.items()
    ]
    first = {"cores": first_use_seconds(model, files["cores"])}
    return [row | {"first_use_seconds": first.get(row["kind"], 0.0)} for row in rows]


def table(report: dict) -> str:
    """The rows, and where they were measured."""
    cells = [
        (row["kind"], f"{row['bytes']:,}", f"{row['load_ms']:.0f}", f"{row['first_use_seconds']:.1f}")
        for row in report["rows"]
    ]
    columns = ["25 blocks of FLUX.2 [klein] 4B", "bytes", "loading, CPU ms", "first use, CPU seconds"]
    return f"{shared.markdown_table(columns, cells)}\n\n{shared.circumstances_text(report['circumstances'])}"


def main(arguments: list[str] | None = None) -> None:
    """Measure, write where it is all blocks, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--double", type=int, default=ALL[0], help="blocks of two streams (default: %(default)s)")
    parser.add_argument("--single", type=int, default=ALL[1], help="blocks of one stream (default: %(default)s)")
    asked = parser.parse_args(arguments)
    shared.use_threads(1)
    report = {"circumstances": shared.circumstances(torch.device("cpu"), torch.bfloat16)}
    model = transformer(asked.double, asked.single)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        report["rows"] = rows_of(model, asked.double + asked.single, Path(folder))
    if (asked.double, asked.single) == ALL:
        shared.write_json(shared.results_path("cores", torch.device("cpu")), report)
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
