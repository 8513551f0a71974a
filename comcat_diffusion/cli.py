"""The command line. It alone prints and exits; torch is imported only by the command that needs it."""

import argparse
import os
import sys
import typing

from comcat_diffusion.config import add_arguments, from_arguments
from comcat_diffusion.generation.config import GenerateConfig
from comcat_diffusion.training.config import TrainConfig

if typing.TYPE_CHECKING:
    from comcat_diffusion.training.loop import Step

BAD_INPUT, NOT_FINITE, INTERRUPTED = 2, 3, 130  # exit statuses


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns its exit status."""
    parsed = _parser().parse_args(arguments)
    try:
        return parsed.run(parsed)
    except (ValueError, OSError, ImportError) as error:
        if os.environ.get("COMCAT_TRACEBACK"):
            raise
        print(f"comcat: {_sentence(error)}", file=sys.stderr)
        return BAD_INPUT
    except RuntimeError as error:
        if type(error).__name__ != "NotFinite":
            raise
        print(f"comcat: {_sentence(error)}", file=sys.stderr)
        return NOT_FINITE
    except KeyboardInterrupt:
        print("comcat: stopped.", file=sys.stderr)
        return INTERRUPTED


def _sentence(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror and error.filename is None:
        return error.strerror
    return " ".join(str(error).split())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="comcat",
        description="Teach Stable Diffusion a subject from a few pictures, share kilobytes, generate.",
        epilog="COMCAT_TRACEBACK=1 in the environment shows where an error came from.",
    )
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    train = commands.add_parser("train", help="learn a subject from a folder of pictures")
    add_arguments(train, TrainConfig)
    train.set_defaults(run=_train)
    generate = commands.add_parser("generate", help="draw pictures from prompts, with adapters")
    add_arguments(generate, GenerateConfig)
    generate.set_defaults(run=_generate)
    info = commands.add_parser("info", help="show what an adapter file says of itself")
    info.add_argument("adapter", metavar="FILE", help="An adapter, .safetensors.")
    info.set_defaults(run=_info)
    return parser


class _Terminal:
    """Shows a training run: notes as lines, steps as a progress bar."""

    def __init__(self) -> None:
        self.bar = None

    def note(self, text: str) -> None:
        print(text, flush=True)

    def step(self, done: "Step", total: int, peak_bytes: int) -> None:
        from tqdm import tqdm

        if self.bar is None:
            self.bar = tqdm(total=total, desc="Steps", unit="step")
        shown = {"loss": f"{done.loss:.4f}", "lr": f"{done.learning_rate:.1e}", "s/step": f"{done.seconds:.2f}"}
        self.bar.set_postfix(shown | {"peak": f"{peak_bytes / 2**30:.1f} GiB"}, refresh=False)
        self.bar.update()
        if done.step == total:
            self.close()

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()


def _quiet() -> None:
    """Leave the terminal to our own words: the libraries' progress bars and advice are for their developers."""
    import warnings

    import diffusers
    import transformers

    diffusers.utils.logging.set_verbosity_error()
    transformers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning)


def _train(parsed: argparse.Namespace) -> int:
    config = from_arguments(TrainConfig, parsed)
    _quiet()
    from comcat_diffusion.training.customize import customize

    terminal = _Terminal()
    try:
        outcome = customize(config, terminal)
    finally:
        terminal.close()
    size = outcome.adapter.stat().st_size
    print(
        f"Saved {outcome.adapter} ({size / 1000:.1f} kB, {outcome.parameters:,} parameters), checked on a fresh base."
    )
    if outcome.interrupted:
        print(f"Stopped after step {outcome.steps}. Go on with the same settings and --resume_from_checkpoint latest.")
        return INTERRUPTED
    if outcome.samples:
        print(f"Samples: {outcome.samples}")
    print(f'Try: comcat generate --adapter {outcome.adapter} --prompt "a photo of {outcome.subject.phrase}"')
    return 0


def _generate(parsed: argparse.Namespace) -> int:
    config = from_arguments(GenerateConfig, parsed)
    _quiet()
    from tqdm import tqdm

    from comcat_diffusion.generation.generate import generate

    bar = tqdm(desc="Pictures", unit="picture", delay=0.01)  # nothing is shown before the first picture

    def shown(done: int, total: int) -> None:
        bar.total = total
        bar.update(done - bar.n)

    with bar:
        made = generate(config, shown)
    print(f"{len(made.files)} pictures in {made.sheet.parent}, all on one sheet: {made.sheet}")
    return 0


def _info(parsed: argparse.Namespace) -> int:
    from pathlib import Path

    from comcat_diffusion.adapters.header import read_adapter

    header = read_adapter(parsed.adapter)
    notes = header.notes
    rows = {
        "file": f"{parsed.adapter} ({Path(parsed.adapter).stat().st_size / 1000:.1f} kB)",
        "subject": f"{notes.trigger} {notes.class_word}".strip() or "not said",
        "prompt": notes.instance_prompt or "not said",
        "base": header.base_model or "not said",
        "base kind": f"{header.fingerprint.get('class')}, predicts {header.fingerprint.get('prediction_type')}",
        **{f"adapter of {part}": _told(config) for part, config in header.config.items()},
        "training": ", ".join(f"{key} {value}" for key, value in notes.training.items()) or "not said",
        "written by": ", ".join(f"{name} {version}" for name, version in header.versions.items()),
    }
    width = max(map(len, rows))
    for name, value in rows.items():
        print(f"{name:<{width}}  {value}")
    return 0


def _told(config: dict) -> str:
    kind = "foldable" if config.get("foldable") else "free"
    targets = config.get("target_modules") or []
    named = targets if isinstance(targets, str) else " ".join(targets)
    return f"{kind}, rank {config.get('r')}, alpha {config.get('alpha')}, on {named}"


if __name__ == "__main__":
    sys.exit(main())
