"""Fine-tuning by self-distillation: a compressed model learns from the dense one it was made of.

The loop is a generator without input or output; it yields a record after every optimizer step.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import nn
from torch.nn import functional

from comcat_diffusion.compression.calibrate import Batch, checked


@dataclass(frozen=True)
class Distillation:
    """What the student is judged by: a weight for each term, zero leaves it out."""

    labels: float = 0.0  # cross-entropy with the batch's labels
    hard: float = 1.0  # cross-entropy with the class that the teacher thinks likeliest
    soft: float = 0.0  # cross-entropy with the teacher's classes, both at the temperature: the gradient of the KL
    temperature: float = 2.0
    align: float = 0.0  # mean square difference of the hidden states after the blocks below
    blocks: tuple[int, ...] = (0, 1, -2, -1)
    streams: float = 0.0  # relative square error of the hidden states, the sum over all blocks

    def __post_init__(self) -> None:
        weights = (self.labels, self.hard, self.soft, self.align, self.streams)
        if min(weights) < 0 or sum(weights) == 0:
            raise ValueError("The weights of the distillation must not be negative, and one must be above zero.")
        if self.temperature <= 0:
            raise ValueError(f"The temperature of the distillation must be above zero, not {self.temperature}.")

    def of(self, student: nn.Module, teacher: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """The loss on a batch; a model without classes is judged by its sample (a U-Net) or its features."""
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        hidden = {"output_hidden_states": True} if self.align or self.streams else {}
        seen, wanted = student(**inputs, **hidden), None
        features = not hasattr(seen, "logits") and hasattr(seen, "last_hidden_state")
        judged = self.hard or self.soft or hidden or features or hasattr(seen, "sample")
        if judged:  # labels alone need no teacher
            with torch.no_grad():
                wanted = teacher(**inputs, **hidden)
        if hasattr(seen, "sample"):
            return relative_error(seen.sample, wanted.sample)
        if features:
            return features_loss(seen.last_hidden_state, wanted.last_hidden_state) + self.along(seen, wanted)
        return self.loss(seen, wanted, batch.get("labels"))

    def loss(self, student: object, teacher: object | None, labels: torch.Tensor | None) -> torch.Tensor:
        """From two outputs of a transformers classifier, with hidden states if they are aligned; the teacher
        may be None if only labels count.

        Raises ValueError if labels are wanted and not there, or outside of the classifier.
        """
        logits, wanted = student.logits, None if teacher is None else teacher.logits  # B, classes
        total = logits.new_zeros(())
        if self.labels:
            total = total + self.labels * functional.cross_entropy(logits, insist_labels(labels, logits.shape[-1]))
        if self.hard:
            total = total + self.hard * functional.cross_entropy(logits, wanted.argmax(-1))
        if self.soft:
            cold, target = (x / self.temperature for x in (logits, wanted))
            entropy = functional.cross_entropy(cold, target.softmax(-1))
            total = total + self.soft * self.temperature**2 * entropy  # gradients then do not depend on the temperature
        if self.align:
            pairs = zip(student.hidden_states[1:], teacher.hidden_states[1:], strict=True)
            errors = [functional.mse_loss(*pair) for pair in pairs]
            chosen = {block % len(errors) for block in self.blocks if -len(errors) <= block < len(errors)}
            total = total + self.align * sum(errors[block] for block in sorted(chosen))
        return total + self.along(student, teacher)

    def along(self, student: object, teacher: object | None) -> torch.Tensor | float:
        """What the streams add. Every block has its own error to learn from, whatever the later ones make of it."""
        if not self.streams:
            return 0.0
        pairs = zip(student.hidden_states[1:], teacher.hidden_states[1:], strict=True)
        return self.streams * sum(relative_error(*pair) for pair in pairs)


OF_FEATURES = Distillation(streams=1.0)  # each block told its own error as well, a model learns faster (docs/log.md)


def features_loss(found: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Of features (B, N, C): 1 - cosine, the first token as much as all others, and the relative square error."""
    off = 1 - functional.cosine_similarity(found, wanted, dim=-1)  # B, N
    off = off.mean() if off.shape[1] == 1 else (off[:, 0].mean() + off[:, 1:].mean()) / 2
    return off + relative_error(found, wanted)


def relative_error(found: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """The square error in parts of what is wanted."""
    return functional.mse_loss(found, wanted) / wanted.square().mean()


def insist_labels(labels: torch.Tensor | None, classes: int) -> torch.Tensor:
    """The labels, (B,). Raises ValueError if there are none or one is no class of the classifier."""
    if labels is None:
        raise ValueError("The batches have no 'labels'; give them, or learn from the dense model alone (labels=0).")
    if labels.min() < 0 or labels.max() >= classes:
        wrong = labels[(labels < 0) | (labels >= classes)][0].item()
        raise ValueError(f"The label {wrong} is outside of the classifier, which has the classes 0 to {classes - 1}.")
    return labels


@dataclass(frozen=True)
class Step:
    """What one optimizer step did."""

    step: int  # counted from one
    loss: float
    learning_rate: float  # the largest of all tensors'
    gradient_norm: float
    seconds: float


@dataclass
class Finetune:
    """Everything a step needs. Batches are taken in their order, again and again; processes share them out."""

    student: nn.Module
    teacher: nn.Module
    batches: Sequence[Batch]
    distillation: Distillation
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    accelerator: Accelerator
    max_grad_norm: float = 1.0

    def steps(self, count: int, first: int = 0) -> Iterator[Step]:
        """Train the student, yielding after each of `count` optimizer steps; `first` steps were done before.

        Raises ValueError, before the weights are touched, at a loss or gradient that is no number.
        """
        self.teacher.eval()
        self.student.train()
        trained = [p for p in self.student.parameters() if p.requires_grad]
        micro = self.accelerator.gradient_accumulation_steps
        for step in range(first + 1, first + count + 1):
            started, losses = time.perf_counter(), []
            for number in range((step - 1) * micro, step * micro):
                with self.accelerator.accumulate(self.student):
                    loss = self._loss(number)
                    self._insist(loss, f"The loss of step {step}")
                    self.accelerator.backward(loss)
                    losses.append(loss.detach())
                    if self.accelerator.sync_gradients:
                        norm = self.accelerator.clip_grad_norm_(trained, self.max_grad_norm)
                        self._insist(norm, f"The gradient of step {step}")
                    self.optimizer.step()
                    self.schedule.step()
                    self.optimizer.zero_grad()
            mean = self.accelerator.reduce(torch.stack(losses).mean(), reduction="mean").item()
            rate, seconds = max(self.schedule.get_last_lr()), time.perf_counter() - started
            yield Step(step, mean, rate, float(norm), seconds)

    def _loss(self, number: int) -> torch.Tensor:
        place = number * self.accelerator.num_processes + self.accelerator.process_index
        batch = next(checked(self.teacher, [self.batches[place % len(self.batches)]]))
        return self.distillation.of(self.student, self.teacher, batch)

    def _insist(self, value: torch.Tensor, what: str) -> None:
        if not torch.isfinite(value).all():
            raise ValueError(f"{what} is not a finite number; lower the learning rate, or train in float32.")
