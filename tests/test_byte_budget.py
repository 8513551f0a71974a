"""Training within a budget of bytes: the file fits, the cut ranks stay cut, and a resumed run is the unbroken one."""

import json
import shutil

import pytest
import torch

from comcat_diffusion import bases, load_adapter, read_adapter
from comcat_diffusion.adapters.terms import read_contents
from comcat_diffusion.training import customize as story
from comcat_diffusion.training import learned
from comcat_diffusion.training.becomes import budget
from comcat_diffusion.training.config import TrainConfig
from comcat_diffusion.training.customize import customize
from tests.quick_training import BARE
from tests.slow import slow
from tests.test_checkpoint import Stop

BUDGET = 12_000  # about an eighth of the whole adapter
SETTINGS = {"max_train_steps": 10, "skip_final_inference": True, "learning_rate": 4e-3, "max_bytes": BUDGET}
SETTINGS |= {"kind": "free", "train_batch_size": 1, **BARE}


@pytest.fixture
def config(tmp_path):
    return lambda folder="out", **more: TrainConfig(**{"output_dir": str(tmp_path / folder), **SETTINGS, **more})


@pytest.fixture
def cuts(monkeypatch):
    """The factors of the learner right after every cut, and a way to them at the end."""
    seen, take = [], learned.take

    def watched(learner, ema, contents):
        take(learner, ema, contents)
        seen.append({name: p.detach().clone() for name, p in learned.learned(learner).items()})

    monkeypatch.setattr(story.learned, "take", watched)
    return seen


@pytest.mark.parametrize(
    ("more", "least"),
    [
        slow({"train_text_encoder": True, "everywhere": True, "rank": 2, "kind": "free"}, 0.9),
        slow({"kind": "foldable", "use_ema": True, "target_modules": ["attn2"]}, 0.9),
        ({"kind": "tied", "max_bytes": 3500}, 0.7),  # a rank of all heads together is a tenth of this
        slow({"convolutions": 4, "target_modules": ["attn2"]}, 0.9),
    ],
    ids=["free, text encoder", "foldable, mean", "tied", "beside convolutions"],
)
def test_the_file_fits_and_the_last_steps_move_what_was_kept_alone(config, cuts, more, least):
    budget = more.get("max_bytes", BUDGET)
    beside = more.get("kind", "free") == "free"  # which has terms beside convolutions unless asked not to
    assert config(**{"convolutions": 8 * beside} | more).cut_step == (6 if beside else 8)
    outcome = customize(config(**more))
    assert least * budget < outcome.adapter.stat().st_size <= budget
    header = read_adapter(outcome.adapter)
    assert header.format_version == (4 if beside else 2) and header.notes.training["steps"] == 10
    after_the_cut, at_the_end = cuts  # the second is what the file holds, taken back for its proof
    moved = 0
    for name, before in after_the_cut.items():
        now = at_the_end[name]
        rank_axis = 1 if "_up." in name else 0
        assert not now.eq(0).all() or before.eq(0).all()
        kept = [int(x.abs().amax(1 - rank_axis).gt(0).sum()) for x in (before, now)]
        assert kept[1] <= kept[0]
        moved += int((before - now).abs().max() > 1e-4)
    assert moved > 5
    cut = sum(x.eq(0).sum().item() for x in after_the_cut.values())
    assert cut > 0.2 * sum(x.numel() for x in after_the_cut.values())


@pytest.mark.slow
@pytest.mark.parametrize("beside", [0, 4], ids=["attentions", "convolutions too"])
def test_a_resumed_run_writes_the_bytes_of_an_unbroken_one(config, tmp_path, beside):
    """Cut off before, at and after the cut of the ranks."""
    settings = {"use_ema": True, "max_train_steps": 5, "checkpointing_steps": 1, "convolutions": beside}
    whole = customize(config("whole", **settings)).adapter.read_bytes()
    first = customize(config(**settings), Stop(1))
    assert first.interrupted and first.adapter.stat().st_size <= BUDGET and first.adapter.read_bytes() != whole
    assert customize(config(**settings, resume_from_checkpoint="latest")).adapter.read_bytes() == whole
    at_the_cut = str(tmp_path / "whole" / "checkpoints" / "checkpoint-4")
    assert customize(config("third", **settings, resume_from_checkpoint=at_the_cut)).adapter.read_bytes() == whole


@pytest.mark.slow
def test_the_best_adapter_fits_too(config, tmp_path):
    judged = {"validation_fraction": 0.25, "validation_steps": 2, "num_validation_images": 1}
    outcome = customize(config(max_train_steps=4, **judged))
    best = outcome.adapter.with_name("sks-teddy-best.safetensors")
    assert best.stat().st_size <= BUDGET and read_adapter(best).notes.training["steps"] in (3, 4)
    lines = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert len([line for line in lines if "held_out_loss" in line]) == 2


@pytest.mark.slow
def test_a_new_word_is_within_the_budget(config, tmp_path):
    folder = tmp_path / "pictures"
    shutil.copytree(bases.assets() / "subject" / "train", folder, ignore=shutil.ignore_patterns("*.txt"))
    word = {"placeholder_token": "<t>", "initializer_token": "teddy", "instance_prompt": "a photo of <t>"}
    word |= {"instance_data_dir": str(folder)}
    outcome = customize(config(**word, max_train_steps=4))
    assert outcome.adapter.stat().st_size <= BUDGET and read_contents(outcome.adapter).header.tokens == ["<t>"]
    load_adapter(bases.load_base("embedded"), outcome.adapter)


def test_a_budget_that_holds_nothing_is_refused_before_the_first_step(config):
    watcher = Stop()
    with pytest.raises(ValueError, match=r"--max_bytes 1,000 is too little: the least .* is [0-9,]+ bytes"):
        customize(config(max_bytes=1000), watcher)
    assert watcher.seen == []
    with pytest.raises(ValueError, match="--max_bytes must be at least 0"):
        config(max_bytes=-1)


@pytest.mark.parametrize(
    ("settings", "most"),
    [
        ({}, 19_660),  # 196,608 numbers in fp16, and a twentieth of them
        ({"rank": 1}, 10_000),  # never less
        ({"rank": 1024}, 1_000_000),  # never more
        ({"convolutions": 8, "target_modules": ["attn2"]}, 19_660),  # as many as without
        ({"max_bytes": 5_000}, 5_000),
        ({"max_bytes": 0}, 0),
        ({"kind": "tied"}, 0),
        ({"as_": "lora"}, 0),
        ({"everywhere": True}, 0),
    ],
)
def test_what_is_free_is_shrunk_to_a_twentieth_unless_it_is_asked_otherwise(settings, most):
    unet = bases.load_base("embedded").unet
    assert budget(TrainConfig(**settings), unet) == most


def test_a_rank_of_zeros_stays_one():
    """What the story relies on: either factor of a rank gets its gradient through the other one."""
    left, right = torch.randn(5, 3), torch.randn(3, 4)
    left[:, 1], right[1] = 0, 0
    factors = [torch.nn.Parameter(left.clone()), torch.nn.Parameter(right.clone())]
    optimizer = torch.optim.AdamW(factors, lr=0.1)
    for _ in range(3):
        (factors[0] @ factors[1] - 1).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert not factors[0][:, 1].any() and not factors[1][1].any() and (factors[0][:, 0] != left[:, 0]).all()
