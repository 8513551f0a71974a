"""Automatic rank selection: the paper's differentiable search (PAPER section 2), on one masked SVD a product.

The mixture of truncations is a mask on the singular values: sum_a p_a U_:ra S_:ra V_:ra = U diag(s m) V with
m_j = sum over the candidates with r_a > j of p_a. So a search step runs every layer once, whatever the candidates.

Where we depart: nothing is truncated on the way, so no direction is lost for good; gates are trained on pictures that
the calibration did not see, never on a test set; a dense layer is a candidate; the penalty acts above the budget only
(as in the authors' code; Eq. 6 would pay for shrinking further); and the choice is projected on the budget.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from accelerate import Accelerator
from safetensors import safe_open
from torch import nn

from comcat_diffusion import atomic
from comcat_diffusion.attentions import style_of
from comcat_diffusion.compression import allocate, cost, hosts
from comcat_diffusion.compression.calibrate import Batch, calibrate, checked
from comcat_diffusion.compression.compress import energies_of, refuse_other_functions, refuse_unfit, replaced
from comcat_diffusion.compression.cost import Unit
from comcat_diffusion.compression.finetune import Distillation
from comcat_diffusion.compression.gates import Gate, Masked, candidate_widths
from comcat_diffusion.compression.plan import Plan, Settings, layout_of, sketch_of
from comcat_diffusion.compression.planning import counted, parts_of, plan_of


@dataclass(frozen=True)
class SearchSettings:
    """How ranks are searched."""

    steps: int = 300
    learning_rate: float = 0.05  # of the gates
    beta: float = 1.5  # exponent of the cost penalty, Eq. 6
    first_temperature: float = 5.0
    last_temperature: float = 0.1
    candidates: int = 8  # widths to choose from for each unit, besides dense
    held_out: float = 0.5  # fraction of the batches that trains the gates; the others calibrate
    seed: int = 0
    distillation: Distillation | None = None  # the loss; None: labels if there are any, else the dense model's classes
    state_path: str | None = None  # file to go on from, and to write the state to
    state_steps: int = 50  # steps between writing it

    def __post_init__(self) -> None:
        if self.steps < 1 or self.candidates < 1:
            raise ValueError("A search needs at least one step and one candidate.")
        if not 0 < self.held_out < 1:
            raise ValueError(f"The held-out fraction of the batches must lie between 0 and 1, not {self.held_out}.")
        if not self.first_temperature >= self.last_temperature > 0:
            raise ValueError("The temperature of a search must fall, and stay above zero.")

    def temperature(self, step: int) -> float:
        """Falling geometrically; `step` counted from zero."""
        progress = step / max(1, self.steps - 1)
        return self.first_temperature * (self.last_temperature / self.first_temperature) ** progress


DEFAULT, DEFAULT_SEARCH = Settings(method="search"), SearchSettings()
ADAM = ("step", "exp_avg", "exp_avg_sq")
KEY = "comcat"  # of what the state file says about its search


@dataclass(frozen=True)
class Step:
    """What one search step did."""

    step: int  # counted from one
    loss: float  # of the task, without the penalty
    expected_parameters: float  # of the units
    temperature: float


class RankSearch:
    """The gates over one model: made of its calibrated products, trained step by step, read out as widths."""

    def __init__(
        self, model: nn.Module, units: Sequence[Unit], moments: dict, budget: int, search: SearchSettings, multiple: int
    ) -> None:
        self.dense, self.units, self.budget, self.search = model, list(units), budget, search
        self.gates = nn.ModuleList(Gate(u, candidate_widths(u, search.candidates, multiple)) for u in self.units)
        self.gates.to(next(model.parameters()).device)
        self.model = self._gated(moments).requires_grad_(False).eval()
        self.optimizer = torch.optim.AdamW(self.gates.parameters(), lr=search.learning_rate, weight_decay=5e-4)
        self.done = 0
        # The cross-entropy of Eq. 6 never is zero; an error that can be would take the penalty along.
        self.floor = 1.0 if hosts.is_diffusers(model) else 0.0

    def _gated(self, moments: dict) -> nn.Module:
        """The model with every unit as its full product, masked where the two factors meet."""
        full = {unit.name: unit.full if len(gate.widths) > 1 else None for unit, gate in self._pairs()}
        gated = replaced(self.dense, self.units, dict(moments), full, folded=False)
        for unit, gate in self._pairs():
            host = gated.get_submodule(unit.module)
            if full[unit.name] is None:
                continue
            if unit.product == "linear":
                host.down = Masked(host.down, gate)
                continue
            style = style_of(host)
            if unit.product == "both" and unit.key_bias:
                raise ValueError(f"'{unit.module}' has a query bias, which a search on diffusers models does not know.")
            if unit.product != "vo":
                setattr(host, style.q, Masked(getattr(host, style.q), gate, hidden=unit.key_bias))
            if unit.product != "qk":
                setattr(host, style.v, Masked(getattr(host, style.v), gate))
        return gated

    def _pairs(self) -> Iterator[tuple[Unit, Gate]]:
        return zip(self.units, self.gates, strict=True)

    def steps(
        self, batches: Sequence[Batch], count: int, accelerator: Accelerator, distillation: Distillation
    ) -> Iterator[Step]:
        """Train the gates, yielding after each of `count` steps. Raises ValueError at a loss that is no number."""
        for step in range(self.done, self.done + count):
            temperature = self.search.temperature(step)
            place = step * accelerator.num_processes + accelerator.process_index
            generator = self._generator(step)  # the same on every process: one draw a step
            for gate in self.gates:
                gate.draw(temperature, generator)
            batch = next(checked(self.dense, [batches[place % len(batches)]]))
            loss = distillation.of(self.model, self.dense, batch)
            expected = torch.stack([gate.expected_cost for gate in self.gates]).sum()
            penalty = (expected / self.budget).clamp_min(1.0) ** self.search.beta  # Eq. 6, above the budget
            if not torch.isfinite(loss):
                raise ValueError(f"The loss of search step {step + 1} is not a finite number; search in float32.")
            accelerator.backward((loss + self.floor) * penalty)
            for gate in self.gates:
                gate.alpha.grad = accelerator.reduce(gate.alpha.grad, reduction="mean")
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.done = step + 1
            mean = accelerator.reduce(loss.detach(), reduction="mean").item()
            yield Step(step + 1, mean, expected.item(), temperature)

    def _generator(self, step: int) -> torch.Generator:
        state = np.random.SeedSequence((self.search.seed, step)).generate_state(1, np.uint64)
        return torch.Generator().manual_seed(int(state[0] >> 1))

    def widths(self) -> dict[str, int | None]:
        """The likeliest width of every unit, not yet on the budget."""
        return {unit.name: gate.width for unit, gate in self._pairs()}

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Everything that going on needs: gates, moments of their optimizer, the number of steps done."""
        state = {"done": torch.tensor(self.done)}
        for unit, gate in self._pairs():
            state[f"{unit.name}.alpha"] = gate.alpha.detach().clone()
            for name, value in self.optimizer.state[gate.alpha].items():
                state[f"{unit.name}.{name}"] = value.clone()
        return state

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """The inverse of `state_dict`. Raises ValueError if the state is of a search over something else."""
        shapes = {name: tuple(value.shape) for name, value in state.items() if name.endswith(".alpha")}
        if shapes != {f"{unit.name}.alpha": tuple(gate.alpha.shape) for unit, gate in self._pairs()}:
            raise ValueError("This search state belongs to another model or other candidates; start without it.")
        with torch.no_grad():
            for unit, gate in self._pairs():
                gate.alpha.copy_(state[f"{unit.name}.alpha"])
                kept = {n: state[f"{unit.name}.{n}"].clone() for n in ADAM if f"{unit.name}.{n}" in state}
                self.optimizer.state[gate.alpha] = kept
        self.done = int(state["done"])


