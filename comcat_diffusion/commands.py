"""What every command does and prints. A command imports what it needs itself, so that `--help` waits for nothing.

What can be refused by flags, headers and folders alone is, before `quiet` imports the libraries: they take seconds.
"""

import argparse
import math
import shlex
import sys
import tempfile
import typing
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from comcat_diffusion import atomic
from comcat_diffusion.adapters.beside_kinds import CONVOLUTIONS, FEED_FORWARDS
from comcat_diffusion.bench.config import BenchConfig
from comcat_diffusion.compression.config import UNET, CompressConfig
from comcat_diffusion.config import from_arguments, weighted
from comcat_diffusion.evaluation.config import EvaluateConfig
from comcat_diffusion.export.config import (
    CombineConfig,
    ExportConfig,
    ImportConfig,
    MergeConfig,
    PullConfig,
    PushConfig,
    ShrinkConfig,
)
from comcat_diffusion.generation.config import GenerateConfig
from comcat_diffusion.markdown import printable, shown
from comcat_diffusion.places import asked_name, place_of
from comcat_diffusion.training.config import TrainConfig, ValidateConfig
from comcat_diffusion.training.named import with_words
from comcat_diffusion.ui.config import UiConfig

if typing.TYPE_CHECKING:
    from comcat_diffusion.adapters.header import Header
    from comcat_diffusion.training.loop import Step

BAD_INPUT, NOT_FINITE, INTERRUPTED = 2, 3, 130  # exit statuses


class _Terminal:
    """Shows a training run: notes as lines, steps as a progress bar."""

    def __init__(self) -> None:
        self.bar = None

    def note(self, text: str) -> None:
        from tqdm import tqdm

        tqdm.write(text)

    def step(self, done: "Step", total: int, peak_bytes: int) -> None:
        from tqdm import tqdm

        if self.bar is None:
            self.bar = tqdm(total=total, initial=done.step - 1, desc="Steps", unit="step", mininterval=_pause())
        shown = {"loss": f"{done.loss:.4f}", "lr": f"{done.learning_rate:.1e}", "s/step": f"{done.seconds:.2f}"}
        self.bar.set_postfix(shown | {"peak": f"{peak_bytes / 2**30:.1f} GiB"}, refresh=False)
        self.bar.update()
        if done.step == total:
            self.close()

    def phase(self, name: str) -> None:
        """What takes long shows in the bar or in the notes."""

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()


def _pause() -> float:
    """Seconds until a progress bar is drawn anew: in a log every time is a line more."""
    return 0.1 if sys.stderr.isatty() else 10.0


def quiet() -> None:
    """Leave the terminal to our own words: the libraries' progress bars and advice are for their developers."""
    import warnings

    import diffusers
    import transformers

    diffusers.utils.logging.set_verbosity_error()
    transformers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning)


def train(parsed: argparse.Namespace) -> int:
    """Learn a subject from a folder of pictures."""
    config = from_arguments(TrainConfig, with_words(parsed))
    from comcat_diffusion.training.order import order_of

    order = order_of(config)
    quiet()
    from comcat_diffusion.training.customize import learn

    terminal = _Terminal()
    try:
        outcome = learn(order, terminal)
    finally:
        terminal.close()
    print(outcome.told)
    if outcome.interrupted:
        return INTERRUPTED
    if outcome.samples:
        print(f"Samples: {outcome.samples}")
    file = shlex.quote(str(outcome.adapter))
    print(f"Try: comcat generate --adapter {file} --prompt {shlex.quote(outcome.prompt)}")
    return 0


def validate(parsed: argparse.Namespace) -> int:
    """Look a training run over before it starts."""
    config = from_arguments(ValidateConfig, with_words(parsed))
    from comcat_diffusion.training.dataset import read_dataset
    from comcat_diffusion.training.order import with_sample

    try:
        read_dataset(with_sample(config))
    except (ValueError, OSError) as error:
        return _looked_over(errors=[str(error)])
    quiet()
    from comcat_diffusion.training.validate import validate

    return _looked_over(**vars(validate(config)))


