"""What a process keeps in memory: weights that are put into another precision are not there twice."""

import mmap
from pathlib import Path
from types import SimpleNamespace

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
    return model.requires_grad_(False)


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
    mapped[0].weight.requires_grad_(True)
    hold(mapped, torch.float32)
    assert [layer.weight.dtype for layer in mapped[:2]] == [torch.bfloat16, torch.float32]  # what is learned stays


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's account of memory")
def test_what_was_put_away_leaves_memory_and_is_as_it_was_when_it_is_read_again(mapped):
    before = file_mib()
    wanted = [weight.clone() for weight in mapped.parameters()]
    full = file_mib()
    if full - before < 60:
        pytest.skip("the temporary folder is in memory")
    put_away(mapped.parameters())
    if file_mib() == full:
        pytest.skip("this system takes no such advice")
    assert file_mib() - before < 8
    assert all(torch.equal(a, b) for a, b in zip(mapped.parameters(), wanted, strict=True))
    assert file_mib() - before > 56
    hold(mapped, torch.bfloat16)  # where every weight leaves as soon as there is a copy
    assert file_mib() - before < 8


def test_memory_of_torchs_own_is_left_alone(mapped, monkeypatch):
    advised = []

    def madvise(*asked):
        advised.append(asked)

    monkeypatch.setattr("ctypes.CDLL", lambda name: SimpleNamespace(madvise=madvise))
    put_away([torch.randn(3000), torch.randn(64, 64).t(), torch.empty(0), torch.randn(5000)[7:]])
    assert advised == []
    put_away([mapped[0].weight])
    ((start, length, _),) = advised
    address, size = mapped[0].weight.data_ptr(), mapped[0].weight.nbytes
    assert address <= start and start + length <= address + size and length > size - 2 * mmap.PAGESIZE


def test_where_the_system_takes_no_advice_all_stays_as_it_is(mapped, monkeypatch):
    monkeypatch.setattr("ctypes.CDLL", lambda name: object())
    wanted = [weight.to(torch.bfloat16) for weight in mapped.parameters()]
    hold(mapped, torch.bfloat16)
    assert all(torch.equal(a, b) for a, b in zip(mapped.parameters(), wanted, strict=True))
