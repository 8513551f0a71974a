"""What `comcat train my_dog/ "sks dog"` says in settings: the words that stand without a flag, beside those that do."""

import argparse
from pathlib import Path

from comcat_diffusion.config import require

_ORDER = 'Name the folder, then its subject, as in: my_dog/ "sks dog".'
_TWICE = "{what} is said twice, by '{word}' and by --{flag}: leave one of them out."


def with_words(parsed: argparse.Namespace) -> argparse.Namespace:
    """The command line with its words, FOLDER and SUBJECT, as the flags that they stand for.

    Of a subject, "sks dog", the first word is the trigger and the rest its class; a flag may say the prompt otherwise.
    Raises ValueError for what is said twice, and for a subject of one word.
    """
    given = dict(vars(parsed))
    folder, subject = given.pop("folder", None), given.pop("subject", None)
    if folder is None:
        return parsed
    _refuse_twice(given, "The folder", folder, "instance_data_dir")
    given["instance_data_dir"] = folder
    if subject is not None:
        trigger, _, of_class = " ".join(subject.split()).partition(" ")
        require(
            bool(of_class),
            f"'{subject}' is no subject: write a rare word that will call it, then what it is, like 'sks dog'.",
        )
        for flag in ("trigger", "class_word"):
            _refuse_twice(given, "The subject", subject, flag)
        given |= {"trigger": trigger, "class_word": of_class}
        given.setdefault("instance_prompt", f"a photo of {trigger} {of_class}")
    elif parsed.config is None and not {"instance_prompt", "trigger"} & set(given):
        require(Path(folder).expanduser().is_dir(), f"There is no folder {folder}. {_ORDER}")
        raise ValueError(f"What does {folder} show? {_ORDER}")
    return argparse.Namespace(**given)


def _refuse_twice(given: dict, what: str, word: str, flag: str) -> None:
    require(flag not in given, _TWICE.format(what=what, word=word, flag=flag))
