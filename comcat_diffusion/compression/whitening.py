"""Adam on layers as their own inputs see them.

What enters a transformer's layer has a mean, channels that are hundreds of times the others, and directions that are
hardly there. Adam's steps, of one size for all weights, turn the output far along the first and hardly along the last.
So it steps on what whitened inputs would see: y = W x + b = V z + c with z = S^-1 (x - m), where m is the mean of x,
S^2 its covariance with a ridge, V = W S and c = b + W m. W and b are moved by what that comes to; without a bias there
is no mean to take away, and S^2 is the second moment. (Input-side natural gradient, as in K-FAC, arXiv 1503.05671; S is
found once, as a student that was fitted hardly changes what its layers see.)

Letters: C channels into a layer, E out of it.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from comcat_diffusion.compression.calibrate import Batch, checked, refuse_unseen
from comcat_diffusion.compression.factor import Moments

RIDGE = 0.003  # of the channels' mean variance: directions with less are hardly moved, a few batches do not know them
BETAS = (0.9, 0.99)
TINY = 1e-12  # against division by zero


@torch.no_grad()
def inputs_of_linears(model: nn.Module, batches: Iterable[Batch]) -> dict[str, Moments]:
    """What every Linear that is run sees, by its path. The model is run in evaluation mode and left as it was.

    Raises ValueError if a batch is no batch of pictures, or activations are not finite.
    """
    seen, handles, training = {}, [], model.training
    for path, layer in model.named_modules():
        if isinstance(layer, nn.Linear):
            moments = Moments.zero(layer.in_features, layer.weight)
            handles.append(layer.register_forward_pre_hook(lambda _, arguments, m=moments: m.add(arguments[0])))
            seen[path] = moments
    try:
        model.eval()
        for batch in checked(model, batches):
            model(**{name: value for name, value in batch.items() if name != "labels"})
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
    run = {path: moments for path, moments in seen.items() if moments.tokens}
    refuse_unseen(run)
    return run


@dataclass(frozen=True)
class Inputs:
    """Of one layer."""

    mean: torch.Tensor  # C; zeros without a bias
    inverse: torch.Tensor  # C, C: S^-1
    size: float  # root mean square of V

    @classmethod
    def of(cls, layer: nn.Linear, moments: Moments) -> "Inputs":
        """In the layer's precision; found in float64."""
        centred = layer.bias is not None
        square = moments.second(centred)
        values, vectors = torch.linalg.eigh(square + RIDGE * square.diagonal().mean() * torch.eye(len(square)).double())
        root = (vectors * values.sqrt()) @ vectors.mT
        size = float((layer.weight.detach().double().cpu() @ root).square().mean().sqrt())
        mean = moments.mean if centred else torch.zeros_like(moments.mean)
        inverse = (vectors * values.rsqrt()) @ vectors.mT
        return cls(mean.to(layer.weight), inverse.to(layer.weight), size)


class Whitened(torch.optim.Optimizer):
    """Adam on the layers' weights for whitened inputs, and on other vectors (norms, scales) as they are.

    A step is at most about `rate` times a tensor's own size (its root mean square; 1 for zeros). What is neither a
    Linear that was seen nor a vector (kernels of patches, tables of positions) is not among its parameters.
    """

    def __init__(self, model: nn.Module, seen: Mapping[str, Moments], rate: float) -> None:
        layers = {path: model.get_submodule(path) for path in seen}
        found = [Inputs.of(layer, seen[path]) for path, layer in layers.items()]
        groups = [
            {"params": [p for p in (layer.weight, layer.bias) if p is not None], "lr": rate * (inputs.size or 1.0)}
            for layer, inputs in zip(layers.values(), found, strict=True)
        ]
        self.inputs = {layer.weight: inputs for layer, inputs in zip(layers.values(), found, strict=True)}
        taken = {id(tensor) for group in groups for tensor in group["params"]}
        for tensor in model.parameters():
            if id(tensor) not in taken and tensor.ndim == 1:
                size = float(tensor.detach().double().square().mean().sqrt())
                groups.append({"params": [tensor], "lr": rate * (size or 1.0)})
        super().__init__(groups, {})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:
        """Along the gradients that are there."""
        for group in self.param_groups:
            tensor, *bias = group["params"]
            if tensor.grad is None:
                continue
            inputs = self.inputs.get(tensor)
            if inputs is None:
                tensor.sub_(group["lr"] * self._adam(tensor, tensor.grad))
                continue
            gradient = tensor.grad - bias[0].grad.outer(inputs.mean) if bias else tensor.grad  # E, C: c being held
            moved = group["lr"] * self._adam(tensor, gradient @ inputs.inverse) @ inputs.inverse
            tensor.sub_(moved)
            if bias:
                bias[0].sub_(group["lr"] * self._adam(bias[0], bias[0].grad) - moved @ inputs.mean)

    def _adam(self, tensor: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
        """Adam's direction; the moments are those of the gradient given."""
        state = self.state[tensor]
        if not state:
            state |= {"step": torch.zeros(()), "exp_avg": torch.zeros_like(gradient)}
            state["exp_avg_sq"] = torch.zeros_like(gradient)
        state["step"] += 1
        for name, value, kept in zip(("exp_avg", "exp_avg_sq"), (gradient, gradient.square()), BETAS, strict=True):
            state[name].lerp_(value, 1 - kept)
        along, spread = (
            state[name] / (1 - kept ** float(state["step"]))
            for name, kept in zip(("exp_avg", "exp_avg_sq"), BETAS, strict=True)
        )
        return along / (spread.sqrt() + TINY)
