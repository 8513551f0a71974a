"""What an adapter costs on one attention, on a training step and on a step of generation: parts of benchmarks.speed.

One attention layer of the largest resolution (SD 1.5 at 512 px: 4096 tokens, 8 heads of 40, 320 channels), one whole
training step of the U-Net (forward, backward, AdamW on the adapter), and one U-Net forward as in generation. Variants:

- bare: the frozen model. Its training step runs the same forward and backward: the input of the earliest adapted
  attention is made to require a gradient, so that the backward pass goes just as far as with an adapter there.
- comcat: a live adapter of rank R. Also comcat_foldable, comcat_tied and comcat_merged (written into weights), and, of
  memory alone, comcat_default (what `comcat train` has by default: cross-attentions, and beside convolutions).
- lora: PEFT's LoRA on to_q, to_k, to_v, to_out.0 of the same attentions, rank R*H/2: just as many parameters in
  self-attention, nearly as many in cross-attention (the tables print the counts).
- two_branch: the authors' formula, both products and the softmax materialized. It gets the factors of `comcat` and must
  give the same output, or the run stops.

Expect `comcat` near 1 in every table, and `two_branch` several times slower wherever there are many tokens.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from benchmarks import circumstances as shared
from benchmarks import variants
from comcat_diffusion.adapters.once import text_once
from comcat_diffusion.timing import wait

TRAINED = ("bare", "comcat", "comcat_foldable", "lora", "two_branch")
FORWARD = ("bare", "comcat", "comcat_merged", "comcat_foldable", "lora", "two_branch")


def kinds(common: tuple[str, ...], targets: str) -> tuple[str, ...]:
    """What is compared on these targets: tied adapters are of cross-attentions alone."""
    return common if "self" in targets else (*common, "comcat_tied")


# Largest difference between comcat and two_branch, relative to the output: rounding, by the bits of the precision.
AGREEMENT = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}


@dataclass(frozen=True)
class Settings:
    """What is measured and how often."""

    device: torch.device
    dtype: torch.dtype
    threads: int | None
    base: variants.Base
    resolution: int  # pixels
    batch: int
    rank: int
    rounds: int
    least_seconds: float  # of a sample; a shorter case is repeated
    targets: tuple[str, ...]  # of the whole U-Net: keys of variants.ATTENTIONS
    steps: int  # of the training runs with one and with two processes

    def __post_init__(self) -> None:
        if self.resolution % 64:
            raise ValueError(f"--resolution must be a multiple of 64, not {self.resolution}.")

    @property
    def latent(self) -> int:
        """Side of the latent image, in its own pixels."""
        return self.resolution // 8

    def random(self, *shape: int) -> torch.Tensor:
        """Standard normal numbers, always the same."""
        generator = torch.Generator(self.device).manual_seed(7)
        return torch.randn(shape, generator=generator, device=self.device, dtype=self.dtype)


def layer_rows(settings: Settings) -> list[dict]:
    """One attention of the largest resolution: forward as in generation, forward and backward as in training."""
    rows = []
    for title, cross in (("self-attention", False), ("cross-attention", True)):
        base = variants.bare_attention(cross, settings.device, settings.dtype, settings.base)
        targets = "cross" if cross else "self"
        models = {kind: variants.variant(kind, base, "attn", settings.rank) for kind in kinds(FORWARD, targets)}
        tokens = (settings.resolution // settings.base.pixels) ** 2
        hidden = settings.random(settings.batch, tokens, settings.base.channels)
        context = context_of(settings) if cross else None
        require_agreement({kind: _attend(model, hidden, context) for kind, model in models.items()}, models)
        forwards = {kind: without_gradient(_attend(model, hidden, context)) for kind, model in models.items()}
        rows += timed_rows(f"layer: {title}, forward", forwards, models, settings)
        # Inside the network a gradient always comes back to the tokens, and never to the frozen text features.
        hidden = hidden.clone().requires_grad_()
        learned = {kind: models[kind] for kind in kinds(TRAINED, targets)}
        steps = {kind: with_gradient(_attend(model, hidden, context), model, hidden) for kind, model in learned.items()}
        rows += timed_rows(f"layer: {title}, forward and backward", steps, models, settings)
    return rows


def _attend(model: nn.Module, hidden: torch.Tensor, context: torch.Tensor | None) -> Callable[[], torch.Tensor]:
    return lambda: model["attn"](hidden, encoder_hidden_states=context)


def step_rows(settings: Settings) -> list[dict]:
    """One training step of the U-Net, with adapters on self- and cross-attention, and on cross-attention alone."""
    rows = []
    base = variants.bare_unet(settings.device, settings.dtype, settings.base)
    for targets in settings.targets:
        pattern = variants.ATTENTIONS[targets]
        models = {kind: variants.variant(kind, base, pattern, settings.rank) for kind in kinds(TRAINED, targets)}
        require_agreement({kind: denoise(model, settings) for kind, model in models.items()}, models)
        steps = {kind: training_step(model, pattern, settings) for kind, model in models.items()}
        rows += timed_rows(f"training step: {targets}", steps, models, settings)
    return rows


def memory_rows(settings: Settings) -> list[dict]:
    """Peak memory of a training step, each variant in a process of its own."""
    rows = []
    for targets in settings.targets:
        for kind in (*kinds(TRAINED, targets), *["comcat_default"] * (targets == "cross")):
            peak, parameters = shared.in_fresh_process(peak_of_training, kind, targets, settings)
            row = {"part": f"memory of a training step: {targets}", "variant": kind, "parameters": parameters}
            rows.append(row | {"peak_mib": peak})
    return rows


def peak_of_training(kind: str, targets: str, settings: Settings) -> tuple[float, int]:
    """MiB at the peak, and the adapter's parameters. Everything counts: weights, activations, libraries (on a CPU)."""
    shared.use_threads(settings.threads)
    pattern = variants.ATTENTIONS[targets]
    base = variants.bare_unet(settings.device, settings.dtype, settings.base)
    model = variants.variant(kind, base, pattern, settings.rank)
    training_step(model, pattern, settings)()
    wait()
    return shared.peak_memory_mib(settings.device), count(model)