def _looked_over(facts: Sequence[str] = (), doubts: Sequence[str] = (), errors: Sequence[str] = ()) -> int:
    for mark, lines in (("  ", facts), ("? ", doubts), ("! ", errors)):
        for line in lines:
            print(mark + line)
    print("This run would fail." if errors else "This run can start.")
    return BAD_INPUT if errors else 0


def generate(parsed: argparse.Namespace) -> int:
    """Draw pictures from prompts, with adapters."""
    config = from_arguments(GenerateConfig, parsed)
    from comcat_diffusion.generation.order import order_of

    order = order_of(config)
    quiet()
    from comcat_diffusion.generation.generate import drawn

    with _bar() as shown:
        made = drawn(order, shown, print)
    print(f"{len(made.files)} pictures in {made.sheet.parent}, all on one sheet: {made.sheet}")
    return 0


@contextmanager
def _bar() -> Iterator[Callable[[int, int], None]]:
    """A progress bar for pictures: a function of how many are done, and of how many."""
    from tqdm import tqdm

    bars = []  # none before the first picture

    def shown(done: int, total: int) -> None:
        if not bars:
            bars.append(tqdm(desc="Pictures", unit="picture", mininterval=_pause()))
        bars[0].total = total
        bars[0].update(done - bars[0].n)

    try:
        yield shown
    finally:
        for bar in bars:
            bar.close()


def ui(parsed: argparse.Namespace) -> int:
    """Teach and draw in the browser."""
    config = from_arguments(UiConfig, parsed)
    from comcat_diffusion.ui.port import refuse_taken

    refuse_taken(config)
    try:
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ModuleNotFoundError as error:
        raise ImportError(f"comcat ui needs {error.name}: pip install 'comcat-diffusion[ui]'.") from error
    from comcat_diffusion.ui.app import serve

    told = f"(Ctrl-C ends it; images, runs and pictures are kept in {config.output_dir})"
    if not config.is_local:
        who = "Whoever reaches this machine" + (" and knows what lets them in" if config.auth or config.token else "")
        told += f"\n{who} can draw{'' if config.draw_only else ', train'} and see what is in {config.output_dir}."
    serve(config, on_answer=lambda address: print(f"{address} {told}", flush=True))
    return 0


def info(parsed: argparse.Namespace) -> int:
    """Show what an adapter file says of itself."""
    import hashlib

    from comcat_diffusion.adapters.header import picture_of, read_adapter

    header = read_adapter(parsed.adapter)
    picture = picture_of(header)
    if parsed.save_preview:
        if picture is None:
            raise ValueError(f"{parsed.adapter} has no thumbnail; comcat train --thumbnail puts one into the header.")
        atomic.write_bytes(parsed.save_preview, picture)
    notes = header.notes
    others = [f"{other['trigger']} {other['class_word']}".strip() for other in notes.others]
    rows = {
        "file": f"{parsed.adapter} ({_size(parsed.adapter)}, format version {header.format_version})",
        "subject": ", ".join(filter(None, [f"{notes.trigger} {notes.class_word}".strip(), *others])) or "not said",
        "prompt": notes.instance_prompt or "not said",
        "new words": ", ".join(header.tokens) or "none",
        "base": " ".join(filter(None, (header.base_model, header.revision))) or "not said",
        "base kind": f"{header.fingerprint.get('class')}, predicts {header.fingerprint.get('prediction_type')}",
        **{f"adapter of {part}": _told(header, part) for part in header.config},
        "training": ", ".join(f"{key} {value}" for key, value in notes.training.items()) or "not said",
        "thumbnail": f"{len(picture):,} bytes" if picture else "none",
        "base's layout": str(header.fingerprint.get("layout")),
        "sha256": hashlib.sha256(Path(parsed.adapter).read_bytes()).hexdigest(),
        "written by": ", ".join(f"{name} {version}" for name, version in header.versions.items()),
    }
    width = max(map(len, rows))
    for name, value in rows.items():
        print(f"{printable(name):<{width}}  {shown(value)}")
    return 0


def _named(targets: str | list[str]) -> str:
    """Attentions as they were asked for; those that a file lists one by one, as shrunk ones do, by kind and number."""
    if isinstance(targets, str) or not any("." in target for target in targets):
        return targets if isinstance(targets, str) else " ".join(targets)
    kinds = Counter(target.rpartition(".")[2] for target in targets)
    return " and ".join(f"{kind} ({count} attentions)" for kind, count in kinds.items())


