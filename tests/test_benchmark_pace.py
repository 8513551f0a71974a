"""benchmarks/pace.py, one round of it: that every adapter learns and that ratios are to the LoRA."""

import pytest
import torch

from benchmarks import circumstances, pace


@pytest.mark.slow
def test_every_adapter_is_timed_beside_the_lora():
    rows = pace.measured(rounds=1)
    assert [row["adapter"] for row in rows] == list(pace.ADAPTERS)
    assert rows[0]["ratio"] == 1 and all(row["milliseconds"] > 0 for row in rows)
    taken = circumstances.circumstances(torch.device("cpu"), torch.float32)
    assert "| 1.00 |" in pace.table({"rows": rows, "circumstances": taken})
