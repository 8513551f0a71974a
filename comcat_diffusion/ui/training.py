"""Training from the page: what is asked for becomes a `TrainConfig`, is looked over, and then a job."""

import re
import threading
from dataclasses import asdict, fields
from pathlib import Path

from starlette.routing import Route

from comcat_diffusion.config import flag_of
from comcat_diffusion.places import is_embedded
from comcat_diffusion.training.config import TrainConfig, ValidateConfig
from comcat_diffusion.ui import asked as asking
from comcat_diffusion.ui import bases_here, presets, settings
from comcat_diffusion.ui.asked import Asked
from comcat_diffusion.ui.captioning import captioner_here
from comcat_diffusion.ui.cutouts import MEGABYTES, model_here, rembg_here
from comcat_diffusion.ui.images import copied
from comcat_diffusion.ui.settings import Refused
from comcat_diffusion.ui.tasks import train_config
from comcat_diffusion.words import is_everyday

ROUND = (1, 2, 5, 10, 20, 25, 50, 100, 200, 250, 500)  # steps between samples
_ONE_AT_A_TIME = threading.Lock()  # the looking over holds whole pictures, and diffusers is no two threads' to import


def subject_in(asked: Asked) -> tuple[str, str]:
    """The word of a subject and what it is, as they were typed in. Raises Refused for no word."""
    word, what = (" ".join(str(asked.value(name, str, "")).split()) for name in ("word", "what"))
    if not word:
        raise Refused("Give the subject a word of its own, for instance sks.", "word")
    return word.lower(), what.lower()


def asked_settings(asked: Asked) -> dict[str, object]:
    """The settings of a training by the names of `TrainConfig`: those of the aims, then those that were typed in."""
    (word, what), studio = subject_in(asked), asked.studio
    aims = asked.value("aims", dict, {})
    base = bases_here.asked(asked.value("base", str, "embedded"), studio.folder, studio.allowed)
    found = presets.chosen(aims)
    if not base.unet:
        found.pop("target_modules", None)  # by which a preset names a U-Net's attentions
    found |= settings.given(TrainConfig, asked.value("settings", dict, {}), bool(studio.allowed))
    for name in settings.PATHS:
        if name in found:
            found[name] = _allowed(found[name], studio.allowed, name)
    sentence = presets.sentence(word, what, aims.get("subject", presets.default_of("subject")))
    found |= {"instance_prompt": sentence, "trigger": word, "class_word": what or None}
    return found | {"pretrained_model_name_or_path": base.name}


def check(asked: Asked) -> dict:
    """All that `comcat validate` says, and of which images it says it."""
    images = asked.own_images(asked.value("images", str))
    sentence, folder = "", images.folder / "training"
    try:
        with _ONE_AT_A_TIME:
            from comcat_diffusion.training.validate import validate

            found = asked_settings(asked)
            sentence = found["instance_prompt"]
            images.ready(sentence)
            report = validate(ValidateConfig(**found, instance_data_dir=str(folder), output_dir=str(images.folder)))
            lines = asdict(report)
    except (ValueError, OSError) as error:  # said like what the looking over finds: somebody is still typing
        one = settings.refused(error, asked.language)
        one.message = asked.bare(one.message, folder)
        lines = {"facts": [], "doubts": [], "errors": []}
        return lines | {"errors": [vars(one) | {"images": []}], "sentence": sentence, "everyday": False}
    told = {}
    for kind, said in lines.items():
        cleaned = [settings.refused(ValueError(asked.bare(line, folder)), asked.language) for line in said]
        told[kind] = [
            {
                "message": one.message,
                "field": one.field,
                "images": _named(line, images.files),
            }
            for one, line in zip(cleaned, said, strict=True)
        ]
    word, _ = subject_in(asked)
    return told | {"sentence": sentence, "everyday": is_everyday(word)}


def warm() -> None:
    """Import what the looking over takes, while somebody reads the page."""
    with _ONE_AT_A_TIME:
        import comcat_diffusion.training.validate  # noqa: F401


def _named(line: str, files: dict[str, int]) -> list[int]:
    """The numbers of the images whose files a sentence names; "1.png" is not named by "dog 1.png" or "11.png"."""
    found = []
    for name in sorted(files, key=len, reverse=True):
        if re.search(rf"(?<![\w-]){re.escape(name)}", line):
            found.append(files[name])
            line = line.replace(name, "\0")
    return sorted(found)


def train(asked: Asked) -> dict:
    """A new run, at the end of the queue."""
    from comcat_diffusion.training.order import order_of

    found = asked_settings(asked)
    images = asked.own_images(asked.value("images", str))
    source = images.ready(found["instance_prompt"])
    steps = found.get("max_train_steps", TrainConfig.max_train_steps)
    found.setdefault("validation_steps", next((round for round in ROUND if round >= steps / 8), max(1, steps // 8)))
    if is_embedded(found["pretrained_model_name_or_path"]):  # which knows prompts that name a place
        found.setdefault("validation_prompt", [presets.example(*subject_in(asked))])
    found.setdefault("checkpointing_steps", max(1, steps // 4))
    found = settings.PAGE_DEFAULTS | found
    request = {
        "settings": found,
        "own_images": True,
        "aims": asked.value("aims", dict, {}),
        "typed": asked.value("settings", dict, {}),
        "images": images.folder.name,
        "base": asked.value("base", str, "embedded"),
        "word": subject_in(asked)[0],
        "what": subject_in(asked)[1],
    }

    def prepare(folder: Path) -> None:
        copied(source)(folder)
        order_of(train_config(request, folder))  # which refuses what can be refused before anything is loaded

    title = " ".join(subject_in(asked)).strip()
    return {"id": asked.studio.queue.add("train", title, asked.owner, request, prepare).id}


def form(asked: Asked) -> dict:
    """Everything that the page has to know to ask for a training."""
    return {
        "groups": settings.asked_of(TrainConfig, asked.language, bool(asked.studio.allowed)),
        "presets": presets.shown(),
        "captioner": captioner_here(asked.studio.folder) is not None,
        "rembg": {"model": model_here() is not None, "megabytes": MEGABYTES} if rembg_here() else None,
        "known": [flag_of(item) for item in fields(TrainConfig)],
    }


def bases(asked: Asked) -> list[dict]:
    """The bases that can be trained."""
    return [
        {name: value for name, value in asdict(base).items() if name != "name"} | {"name": Path(base.name).name}
        if base.id.startswith(("folder:", "file:"))
        else asdict(base)
        for base in bases_here.bases_here(asked.studio.folder, asked.studio.allowed)
    ]


def fetch(asked: Asked) -> dict:
    """Download a base, as a job."""
    name = bases_here.wanted(asked.value("hub", str, ""))
    return {"id": asked.studio.queue.add("fetch", name, asked.owner, {"hub": name}, lambda folder: None).id}


def _allowed(value: str, allowed: list[Path], flag: str) -> str:
    """A path of the machine, if it is in one of the folders that the page may name. Raises Refused."""
    path = Path(value).expanduser().resolve()
    if not any(path == place or place in path.parents for place in allowed):
        raise Refused(f"--{flag} {value} is in no folder that --allow_paths names.", flag)
    return str(path)


ROUTES: list[Route] = [
    asking.route("/api/train", "GET", form),
    asking.route("/api/train", "POST", train),
    asking.route("/api/check", "POST", check),
    asking.route("/api/bases", "GET", bases),
    asking.route("/api/bases", "POST", fetch),
]
