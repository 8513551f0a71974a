"""How the embedded base is made: a solved encoder, and a loop that goes on where it was cut."""

import dataclasses

import pytest
import torch
from torch.nn.functional import conv2d
from torch.testing import assert_close

from recipe import autoencoder
from recipe.fit import DEVICE, Schedule, adopt, ema_weights, fit

SCHEDULE = Schedule(steps=12, learning_rate=0.05, warmup_steps=3, ema_decay=0.8)


def test_the_encoder_computes_principal_components():
    noise = torch.Generator().manual_seed(0)
    pixels = torch.rand(6, 3, 64, 64, generator=noise).mul(2).sub(1)
    pixels = torch.nn.functional.avg_pool2d(pixels, 3, stride=1, padding=1)  # neighbours that are alike, as in pictures
    rows, offsets = autoencoder.principal_components(pixels)
    vae = autoencoder.new_autoencoder()
    autoencoder.solve_encoder(vae, rows, offsets)
    posterior = vae.encode(pixels).latent_dist
    codes = conv2d(pixels.double(), rows, offsets, stride=autoencoder.PATCH)  # B, C, h, w
    assert codes.shape == (6, 16, 16, 16) and codes.std().item() == pytest.approx(1, abs=0.01)
    assert_close(posterior.mean.double(), codes, rtol=0, atol=0.02)
    assert_close(posterior.std, torch.full_like(posterior.std, autoencoder.POSTERIOR_STD))


def learn(state, muon=False, **changes) -> torch.nn.Linear:
    """A linear map fitted to another on batches drawn from the step number; its matrix by Muon, if asked."""
    torch.manual_seed(1)
    model, wanted = torch.nn.Linear(4, 3).to(DEVICE), torch.randn(3, 4, device=DEVICE)

    def batch_of(step: int) -> tuple[torch.Tensor, torch.Tensor]:
        seen = torch.randn(16, 4, generator=torch.Generator(DEVICE).manual_seed(step), device=DEVICE)
        return seen, seen @ wanted.T

    schedule = dataclasses.replace(SCHEDULE, **changes)
    hidden = [model.weight] if muon else ()
    fit(model, batch_of, lambda seen, answer: (model(seen) - answer).square().mean(), schedule, state, hidden)
    return model


@pytest.mark.parametrize("muon", [False, True])
def test_a_stage_that_was_cut_ends_as_one_that_was_not(tmp_path, monkeypatch, muon):
    whole = learn(tmp_path / "whole.pt", muon)
    state, steps = tmp_path / "cut.pt", []

    class Cut(Exception):
        pass

    def cut(self, step: int) -> float:
        steps.append(step)
        if step == 7:
            raise Cut
        return rate(self, step)

    rate = Schedule.rate
    with monkeypatch.context() as patch, pytest.raises(Cut):
        patch.setattr(Schedule, "rate", cut)
        learn(state, muon, checkpoint_seconds=0.0)
    assert steps == list(range(8))
    again = learn(state, muon)
    assert_close(again.weight, whole.weight, rtol=0, atol=0)
    fresh = torch.nn.Linear(4, 3)
    ema_weights(fresh, state)
    assert_close(fresh.weight, whole.weight.cpu(), rtol=0, atol=0)


def test_muon_trains_the_matrices_that_it_is_given(tmp_path):
    learned, adam = (learn(tmp_path / f"{muon}.pt", muon) for muon in (True, False))
    assert not torch.equal(learned.weight, adam.weight)
    saved = torch.load(tmp_path / "True.pt", weights_only=True)
    assert len(saved["muon"]["state"]) == len(saved["optimizer"]["state"]) == 1


def test_a_stage_ends_when_its_time_is_over(tmp_path):
    learn(tmp_path / "stage.pt", limit_seconds=0.0)
    assert torch.load(tmp_path / "stage.pt", weights_only=True)["step"] == 1
    learn(tmp_path / "stage.pt")
    assert torch.load(tmp_path / "stage.pt", weights_only=True)["step"] == SCHEDULE.steps


def test_a_shipped_stage_is_trained_further_from_its_step(tmp_path, capsys):
    torch.manual_seed(2)
    shipped = torch.nn.Linear(4, 3)
    adopt(shipped, 11, tmp_path / "stage.pt")
    learned = learn(tmp_path / "stage.pt")
    moved = (learned.weight.cpu() - shipped.weight).abs().max().item()
    assert 0 < moved < 0.01  # the one step that is left, at the end of the schedule
