"""Self-distillation: what the losses are, that they bring a student nearer to its teacher, and what stops."""

import math

import pytest
import torch
from accelerate import Accelerator
from torch.nn import functional
from torch.testing import assert_close

from comcat_diffusion.compression import Settings, compress
from comcat_diffusion.compression.finetune import Distillation, Finetune, features_loss
from comcat_diffusion.compression.learning import learned
from tests.compression_models import batches, built, out, pictures


def loop(student, teacher, distillation=None, data=None, rate=1e-3, accumulate=1, optimizer=torch.optim.AdamW):
    made = optimizer(student.parameters(), lr=rate)
    schedule = torch.optim.lr_scheduler.ConstantLR(made, 1.0)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulate)
    student, made, schedule = accelerator.prepare(student, made, schedule)
    return Finetune(
        student, teacher, data or batches(), distillation or Distillation(), made, schedule, accelerator, 1e9
    )


def pair(reduction=0.5):
    teacher = built("vit")
    return compress(teacher, reduction, batches(), settings=Settings(method="energy"))[0], teacher


@pytest.mark.parametrize("distillation", [Distillation(hard=0, soft=1.0), Distillation(hard=0, align=1.0)])
def test_a_student_comes_nearer_to_its_teacher(distillation):
    student, teacher = pair()
    weights = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    distance = lambda: float((out(student, pictures(32)) - out(teacher, pictures(32))).square().mean())
    before = distance()
    records = list(loop(student, teacher, distillation, batches(8, 16)).steps(40))
    assert [record.step for record in records] == list(range(1, 41))
    assert student.eval() and distance() < 0.8 * before
    assert all(torch.equal(tensor, weights[name]) for name, tensor in teacher.state_dict().items())


def test_hard_labels_teach_the_classes_of_the_teacher():
    student, teacher = pair(0.7)
    agreement = lambda: float(
        (out(student, pictures(64)).argmax(-1) == out(teacher, pictures(64)).argmax(-1)).mean(dtype=float)
    )
    before = agreement()
    records = list(loop(student, teacher, data=[{"pixel_values": pictures(64)}]).steps(30))
    student.eval()
    assert before < 0.9 and agreement() > before + 0.1 and records[-1].loss < 0.8 * records[0].loss


def test_the_loss_is_the_sum_of_its_terms():
    student, teacher = pair()
    batch = batches(1, labels=True)[0]
    seen, wanted = (model(batch["pixel_values"], output_hidden_states=True) for model in (student, teacher))
    terms = {
        "labels": functional.cross_entropy(seen.logits, batch["labels"]),
        "hard": functional.cross_entropy(seen.logits, wanted.logits.argmax(-1)),
        "align": sum(functional.mse_loss(seen.hidden_states[n], wanted.hidden_states[n]) for n in (1, 2)),
        "streams": sum(
            (seen.hidden_states[n] - wanted.hidden_states[n]).square().mean() / wanted.hidden_states[n].square().mean()
            for n in (1, 2)
        ),
    }
    for name, term in terms.items():
        alone = Distillation(**({"hard": 0.0} | {name: 2.0}))
        assert_close(alone.of(student, teacher, batch), 2 * term)
        assert term > 0.01
    together = Distillation(labels=0.5, hard=0.5, align=0.1)
    weighted = 0.5 * terms["labels"] + 0.5 * terms["hard"] + 0.1 * terms["align"]
    assert_close(together.of(student, teacher, batch), weighted)


def test_features_are_learned_beside_the_streams_of_all_blocks():
    teacher = built("dinov2")
    student = compress(teacher, 0.5, batches(), settings=Settings(method="energy"))[0]
    batch = batches(1)[0]
    seen, wanted = (model(batch["pixel_values"], output_hidden_states=True) for model in (student, teacher))
    alone = Distillation().of(student, teacher, batch)
    assert_close(alone, features_loss(seen.last_hidden_state, wanted.last_hidden_state))
    pairs = list(zip(seen.hidden_states, wanted.hidden_states, strict=True))[1:]
    errors = [(found - right).square().sum() / right.square().sum() for found, right in pairs]
    assert len(errors) == 2 and min(errors) > 1e-3
    assert_close(Distillation(streams=0.5).of(student, teacher, batch), alone + 0.5 * sum(errors))