def generation_rows(settings: Settings) -> list[dict]:
    """One U-Net forward as generation makes it, without and with an adapter in its live and merged forms.

    It is one of the steps after the first: what ours makes of the text is made.
    """
    rows = []
    base = variants.bare_unet(settings.device, settings.dtype, settings.base)
    for targets in settings.targets:
        pattern = variants.ATTENTIONS[targets]
        models = {kind: variants.variant(kind, base, pattern, settings.rank) for kind in kinds(FORWARD, targets)}
        forwards = {kind: without_gradient(denoise(model, settings)) for kind, model in models.items()}
        with text_once():
            rows += timed_rows(f"generation, one U-Net forward: {targets}", forwards, models, settings)
    return rows


def timed_rows(part: str, cases: dict[str, Callable], models: dict[str, nn.Module], settings: Settings) -> list[dict]:
    """Time the cases against the first one, a row each."""
    timings = shared.interleaved(cases, settings.rounds, settings.least_seconds)
    return [
        {"part": part, "variant": kind, "parameters": count(models[kind])} | timing.row()
        for kind, timing in timings.items()
    ]


def count(model: nn.Module) -> int:
    """Number of the adapter's parameters."""
    return sum(parameter.numel() for parameter in variants.trainable(model))


def context_of(settings: Settings) -> torch.Tensor:
    """Stands for the text features, (B, 77, C)."""
    return settings.random(settings.batch, variants.CONTEXT_TOKENS, settings.base.unet["cross_attention_dim"])


def denoise(unet: nn.Module, settings: Settings) -> Callable[[], torch.Tensor]:
    """The U-Net's forward on fixed latents, (B, 4, side, side), timestep and text features."""
    latents, context = settings.random(settings.batch, 4, settings.latent, settings.latent), context_of(settings)
    timesteps = torch.full((settings.batch,), 500, device=settings.device)
    added = added_of(settings)
    return lambda: unet(latents, timesteps, encoder_hidden_states=context, added_cond_kwargs=added).sample


def added_of(settings: Settings) -> dict[str, torch.Tensor] | None:
    """What SDXL is told besides: the pooled text, (B, C), and six numbers of size and crop, (B, 6)."""
    unet = settings.base.unet
    if "addition_embed_type" not in unet:
        return None
    pooled = unet["projection_class_embeddings_input_dim"] - 6 * unet["addition_time_embed_dim"]
    return {"text_embeds": settings.random(settings.batch, pooled), "time_ids": settings.random(settings.batch, 6)}


