"""Images on the page: brought, looked over, cut, captioned, masked."""

from dataclasses import asdict

from starlette.routing import Route

from comcat_diffusion.ui import asked, bases_here, images, presets, sentences
from comcat_diffusion.ui.asked import Asked
from comcat_diffusion.ui.captioning import captioner_here
from comcat_diffusion.ui.cutouts import model_here, rembg_here
from comcat_diffusion.ui.settings import Refused
from comcat_diffusion.ui.training import subject_in


def create(asked: Asked) -> dict:
    """A new set."""
    return _told(asked, images.ImageSet.create(asked.studio.folder / "images", asked.owner))


def show(asked: Asked) -> dict:
    """A set as it is."""
    return _told(asked, asked.images())


def add(asked: Asked) -> dict:
    """A file more."""
    found = asked.images()
    found.add(asked.query.get("name", "picture"), asked.content)
    return _told(asked, found)


def add_sample(asked: Asked) -> dict:
    """The sample subject's images."""
    found = asked.images()
    found.add_sample()
    return _told(asked, found)


def change(asked: Asked) -> dict:
    """Another caption, crop, or place in the training."""
    found = asked.images()
    new = asked.content if isinstance(asked.content, dict) else {}
    found.change(asked.params["number"], **new)
    return _told(asked, found)


def set_mask(asked: Asked) -> dict:
    """A mask that was drawn."""
    found = asked.images()
    found.set_mask(asked.params["number"], asked.content, "drawn")
    return _told(asked, found)


def remove(asked: Asked) -> dict:
    """One image less."""
    found = asked.images()
    found.remove(asked.params["number"])
    return _told(asked, found)


def view(request: Asked) -> object:
    """A picture for the page."""
    kind = request.params["kind"]
    if kind not in ("large", "small", "mask"):
        raise Refused("An image has no such view.")
    return asked.file(request.images().shown(request.params["number"], kind))


def outline(asked: Asked) -> dict:
    """Have the base find the subject, as a job."""
    found, (word, what) = asked.images(), subject_in(asked)
    if not what:
        raise Refused("Say first what it is, for instance dog: that is what the base looks for.", "what")
    base = bases_here.asked(asked.value("base", str, "embedded"), asked.studio.folder, asked.studio.allowed)
    numbers = [one.number for one in found.pictures if _is_open(one)]
    wanted = asked.value("numbers", list, numbers)
    request = {"set": found.folder.name, "numbers": wanted, "word": word, "what": what, "base": base.name}
    job = asked.studio.queue.add("outline", "masks", asked.owner, request, lambda folder: None)
    return {"id": job.id}


def cutout(asked: Asked) -> dict:
    """Have rembg cut the subject out, as a job; what it would download is asked for."""
    found = asked.images()
    if not rembg_here():
        raise Refused("rembg is not installed here.")
    download = asked.value("download", bool, False)
    if not (model_here() or download):
        raise Refused("rembg's model is not here, and nobody said that it may be downloaded.")
    numbers = [one.number for one in found.pictures if _is_open(one)]
    request = {"set": found.folder.name, "numbers": numbers, "download": download}
    return {"id": asked.studio.queue.add("cutout", "masks", asked.owner, request, lambda folder: None).id}


def _is_open(one: images.Picture) -> bool:
    """Whether an image can be given a mask: it has none by somebody's hand."""
    return not (one.problem or one.mask in ("drawn", "given"))


def caption(asked: Asked) -> dict:
    """Have a captioning model describe what has no caption, as a job."""
    found, (word, what) = asked.images(), subject_in(asked)
    if captioner_here(asked.studio.folder) is None:
        raise Refused("There is no captioning model here.")
    all_of_them = asked.value("all", bool, False)
    numbers = [one.number for one in found.pictures if not one.problem and (all_of_them or not one.caption)]
    sentence = presets.sentence(word, what, str(asked.value("aim", str, "object")))
    request = {"set": found.folder.name, "numbers": numbers, "what": what, "phrase": f"{word} {what}".strip()}
    request["sentence"] = sentence
    return {"id": asked.studio.queue.add("caption", "captions", asked.owner, request, lambda folder: None).id}


def _told(asked: Asked, found: images.ImageSet) -> dict:
    """A set as the page shows it; what was noted of an image is said in the visitor's language."""
    told = [asdict(picture) for picture in found.pictures]
    for one in told:
        one["notes"] = [sentences.known(note, asked.language) or note for note in one["notes"]]
        one["problem"] = sentences.said(one["problem"], asked.language)
    return {"id": found.folder.name, "pictures": told}


ONE = "/api/images/{set}/{number:int}"
ROUTES: list[Route] = [
    asked.route("/api/images", "POST", create),
    asked.route("/api/images/{set}", "GET", show),
    asked.route("/api/images/{set}", "PUT", add, upload="picture"),
    asked.route("/api/images/{set}/sample", "POST", add_sample),
    asked.route("/api/images/{set}/outline", "POST", outline),
    asked.route("/api/images/{set}/cutout", "POST", cutout),
    asked.route("/api/images/{set}/caption", "POST", caption),
    asked.route(ONE, "PATCH", change),
    asked.route(ONE, "DELETE", remove),
    asked.route(f"{ONE}/mask", "PUT", set_mask, upload="mask"),
    asked.route(f"{ONE}/{{kind}}", "GET", view),
]
