"""benchmarks/pace.py, one round of it: that every adapter learns and draws, and to what ratios are."""

import pytest
import torch

from benchmarks import circumstances, pace


@pytest.mark.slow
def test_steps_are_timed_beside_the_loras_and_the_bases():
    report = {"training": pace.learning(rounds=1), "drawing": pace.drawing(rounds=1)}
    assert [row["what"] for row in report["training"]] == list(pace.ADAPTERS)
    assert [row["what"] for row in report["drawing"]] == ["the base", pace.FREELY, pace.KEPT]
    for rows in report.values():
        assert rows[0]["ratio"] == 1 and all(row["milliseconds"] > 0 for row in rows)
    taken = circumstances.circumstances(torch.device("cpu"), torch.float32)
    shown = pace.table({**report, "circumstances": taken})
    for first, *_ in report.values():
        assert f"| {first['what']} | {first['milliseconds']:.0f} | 1.00 |" in shown
