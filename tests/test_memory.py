"""What a process keeps in memory: weights that are put into another precision are not there twice."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from comcat_diffusion.memory import hold, put_away

SIDE, LAYERS = 1024, 16  # 64 MB of weights


def layers() -> nn.Sequential:
    return nn.Sequential(*(nn.Linear(SIDE, SIDE, bias=False) for _ in range(LAYERS)))


@pytest.fixture
def mapped(tmp_path):
    """A model whose weights are mapped from a file, as those of a base are."""
    torch.manual_seed(0)
    model = layers()
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    with torch.device("meta"):
        model = layers()
    model.load_state_dict(load_file(tmp_path / "model.safetensors"), assign=True)
    return model


def file_mib() -> float:
    """Resident memory that is mapped from files, in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("RssFile"))


def test_what_is_held_in_another_precision_has_the_values_it_would_have(mapped):
    wanted = [weight.to(torch.bfloat16) for weight in mapped.parameters()]
    mapped.register_buffer("places", torch.arange(3))
    hold(mapped, torch.bfloat16)
    assert all(torch.equal(a, b) for a, b in zip(mapped.parameters(), wanted, strict=True))
    assert mapped.places.dtype == torch.int64
    hold(mapped, torch.bfloat16)
    assert {weight.dtype for weight in mapped.parameters()} == {torch.bfloat16}


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's account of memory")
def test_what_was_put_away_leaves_memory_and_is_as_it_was_when_it_is_read_again(mapped):
    before = file_mib()
    wanted = [weight.clone() for weight in mapped.parameters()]
    full = file_mib()
    if full - before < 60:
        pytest.skip("the temporary folder is in memory")
    put_away(mapped.parameters())
    assert file_mib() - before < 8
    assert all(torch.equal(a, b) for a, b in zip(mapped.parameters(), wanted, strict=True))
    assert file_mib() - before > 56
    hold(mapped, torch.bfloat16)  # where every weight leaves as soon as there is a copy
    assert file_mib() - before < 8


def test_memory_of_torchs_own_is_left_alone():
    odd = [torch.randn(3000), torch.randn(64, 64).t(), torch.empty(0), torch.randn(5000)[7:]]
    wanted = [tensor.clone() for tensor in odd]
    put_away(odd)
    assert all(torch.equal(a, b) for a, b in zip(odd, wanted, strict=True))


def test_where_the_system_takes_no_advice_all_stays_as_it_is(mapped, monkeypatch):
    monkeypatch.setattr("ctypes.CDLL", lambda name: object())
    wanted = [weight.to(torch.bfloat16) for weight in mapped.parameters()]
    hold(mapped, torch.bfloat16)
    assert all(torch.equal(a, b) for a, b in zip(mapped.parameters(), wanted, strict=True))
