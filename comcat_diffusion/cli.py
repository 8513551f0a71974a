"""The command line: which commands there are, and what becomes of an error. It alone, with `commands`, prints."""

import argparse
import io
import os
import sys

from comcat_diffusion import commands
from comcat_diffusion.bench.config import BenchConfig
from comcat_diffusion.compression.config import CompressConfig
from comcat_diffusion.config import add_arguments
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
from comcat_diffusion.training.config import TrainConfig, ValidateConfig
from comcat_diffusion.ui.config import UiConfig

COMMANDS = {
    "train": (commands.train, TrainConfig),
    "validate": (commands.validate, ValidateConfig),
    "generate": (commands.generate, GenerateConfig),
    "export": (commands.export, ExportConfig),
    "merge": (commands.merge, MergeConfig),
    "combine": (commands.combine, CombineConfig),
    "shrink": (commands.shrink, ShrinkConfig),
    "compress": (commands.compress, CompressConfig),
    "evaluate": (commands.evaluate, EvaluateConfig),
    "bench": (commands.bench, BenchConfig),
    "push": (commands.push, PushConfig),
    "pull": (commands.pull, PullConfig),
    "import": (commands.import_, ImportConfig),
    "ui": (commands.ui, UiConfig),
}


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns its exit status."""
    _hold_any_letter()
    parsed = _parser().parse_args(arguments)
    try:
        return parsed.run(parsed)
    except (ValueError, OSError, ImportError) as error:
        if os.environ.get("COMCAT_TRACEBACK"):
            raise
        print(f"comcat: {_sentence(error)}", file=sys.stderr)
        return commands.BAD_INPUT
    except RuntimeError as error:
        if type(error).__name__ != "NotFinite":
            raise
        print(f"comcat: {_sentence(error)}", file=sys.stderr)
        return commands.NOT_FINITE
    except KeyboardInterrupt:
        print("comcat: stopped.", file=sys.stderr)
        return commands.INTERRUPTED


def _hold_any_letter() -> None:
    """Let a run not end over its own words: over a letter that its log cannot hold, or because nobody listens."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed by whoever started it
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 - for as long as the program runs
        elif isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="backslashreplace")


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
    there = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for name, (run, settings) in COMMANDS.items():
        command = there.add_parser(name, help=_help(run), description=_help(run) + ".")
        add_arguments(command, settings)
        command.set_defaults(run=run)
    info = there.add_parser("info", help=_help(commands.info))
    info.add_argument("adapter", metavar="FILE", help="An adapter, .safetensors.")
    info.add_argument("--save_preview", metavar="FILE", help="Write the header's thumbnail, a JPEG, to this file.")
    info.set_defaults(run=commands.info)
    return parser


def _help(run: object) -> str:
    sentence = run.__doc__.strip().rstrip(".")
    return sentence[0].lower() + sentence[1:]


if __name__ == "__main__":
    sys.exit(main())
