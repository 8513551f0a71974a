"""comcat bench: the three cases in turns, each on a base that carries nothing else."""

import json
from itertools import islice

import pytest
from peft.tuners.lora import LoraLayer

from comcat_diffusion import bases, timing
from comcat_diffusion.adapters.layer import ComcatLayer
from comcat_diffusion.adapters.store import expected_shapes
from comcat_diffusion.attentions import DIFFUSERS
from comcat_diffusion.bench import run
from comcat_diffusion.bench.config import BenchConfig
from comcat_diffusion.cli import main
from comcat_diffusion.training.learned import adapter_config
from tests import tiny_bases


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return str(tiny_bases.sd1(tmp_path_factory.mktemp("base")))


def test_rounds_go_through_the_cases_in_turns_after_an_untimed_call_of_each():
    seen = []
    cases = {name: lambda name=name: seen.append(name) for name in "ab"}
    found = list(islice(timing.rounds(cases, lambda name: seen.append(f"for {name}")), 2))
    assert seen == ["for a", "a", "for b", "b"] * 3
    assert [set(one) for one in found] == [{"a", "b"}] * 2 and all(s >= 0 for one in found for s in one.values())


def test_a_short_case_is_repeated_until_a_sample_is_long_enough(monkeypatch):
    now, called = [0.0], []

    def case(name, takes):
        called.append(name)
        now[0] += takes

    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])
    cases = {"short": lambda: case("short", 0.01), "long": lambda: case("long", 1.0)}
    found = next(timing.rounds(cases, least_seconds=0.1))
    assert found == {"short": pytest.approx(0.01), "long": pytest.approx(1.0)}
    assert called.count("short") == 2 + 10 and called.count("long") == 1 + 1


@pytest.mark.slow
def test_every_case_is_timed_on_a_base_that_carries_nothing_else(base, monkeypatch):
    seen, predict = [], run._predict

    def watched(learner, batch):
        kinds = {"COMCAT" for m in learner.denoiser.modules() if isinstance(m, ComcatLayer)}
        kinds |= {"LoRA" for m in learner.denoiser.modules() if isinstance(m, LoraLayer)}
        made = predict(learner, batch)
        seen.append((kinds, made.requires_grad, tuple(batch.prompts)))
        return made

    monkeypatch.setattr(run, "_predict", watched)
    monkeypatch.setattr(run, "LEAST_SECONDS", 0.0)
    made = run.bench(BenchConfig(pretrained_model_name_or_path=base, rounds=1, train_batch_size=2, rank=3))
    one, both = ("a photo of sks dog",) * 2, ("a photo of sks dog", "")
    training = [(set(), False, one), ({"COMCAT"}, True, one), ({"LoRA"}, True, one)]
    drawing = [(set(), False, both), ({"COMCAT"}, False, both), ({"LoRA"}, False, both)]
    assert seen == training * 2 + drawing * 2
    assert [(row.step, row.adapter) for row in made.rows] == [
        (step, name) for step in ("training", "drawing") for name in (run.BASE, run.COMCAT, run.LORA)
    ]
    assert all(row.seconds > 0 for row in made.rows) and made.rows[0].ratio == made.rows[3].ratio == 1


@pytest.mark.slow
def test_sizes_are_those_of_the_adapters(base):
    config = BenchConfig(pretrained_model_name_or_path=base, rounds=1, rank=3, lora_rank=2)
    made = run.bench(config)
    unet = bases.load_base(base).unet
    mine = sum(a * b for a, b in expected_shapes(unet, adapter_config(config, unet, ["sks"])).values())
    projections = [m for name, m in unet.named_modules() if name.endswith(tuple(DIFFUSERS.names))]
    lora = sum(2 * (m.in_features + m.out_features) for m in projections)
    assert [row.parameters for row in made.rows] == [0, mine, lora] * 2 and mine > 0


@pytest.mark.slow
def test_a_base_with_two_text_encoders(tmp_path):
    made = run.bench(BenchConfig(pretrained_model_name_or_path=str(tiny_bases.sdxl(tmp_path / "base")), rounds=1))
    assert len(made.rows) == 6 and made.rows[1].parameters > 0


@pytest.mark.slow
def test_the_command_prints_the_table_and_writes_the_numbers(base, tmp_path, capsys):
    file = tmp_path / "bench.json"
    asked = ["--pretrained_model_name_or_path", base, "--rounds", "2", "--output", str(file)]
    assert main(["bench", *asked, "--kind", "foldable", "--everywhere", "--precision", "bf16"]) == 0
    out = capsys.readouterr().out
    report = json.loads(file.read_text())
    assert all(f"{row['step']}, {row['adapter']}" in out for row in report["rows"]) and len(report["rows"]) == 6
    assert report["circumstances"]["precision"] == "bf16" and report["circumstances"]["rounds"] == 2
    assert str(tmp_path) not in json.dumps(report["circumstances"])


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--rounds", "0"], "--rounds must be at least 1"),
        (["--rank", "0"], "--rank must be at least 1"),
        (["--resolution", "13"], "--resolution 13 must be a multiple of"),
        (["--device", "abacus"], "--device abacus: torch knows no such device here"),
        (["--target_modules", "attn7"], "attn7"),
    ],
)
def test_a_mistake_is_one_sentence(base, flags, said, capsys):
    assert main(["bench", "--pretrained_model_name_or_path", base, *flags]) == 2
    captured = capsys.readouterr()
    assert said in captured.err and not captured.out


def test_a_device_that_is_not_there_is_said_before_anything_is_drawn(base, tmp_path, capsys):
    drawing = ["--pretrained_model_name_or_path", base, "--prompt", "a dog", "--output_dir", str(tmp_path / "out")]
    assert main(["generate", *drawing, "--device", "abacus"]) == 2
    assert "comcat: --device abacus" in capsys.readouterr().err
