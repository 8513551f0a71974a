"""The command line: which commands there are, and what becomes of an error. It alone, with `commands`, prints."""

import argparse
import difflib
import io
import os
import sys
import typing
from collections.abc import Sequence

from comcat_diffusion import __version__, commands
from comcat_diffusion.bench.config import BenchConfig
from comcat_diffusion.compression.config import CompressConfig
from comcat_diffusion.config import add_arguments, required_flags
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
INFO = "info"  # which has no settings
# What may stand without a flag, and how that is told.
WORDS = {"train": ("folder", "subject"), "validate": ("folder", "subject")}
_NAMED = (
    " FOLDER holds the pictures; SUBJECT says what they show: a rare word that will call it, then what it is, as in: "
    'comcat {} my_dog/ "sks dog". All else has a default.'
)
EVERYTHING = "--help-all"
TELLING = 4  # letters of a word that says which flags it may be a part of


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns its exit status."""
    _hold_any_letter()
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = _parser(EVERYTHING in arguments)
    if not arguments:
        parser.print_help()
        return 0
    _refuse_no_command(parser, arguments[0])
    parsed = parser.parse_args(arguments)
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


def _refuse_no_command(parser: argparse.ArgumentParser, word: str) -> None:
    """Leave with a sentence if the first word is no command, nor asks for the help."""
    known = [*COMMANDS, INFO]
    if word.startswith("-"):
        if word not in ("-h", "--help", "--version"):
            parser.error(f"{word} comes after a command, as in: comcat train {word}. (comcat --help lists them.)")
    elif word not in known:
        found = difflib.get_close_matches(word.lower(), known, 1)
        meant = f": did you mean {found[0]}?" if found else "."
        parser.error(f"there is no command '{word}'{meant} (comcat --help lists them.)")


def _sentence(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror and error.filename is None:
        return error.strerror
    return " ".join(str(error).split())


class _Parser(argparse.ArgumentParser):
    """Says in one sentence what it does not understand, and what may have been meant.

    `words` are what a command takes without a flag, anywhere between its flags.
    """

    words: tuple[str, ...] = ()

    def parse_known_args(
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """As argparse's, but that nothing is left over."""
        parsed, left = super().parse_known_args(args, namespace)
        left = [word for word in left if word != "--"]
        for word in left:
            if word[0:1] in ("-", "–", "—"):
                self.error(f"there is no {word.partition('=')[0]}{self._meant(word)}")
        for word in left[len(self.words) :]:
            self.error(f"'{word}' belongs to no flag of {self.prog}; what holds spaces stands in quotes.")
        for name, word in zip(self.words, left, strict=False):
            setattr(parsed, name, word)
        return parsed, []

    def error(self, message: str) -> typing.NoReturn:
        """Print a sentence and leave."""
        print(f"comcat: {message.removeprefix('argument ')}", file=sys.stderr)
        sys.exit(commands.BAD_INPUT)

    def _meant(self, word: str) -> str:
        """The rest of the sentence about a flag that is none."""
        known = [flag.removeprefix("--") for flag in self._option_string_actions if flag.startswith("--")]
        asked = word.partition("=")[0].lstrip("-–—").lower().replace("-", "_")
        found = difflib.get_close_matches(asked, known, 1)
        if not found and len(asked) >= TELLING:
            found = [flag for flag in known if asked in flag][:3]
        meant = f": did you mean {' or '.join(f'--{flag}' for flag in found)}?" if found else "."
        return f"{meant} ({self.prog} {EVERYTHING if self.words or 'config' in known else '--help'} shows all.)"


def _parser(everything: bool = True) -> argparse.ArgumentParser:
    parser = _Parser(
        prog="comcat",
        description="Teach Stable Diffusion a subject from a few pictures, share kilobytes, generate.",
        epilog="COMCAT_TRACEBACK=1 in the environment shows where an error came from.",
    )
    parser.add_argument("--version", action="version", version=f"comcat-diffusion {__version__}")
    there = parser.add_subparsers(title="commands", metavar="COMMAND")
    for name, (run, settings) in COMMANDS.items():
        command = there.add_parser(name, help=_help(run), usage=_usage(name, settings), description=_about(name, run))
        command.set_defaults(run=run)
        command.words = WORDS.get(name, ())
        left_out = add_arguments(command, settings, everything)
        told = "show every setting and exit" if left_out else argparse.SUPPRESS
        command.add_argument(EVERYTHING, action="help", help=told)
        command.epilog = f"{left_out} more settings: comcat {name} {EVERYTHING}" if left_out else None
    info = there.add_parser(INFO, help=_help(commands.info), description=_about(INFO, commands.info))
    info.add_argument("adapter", metavar="FILE", help="An adapter, .safetensors.")
    info.add_argument("--save_preview", metavar="FILE", help="Write the header's thumbnail, a JPEG, to this file.")
    info.set_defaults(run=commands.info)
    return parser


def _usage(name: str, settings: type) -> str:
    """How a command is called, with what must be given."""
    words = [f"[{' '.join(WORDS[name]).upper()}]"] if name in WORDS else []
    return " ".join(["comcat", name, *words, *required_flags(settings), "[--SETTING VALUE ...]"])


def _about(name: str, run: object) -> str:
    """What a command is for, as its help begins."""
    return run.__doc__.strip() + (_NAMED.format(name) if name in WORDS else "")


def _help(run: object) -> str:
    sentence = run.__doc__.strip().rstrip(".")
    return sentence[0].lower() + sentence[1:]


if __name__ == "__main__":
    sys.exit(main())
