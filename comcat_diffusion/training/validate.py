"""Looking a run over before it starts: its data, its words and its numbers, in seconds and without the weights."""

import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, replace

from torch import nn

from comcat_diffusion import bases
from comcat_diffusion.adapters.beside_kinds import CONVOLUTIONS, FEED_FORWARDS, Kind
from comcat_diffusion.adapters.store import expected_shapes
from comcat_diffusion.training import suitable
from comcat_diffusion.training.becomes import becomes
from comcat_diffusion.training.config import TrainConfig, ValidateConfig
from comcat_diffusion.training.crops import fitted, sizes
from comcat_diffusion.training.customize import Silent, customize, default_batch
from comcat_diffusion.training.dataset import Dataset, before_others, read_dataset
from comcat_diffusion.training.learned import adapter_config, awaited
from comcat_diffusion.training.order import planned, with_initial, with_sample
from comcat_diffusion.training.precision import launched_precision, refuse_precision, with_precision
from comcat_diffusion.training.remarks import Remarks, look_over, small_doubts
from comcat_diffusion.training.wording import cut_off, well_known

MEASURED_STEPS = 3  # the first one warms up and does not count


@dataclass
class Report:
    """What was found: facts, doubts that a run would survive, and errors that would end it."""

    facts: list[str] = field(default_factory=list)
    doubts: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)


def validate(config: ValidateConfig) -> Report:
    """Check everything that can be known without weights; with `measure`, also run a few real steps."""
    report = Report()
    config = with_sample(config)
    try:
        dataset = read_dataset(config)
    except (ValueError, OSError) as error:
        report.errors.append(str(error))
        return report
    dataset, found = look_over(config, dataset)
    report.facts += [*_data_facts(dataset), *launched_precision(config), *found.facts]
    report.doubts += found.doubts
    try:
        config = with_initial(config, dataset.subjects)
    except ValueError as error:
        report.errors.append(str(error))
    report.errors += [*_refusals(config, dataset), *found.errors]
    try:
        folder = bases.config_folder(config)
        family = suitable.refuse_configurations(folder, config.pretrained_model_name_or_path or bases.EMBEDDED)
        suitable.refuse_settings(config, family)
        tokenizer = suitable.tokenizer_in(folder, family.tokenizer)
        denoiser = family.blank(folder)
        most = family.most_tokens(tokenizer, suitable.kind_in(folder), denoiser.config)
    except (ValueError, OSError) as error:
        report.errors.append(str(error))
        return report
    report.doubts += cut_off(tokenizer, (example.prompt for example in dataset.examples), most)
    report.doubts += well_known(tokenizer, dataset.subjects)
    vae = suitable.config_in(folder / "vae")
    factor, native = family.factor(vae), family.native(denoiser.config, vae)
    batch = config.train_batch_size or default_batch(native, len(dataset.examples))
    config = replace(config, train_batch_size=batch, resolution=config.resolution or native)
    divisible = family.grain(denoiser.config, factor)
    options = sizes(config.resolution, config.aspect_ratio_buckets, divisible)
    report.doubts += small_doubts(found.sizes, options, config.resolution)
    if config.resolution % divisible:
        report.errors.append(f"--resolution {config.resolution} must be a multiple of {divisible} for this base.")
    try:
        bases.refuse_large(family, denoiser.config, factor, options)
        report.facts += _size_facts(config, dataset, denoiser)
    except ValueError as error:
        report.errors.append(str(error))
    report.facts += _pace_facts(config, dataset)
    if config.background_augmentation and not report.errors:
        report.facts += _background_facts(dataset)
    report.doubts += _pace_doubts(config, dataset)
    if config.aspect_ratio_buckets and not report.errors:
        report.doubts += _bucket_doubts(config, dataset, found, options)
    if config.measure and not report.errors:
        report.facts += _measured(config)
    return report


def _data_facts(dataset: Dataset) -> Iterator[str]:
    for subject in dataset.subjects:
        own = [example for example in dataset.examples if example.subject == subject]
        masks, prompts = sum(bool(e.mask) for e in own), len({e.prompt for e in own})
        yield f"'{subject.phrase}': {len(own)} pictures, {prompts} prompts, {masks} masks."
    if dataset.held_out:
        yield f"Kept out to judge by: {len(dataset.held_out)} pictures."


def _refusals(config: TrainConfig, dataset: Dataset) -> Iterator[str]:
    """What a run would refuse before it loads its base."""
    for refuse in (lambda: planned(config, dataset.subjects), lambda: refuse_precision(with_precision(config))):
        try:
            refuse()
        except (ValueError, OSError) as error:
            yield str(error)