def _told(header: "Header", part: str) -> str:
    from comcat_diffusion.adapters.header import kind_of

    config = header.config[part]
    named = _named(config.get("target_modules") or [])
    rank = f"rank {config.get('r')}"
    if part in header.packed:
        own = header.packed[part].values()
        ranks = [rank for pieces in own for products in pieces for heads in products for rank in heads]
        rank = f"ranks {min(ranks)} to {max(ranks)} by head" + " and piece" * bool(header.pieces)
    acts = f", from {' or '.join(config['trigger'])} on" if config.get("trigger") else ""
    beside = "".join(f", with terms beside {told}" for told in _beside(config))
    return f"{kind_of(config)}, {rank}, alpha {config.get('alpha')}, on {named}{beside}{acts}"


def _beside(config: dict) -> Iterator[str]:
    """Beside which modules that are no attentions, of which ranks."""
    for kind, hosts, whose in (
        (CONVOLUTIONS, "convolutions", " of residual blocks"),
        (FEED_FORWARDS, "Linears of feed-forwards", ""),
    ):
        own = config.get(kind.ranks)
        if own is not None:
            yield f"{len(own)} {hosts} of ranks {min(own.values())} to {max(own.values())}"
        elif config.get(kind.setting):
            yield f"all {hosts}{whose} of rank {config[kind.setting]}"


def _size(path: str | Path) -> str:
    return f"{Path(path).stat().st_size / 1000:.1f} kB"


def export(parsed: argparse.Namespace) -> int:
    """Write an adapter as an ordinary LoRA file, for ComfyUI, Forge, A1111, kohya's scripts, InvokeAI and diffusers."""
    config = from_arguments(ExportConfig, parsed)
    atomic.refuse_bad_target(config.output, config.overwrite)
    from comcat_diffusion.adapters.header import read_adapter
    from comcat_diffusion.export.beside import files_beside
    from comcat_diffusion.export.clients import CLIENTS, asked_for, format_of
    from comcat_diffusion.export.fit import family_in, is_free, needs_base, refuse_exact, refuse_inexpressible, waits

    header = read_adapter(config.adapter)
    if (family := family_in(header)) is not None:  # before a training is advised that ends here again
        format = format_of(config.for_, config.format, family.name)
    if config.approximate:
        refuse_exact(header, config.adapter)
        place_of(asked_name(config, header.base_model))
    else:
        refuse_inexpressible(header, config.adapter)
    beside = files_beside(config.output, header, config.for_, config.preview)
    for file in beside:
        atomic.refuse_bad_target(file, config.overwrite, "Beside --output,")
    quiet()
    from comcat_diffusion import bases
    from comcat_diffusion.export.approximate import approximate
    from comcat_diffusion.export.everywhere import act_everywhere
    from comcat_diffusion.export.lora import export_adapter
    from comcat_diffusion.export.spread import shells

    with tempfile.TemporaryDirectory() as folder:
        source = config.adapter
        if config.approximate:
            prompts = config.prompt or [header.notes.example]
            pipe = bases.asked_base(config, "fp32", header.base_model)
            if is_free(header):
                source = Path(folder) / "foldable.safetensors"
                limit = math.inf if config.force or waits(header) else 0.1  # of what waits, all is measured below
                found = approximate(pipe, config.adapter, source, prompts, limit)
                print(f"The closest foldable adapter differs by {found.error:.1%} of the adapter's effect.")
            if waits(header):
                waiting, source = source, Path(folder) / "everywhere.safetensors"
                least = -math.inf if config.force else 0.1
                freed = act_everywhere(pipe, waiting, source, prompts, config.adapter, least)
                print(freed.told)
        models = shells(config, header, config.adapter) if needs_base(header) else None
        precision = bases.PRECISIONS[config.save_precision]
        made = export_adapter(source, config.output, format, precision, models)
    for file, content in beside.items():
        atomic.write_bytes(file, content)
    for file in (*made.files, *beside):
        print(f"Wrote {file} ({_size(file)}).")
    client = CLIENTS[config.for_]
    words = f"; its new words: {client.words}" if client.words and len(made.files) > 1 else ""
    print(f"For {asked_for(config.for_, family.name, format)}: {client.loras}{words}.")
    return 0


