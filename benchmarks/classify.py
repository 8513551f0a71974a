"""What compression is measured on: two small classification tasks, a ViT of DeiT-tiny's shape, training and top-1.

    python -m benchmarks.classify --data scenes --output runs/vit/scenes.safetensors    # goes on where it was cut

- scenes: the embedded base's world (recipe/draw.py), one object a picture, 64 x 64. A class is one of 24 objects in its
  own colours, in a warm tint or in a cold one: 72 classes. Place, size, tint and background vary within a class.
- digits: the 1,797 handwritten digits, 8 x 8, that come with scikit-learn (which has to be installed for it).

Test pictures are made of another seed (digits: set aside) and are looked at only to report a top-1.
"""

import argparse
import json
import math
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import safetensors.torch
import torch
from safetensors import safe_open
from torch import nn
from torch.nn import functional
from transformers import ViTConfig, ViTForImageClassification

from benchmarks import circumstances as shared

WARM, COLD = ("red", "orange", "yellow"), ("green", "blue", "violet")


@dataclass(frozen=True)
class Task:
    """Pictures (N, 3, h, w) as uint8, and labels (N,)."""

    name: str
    classes: int
    patch: int  # pixels
    train: torch.Tensor
    train_labels: torch.Tensor
    test: torch.Tensor
    test_labels: torch.Tensor


def task(name: str, train_count: int = 40_000, test_count: int = 7_200) -> Task:
    """A task by name; the counts hold for `scenes`, of which there are as many as one likes."""
    return scenes(train_count, test_count) if name == "scenes" else digits()


def scenes(train_count: int, test_count: int) -> Task:
    """Drawn scenes of 72 classes; needs Debian's fonts-noto-color-emoji."""
    from recipe.world import OBJECTS

    return Task("scenes", 3 * len(OBJECTS), 16, *_drawn(train_count, seed=1), *_drawn(test_count, seed=2))


