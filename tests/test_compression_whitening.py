"""Adam on weights as whitened inputs see them: the formula, that it learns where Adam alone does not, what is held."""

import copy

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from comcat_diffusion.compression import Settings, compress
from comcat_diffusion.compression.factor import Moments
from comcat_diffusion.compression.finetune import OF_FEATURES
from comcat_diffusion.compression.learning import learned
from comcat_diffusion.compression.whitening import BETAS, RIDGE, TINY, Whitened, inputs_of_linears
from tests.compression_models import batches, built, pictures


def skewed(tokens: int = 400, channels: int = 6) -> torch.Tensor:
    """(tokens, channels) with a mean, one channel of thirty times the others, and a direction that is hardly there."""
    made = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, channels, generator=made, dtype=torch.float64)
    x[:, 1] = 0.9 * x[:, 0] + 0.1 * x[:, 1]
    x[:, 2] *= 30
    return x + 5 * torch.randn(channels, generator=made, dtype=torch.float64)


def layer(bias: bool = True, channels: int = 6, outputs: int = 4) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return nn.Sequential(nn.Linear(channels, outputs, bias=bias)).double()


def whitened(model: nn.Module, x: torch.Tensor, rate: float) -> Whitened:
    seen = Moments.zero(x.shape[1], model[0].weight)
    seen.add(x)
    return Whitened(model, {"0": seen}, rate)


@pytest.mark.parametrize("bias", [True, False])
def test_a_step_is_adams_on_the_weights_of_whitened_inputs(bias):
    x, model = skewed(), layer(bias)
    wanted = torch.randn(400, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    mean = x.mean(0) if bias else torch.zeros(6).double()
    square = (x - mean).mT @ (x - mean) / len(x)
    values, vectors = torch.linalg.eigh(square + RIDGE * square.diagonal().mean() * torch.eye(6).double())
    root = vectors @ values.sqrt().diag() @ vectors.mT
    slow = [(model[0].weight @ root).detach().requires_grad_()]
    slow += [(model[0].bias + model[0].weight @ mean).detach().requires_grad_()] if bias else []
    size = float(slow[0].detach().square().mean().sqrt())
    adam, ours = torch.optim.Adam(slow, 0.02 * size, BETAS, eps=TINY), whitened(model, x, 0.02)
    before = model(x).detach()
    for _ in range(6):
        out = (x - mean) @ torch.linalg.inv(root) @ slow[0].mT + (slow[1] if bias else 0)
        (out - wanted).square().mean().backward()
        (model(x) - wanted).square().mean().backward()
        for optimizer in (adam, ours):
            optimizer.step()
            optimizer.zero_grad()
    with torch.no_grad():
        out = (x - mean) @ torch.linalg.inv(root) @ slow[0].mT + (slow[1] if bias else 0)
        assert_close(model(x), out, rtol=0, atol=1e-9)
        assert (model(x) - before).abs().max() > 0.01


def test_it_learns_where_adam_alone_is_held_back_by_the_mean_of_what_comes_in():
    x, teacher, signs = skewed()[:, [0, 1, 3, 4, 5]] + 20, layer(channels=5), torch.tensor([1.0, -1, 0, 1, -1])
    with torch.no_grad():
        wanted = teacher(x) + 0.1 * ((x - x.mean(0)) @ signs.double()).unsqueeze(1)
    left = {}
    for name in ("adam", "whitened"):
        model = copy.deepcopy(teacher)
        size = float(model[0].weight.detach().square().mean().sqrt())
        ours = name == "whitened"
        optimizer = whitened(model, x, 0.02) if ours else torch.optim.Adam(model.parameters(), 0.02 * size, BETAS)
        falling = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, 60)
        for _ in range(60):
            (model(x) - wanted).square().mean().backward()
            optimizer.step()
            falling.step()
            optimizer.zero_grad()
        left[name] = float((model(x) - wanted).square().mean().detach())
    assert left["whitened"] < 0.1 * left["adam"]


def test_what_linears_see_is_told_and_the_model_left_as_it_was():
    model = built("dinov2").train()
    hooks = [dict(module._forward_pre_hooks) for module in model.modules()]
    seen = inputs_of_linears(model, batches(2))
    assert model.training and [dict(module._forward_pre_hooks) for module in model.modules()] == hooks
    assert set(seen) == {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    entered = []
    layer = model.get_submodule("encoder.layer.0.mlp.fc1")
    handle = layer.register_forward_pre_hook(lambda _, arguments: entered.append(arguments[0]))
    model.eval()(pixel_values=torch.cat([batch["pixel_values"] for batch in batches(2)]))
    handle.remove()
    tokens = entered[0].detach().flatten(0, 1)
    assert_close(seen["encoder.layer.0.mlp.fc1"].mean, tokens.mean(0), rtol=0, atol=1e-12)
    assert_close(seen["encoder.layer.0.mlp.fc1"].second(True), tokens.mT.cov(correction=0), rtol=0, atol=1e-12)


def test_activations_that_are_no_numbers_are_named():
    model = built("dinov2")
    with torch.no_grad():
        model.encoder.layer[0].norm2.weight[0] = torch.inf
    with pytest.raises(ValueError, match="not finite"):
        inputs_of_linears(model, batches(1))


def test_a_student_learns_and_kernels_and_tables_stay():
    teacher = built("dinov2")
    student = compress(teacher, 0.5, batches(), settings=Settings(method="energy"))[0]
    student.encoder.layer[0].norm1.weight.requires_grad_(False)
    frozen = {name for name, tensor in student.named_parameters() if not tensor.requires_grad}
    before = {name: tensor.detach().clone() for name, tensor in student.named_parameters()}
    pixels = pictures(32)
    off = lambda: float(OF_FEATURES.of(student, teacher, {"pixel_values": pixels}).detach())
    start = off()
    learned(student, teacher, batches(20, 16), OF_FEATURES, 4e-4, 0, whitened=True)
    assert off() < 0.8 * start
    same = {name for name, tensor in student.named_parameters() if torch.equal(tensor, before[name])}
    assert {"embeddings.position_embeddings", "embeddings.patch_embeddings.projection.weight"} <= same
    assert "encoder.layer.1.mlp.fc2.weight" not in same and "layernorm.weight" not in same
    assert {name for name, tensor in student.named_parameters() if not tensor.requires_grad} == frozen
