"""The benchmarks of blocks and of cores, on tiny blocks: what they measure is there, and of the same weights."""

import json

import pytest
import torch

from benchmarks import blocks, cores
from comcat_diffusion.adapters.model import adapted_layers
from tests import tiny_families


def tiny() -> tuple:
    """A tiny klein, and what it is called with."""
    torch.manual_seed(0)
    call = {
        "hidden_states": torch.randn(1, 16, 16), "encoder_hidden_states": torch.randn(1, 5, 72),
        "timestep": torch.tensor([0.5]), "txt_ids": torch.zeros(5, 4, dtype=torch.long),
        "img_ids": torch.cartesian_prod(*(torch.arange(n) for n in (1, 4, 4, 1))),
    }  # fmt: skip
    return tiny_families.klein_transformer(), call


@pytest.mark.slow
def test_every_kind_takes_its_steps_on_one_base(monkeypatch):
    monkeypatch.setattr(blocks, "BASES", {"tiny": tiny})
    rows = blocks.rows_of("tiny", 1)
    assert [(row["kind"], row["what"]) for row in rows] == [
        (kind, what) for what in ("forward", "step") for kind in ("bare", *blocks.KINDS)
    ]
    assert all(row["seconds"] > 0 for row in rows) and [r["ratio"] for r in rows if r["kind"] == "bare"] == [1, 1]
    (bare, *others) = blocks.rows_of("tiny", 0)[:4]
    assert bare["operations"] == 1 and all(1 < row["operations"] < 2 and "seconds" not in row for row in others)
    model, call = tiny()
    model.requires_grad_(False)
    for kind in blocks.KINDS:
        made = blocks.adapted(model, kind)
        assert made.x_embedder.weight is model.x_embedder.weight and not adapted_layers(model)
        blocks.step(made, call)
        learned = [p for layer in adapted_layers(made).values() for p in layer.parameters() if p.requires_grad]
        assert learned and all(one.grad is not None for one in learned)
    blocks.step(model, call)
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.slow
def test_loading_and_first_use_are_told_by_kind(monkeypatch, capsys, tmp_path):
    model, kept = tiny_families.klein_transformer(), tmp_path / "cores.json"
    before = {name: value.clone() for name, value in model.state_dict().items()}
    monkeypatch.setattr(cores, "transformer", lambda double, single: model)
    monkeypatch.setattr(cores.shared, "use_threads", lambda count: None)
    monkeypatch.setattr(cores.shared, "results_path", lambda name, device: kept)
    cores.main(["--single", "1"])
    assert not kept.exists()  # a table is of all blocks
    cores.main([])
    report = json.loads(kept.read_text())
    kinds = [*cores.KINDS, cores.LORA]
    assert json.loads(capsys.readouterr().out.partition("\n}\n")[2])["rows"] == report["rows"]
    assert [row["kind"] for row in report["rows"]] == kinds and all(row["load_ms"] > 0 for row in report["rows"])
    assert [row["first_use_seconds"] > 1e-4 for row in report["rows"]] == [kind == "cores" for kind in kinds]
    left = model.state_dict()  # of a kind that stayed, the next one's loading would take longer
    assert left.keys() == before.keys() and all(torch.equal(left[name], value) for name, value in before.items())


@pytest.mark.slow
def test_blocks_have_their_real_widths():
    model, call = blocks.medium()
    blocks.forward(model, call)
    assert len(adapted_layers(blocks.adapted(model, "free"))) == 2
