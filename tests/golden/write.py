"""How the golden files were made: `python -m tests.golden.write`. They stay as they are; a new format gets its own."""

import json
import tempfile
from pathlib import Path

import torch

from comcat_diffusion import ComcatConfig, read_adapter, save_adapter
from comcat_diffusion.adapters.combine import combine
from comcat_diffusion.adapters.header import Notes
from comcat_diffusion.adapters.shrink import shrink
from comcat_diffusion.adapters.store import read_tensors
from tests.test_adapter_file import GOLDEN, _by_formula, _with_adapter, pipeline
from tests.test_convolved import GOLDEN as CONVOLVED
from tests.test_feed_forwards import GOLDEN as FED
from tests.test_pieces import GOLDEN as PIECES
from tests.tiny_families import klein_transformer
from tests.tiny_models import build_tiny_unet


def first() -> None:
    """Version 1: dense."""
    pipe = pipeline(_by_formula(_with_adapter(build_tiny_unet())))
    save_adapter(pipe, GOLDEN, "golden", "tests/tiny", Notes("sks", "a photo of sks dog", "dog"), torch.float16)


def third() -> None:
    """Version 3: two subjects, one in half precision and one in whole numbers, and what they are when read."""
    with tempfile.TemporaryDirectory() as folder:
        files = []
        for word, most in (("sks", 40_000), ("ohwx", 3_500)):
            pipe = pipeline(build_tiny_unet())
            pipe.unet.add_adapter(ComcatConfig(r=3, foldable=True, trigger=[word]), "golden")
            _by_formula(pipe.unet)
            save_adapter(
                pipe, Path(folder) / word, "golden", "tests/tiny", Notes(word, f"a photo of {word} dog", "dog")
            )
            files.append(Path(folder) / f"{word}.safetensors")
            shrink(Path(folder) / word, files[-1], most)
        combine([(files[0], 0.5), (files[1], 1.0)], PIECES)
    _remember(PIECES)


def _remember(path: Path) -> None:
    """Note beside a file what it is when read."""
    header = read_adapter(path)
    sums = {
        name: [list(tensor.shape), float(tensor.double().abs().sum())]
        for name, tensor in read_tensors(path, header).items()
    }
    (config,) = header.config.values()
    path.with_suffix(".json").write_text(json.dumps({"config": config, "sums": sums}, indent=1) + "\n")


def fourth() -> None:
    """Version 4: terms beside convolutions, in whole numbers, and what they are when read."""
    with tempfile.TemporaryDirectory() as folder:
        pipe = pipeline(build_tiny_unet())
        pipe.unet.add_adapter(ComcatConfig(r=3, target_modules=["attn2"], convolutions=4, trigger=["sks"]), "golden")
        _by_formula(pipe.unet)
        dense = Path(folder) / "dense.safetensors"
        save_adapter(pipe, dense, "golden", "tests/tiny", Notes("sks", "a photo of sks dog", "dog"))
        shrink(dense, CONVOLVED, 8_000)
    _remember(CONVOLVED)


def fifth() -> None:
    """Version 5: terms beside feed-forwards, in whole numbers, and what they are when read."""
    with tempfile.TemporaryDirectory() as folder:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = klein_transformer()
        model.add_adapter(ComcatConfig(r=2, feed_forwards=4, trigger=["sks"]), "golden")
        _by_formula(model)
        dense = Path(folder) / "dense.safetensors"
        save_adapter(model, dense, "golden", "tests/tiny", Notes("sks", "a photo of sks dog", "dog"))
        shrink(dense, FED, 3_400)
    _remember(FED)


if __name__ == "__main__":
    for file, write in ((GOLDEN, first), (PIECES, third), (CONVOLVED, fourth), (FED, fifth)):
        if file.exists():
            print(f"{file} exists and is never written again.")
        else:
            write()
