"""How a dataclass of settings becomes flags, a TOML file and back. Nothing here imports torch.

A field's metadata holds its help text; its name is the flag. The settings of a command are put together from groups,
dataclasses that other commands may share; a group checks its own values when the object is made, and messages name the
flag. Where a command has more settings than fit a screen, its `--help` shows those that are marked as usual, and
`--help-all` all of them.
"""

import argparse
import tomllib
import types
import typing
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass
from pathlib import Path

import tomli_w

LARGEST = 3e38  # what float32 holds
STRONGEST = 100.0  # of an adapter's scale: one is what it was trained with
FEW = 16  # settings that fit a screen: the help of a command with no more than these shows all
EMBEDDED = "embedded"  # the small base that comes with the package,
EMBEDDED_FLOW = "embedded-flow"  # and its flow-matching sibling
_METAVARS = {str: "TEXT", int: "N", float: "NUMBER"}
WEIGHTS = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")  # endings of files; "dreamlike-photoreal-2.0" has none


def option(default: object, help: str, **more: object) -> typing.Any:
    """A dataclass field with its help text.

    `choices` may be given, `usual=True` for a setting that people change, `required`, which says what to do where it is
    missing, and `formerly`, a name that it had.
    """
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: default.copy(), metadata={"help": help, **more})
    return field(default=default, metadata={"help": help, **more})


def flag_of(item: object) -> str:
    """The flag, without its dashes, of a field; one that Python keeps for itself has an underscore behind it."""
    return item.name.rstrip("_")


def _older(item: object) -> tuple[str, ...]:
    """Flags that a field had before."""
    return (item.metadata["formerly"],) if "formerly" in item.metadata else ()


def require(holds: bool, message: str) -> None:
    """Raise ValueError with the message unless it holds."""
    if not holds:
        raise ValueError(message)


def require_finite(settings: object, *flags: str, above: float | None = None) -> None:
    """Raise ValueError, naming the flag, unless each setting is None or a finite number, and above `above`."""
    for flag in flags:
        value = getattr(settings, flag)
        finite = value is None or abs(value) <= LARGEST  # which a NaN is not either
        require(finite, f"--{flag} must be a finite number, not {value}.")
        require(value is None or above is None or value > above, f"--{flag} must be above {above}, not {value}.")


def require_at_least(settings: object, least: int, *flags: str) -> None:
    """Raise ValueError, naming the flag, unless each setting is None or at least `least`."""
    for flag in flags:
        value = getattr(settings, flag)
        require(value is None or value >= least, f"--{flag} must be at least {least}, not {value}.")


def require_seed(seed: int) -> None:
    """Raise ValueError unless torch takes this seed."""
    require(0 <= seed < 2**63, f"--seed must be at least 0 and below 2 to the 63rd, not {seed}.")


class Group:
    """Settings that belong together. `check` looks at them alone; a command's own `check` at how groups fit."""

    def __post_init__(self) -> None:
        for item in fields(self):
            missing = item.metadata.get("required")
            there = getattr(self, item.name) not in (None, "", [])
            require(not missing or there, f"--{flag_of(item)} is missing: {missing}.")
        for item in fields(self):  # a TOML file knows nothing of a flag's choices
            choices, value = item.metadata.get("choices"), getattr(self, item.name)
            known = not choices or value in choices or (value is None and item.default is None)
            require(known, f"--{flag_of(item)} must be one of {', '.join(choices or ())}, not {value!r}.")
        for kind in reversed(type(self).__mro__):
            if "check" in vars(kind):
                kind.check(self)


@dataclass(frozen=True, kw_only=True)
class BaseSettings(Group):
    """The base"""

    pretrained_model_name_or_path: str | None = option(
        None,
        "Base: hub id, diffusers folder, single .safetensors file, 'embedded' or 'embedded-flow'. Default: that of the "
        "adapter, else 'embedded'.",
        usual=True,
    )
    revision: str | None = option(None, "Branch, tag or commit of a hub base.")
    variant: str | None = option(None, "Variant of the base's weight files, for instance fp16.")
    base_config: str | None = option(
        None,
        "For a single-file base: diffusers folder or cached hub id of its family, with weights where the file holds a "
        "transformer alone. Default: found in the cache.",
    )


def add_arguments(parser: argparse.ArgumentParser, kind: type, everything: bool = True) -> int:
    """One flag per field, under the name of its group, and --config for a TOML file that holds any of them.

    The help shows `everything`, or, where that is too much, what is usual or required; returns how many it leaves out.
    """
    parser.add_argument("--config", metavar="FILE", help="TOML file with any of these settings; flags win over it.")
    hints, left_out = typing.get_type_hints(kind), 0
    groups = {
        title: [item for item in items if not item.metadata.get("file_only")]
        for title, items in fields_by_group(kind).items()
    }
    everything = everything or sum(map(len, groups.values())) <= FEW
    for title, items in groups.items():
        shown = parser.add_argument_group(title)
        for item in items:
            settings = _argument(item, hints)
            if not (everything or item.metadata.get("usual") or item.metadata.get("required")):
                settings["help"] = argparse.SUPPRESS
                left_out += 1
            shown.add_argument(f"--{flag_of(item)}", dest=item.name, default=argparse.SUPPRESS, **settings)
            for old in _older(item):
                hidden = settings | {"help": argparse.SUPPRESS}
                shown.add_argument(f"--{old}", dest=item.name, default=argparse.SUPPRESS, **hidden)
    return left_out


