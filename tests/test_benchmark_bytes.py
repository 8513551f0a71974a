"""benchmarks/bytes.py, run tiny: what is left of an adapter in how many bytes."""

import json

import pytest
import torch

from benchmarks import bytes as benchmark
from comcat_diffusion.training.config import TrainConfig


@pytest.mark.parametrize("kind", benchmark.ADAPTERS)
def test_every_adapter_can_be_trained(kind):
    assert TrainConfig(**benchmark.ADAPTERS[kind]).kind == kind


@pytest.mark.slow
def test_fewer_bytes_change_more(tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark, "FOLDER", tmp_path / "runs")
    monkeypatch.setattr(benchmark, "ADAPTERS", {"tied": {"kind": "tied", "max_train_steps": 2}})
    monkeypatch.setattr(benchmark, "SHARES", (1.0, 0.5, 0.01))
    monkeypatch.setattr(benchmark, "PROMPTS", benchmark.PROMPTS[:1])
    monkeypatch.setattr(benchmark.shared, "results_path", lambda name, device: tmp_path / f"{name}.json")
    monkeypatch.setattr(benchmark.shared, "use_threads", lambda count: None)
    threads = torch.get_num_threads()
    benchmark.main()
    rows = json.loads((tmp_path / "bytes.json").read_text())["rows"]
    whole = (tmp_path / "runs" / "tied" / "sks-teddy.safetensors").stat().st_size
    found = {row["share"]: row for row in rows}
    assert set(found) == {1.0, 0.5}  # a hundredth is below the header
    for share, row in found.items():
        assert row["bytes"] <= share * whole and row["whole_bytes"] == whole and row["header_bytes"] < row["bytes"]
    assert found[1.0]["change"] < found[0.5]["change"] < 0.1
    assert (tmp_path / "bytes.png").stat().st_size > 1000 and torch.get_num_threads() == threads