def search_ranks(
    model: nn.Module,
    train_batches: Iterable[Batch],
    reduction: float,
    settings: Settings = DEFAULT,
    search: SearchSettings = DEFAULT_SEARCH,
    accelerator: Accelerator | None = None,
) -> Plan:
    """The paper's search as a plan, for `compress(model, plan=plan)`; the model stays as it is.

    Part of the batches calibrates, the held-out part trains the gates. Raises ValueError as `compress` does, and if
    there are too few batches to hold some out.
    """
    refuse_unfit(model)
    units = cost.units(model, parts_of(model, settings))
    budget = allocate.budget_of(units, reduction, counted(model, units, settings), settings.multiple)
    refuse_other_functions(model, units)
    seen, held_out = split(list(train_batches), search.held_out)
    training = model.training
    model.eval()
    try:
        moments = calibrate(model, units, seen)
        running = RankSearch(model, units, moments, budget, search, settings.multiple)
        run(running, held_out, accelerator or Accelerator())
    finally:
        model.train(training)
    # The likeliest widths may miss the budget a little either way: the energies say what to change first.
    energies = energies_of(model, units, moments)
    widths = allocate.project(units, energies, running.widths(), budget, settings.multiple)
    return plan_of(model, units, widths, reduction, replace(settings, method="search"))


def split(batches: list[Batch], held_out: float) -> tuple[list[Batch], list[Batch]]:
    """Batches to calibrate on and batches to train gates on, spread evenly. Raises ValueError if one would be empty."""
    gating = [int((place + 1) * held_out) > int(place * held_out) for place in range(len(batches))]
    parts = (
        [b for b, g in zip(batches, gating, strict=True) if not g],
        [b for b, g in zip(batches, gating, strict=True) if g],
    )
    if not all(parts):
        raise ValueError(
            f"{len(batches)} batches are too few to hold {held_out:.0%} of them out; give more, smaller ones."
        )
    return parts


def run(running: RankSearch, batches: Sequence[Batch], accelerator: Accelerator) -> None:
    """All steps of a search, going on from its state file if there is one and writing it now and then."""
    search = running.search
    whose = [layout_of(running.units), sketch_of(running.dense, running.units), running.budget]
    about = {KEY: json.dumps([*whose, asdict(replace(search, state_path=None))])}
    path = None if search.state_path is None else Path(search.state_path)
    if path is not None and path.exists():
        with safe_open(path, framework="pt") as opened:
            if (opened.metadata() or {}).get(KEY) != about[KEY]:
                raise ValueError(f"{path} is the state of another search; take it away or name another file.")
        running.load_state_dict(safetensors.torch.load_file(path))
    labelled = isinstance(batches[0], Mapping) and "labels" in batches[0]
    distillation = search.distillation or Distillation(labels=float(labelled), hard=float(not labelled))
    for step in running.steps(batches, search.steps - running.done, accelerator, distillation):
        due = step.step % search.state_steps == 0 or step.step == search.steps
        if path is not None and due and accelerator.is_main_process:
            atomic.write_bytes(path, safetensors.torch.save(running.state_dict(), about))
