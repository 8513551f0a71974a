"""How the golden file was made: `python -m tests.golden.write`. It is kept as it is; a new format gets a new file."""

import torch

from comcat_diffusion import save_adapter
from comcat_diffusion.adapters.header import Notes
from tests.conftest import build_tiny_unet
from tests.test_adapter_file import GOLDEN, _by_formula, _with_adapter, pipeline

if __name__ == "__main__":
    if GOLDEN.exists():
        raise SystemExit(f"{GOLDEN} exists; files of version 1 are never written again.")
    pipe = pipeline(_by_formula(_with_adapter(build_tiny_unet())))
    save_adapter(pipe, GOLDEN, "golden", "tests/tiny", Notes("sks", "a photo of sks dog", "dog"), torch.float16)