def _size_facts(config: TrainConfig, dataset: Dataset, denoiser: nn.Module) -> Iterator[str]:
    adapter = adapter_config(config, denoiser, awaited(config, dataset.subjects))
    by_attention = expected_shapes(denoiser, replace(adapter.at_attentions(), tied=False, cores=False))
    if not by_attention:
        raise ValueError(f"--target_modules {' '.join(config.target_modules or [])}: the base has none of this name.")
    shapes = expected_shapes(denoiser, adapter)
    count = sum(high * wide for high, wide in shapes.values())
    attentions = len({name.rpartition(".")[0] for name in by_attention})
    size = count * bases.PRECISIONS[config.save_precision].itemsize / 1000
    yield f"Adapter: {count:,} parameters on {attentions} attentions, {size:,.0f} kB and its header."
    (convolved, convolutions), (fed, linears) = (_beside(shapes, kind) for kind in (CONVOLUTIONS, FEED_FORWARDS))
    if convolved:
        yield f"{convolved:,} of them are in terms beside {convolutions} convolutions."
    if fed:
        yield f"{fed:,} of them are in terms beside {linears} Linears of feed-forwards."
    yield becomes(config, denoiser)


def _beside(shapes: Mapping[str, tuple[int, int]], kind: Kind) -> tuple[int, int]:
    """How many numbers the terms of a kind have, and beside how many modules they stand."""
    own = [high * wide for name, (high, wide) in shapes.items() if name.rpartition(".")[2] in kind.factors]
    return sum(own), len(own) // len(kind.factors)


def _pace_facts(config: TrainConfig, dataset: Dataset) -> Iterator[str]:
    seen = config.max_train_steps * config.train_batch_size * config.gradient_accumulation_steps
    count = sum(example.repeats for example in dataset.examples)
    yield f"{config.max_train_steps} steps show every picture about {seen / count:.0f} times."


def _background_facts(dataset: Dataset) -> Iterator[str]:
    plain = {example.path for example in before_others(dataset.examples)}
    if plain:
        yield (
            f"{len(plain)} of {len(dataset.examples)} pictures have a plain background: they are learned from before "
            "others too."
        )


def _pace_doubts(config: TrainConfig, dataset: Dataset) -> Iterator[str]:
    seen = config.max_train_steps * config.train_batch_size * config.gradient_accumulation_steps
    if seen < 20 * len(dataset.examples):
        yield (
            f"--max_train_steps {config.max_train_steps} shows {len(dataset.examples)} pictures less than 20 times "
            "each: little will be learned."
        )
    if config.lr_warmup_steps > config.max_train_steps / 2:
        yield f"--lr_warmup_steps {config.lr_warmup_steps} is more than half of the run."


def _bucket_doubts(
    config: TrainConfig, dataset: Dataset, found: Remarks, options: list[tuple[int, int]]
) -> Iterator[str]:
    filled: dict[tuple[int, int], int] = {}
    for example in dataset.examples:
        size, _ = fitted(found.sizes[example.path], options)
        filled[size] = filled.get(size, 0) + example.repeats
    for (high, wide), count in filled.items():
        if count < config.train_batch_size:
            batch = config.train_batch_size
            yield f"The bucket {wide} x {high} holds {count} picture(s) for batches of {batch}: they repeat."


class _Clock(Silent):
    """A watcher that keeps the seconds of every step and the peak of the memory."""

    def __init__(self) -> None:
        self.seconds, self.peak = [], 0

    def step(self, done: object, total: int, peak_bytes: int) -> None:
        """Remember."""
        self.seconds.append(done.seconds)
        self.peak = peak_bytes


def _measured(config: ValidateConfig) -> Iterator[str]:
    """A few real steps in a folder that is thrown away."""
    clock, own = _Clock(), {item.name: getattr(config, item.name) for item in fields(TrainConfig)}
    with tempfile.TemporaryDirectory() as folder:
        run = TrainConfig(**own)
        beside = {"output_dir": folder, "checkpointing_steps": None, "validation_steps": None, "report_to": []}
        beside["thumbnail"] = False
        shorter = {"max_train_steps": MEASURED_STEPS, "lr_warmup_steps": 0, "skip_final_inference": True}
        customize(replace(run, **beside, **shorter, resume_from_checkpoint=None), clock)
    seconds = sum(clock.seconds[1:]) / len(clock.seconds[1:])
    hours = seconds * config.max_train_steps / 3600
    yield f"Measured: {seconds:.2f} s per step, {clock.peak / 2**30:.1f} GiB at the peak; the run takes {hours:.1f} h."