def required_flags(kind: type) -> list[str]:
    """What a command cannot do without, as it is written."""
    return [
        f"--{flag_of(item)} {_METAVARS[value_type(typing.get_type_hints(kind)[item.name])[0]]}"
        for item in fields(kind)
        if item.metadata.get("required")
    ]


def fields_by_group(kind: type) -> dict[str, list]:
    """The fields of a command's settings under the titles of the groups that they come from."""
    items, groups = {item.name: item for item in fields(kind)}, {}
    for part in reversed(kind.__mro__):
        own = [items.pop(name) for name in vars(part).get("__annotations__", {}) if name in items]
        if own:
            groups[part.__doc__.split("\n")[0].rstrip(".")] = own
    return groups


def _argument(item: object, hints: dict) -> dict:
    kind, several = value_type(hints[item.name])
    text = _told(item).replace("%", "%%")
    if kind is bool:
        return {"action": argparse.BooleanOptionalAction, "help": text}
    settings = {"type": kind, "help": text, "choices": item.metadata.get("choices"), "metavar": _METAVARS[kind]}
    if settings["choices"]:
        settings.pop("metavar")
    return settings | ({"nargs": "+", "action": "extend"} if several else {})


def _told(item: object) -> str:
    """The help of a flag: the field's own, and whether it must be given, or what it is if it is not."""
    text, default = item.metadata["help"], item.default if item.default is not MISSING else item.default_factory()
    if item.metadata.get("required"):
        return f"{text} Required."
    if default is None or default is False or default == [] or "Default:" in text:
        return text
    return f"{text} Default: {'yes' if default is True else default}."


def value_type(hint: object) -> tuple[type, bool]:
    """(type of one value, whether there may be several) of a field's annotation."""
    if isinstance(hint, types.UnionType):
        hint = next(part for part in typing.get_args(hint) if part is not type(None))
    if typing.get_origin(hint) is list:
        return typing.get_args(hint)[0], True
    return hint, False


def from_arguments(kind: type, arguments: argparse.Namespace) -> object:
    """Defaults, then the TOML file, then the flags."""
    given = {name: value for name, value in vars(arguments).items() if name in {item.name for item in fields(kind)}}
    stored = read_toml(kind, arguments.config) if arguments.config else {}
    return kind(**{**stored, **given})


def read_toml(kind: type, path: str | Path) -> dict:
    """The settings in a TOML file. Raises ValueError for what is no TOML, an unknown key or a value of another type."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"--config: there is no file {path}.")
    try:
        content = tomllib.loads(path.read_text("utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"--config: {path} is not TOML: {error}.") from error
    return _table(kind, content, path)


def _table(kind: type, content: dict, path: Path, within: str = "") -> dict:
    hints = typing.get_type_hints(kind)
    names = {flag: item.name for item in fields(kind) for flag in (flag_of(item), *_older(item))}
    unknown = sorted(set(content) - set(names))
    if unknown:
        raise ValueError(f"--config: {path} has unknown settings: {', '.join(within + name for name in unknown)}.")
    found = {names[flag]: (flag, value) for flag, value in content.items()}
    return {
        name: _checked(within + flag, value, *value_type(hints[name]), path) for name, (flag, value) in found.items()
    }


def _checked(name: str, value: object, kind: type, several: bool, path: Path) -> object:
    if several and isinstance(value, list):
        return [_checked(f"{name}[{n}]", part, kind, False, path) for n, part in enumerate(value)]
    if is_dataclass(kind) and isinstance(value, dict):
        needed = {item.name for item in fields(kind) if MISSING is item.default is item.default_factory}
        if needed - set(value):
            raise ValueError(f"--config: {path}: {name} needs {', '.join(sorted(needed - set(value)))}.")
        return kind(**_table(kind, value, path, name + "."))
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not several and type(value) is kind:
        return value
    wanted = f"a list of {kind.__name__}" if several else kind.__name__
    raise ValueError(f"--config: {path}: {name} must be {wanted}, not {value!r}.")


def require_scale(scale: float, flag: str = "--scale") -> None:
    """Raise ValueError unless an adapter can be drawn with at this scale."""
    told = f"{flag} must be a finite number from -100 to 100, where 1 is as it was trained, and not {scale}."
    require(abs(scale) <= STRONGEST, told)


def weighted(text: str, weight: float = 1.0, flag: str = "--adapter") -> tuple[str, float]:
    """(file, weight) of `dog.safetensors` or `dog.safetensors:0.8`. Raises ValueError if that is no number."""
    require(bool(text.strip()), f"{flag} is empty: name a file.")
    path = text
    head, colon, tail = text.rpartition(":")
    if colon and not Path(text).exists():
        try:
            path, weight = head, float(tail)
        except ValueError:
            raise ValueError(f"{flag} {text}: '{tail}' after the colon is not a number.") from None
    require_scale(weight, f"The weight of {flag} {text}")
    return path, weight


def is_hub_id(name: str) -> bool:
    """Whether a name can be an id of the hub: it reads owner/name and is no path, here or missing."""
    path = name.startswith((".", "~", "/")) or "\\" in name or name.endswith(WEIGHTS) or Path(name).exists()
    return name.count("/") == 1 and not path


def to_toml(config: object) -> str:
    """Every setting that is set, as TOML that `read_toml` takes back."""
    return tomli_w.dumps(_set_values({flag_of(item): asdict(config)[item.name] for item in fields(config)}))


def _set_values(table: dict) -> dict:
    found = {}
    for name, value in table.items():
        if isinstance(value, list):
            value = [_set_values(part) if isinstance(part, dict) else part for part in value]
        if value is not None:
            found[name] = value
    return found
