"""What compression is measured on: two small classification tasks, a ViT of DeiT-tiny's shape, training and top-1.

- scenes: the embedded base's world (recipe/draw.py), one object a picture, 64 x 64. A class is one of 24 objects in its
  own colours, in a warm tint or in a cold one: 72 classes. Place, size, tint and background vary within a class.
- digits: the 1,797 handwritten digits, 8 x 8, that come with scikit-learn (which has to be installed for it).

Test pictures are made of another seed (digits: set aside) and are looked at only to report a top-1.
"""

import math
import random
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
from torch import nn
from torch.nn import functional
from transformers import ViTConfig, ViTForImageClassification

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


def task(name: str, train_count: int, test_count: int) -> Task:
    """A task by name; the counts hold for `scenes`, of which there are as many as one likes."""
    return scenes(train_count, test_count) if name == "scenes" else digits()


def scenes(train_count: int, test_count: int) -> Task:
    """Drawn scenes of 72 classes; needs Debian's fonts-noto-color-emoji."""
    from recipe.world import OBJECTS

    return Task("scenes", 3 * len(OBJECTS), 8, *_drawn(train_count, seed=1), *_drawn(test_count, seed=2))


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
    return Task("digits", 10, 1, pictures[~test], labels[~test], pictures[test], labels[test])


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


def batches(data: Task, count: int, size: int, device: torch.device, seed: int = 3) -> list[dict[str, torch.Tensor]]:
    """Batches of training pictures with labels, in a random order."""
    order = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(seed))
    chosen = order.repeat(1 + count * size // len(order))[: count * size].split(size)
    return [
        {"pixel_values": as_input(data.train[one], device), "labels": data.train_labels[one].to(device)}
        for one in chosen
    ]


def trained(data: Task, layers: int, steps: int, batch: int, device: torch.device, state: Path | None) -> nn.Module:
    """The dense model, trained from scratch on the task; a file at `state` is taken instead, or written."""
    model = deit(192, 3, data.classes, data.train.shape[-1], data.patch, layers).to(device)
    if state is not None and state.exists():
        model.load_state_dict(safetensors.torch.load_file(state))
        return model
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)
    warm = max(1, steps // 20)

    def rate(step: int) -> float:
        return min(1.0, (step + 1) / warm) * 0.5 * (1 + math.cos(math.pi * step / steps))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    order = torch.Generator().manual_seed(4)
    model.train()
    for _ in range(steps):
        chosen = torch.randint(len(data.train), (batch,), generator=order)
        logits = model(as_input(data.train[chosen], device)).logits
        functional.cross_entropy(logits, data.train_labels[chosen].to(device), label_smoothing=0.1).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
    if state is not None:
        state.parent.mkdir(parents=True, exist_ok=True)
        safetensors.torch.save_file(model.state_dict(), state)
    return model.eval()


@torch.no_grad()
def top1(model: nn.Module, data: Task, device: torch.device) -> float:
    """Percent of the test pictures whose class is found."""
    model.eval()
    found = [
        (model(as_input(pictures, device)).logits.argmax(-1).cpu() == labels).float()
        for pictures, labels in zip(data.test.split(256), data.test_labels.split(256), strict=True)
    ]
    return 100 * float(torch.cat(found).mean())