def _drawn(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    from recipe.draw import contrast, draw
    from recipe.world import BACKGROUNDS, OBJECTS, PLACES, SIZES, Scene, Thing

    rng, names, made, labels = random.Random(seed), list(OBJECTS), [], []
    while len(made) < count:
        label = len(made) % (3 * len(names))  # the same number of every class
        name, tint = names[label // 3], rng.choice(((None,), WARM, COLD)[label % 3])
        background = rng.choice(list(BACKGROUNDS))
        if tint == background or not contrast(name, tint, background):
            continue
        thing = Thing(name, tint, rng.choice(list(PLACES)), rng.choice(list(SIZES)))
        made.append(torch.from_numpy(draw(Scene((thing,), background), rng).copy()).movedim(-1, 0))
        labels.append(label)
    return torch.stack(made), torch.tensor(labels)


def digits() -> Task:
    """scikit-learn's handwritten digits, every fifth set aside for the test."""
    from sklearn.datasets import load_digits

    data = load_digits()
    pictures = torch.from_numpy(data.images * 255 / 16).to(torch.uint8).unsqueeze(1).expand(-1, 3, -1, -1)
    labels, test = torch.from_numpy(data.target).long(), torch.arange(len(data.target)) % 5 == 0
    return Task("digits", 10, 2, pictures[~test], labels[~test], pictures[test], labels[test])


def deit(width: int, heads: int, classes: int, pixels: int, patch: int, layers: int = 12) -> nn.Module:
    """A ViT of random weights: 192/3 is DeiT-tiny's shape, 384/6 small's, 768/12 base's."""
    config = ViTConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        image_size=pixels,
        patch_size=patch,
        num_labels=classes,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return ViTForImageClassification(config).eval()


def as_input(pictures: torch.Tensor, device: torch.device) -> torch.Tensor:
    """uint8 -> (B, 3, h, w) from -1 to 1."""
    return pictures.to(device).float() / 127.5 - 1


class Batches(Sequence):
    """Batches of training pictures with labels, in a random order, made when they are asked for."""

    def __init__(self, data: Task, count: int, size: int, device: torch.device, seed: int = 3) -> None:
        order = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(seed))
        self.chosen = order.repeat(1 + count * size // len(order))[: count * size].split(size)
        self.data, self.device = data, device

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """pixel_values (B, 3, h, w) and labels (B,)."""
        chosen = self.chosen[index]  # IndexError ends an iteration
        pictures, labels = self.data.train[chosen], self.data.train_labels[chosen]
        return {"pixel_values": as_input(pictures, self.device), "labels": labels.to(self.device)}


@dataclass(frozen=True)
class Course:
    """How the dense model is trained, from scratch."""

    layers: int = 12
    steps: int = 1_600
    batch: int = 64  # pictures
    learning_rate: float = 1e-3  # peak; a twentieth of the steps warms up, then a cosine to zero
    weight_decay: float = 0.05
    smoothing: float = 0.1  # of the labels
    save_steps: int = 100  # between states to go on from

    def rate(self, step: int) -> float:
        """Part of the peak learning rate at a step counted from zero."""
        warm = max(1, self.steps // 20)
        return min(1.0, (step + 1) / warm) * 0.5 * (1 + math.cos(math.pi * step / self.steps))


COURSES = {"scenes": Course(steps=6_000), "digits": Course(steps=600, batch=32)}


@dataclass
class Training:
    """A model on its course. Pictures of a step depend on the step alone, so a cut run goes on as if it was none."""

    data: Task
    course: Course
    device: torch.device

    def __post_init__(self) -> None:
        shape = self.data.classes, self.data.train.shape[-1], self.data.patch
        self.model = deit(192, 3, *shape, self.course.layers).to(self.device)
        about = {"lr": self.course.learning_rate, "weight_decay": self.course.weight_decay, "fused": True}
        self.optimizer = torch.optim.AdamW(self.model.parameters(), **about)
        self.done, self.seconds = 0, 0.0

    def steps(self) -> Iterator[float]:
        """Train, yielding the loss after each step that is left."""
        self.model.train()
        for step in range(self.done, self.course.steps):
            started = time.perf_counter()
            for group in self.optimizer.param_groups:
                group["lr"] = self.course.learning_rate * self.course.rate(step)
            loss = self._loss(step)
            loss.backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.done, self.seconds = step + 1, self.seconds + time.perf_counter() - started
            yield loss.item()
        self.model.eval()

    def _loss(self, step: int) -> torch.Tensor:
        order = torch.Generator().manual_seed(step)
        chosen = torch.randint(len(self.data.train), (self.course.batch,), generator=order)
        with torch.autocast(self.device.type, torch.bfloat16):  # a quarter faster where the CPU multiplies it
            logits = self.model(as_input(self.data.train[chosen], self.device)).logits
        labels = self.data.train_labels[chosen].to(self.device)
        return functional.cross_entropy(logits.float(), labels, label_smoothing=self.course.smoothing)

    def save(self, path: Path) -> None:
        """Everything that going on needs."""
        path.parent.mkdir(parents=True, exist_ok=True)
        content = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        torch.save(content | {"done": self.done, "seconds": self.seconds}, path.with_suffix(".tmp"))
        path.with_suffix(".tmp").replace(path)

    def load(self, path: Path) -> None:
        """The inverse of `save`."""
        content = torch.load(path, weights_only=True, map_location=self.device)
        self.model.load_state_dict(content["model"])
        self.optimizer.load_state_dict(content["optimizer"])
        self.done, self.seconds = content["done"], content["seconds"]


def trained(data: Task, course: Course, device: torch.device, path: Path) -> tuple[nn.Module, dict]:
    """The dense model and how it was trained, from the file at `path`, which is written first if it is not there."""
    training, cut = Training(data, course, device), path.with_suffix(".cut")
    if not path.exists():
        if cut.exists():
            training.load(cut)
        for loss in training.steps():
            if training.done % course.save_steps == 0:
                training.save(cut)
                print(f"step {training.done:,}, loss {loss:.3f}, {training.seconds:.0f} s", flush=True)
        about = asdict(course) | {"seconds": training.seconds, "dtype": "bfloat16 autocast"}
        path.parent.mkdir(parents=True, exist_ok=True)
        safetensors.torch.save_file(training.model.state_dict(), path, {"training": json.dumps(about)})
        cut.unlink(missing_ok=True)
    with safe_open(path, framework="pt") as opened:
        about = json.loads(opened.metadata()["training"])
    training.model.load_state_dict(safetensors.torch.load_file(path))
    return training.model.eval(), about


@torch.no_grad()
def top1(model: nn.Module, data: Task, device: torch.device) -> float:
    """Percent of the test pictures whose class is found."""
    model.eval()
    found = [
        (model(as_input(pictures, device)).logits.argmax(-1).cpu() == labels).float()
        for pictures, labels in zip(data.test.split(256), data.test_labels.split(256), strict=True)
    ]
    return 100 * float(torch.cat(found).mean())


def main(arguments: list[str] | None = None) -> None:
    """Train the dense model of a task and print its top-1."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.classify", description=__doc__)
    parser.add_argument("--data", choices=tuple(COURSES), default="scenes", help="task (default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="torch device (default: %(default)s)")
    parser.add_argument("--threads", type=int, help="CPU threads (default: as many as torch finds)")
    parser.add_argument("--output", type=Path, required=True, help="file of the trained model")
    flags = parser.parse_args(arguments)
    shared.use_threads(flags.threads)
    device, data = torch.device(flags.device), task(flags.data)
    model, about = trained(data, COURSES[flags.data], device, flags.output)
    print(f"top-1 {top1(model, data, device):.2f} after {about['steps']:,} steps, {about['seconds']:.0f} s")


if __name__ == "__main__":
    main()