def merge(parsed: argparse.Namespace) -> int:
    """Write foldable adapters into their base, as a folder that diffusers loads."""
    config = from_arguments(MergeConfig, parsed)
    files = [weighted(text) for text in config.adapter]
    from comcat_diffusion.adapters.header import read_adapter
    from comcat_diffusion.export.fit import refuse_unmergeable

    refuse_unmergeable(files, config.output_dir)
    base = asked_name(config, read_adapter(files[0][0]).base_model)
    place_of(base)
    quiet()
    from comcat_diffusion import bases
    from comcat_diffusion.export.checkpoint import merge_to_folder

    pipe = bases.asked_base(config, "fp32", base)
    merge_to_folder(pipe, files, config.output_dir, config.any_weights)
    print(f'Wrote {config.output_dir}; load it with DiffusionPipeline.from_pretrained("{config.output_dir}").')
    return 0


def combine(parsed: argparse.Namespace) -> int:
    """Add several adapters of one base into one file."""
    config = from_arguments(CombineConfig, parsed)
    atomic.refuse_bad_target(config.output, config.overwrite)
    files = [weighted(text) for text in config.adapter]
    from comcat_diffusion.adapters.alike import refuse_unlike

    refuse_unlike(files, config.rank)
    quiet()
    from comcat_diffusion import bases
    from comcat_diffusion.adapters.combine import combine

    made = combine(files, config.output, config.rank, bases.PRECISIONS[config.save_precision])
    for doubt in made.doubts:
        print(doubt)
    print(f"Wrote {config.output} ({_size(config.output)}, rank {made.rank}, {made.energy_kept:.2%} of the energy).")
    apart = sum(Path(file).stat().st_size for file, _ in files)
    if Path(config.output).stat().st_size > 2 * apart:  # all heads have one rank here, and what was shrunk has not
        print(f"As they are, the files have {apart / 1000:.1f} kB: this tool and its nodes take them side by side.")
    return 0


def shrink(parsed: argparse.Namespace) -> int:
    """Write an adapter in fewer bytes."""
    config = from_arguments(ShrinkConfig, parsed)
    atomic.refuse_bad_target(config.output, config.overwrite)
    from comcat_diffusion.adapters.header import read_adapter

    read_adapter(config.adapter)
    place_of(asked_name(config))
    quiet()
    from comcat_diffusion.adapters.shrink import shrink

    pipe = None
    if config.pretrained_model_name_or_path:  # a base that the adapter is not for is refused before a file is written
        from comcat_diffusion import bases
        from comcat_diffusion.adapters.merge import unload_adapters
        from comcat_diffusion.adapters.store import load_adapter

        pipe = bases.asked_base(config, "fp32")
        load_adapter(pipe, config.adapter)
        unload_adapters(pipe)
    made = shrink(config.adapter, config.output, config.max_bytes)
    before = _size(config.adapter)
    print(f"Wrote {config.output} ({made.bytes:,} bytes of {before}, {made.energy_kept:.2%} of the energy).")
    if pipe is not None:
        from comcat_diffusion.adapters.effect import change

        prompts = config.prompt or [made.header.notes.example]
        (changed,) = change(pipe, config.adapter, [config.output], prompts)
        print(f"What the base predicts with it differs by {changed:.2%} of the adapter's effect.")
    return 0


def compress(parsed: argparse.Namespace) -> int:
    """Make a vision model, or a base's attentions, smaller: low-rank heads and matrices, fewer neurons."""
    config = from_arguments(CompressConfig, parsed)
    atomic.refuse_used(Path(config.output_dir).expanduser())
    from comcat_diffusion.compression.pictures import folder_of

    for flag in ("calibration_dir", "train_dir", "eval_dir"):
        if getattr(config, flag) is not None:
            folder_of(getattr(config, flag), flag)
    if config.part == UNET:
        place_of(config.model)
    quiet()
    from comcat_diffusion.compression.run import run

    made = run(config, print)
    print(made.table())
    sheet = made.folder / "sheet.png"
    base = sheet.exists()  # and not a vision model
    more = f"; pictures before and after: {sheet}" if base else ""
    how = f'comcat_diffusion.compression.load_compressed("{made.folder}")'
    how = f"use it as a base: --pretrained_model_name_or_path {made.folder}" if base else f"load it with {how}"
    print(f"{made.removed:.1%} of {made.counted:,} parameters are gone. Ranks: {made.folder / 'ranks.png'}{more}")
    print(f"Wrote {made.folder}; {how}.")
    return 0


