"""Which adapter an evaluation names as the best, on measures that are made up."""

import json
from pathlib import Path

import pytest
import torch

from comcat_diffusion.evaluation.metrics import interval, learned
from comcat_diffusion.evaluation.prompts import Prompts
from comcat_diffusion.evaluation.report import Judged, Report
from comcat_diffusion.words import Subject

P, S = 5, 4  # prompts and seeds
BEFORE = 0.1 + 0.02 * torch.randn(P, S, generator=torch.Generator().manual_seed(0))  # the base's subject fidelity


def judged(name, gain=0.0, obeyed=1.0, drift=0.0):
    """A row; gain over the base and obedience are numbers or (P, S)."""
    fidelity, obeyed = BEFORE + gain, torch.as_tensor(obeyed).expand(P, S)
    values = {"learned": learned(fidelity, BEFORE, obeyed), "drift": torch.full((P, S), drift)}
    return Judged(name, {measure: interval(value) for measure, value in values.items()})


def reported(*rows):
    prompts = Prompts(Subject("sks", "teddy"), (), (), ())
    return Report(Path(), [judged("before"), *rows], prompts, range(S), 2, 4, [], {})


def best(*rows):
    """The name of the best, which must not depend on the order."""
    names = {reported(*some).best.name for some in (rows, rows[::-1])}
    assert len(names) == 1
    return names.pop()


def shares(*of_prompts):
    """Obedience by prompts: in so many of its seeds."""
    return torch.tensor([[float(seed < many) for seed in range(S)] for many in of_prompts])


HONEST = judged("honest", gain=0.3, obeyed=shares(4, 3, 4, 4, 3), drift=0.4)


def test_one_that_learned_nothing_loses_though_it_obeys_and_keeps_everything():
    assert best(HONEST, judged("nothing")) == "honest"


def test_one_that_learned_little_loses():
    assert best(HONEST, judged("little", gain=0.05)) == "honest"


def test_one_that_copies_loses_though_it_is_most_like_the_subject():
    copies = judged("copies", gain=0.7, obeyed=shares(4, 0, 0, 0, 0), drift=0.2)  # one prompt asks for what it has seen
    assert best(HONEST, copies) == "honest"
    assert best(HONEST, judged("obeys", gain=0.7, drift=0.2)) == "obeys"  # it is not the fidelity that makes it lose


def test_one_that_leaves_nothing_of_other_prompts_loses():
    assert best(HONEST, judged("everywhere", gain=0.5, drift=0.9)) == "honest"


def test_at_equal_scores_the_lower_drift_wins_and_then_the_first():
    calm, wild = judged("calm", gain=0.3, drift=0.1), judged("wild", gain=0.36, drift=0.25)
    assert calm.score == pytest.approx(wild.score, abs=1e-4)
    assert best(wild, calm) == "calm"
    assert reported(judged("first", gain=0.3), judged("second", gain=0.3)).best.name == "first"


def test_the_best_of_those_that_learned_nothing_is_none():
    chance = 0.3 * torch.randn(P, S, generator=torch.Generator().manual_seed(1))
    chance += 0.02 - chance.mean()  # a mean above 0, and an interval that reaches below
    rows = judged("nothing"), judged("chance", gain=chance), judged("hair", gain=1e-4)
    assert rows[1].score == pytest.approx(0.02, abs=1e-6)
    report = reported(*rows)
    assert (
        report.best is None and report.verdict.startswith("Best: none") and json.loads(report.to_json())["best"] is None
    )
    assert reported(*rows, HONEST).best is HONEST


def test_the_report_states_the_rule():
    report = reported(HONEST)
    assert report.verdict in report.page({}) and json.loads(report.to_json())["rule"] in report.verdict
    assert report.verdict.startswith("Best: honest (0.162), by the highest score = learned x (1 - drift)")