def test_the_soft_loss_has_the_gradient_of_the_kl_divergence():
    student, teacher = pair()
    batch = batches(1)[0]
    loss = Distillation(hard=0, soft=1.0, temperature=2.0).of(student, teacher, batch)
    parameter = student.classifier.bias
    (ours,) = torch.autograd.grad(loss, parameter)
    cold, target = (m(batch["pixel_values"]).logits / 2 for m in (student, teacher))
    kl = functional.kl_div(cold.log_softmax(-1), target.softmax(-1), reduction="batchmean")
    (theirs,) = torch.autograd.grad(4 * kl, parameter)
    assert_close(ours, theirs)
    assert ours.abs().max() > 1e-3


def test_accumulated_batches_are_one_larger_batch():
    both = {"pixel_values": torch.cat([batch["pixel_values"] for batch in batches(2)])}
    results = []
    for data, accumulate in ((batches(2), 2), ([both], 1)):
        student, teacher = pair()
        start = {name: p.detach().clone() for name, p in student.named_parameters()}
        records = list(loop(student, teacher, data=data, accumulate=accumulate, optimizer=torch.optim.SGD).steps(1))
        assert len(records) == 1
        results.append({name: p.detach() - start[name] for name, p in student.named_parameters()})
    assert all((change - results[1][name]).abs().max() < 1e-12 for name, change in results[0].items())
    assert max(change.abs().max() for change in results[0].values()) > 1e-5


def test_a_loop_that_goes_on_takes_the_batches_that_come():
    data = batches(5)
    whole, parts = pair(), pair()
    list(loop(*whole, data=data, optimizer=torch.optim.SGD).steps(4))
    running = loop(*parts, data=data, optimizer=torch.optim.SGD)
    list(running.steps(3))
    assert [record.step for record in running.steps(1, first=3)] == [4]
    for ours, theirs in zip(whole[0].parameters(), parts[0].parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_a_step_that_is_no_number_touches_nothing():
    student, teacher = pair()
    with torch.no_grad():
        student.classifier.bias[0] = torch.nan
    before = student.vit.layernorm.weight.clone()
    with pytest.raises(ValueError, match="loss of step 1 is not a finite number"):
        list(loop(student, teacher).steps(1))
    assert torch.equal(student.vit.layernorm.weight, before)


def test_rates_rise_from_nothing_and_fall_to_it():
    seen = []
    student, teacher = pair()
    learned(student, teacher, batches(30), Distillation(), 1e-3, 0, told=lambda step: seen.append(step.learning_rate))
    course = [1e-3 * min(1, (n + 1) / 4) * (1 + math.cos(math.pi * n / 30)) / 2 for n in range(31)]
    assert_close(seen, course[1:], rtol=1e-6, atol=1e-12)  # told is what comes next
    assert course[0] < 3e-4 and max(seen) > 9e-4 and seen[-1] < 1e-8


def test_no_tensor_is_changed_faster_than_its_size_allows():
    student, teacher = pair()
    scaled = {"vit.layernorm.weight": 1.0, "classifier.weight": 0.002, "classifier.bias": 0.0}
    with torch.no_grad():
        for name, size in scaled.items():
            tensor = student.get_parameter(name)
            tensor.copy_(size * tensor.sign())
    before = {name: tensor.detach().clone() for name, tensor in student.named_parameters()}
    learned(student, teacher, batches(1, 16), Distillation(), 1e-3, 0)  # Adam's first step is the rate, by signs
    moved = {name: float((student.get_parameter(name).detach() - before[name]).abs().median()) for name in scaled}
    assert_close(moved["vit.layernorm.weight"], 1e-3, rtol=0.02, atol=0)  # the rest is decay
    assert_close(moved["classifier.weight"], 1e-4, rtol=0.02, atol=0)
    assert_close(moved["classifier.bias"], 1e-3, rtol=0.02, atol=0)  # zeros have no size


def test_labels_are_asked_for_only_where_they_are_used():
    student, teacher = pair()
    list(loop(student, teacher).steps(1))
    with pytest.raises(ValueError, match="no 'labels'"):
        list(loop(student, teacher, Distillation(labels=1.0)).steps(1))


@pytest.mark.parametrize("wrong", [{"hard": 0.0}, {"soft": -1.0}, {"temperature": 0.0}])
def test_a_distillation_that_makes_no_sense(wrong):
    with pytest.raises(ValueError):
        Distillation(**wrong)


def test_a_unet_learns_from_its_own_samples(tiny_unet):
    unet = tiny_unet().requires_grad_(True)
    small, _ = compress(unet, 0.5, settings=Settings(counted="parts"))
    inputs = {n: t.float() if t.is_floating_point() else t for n, t in tiny_unet.inputs().items()}
    records = list(loop(small, unet, data=[inputs], rate=1e-5).steps(5))
    assert 0 < records[-1].loss < records[0].loss < 1