def without_gradient(forward: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
    """A forward as generation runs it."""
    return torch.inference_mode()(forward)


def with_gradient(forward: Callable[[], torch.Tensor], model: nn.Module, *leaves: torch.Tensor) -> Callable[[], None]:
    """A forward and its backward; gradients are dropped afterwards, those of `leaves` as well as the adapter's."""
    leaves = (*leaves, *variants.trainable(model))

    def step() -> None:
        output = forward()
        output.float().square().mean().backward()
        for leaf in leaves:
            leaf.grad = None

    return step


def training_step(unet: nn.Module, pattern: str, settings: Settings) -> Callable[[], None]:
    """Forward, backward and AdamW on the adapter's parameters, of which the bare model has none."""
    forward, parameters = denoise(unet, settings), variants.trainable(unet)
    if not parameters:
        return with_gradient(requiring_gradient_at(variants.attentions_of(unet, pattern)[0], unet, forward), unet)
    optimizer = torch.optim.AdamW(parameters, lr=1e-6)
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()  # so that its state is there from the first step on, as in all later ones
    optimizer.zero_grad(set_to_none=True)

    def step() -> None:
        forward().float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def requiring_gradient_at(name: str, model: nn.Module, forward: Callable) -> Callable[[], torch.Tensor]:
    """`forward`, with the tokens that enter one attention made a leaf that requires a gradient."""

    def make_leaf(module: nn.Module, inputs: tuple) -> tuple:
        return inputs[0].detach().requires_grad_(), *inputs[1:]

    def hooked() -> torch.Tensor:
        handle = model.get_submodule(name).register_forward_pre_hook(make_leaf)
        try:
            return forward()
        finally:
            handle.remove()

    return hooked


def require_agreement(forwards: dict[str, Callable], models: dict[str, nn.Module]) -> None:
    """Give two_branch the factors of comcat and compare outputs. Raises RuntimeError if they are not one function."""
    variants.copy_factors(models["comcat"], models["two_branch"])
    with torch.no_grad():
        fused, slow, bare = (forwards[kind]() for kind in ("comcat", "two_branch", "bare"))
    largest = slow.abs().max()
    error, effect = ((other - slow).abs().max() / largest for other in (fused, bare))
    if not (error < AGREEMENT[slow.dtype] and effect > 0 and math.isfinite(largest)):
        raise RuntimeError(
            f"comcat and two_branch are not one function: they differ by {error:.1e} of the largest output, and the "
            f"adapter adds {effect:.1e}."
        )


def tables(report: dict) -> str:
    """The report as markdown, a table for every part."""
    about = {"base": "SD 1.5"} | report["settings"]  # results older than other bases do not name it
    settings = ", ".join(f"{name} {value}" for name, value in about.items() if name != "base")
    lines = [shared.circumstances_text(report["circumstances"])]
    lines.append(f"{about['base']} architecture, random weights; {settings}.")
    for part in dict.fromkeys(row["part"] for row in report["rows"]):
        rows = [row for row in report["rows"] if row["part"] == part]
        lines.append(f"**{part}**\n\n" + (timing_table(rows) if "seconds" in rows[0] else memory_table(rows)))
    return "\n\n".join(lines)


def timing_table(rows: list[dict]) -> str:
    """Medians over the rounds; the ratio is that of the same round, with its extremes."""
    columns = ("variant", "parameters", "seconds", "x bare", "lowest to highest")
    cells = [
        (
            row["variant"],
            f"{row['parameters']:,}",
            f"{row['seconds']:.4g}",
            f"{row['ratio']:.3f}",
            f"{row['ratio_min']:.3f} to {row['ratio_max']:.3f}",
        )
        for row in rows
    ]
    return shared.markdown_table(columns, cells)


def memory_table(rows: list[dict]) -> str:
    """Peak memory of the process and its ratio to the first variant's."""
    cells = [
        (r["variant"], f"{r['parameters']:,}", f"{r['peak_mib']:,.0f}", f"{r['peak_mib'] / rows[0]['peak_mib']:.3f}")
        for r in rows
    ]
    return shared.markdown_table(("variant", "parameters", "peak MiB", "x bare"), cells)