def evaluate(parsed: argparse.Namespace) -> int:
    """Judge adapters side by side by held-out pictures of the subject."""
    config = from_arguments(EvaluateConfig, parsed)
    from comcat_diffusion.evaluation.order import order_of

    order = order_of(config)
    quiet()
    from tqdm import tqdm

    from comcat_diffusion.evaluation.evaluate import judged

    with _bar() as shown:
        report = judged(order, tqdm.write, shown)
    if report is not None:  # of several processes, one measures
        for text in (report.table(), *report.notes, report.verdict):
            print(text)
        print(f"Wrote {report.folder / 'report.md'}, with sheet.png, plot.png and report.json beside it.")
    return 0


def bench(parsed: argparse.Namespace) -> int:
    """Time a step of training and of drawing here: the base alone, with COMCAT, with a LoRA."""
    config = from_arguments(BenchConfig, parsed)
    if config.output:
        atomic.refuse_bad_target(config.output, overwrite=True)
    place_of(asked_name(config))
    quiet()
    from comcat_diffusion.bench.run import bench

    made = bench(config)
    print(made.table())
    print(", ".join(f"{name} {value}" for name, value in made.circumstances.items()))
    if config.output:
        print(f"Wrote {config.output}.")
    return 0


def push(parsed: argparse.Namespace) -> int:
    """Share an adapter on the Hugging Face hub, with a card."""
    config = from_arguments(PushConfig, parsed)
    from comcat_diffusion.export.shareable import refuse_unshareable

    refuse_unshareable(config.repo_id, config.adapter, config.sheet, bool(config.lora))
    if config.space:
        from comcat_diffusion.export.space import build_space

        made = build_space(config.space, config.repo_id, config.adapter, config.sheet)
        print(f"Wrote {made}; hf upload OWNER/NAME {made} --repo-type space makes it a page of the hub.")
        return 0
    quiet()
    from comcat_diffusion.export.hub import push
    from comcat_diffusion.export.share import build_folder

    with tempfile.TemporaryDirectory() as folder:
        build_folder(Path(folder), config.repo_id, config.adapter, config.sheet, config.lora)
        names = ", ".join(sorted(path.name for path in Path(folder).iterdir()))
        print(f"Shared {names} at {push(Path(folder), config.repo_id, config.private)}")
    return 0


def pull(parsed: argparse.Namespace) -> int:
    """Fetch an adapter from the Hugging Face hub."""
    config = from_arguments(PullConfig, parsed)
    from huggingface_hub.utils import validate_repo_id

    validate_repo_id(config.repo_id)
    from comcat_diffusion.adapters.header import read_adapter
    from comcat_diffusion.export.hub import pull

    for file in pull(config.repo_id, config.output_dir, config.revision):
        print(f'Fetched {file} ({_size(file)}); try the prompt "{read_adapter(file).notes.example}".')
    return 0


def import_(parsed: argparse.Namespace) -> int:
    """Read the paper authors' comcat_weight.pt into an adapter file."""
    config = from_arguments(ImportConfig, parsed)
    atomic.refuse_bad_target(config.output, config.overwrite)
    from comcat_diffusion.adapters.header import Notes
    from comcat_diffusion.export.fit import refuse_missing
    from comcat_diffusion.words import subject_of

    refuse_missing(config.weights)
    place_of(asked_name(config))
    notes = None
    if config.instance_prompt:
        subject = subject_of(config.instance_prompt)
        notes = Notes(subject.trigger, config.instance_prompt, subject.class_word)
    quiet()
    from comcat_diffusion import bases
    from comcat_diffusion.export.authors import import_authors_file

    pipe, base = bases.asked_base(config, "fp32"), config.pretrained_model_name_or_path
    import_authors_file(pipe, config.weights, config.output, config.strength, base, notes)
    print(f"Wrote {config.output} ({_size(config.output)}).")
    return 0
