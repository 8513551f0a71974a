"""comcat ui: what the page's server answers, asked as a browser asks it, with a worker in a thread."""

import base64
import io
import json
import os
import re
import socket
import sys
import threading
import time
import types
from contextlib import closing
from dataclasses import fields

import numpy as np
import pytest
from PIL import Image, ImageDraw
from starlette.testclient import TestClient

from comcat_diffusion import bases, commands, places, read_adapter
from comcat_diffusion.cli import main
from comcat_diffusion.config import read_toml
from comcat_diffusion.export.clients import CLIENTS
from comcat_diffusion.families.known import FAMILIES
from comcat_diffusion.generation.config import GenerateConfig
from comcat_diffusion.training.config import TrainConfig
from comcat_diffusion.ui import app, bases_here, cutouts, jobs, presets, settings, texts, uploads
from comcat_diffusion.ui.captioning import named
from comcat_diffusion.ui.config import UiConfig
from comcat_diffusion.ui.jobs import Job, Queue
from comcat_diffusion.ui.port import address_of
from comcat_diffusion.ui.progress import Cancelled, Paused, Progress
from comcat_diffusion.ui.settings import Refused
from tests.quick_training import QUICK

TRAIN = bases.assets() / "subject" / "train"
HOST = "http://127.0.0.1:7860"


def browser(served):
    return TestClient(served, base_url=HOST, headers={"origin": HOST, "accept-language": "en"})


@pytest.fixture
def page(tmp_path):
    """A page whose jobs are never done, so that they can be looked at."""
    held = threading.Event()
    served = app.build(UiConfig(output_dir=str(tmp_path / "studio")), work=lambda folder: held.wait())
    with browser(served) as client:
        client.folder, client.served = tmp_path / "studio", served
        yield client
        held.set()


@pytest.fixture
def at_work(tmp_path):
    """A page that does what it is asked, in a thread."""
    from comcat_diffusion.ui.worker import run

    with browser(app.build(UiConfig(output_dir=str(tmp_path / "studio")), work=run)) as client:
        client.folder = tmp_path / "studio"
        yield client


def png(size=(96, 80), colour="purple", mode="RGB"):
    content = io.BytesIO()
    Image.new(mode, size, colour).save(content, "PNG")
    return content.getvalue()


def picture(n, size=(96, 80)):
    """Pictures that are not alike."""
    made = Image.new("RGB", size, (40 * n, 90, 200 - 30 * n))
    ImageDraw.Draw(made).ellipse((10 * n, 8, 40 + 8 * n, 30 + 9 * n), fill=(250, 30 * n, 40))
    content = io.BytesIO()
    made.save(content, "PNG")
    return content.getvalue()


def brought(client, *files):
    found = client.post("/api/images", json={}).json()["id"]
    for name, content in files:
        answer = client.put(f"/api/images/{found}", params={"name": name}, content=content)
        assert answer.status_code == 200, answer.text
    return found


def pixels(content):
    return np.asarray(Image.open(io.BytesIO(content)), dtype=int)


def shown(client, images):
    return client.get(f"/api/images/{images}").json()["pictures"]


def sample(client):
    found = client.post("/api/images", json={}).json()["id"]
    assert client.post(f"/api/images/{found}/sample", json={}).status_code == 200
    return found


def asked(images, **more):
    return {"images": images, "word": "sks", "what": "teddy", "base": "embedded", "aims": {}, "settings": {}} | more


def ended(client, id, seconds=120):
    for _ in range(seconds * 20):
        job = client.get(f"/api/jobs/{id}").json()
        if job["state"] not in jobs.LIVE:
            return job
        time.sleep(0.05)
    raise AssertionError(job)


# Images


def test_odd_files_are_taken_in_or_refused_by_a_sentence_each(page):
    """Names with markup, brackets and folders; a broken picture; one that lies on its side; a caption and a mask."""
    turned = io.BytesIO()
    lying = Image.new("RGB", (60, 90), "red")
    lying.save(turned, "JPEG", exif=_on_its_side())
    images = brought(
        page,
        ("dog (1).png", picture(1)),
        ("<b>my dog</b>.png", picture(2)),
        ("../../etc/passwd.png", picture(3)),
        ("side.jpg", turned.getvalue()),
        ("broken.png", b"no picture"),
        ("photo.heic", b"\0\0\0\x18ftypheic" + b"\0" * 64),
        ("dog (1).txt", "a photo of sks dog, on a sofa".encode("utf-8-sig")),
        ("dog (1)-mask.png", png((48, 40), 255, "L")),
    )
    found = {one["called"]: one for one in shown(page, images)}
    assert set(found) == {
        "dog (1).png", "<b>my dog</b>.png", "../../etc/passwd.png", "side.jpg", "broken.png", "photo.heic"
    }  # fmt: skip
    assert (
        found["dog (1).png"]["caption"] == "a photo of sks dog, on a sofa" and found["dog (1).png"]["mask"] == "given"
    )
    assert found["side.jpg"]["size"] == [90, 60] and "turned upright" in found["side.jpg"]["notes"][0]
    assert found["broken.png"]["problem"].startswith("broken.png cannot be read as a picture")
    assert "HEIC" in found["photo.heic"]["problem"] or "cannot be read" in found["photo.heic"]["problem"]
    assert {one["name"] for one in found.values()} >= {"dog (1)", "passwd"}
    inside = [path.name for path in (page.folder / "images" / images / "originals").iterdir()]
    assert sorted(inside) == ["1.png", "2.png", "3.png", "4.jpg", "5.png", "6.heic"]
    for name, content, told in (
        ("notes.txt", b"alone", "has no image of the same name"),
        ("virus.exe", b"MZ", "no picture that can be read"),
        ("empty.png", b"", "empty"),
        ("odd-mask.png", b"", "empty"),
    ):
        answer = page.put(f"/api/images/{images}", params={"name": name}, content=content)
        assert answer.status_code == 422 and told in answer.json()["message"], answer.text


def _on_its_side():
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


def test_more_bytes_than_a_picture_may_have_are_refused_while_they_come(page, monkeypatch):
    monkeypatch.setitem(uploads.MOST_BYTES, "picture", 1000)
    images = page.post("/api/images", json={}).json()["id"]
    answer = page.put(f"/api/images/{images}", params={"name": "big.png"}, content=b"x" * 1001)
    assert answer.status_code == 413 and shown(page, images) == []


def test_names_are_safe_to_write_whatever_they_were():
    for name, kept in (
        ("dog (1).png", ("dog (1)", ".png")),
        ("..\\..\\boot.ini", ("boot", ".ini")),
        ("/etc/passwd", ("passwd", "")),
        ("a<b>&\0.JPG", ("a-b", ".jpg")),
        (".png", ("png", "")),
        ("…", ("picture", "")),
        ("x" * 500 + ".png", ("x" * 80, ".png")),
        ("Größe\u0308.png", ("Größë", ".png")),
    ):
        assert uploads.clean_name(name) == kept, name
    assert uploads.unique("dog", {"DOG", "dog 2"}) == "dog 3"


def test_the_training_folder_has_what_was_decided_on_the_page(page):
    """The crop, the mask in the crop, a caption for all where one has one; nothing of what is left out or broken."""
    images = brought(page, *[(f"{n}.png", picture(n, (200, 120))) for n in (1, 2, 3)], ("bad.png", b"x"))
    one, two, three, _ = shown(page, images)
    change = f"/api/images/{images}/{{}}".format
    assert page.patch(change(one["number"]), json={"crop": [60, 20, 80]}).status_code == 200
    mask = Image.new("L", (400, 240))
    mask.paste(255, (110, 30, 290, 210))
    content = io.BytesIO()
    mask.save(content, "PNG")
    assert page.put(f"{change(one['number'])}/mask", content=content.getvalue()).status_code == 200
    assert page.patch(change(two["number"]), json={"caption": " sks  teddy,\nblue "}).status_code == 200
    assert page.patch(change(three["number"]), json={"left_out": True}).status_code == 200
    report = page.post("/api/check", json=asked(images)).json()
    assert report["errors"] == [] and report["sentence"] == "a photo of sks teddy"
    folder = page.folder / "images" / images / "training"
    assert sorted(path.name for path in folder.iterdir()) == ["1-mask.png", "1.png", "1.txt", "2.png", "2.txt"]
    assert Image.open(folder / "1.png").size == (80, 80)
    assert Image.open(folder / "1-mask.png").getextrema() == (255, 255)  # what the crop shows is all painted
    assert (folder / "1.txt").read_text() == "a photo of sks teddy" and (
        folder / "2.txt"
    ).read_text() == "sks teddy, blue"
    assert (folder / "2.png").read_bytes() == picture(2, (200, 120))
    for wrong in (
        {"crop": [150, 0, 80]},
        {"crop": [0, 0, 8]},
        {"crop": "all"},
        {"name": "x"},
        {"caption": 3},
        {"left_out": 1},
    ):
        assert page.patch(change(one["number"]), json=wrong).status_code == 422, wrong
    other = page.put(f"{change(one['number'])}/mask", content=png((50, 50)))
    assert other.status_code == 422 and "another shape" in other.json()["message"]
    assert page.delete(change(one["number"])).status_code == 200 and len(shown(page, images)) == 3


def test_a_remark_is_told_at_the_image_that_it_is_about(page):
    images = brought(page, ("1.png", picture(1)), ("11.png", picture(1)), ("2.png", picture(2, (300, 300))))
    doubts = page.post("/api/check", json=asked(images)).json()["doubts"]
    (twins,) = [one for one in doubts if "shows the same as" in one["message"]]
    assert twins["images"] == [1, 2]
    assert any("photographs" in one["message"] and one["images"] == [] for one in doubts)
    page.put(f"/api/images/{images}/3/mask", content=png((300, 300), 0, "L"))
    doubts = page.post("/api/check", json=asked(images)).json()["doubts"]
    assert [one["images"] for one in doubts if "masks nothing" in one["message"]] == [[3]]
    doubts = page.post("/api/check", json=asked(sample(page))).json()["doubts"]
    assert not any("photographs" in one["message"] for one in doubts)  # these are drawn for the embedded base


def test_a_german_page_says_all_of_it_in_german(page):
    """Remarks of every kind, what was noted of images, refusals at fields and of what is not there."""
    page.headers["accept-language"] = "de"
    turned = io.BytesIO()
    Image.new("RGB", (60, 90), "red").save(turned, "JPEG", exif=_on_its_side())
    images = brought(page, ("1.png", picture(1)), ("2.png", picture(1)), ("lies.jpg", turned.getvalue()),
                     ("clear.png", png(mode="RGBA", colour=(1, 2, 3, 0))), ("broken.jpg", b"\xff\xd8\xff"))  # fmt: skip
    notes = [*(one["notes"] for one in shown(page, images)), *([one["problem"]] for one in shown(page, images))]
    said = " ".join(word for one in notes for word in one)
    assert "aufgerichtet" in said and "durchsichtige" in said and "lässt sich nicht als Bild lesen" in said
    told = page.post("/api/check", json=asked(images, word="dog", settings={"rank": 3, "lr_warmup_steps": 300})).json()
    lines = [one["message"] for kind in ("facts", "doubts", "errors") for one in told[kind]]
    english = re.compile(r"\b(the|is|are|of|and|with|for|every|be|was|it)\b")
    assert len(lines) > 8 and not [line for line in lines if english.search(re.sub("„[^“]*“", "", line))], lines
    assert not any("--" in line for line in lines)
    for wrong, sentence in (({"rank": -1}, "„Rang“ muss mindestens 1 sein, nicht -1."), ({"rank": "x"}, "ganze Zahl")):
        answer = page.post("/api/train", json=asked(images, settings=wrong))
        assert answer.json()["field"] == "rank" and sentence in answer.json()["message"]
    assert "nicht mehr" in page.get("/api/images/nope").json()["message"]


def test_what_is_wrong_while_somebody_types_is_said_and_no_failure(page):
    images = sample(page)
    for more, field, told in (
        ({"word": ""}, "word", "a word of its own"),
        ({"settings": {"rank": 0}}, "rank", "“Rank” must be at least 1, not 0."),
        ({"settings": {"learning_rate": "high"}}, "learning_rate", "must be a number"),
        ({"base": "../../etc"}, "base", "not here"),
        ({"aims": {"effort": "never"}}, "effort", "one of fast, good, best"),
    ):
        answer = page.post("/api/check", json=asked(images, **more))
        (error,) = answer.json()["errors"]
        assert answer.status_code == 200 and (error["field"], told in error["message"]) == (field, True), error
    assert page.post("/api/check", json=asked(images, word="dog", what="")).json()["everyday"]
    (error,) = page.post("/api/check", json=asked(images, word="zwx")).json()["errors"]  # its captions name another
    assert error["field"] == "word" and error["message"].startswith("No caption contains 'zwx'")
    assert str(page.folder) not in page.post("/api/check", json=asked(images, word="zwx"), headers={}).text


# Settings


@pytest.mark.parametrize("kind", [TrainConfig, GenerateConfig])
@pytest.mark.parametrize("language", texts.LANGUAGES)
def test_every_setting_has_a_place_on_the_page_and_a_label(kind, language):
    groups = settings.asked_of(kind, language, paths=True)
    names = [one["name"] for group in groups for one in group["fields"]]
    own = {item.name for item in fields(kind)} & set(settings.OWN)
    assert set(names) == {item.name for item in fields(kind)} - own and len(names) == len(set(names))
    for name in names:
        assert name in texts._all()[language]["labels"], name
        assert language == "en" or name in texts._all()[language]["help"], name


def test_what_is_left_empty_is_not_sent_and_what_is_typed_keeps_its_type():
    """An empty number became 0 on the page before."""
    empty = {"rank": None, "learning_rate": "", "validation_prompt": [], "alpha": None, "train_batch_size": None}
    assert settings.given(TrainConfig, empty) == {}
    typed = {"rank": 4, "learning_rate": 1, "random_flip": True, "validation_prompt": [" a dog ", ""], "kind": "free"}
    found = settings.given(TrainConfig, typed)
    assert found == typed | {"validation_prompt": ["a dog"]} and type(found["learning_rate"]) is float
    assert settings.given(GenerateConfig, {"guidance_scale": None}) == {}
    for wrong in ({"rank": "8"}, {"rank": 2.5}, {"random_flip": 1}, {"validation_prompt": "a"}, {"seed": True}):
        with pytest.raises(Refused):
            settings.given(TrainConfig, wrong)
    for hidden in ("output_dir", "instance_data_dir", "resume_from_checkpoint", "cache_dir", "config", "nonsense"):
        with pytest.raises(Refused, match="no setting"):
            settings.given(TrainConfig, {hidden: "/etc"})


def test_messages_name_the_labels_of_the_page_and_no_flags():
    error = ValueError("--train_batch_size must be at least 1, not 0: see --skip_broken, --unknown.")
    told = settings.refused(error, "en")
    assert told.message == "“Batch size” must be at least 1, not 0: see “Skip broken”, --unknown."
    assert told.field == "train_batch_size"
    said = settings.refused(ValueError("--train_batch_size must be at least 1, not 0."), "de").message
    assert said == "„Batch-Größe“ muss mindestens 1 sein, nicht 0."


def test_all_that_the_page_says_is_there_in_both_languages():
    english, german = (texts._all()[language] for language in texts.LANGUAGES)
    for part in ("page", "labels", "groups"):
        assert english[part].keys() == german[part].keys() and all(map(str.strip, german[part].values()))
    for key, said in english["page"].items():
        assert _names(said) == _names(german["page"][key]), key
    script = "".join(path.read_text("utf-8") for path in (app.STATIC / "js").iterdir())
    for key in _said_in(script):
        assert key in english["page"], key


def _names(text):
    import re

    return sorted(re.findall(r"\{\w+\}", text))


def _said_in(script):
    import re

    return re.findall(r'\bt\("(\w+)"', script)


@pytest.mark.parametrize("kind", list(presets.AIMS))
def test_presets_are_files_that_train_takes(kind, tmp_path):
    for name in presets.AIMS[kind]:
        found = read_toml(TrainConfig, presets.FOLDER / f"{name}.toml")
        assert presets.chosen({kind: name}).items() >= found.items()
        TrainConfig(**presets.chosen({kind: name}))
    assert presets.sentence("sks", "style", "style") == "a picture in sks style"


def test_the_page_asks_nobody_else():
    """Not in what it loads, and the browser is told not to."""
    for path in app.STATIC.rglob("*"):
        if path.suffix in (".js", ".css", ".html"):
            text = path.read_text("utf-8").replace("http://www.w3.org/2000/svg", "")
            assert "http://" not in text and "https://" not in text and "@import url" not in text, path
    from comcat_diffusion.ui.visitors import POLICY

    assert "default-src 'self'" in POLICY and "unsafe" not in POLICY


# Who may do what


def test_a_job_belongs_to_who_started_it(page):
    images = brought(page, ("1.png", picture(1)))
    id = page.post("/api/train", json=asked(images)).json()["id"]
    waiting = page.post("/api/train", json=asked(images, word="zwx")).json()["id"]
    other = TestClient(page.served, base_url=HOST, headers={"origin": HOST})
    assert other.get(f"/api/jobs/{id}").json()["own"] is False
    assert [one["position"] for one in other.get("/api/queue").json()] == [0, 1]
    for verb in ("stop", "cancel", "resume"):
        answer = other.post(f"/api/jobs/{id}/{verb}", json={})
        assert answer.status_code == 403 and "Somebody else" in answer.json()["message"]
    assert other.patch(f"/api/jobs/{id}", json={"title": "mine"}).status_code == 403
    assert other.delete(f"/api/jobs/{id}").status_code == 403
    assert other.get(f"/api/images/{images}").status_code == 404
    assert other.post("/api/train", json=asked(images)).status_code == 404
    assert page.delete(f"/api/jobs/{id}").status_code == 422  # it is not finished
    assert page.post(f"/api/jobs/{waiting}/cancel", json={}).status_code == 200
    assert page.get(f"/api/jobs/{waiting}").json()["state"] == "cancelled"
    assert page.patch(f"/api/jobs/{waiting}", json={"title": "<b>Bär</b>"}).status_code == 200
    assert page.get(f"/api/jobs/{waiting}").json()["title"] == "<b>Bär</b>"
    assert page.delete(f"/api/jobs/{waiting}").status_code == 200
    assert page.get(f"/api/jobs/{waiting}").status_code == 404 and not (page.folder / waiting).exists()


def test_other_sites_and_other_names_are_refused(page):
    assert page.post("/api/images", json={}, headers={"origin": "http://evil.test"}).status_code == 403
    bare = TestClient(page.served, base_url=HOST)
    assert bare.post("/api/images", json={}).status_code == 403
    assert page.get("/", headers={"host": "evil.test"}).status_code == 403
    assert page.get("/", headers={"host": "localhost:7860"}).status_code == 200


LEADING_OUT = (
    "/api/jobs/runs/{run}/files/../../../secret.txt",
    "/api/jobs/runs/{run}/files/..%2f..%2f..%2fsecret.txt",
    "/api/jobs/runs/{run}/files/job.json",
    "/api/jobs/runs/{run}/files/samples/../job.json",
    "/api/jobs/runs/{run}/files//etc/passwd",
    "/api/jobs/runs/..%2f..%2fsecret/files/secret.txt",
    "/api/jobs/..%2f../files",
    "/api/jobs/images",
    "/api/images/..",
    "/api/images/..%2f..",
    "/api/adapters/..%2f..%2fsecret/file.safetensors/file",
    "/static/../app.py",
    "/static/..%2fapp.py",
    "/static/%2e%2e/app.py",
)


def test_no_path_leads_out_of_the_folder(page):
    (page.folder.parent / "secret.txt").write_text("secret")
    run = page.post("/api/train", json=asked(sample(page))).json()["id"].split("/")[1]
    for path in LEADING_OUT:
        answer = page.get(path.format(run=run))
        assert answer.status_code in (404, 405), path
        assert b"secret" not in answer.content.replace(b"secret.txt", b"")


def test_bases_and_paths_of_the_machine_are_not_named_unless_they_may_be(page, tmp_path):
    (tmp_path / "mine").mkdir()
    for name in ("/etc", str(tmp_path / "mine"), "~/base", "assets/tiny-sd", "owner/name"):
        answer = page.post("/api/train", json=asked(sample(page), base=name))
        assert answer.status_code == 422 and answer.json()["field"] == "base", name
    given = {"settings": {"cache_dir": str(tmp_path)}}
    assert "no setting" in page.post("/api/train", json=asked(sample(page), **given)).json()["message"]
    allowing = UiConfig(output_dir=str(tmp_path / "other"), allow_paths=[str(tmp_path / "mine")])
    with browser(app.build(allowing, work=lambda folder: None)) as client:
        assert "no folder that" in client.post("/api/train", json=asked(sample(client), **given)).json()["message"]
        given["settings"]["cache_dir"] = str(tmp_path / "mine" / "cache")
        assert client.post("/api/train", json=asked(sample(client), **given)).status_code == 200


def test_of_a_single_file_the_page_tells_family_and_licence_by_its_header(page):
    def file(name, weights, told=None):
        header = json.dumps({"__metadata__": told or {}} | {one: {} for one in weights}).encode()
        path = page.folder / "bases" / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(len(header).to_bytes(8, "little") + header)
        os.truncate(path, 600_000_000)  # without its weights, which nobody reads for this

    unet = "model.diffusion_model.input_blocks.0.0.weight"
    file("sd.safetensors", [unet, "cond_stage_model.x"], {"modelspec.license": "openrail"})
    file("xl.safetensors", [unet, "conditioner.embedders.1.model.x"])
    file("flux.safetensors", ["double_blocks.0.img_attn.proj.weight"])
    (page.folder / "bases" / "broken.safetensors").write_bytes(b"\xff" * 64)
    os.truncate(page.folder / "bases" / "broken.safetensors", 600_000_000)
    told = {one["name"]: one for one in page.get("/api/bases").json()}
    assert [told[f"{name}.safetensors"]["family"] for name in ("sd", "xl", "flux", "broken")] == [
        "Stable Diffusion 1.x and 2.x", "Stable Diffusion XL", "FLUX.1", ""]  # fmt: skip
    assert told["sd.safetensors"]["license"] == "openrail" and not told["broken.safetensors"]["usable"]
    assert told["xl.safetensors"]["unet"] and not told["flux.safetensors"]["unet"]
    assert set(dict(bases_here._MARKS)) <= {family.name for family in FAMILIES}


def test_others_come_in_by_a_name_or_a_word_only(tmp_path):
    served = app.build(
        UiConfig(output_dir=str(tmp_path), host="0.0.0.0", auth="me:secret", token="letmein"), work=print
    )
    with TestClient(served, base_url=HOST, follow_redirects=False) as client:
        (tmp_path / "adapters").mkdir()
        (tmp_path / "adapters" / "a.safetensors").touch()
        pushing = {"auth": ("me", "secret"), "headers": {"origin": HOST}, "json": {"repo_id": "me/dog"}}
        shared = client.post("/api/adapters/adapters/a.safetensors/push", **pushing)
        assert shared.status_code == 403 and "account of this machine" in shared.json()["message"]
        refused = client.get("/api/texts")
        assert refused.status_code == 401 and "Basic" in refused.headers["www-authenticate"]
        assert client.get("/", auth=("me", "wrong")).status_code == 401
        assert client.get("/", auth=("me", "secret")).status_code == 200
        assert client.get("/?token=wrong").status_code == 401
        welcome = client.get("/?token=letmein")
        assert welcome.status_code == 303 and welcome.headers["location"] == "/"
        assert client.get("/api/texts").status_code == 200  # by the cookie
        assert "letmein" not in str(client.cookies)


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--host", "0.0.0.0"], "--host 0.0.0.0 lets everybody who reaches this machine train, draw"),
        (["--auth", "secret"], "--auth must be NAME:PASSWORD"),
        (["--token", "a b"], "--token must be letters and digits"),
        (["--allow_paths", "/nowhere/at/all"], "--allow_paths: there is no /nowhere/at/all"),
        (["--port", "0"], "--port must be 1 to 65535"),
        (["--host", "nowhere.invalid", "--token", "x"], "--host nowhere.invalid is no address"),
        (["--host", "192.0.2.1", "--token", "x"], "--host 192.0.2.1 is no address of this machine"),
    ],
)
def test_a_page_that_cannot_be_served_so_is_one_sentence(flags, told, tmp_path, capsys):
    assert main(["ui", "--output_dir", str(tmp_path), *flags]) == commands.BAD_INPUT
    (sentence,) = capsys.readouterr().err.splitlines()
    assert sentence.startswith(f"comcat: {told}")


# The queue, whose truth are the folders


def test_the_queue_goes_on_where_an_earlier_server_was(tmp_path):
    """What ran is gone on with first, then what waited, in its order; what was being stopped is stopped."""
    for n, (name, state) in enumerate(
        (("first", "running"), ("second", "queued"), ("third", "stopping"), ("old", "done"))
    ):
        folder = tmp_path / "runs" / name
        folder.mkdir(parents=True)
        told = {"kind": "train", "title": name, "owner": "me", "number": n, "request": {}}
        (folder / jobs.ASKED).write_text(json.dumps(told))
        Job(folder).tell(state=state)
    done = []

    def work(folder):
        done.append((folder.name, Job(folder).status.get("resume", False)))
        Job(folder).tell(state=jobs.DONE)

    queue = Queue(tmp_path, work)
    wait_for(lambda: len(done) == 2)
    queue.close(1)
    assert done == [("first", True), ("second", False)]
    assert Job(tmp_path / "runs" / "third").status["state"] == "stopped"


def test_what_was_cancelled_goes_on_when_its_worker_has_ended(tmp_path):
    """Before, it would take away from the worker what tells it to end, and two would be at one run."""
    begun, may_end = threading.Event(), threading.Event()
    queue = Queue(tmp_path, lambda folder: (begun.set(), may_end.wait()))
    job = queue.add("train", "one", "me", {}, lambda folder: None)
    begun.wait()
    queue.cancel(job)
    for what in (queue.resume, queue.remove):
        with pytest.raises(ValueError, match="still ending"):
            what(job)
    assert (job.folder / jobs.CANCEL).exists() and job.status["state"] == jobs.CANCELLED
    may_end.set()
    while queue.live():
        time.sleep(0.01)
    queue.resume(job)
    assert not (job.folder / jobs.CANCEL).exists()
    queue.close()


def test_a_job_that_ends_without_a_word_is_told_of_and_the_next_one_begins(tmp_path):
    def work(folder):
        if folder.name == "one":
            Job(folder).tell(state=jobs.RUNNING)  # and its process is gone
        elif folder.name == "two":
            raise RuntimeError("a fault\nof ours")
        else:
            Job(folder).tell(state=jobs.DONE)

    queue = Queue(tmp_path, work)
    made = [queue.add("draw", name, "me", {}, lambda folder: None) for name in ("one", "two", "three")]
    wait_for(lambda: made[2].status["state"] == jobs.DONE)
    queue.close(1)
    assert "out of memory" in made[0].status["message"] and made[1].status["message"] == "a fault of ours"
    with pytest.raises(ValueError, match="no"):
        queue.add("draw", "four", "me", {}, lambda folder: (_ for _ in ()).throw(ValueError("no")))
    assert not (tmp_path / "pictures" / "four").exists()


def test_two_servers_do_not_share_a_folder(page):
    with pytest.raises(OSError, match="Another page is served from"):
        app.build(UiConfig(output_dir=str(page.folder)))


def wait_for(is_so, seconds=20):
    for _ in range(seconds * 50):
        if is_so():
            return
        time.sleep(0.02)
    raise AssertionError


def test_a_run_tells_how_long_it_will_take_and_the_bar_does_not_stand_at_its_end(tmp_path):
    """Saving and proving are part of the whole: before them the share is less than one by what they will take."""
    now = [0.0]
    job = Job(tmp_path)
    progress = Progress(job, rounds=2, clock=lambda: now[0])

    def pass_(seconds, then):
        now[0] += seconds
        then()

    pass_(4, lambda: progress.phase("encoding"))
    pass_(1, lambda: progress.phase("sampling"))
    assert job.status["seconds_left"] is None
    pass_(3, lambda: progress.phase("training"))
    for step in range(1, 11):
        pass_(1, lambda step=step: progress.count(step, 10))
        if step == 5:
            assert job.status["seconds_left"] == pytest.approx(5 * 1 + 3 + 4)
    assert job.status["share"] == pytest.approx(18 / (18 + 3 + 4))
    progress.phase("sampling")
    pass_(3, lambda: progress.phase("proving"))
    assert job.status["seconds_left"] == pytest.approx(4)


def test_a_download_tells_how_long_it_will_take_by_its_bytes(tmp_path):
    now = [0.0]
    progress = Progress(Job(tmp_path), clock=lambda: now[0])
    progress.phase("fetching")
    for second, there in ((1, 500), (2, 500), (4, 1500)):  # 500 bytes were there of an earlier one
        now[0] = second
        progress.count(there, 4500)
        assert (progress.seconds_left is None) == (there == 500)
    assert progress.seconds_left == pytest.approx(3 * 4)


@pytest.mark.parametrize(("asked_by", "error"), [(jobs.STOP, KeyboardInterrupt), (jobs.PAUSE, Paused)])
def test_a_run_is_interrupted_once_and_not_while_it_is_saved(asked_by, error, tmp_path):
    progress = Progress(Job(tmp_path), rounds=1)
    progress.phase("training")
    progress.count(1, 10)
    (tmp_path / asked_by).touch()
    with pytest.raises(error) as raised:
        progress.count(2, 10)
    assert isinstance(raised.value, Paused) == (asked_by == jobs.PAUSE) == progress.paused
    progress.phase("saving")  # what it has learned
    (tmp_path / jobs.CANCEL).touch()
    with pytest.raises(Cancelled):
        progress.phase("proving")
    (tmp_path / jobs.CANCEL).unlink()
    late = Progress(Job(tmp_path), rounds=1)
    late.done = late.total = 10
    late.phase("saving")
    late.phase("proving")


# The way through, with the embedded base


@pytest.mark.slow
def test_a_subject_is_taught_and_drawn_and_taken_away(at_work):
    images = sample(at_work)
    given = {"max_train_steps": 2, "rank": 3, "num_validation_images": 1, "max_bytes": 0, "num_vectors": None}
    answer = at_work.post("/api/train", json=asked(images, settings=given))
    run = ended(at_work, answer.json()["id"])
    assert run["state"] == "done" and run["own"], run
    assert [(one["step"], one["seed"]) for one in run["samples"]] == [(0, 0), (1, 0), (2, 0)]
    assert [one["step"] for one in run["losses"]] == [1, 2] and run["phase"] == "proving"
    assert at_work.get(f"/api/jobs/{run['id']}", params={"from": 2}).json()["losses"][0]["step"] == 2
    assert run["adapters"] == ["sks-teddy.safetensors"] and any("Learning 'sks teddy'" in line for line in run["log"])
    header = read_adapter(at_work.folder / "runs" / "sks-teddy" / "sks-teddy.safetensors")
    assert header.config["unet"]["r"] == 3 and header.notes.instance_prompt == "a photo of sks teddy"

    (card,) = at_work.get("/api/adapters").json()
    assert card["phrase"] == "sks teddy" and card["picture"] and "sks teddy" in card["prompt"]
    assert at_work.get(f"/api/adapters/{card['id']}/picture").headers["content-type"] == "image/png"
    draw = {
        "prompt": "{subject}",
        "adapters": [{"id": card["id"], "scale": 0.5}],
        "settings": {"num_inference_steps": 2},
    }
    made = ended(at_work, at_work.post("/api/draw", json={**draw, "num_images": 2, "strengths": [1, 2]}).json()["id"])
    drawn = made["result"]["pictures"]
    assert [(one["strength"], one["seed"]) for one in drawn] == [(1, 0), (1, 1), (2, 0), (2, 1)]
    first, file = drawn[0], f"/api/jobs/{made['id']}/files/"
    content = at_work.get(file + first["file"]).content
    assert content != at_work.get(file + first["base"]).content
    assert json.loads(Image.open(io.BytesIO(content)).text["comcat"])["adapters"][0]["scale"] == 0.5

    back = at_work.post("/api/pictures/read", content=content).json()
    assert back["prompt"] == "sks teddy" and back["adapters"] == [{"id": card["id"], "scale": 0.5}]
    assert back["typed"]["num_inference_steps"] == 2 and back["missing"] == []
    known = {path: path.stat().st_mtime_ns for path in at_work.folder.glob("base-pictures/*/*.png")}
    ended(at_work, at_work.post("/api/draw", json={**draw, "num_images": 3, "strengths": [0.8]}).json()["id"])
    assert all(path.stat().st_mtime_ns == written for path, written in known.items()) and len(known) == 2
    assert sorted(path.name for path in at_work.folder.glob("base-pictures/*/*")) == ["0.png", "1.png", "2.png"]
    again = {"prompt": back["prompt"], "adapters": back["adapters"], "settings": back["typed"], "num_images": 1}
    same = ended(at_work, at_work.post("/api/draw", json={**again, "compare": False}).json()["id"])
    other = at_work.get(f"/api/jobs/{same['id']}/files/{same['result']['pictures'][0]['file']}").content
    off = np.abs(pixels(other) - pixels(content)).max()
    assert off <= 2  # of 255: drawn alone and in a batch
    assert len([p for job in at_work.get("/api/pictures").json() for p in job["pictures"]]) == 8

    told = at_work.get(f"/api/adapters/{card['id']}/programs").json()
    assert told["able"] and not told["exact"] and len(told["loras"]) == len(CLIENTS)
    downloaded = at_work.get(f"/api/adapters/{card['id']}/file")
    assert 'filename="sks-teddy.safetensors"' in downloaded.headers["content-disposition"]
    answer = at_work.put("/api/adapters", params={"name": "../a dog.safetensors"}, content=downloaded.content)
    assert answer.json() == {"id": "adapters/a dog.safetensors"}
    for name, wrong in (("x.safetensors", b"not one"), ("x.pt", downloaded.content)):
        assert at_work.put("/api/adapters", params={"name": name}, content=wrong).status_code == 422
    assert len(list((at_work.folder / "adapters").iterdir())) == 1
    wrong = [
        ({"prompt": ""}, "prompt", "“Prompt” is empty"),
        ({"prompt": "a dog"}, "prompt", "does not name the subject"),
        ({"num_images": 0}, "num_images", "1 to 64"),
        ({"num_images": None}, None, ""),
        ({"settings": {"guidance_scale": 1e39}}, "guidance_scale", "“Guidance (CFG)” must be a finite number"),
        ({"strengths": ["x"]}, "strengths", "must be a number"),
        ({"strengths": [1000]}, "strengths", "from -100 to 100"),
        ({"adapters": [{"id": card["id"], "region": "x"}]}, "region", "A region is a PNG"),
    ]
    before = sorted(at_work.folder.glob("pictures/*"))
    for more, field, message in wrong[:3] + wrong[4:]:
        answer = at_work.post("/api/draw", json={**draw, **more})
        assert answer.status_code == 422 and message in answer.json()["message"], answer.text
        assert answer.json()["field"] == field, answer.text
    assert at_work.post("/api/draw", json={**draw, "adapters": [{"id": "nope"}]}).status_code == 404
    assert sorted(at_work.folder.glob("pictures/*")) == before


def test_a_base_is_downloaded_that_is_asked_for_by_name_and_how_much_of_it_is_there_is_told(tmp_path, monkeypatch):
    import functools

    from huggingface_hub import constants, snapshot_download

    from comcat_diffusion.ui import download
    from tests.hub_server import running

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    seen = []
    with running("secret") as hub:
        files = {"model_index.json": b"{}", "unet/a.safetensors": b"x" * 100_000, "unet/a.fp16.safetensors": b"y"}
        hub.files["me/base"], hub.private["me/base"] = files | {"all-in-one.safetensors": b"z"}, False
        fetch = functools.partial(snapshot_download, endpoint=hub.address, cache_dir=tmp_path)
        monkeypatch.setattr(download, "snapshot_download", fetch)
        download.download("me/base", lambda *counted: seen.append(counted))
        with pytest.raises(OSError, match="The hub did not give 'me/nothing'"):
            download.download("me/nothing", lambda *counted: None)
    assert seen[-1] == (100_002, 100_002)
    fetched = [path.name for path in tmp_path.glob("models--me--base/snapshots/*/**/*.*")]
    assert sorted(fetched) == ["a.safetensors", "model_index.json"]


def test_what_is_no_name_on_the_hub_is_not_asked_for(page):
    for name in ("", "bert", "../../etc", "a/b/c", "/etc/passwd", "http://x/y", "assets/tiny-sd"):
        answer = page.post("/api/bases", json={"hub": name})
        assert answer.status_code == 422 and answer.json()["field"] == "hub", name


def exported(client, name, body):
    answer = client.post(f"/api/adapters/{name}/export", json=body)
    return ended(client, answer.json()["id"]) if answer.status_code == 200 else answer


@pytest.mark.slow
def test_an_adapter_becomes_a_lora_for_other_programs_exactly_or_nearly(at_work):
    for file, exact in (("lora", True), ("small", False)):
        given = {"max_train_steps": 3, "max_bytes": 0, "skip_final_inference": True, "num_validation_images": 1}
        body = asked(sample(at_work), settings=given, aims={"file": file})
        run = ended(at_work, at_work.post("/api/train", json=body).json()["id"])
        name = f"{run['id'].split('/')[1]}/{run['adapters'][0]}"
        assert at_work.get(f"/api/adapters/{name}/programs").json()["exact"] is exact
        made = exported(at_work, name, {"client": "forge"})
        if not exact and made["state"] == "failed":  # so little is learned in three steps that too little would be kept
            assert "would keep" in made["message"] and "--" not in made["message"].replace("--as lora", ""), made
            continue
        assert made["state"] == "done" and "sks-teddy-lora.safetensors" in made["result"]["files"], made
        assert "sks-teddy-lora.json" in made["result"]["files"] and str(at_work.folder) not in str(made["result"])
        file = at_work.get(f"/api/jobs/{made['id']}/files/sks-teddy-lora.safetensors?keep=1")
        assert file.status_code == 200 and b"lora_unet_" in file.content[:20000]
    assert exported(at_work, name, {"client": "paint"}).status_code == 422
    for wrong in ("", "me/../x", "me/my dog", "-a/b"):
        answer = at_work.post(f"/api/adapters/{name}/push", json={"repo_id": wrong})
        assert answer.status_code == 422 and answer.json()["field"] == "repo_id", wrong


def test_a_picture_that_says_nonsense_is_refused(page):
    from PIL.PngImagePlugin import PngInfo

    def saying(text):
        info, content = PngInfo(), io.BytesIO()
        info.add_text("comcat", text)
        Image.new("RGB", (4, 4)).save(content, "PNG", pnginfo=info)
        return content.getvalue()

    for content in (
        b"no PNG",
        png(),
        saying("[1"),
        saying("[1]"),
        saying('{"adapters": [1]}'),
        saying('{"seed": "x"}'),
    ):
        answer = page.post("/api/pictures/read", content=content)
        assert answer.status_code == 422 and "\n" not in answer.json()["message"], answer.text
    told = page.post("/api/pictures/read", content=saying('{"prompt": "a", "adapters": [{"file": "gone"}]}')).json()
    assert told["missing"] == ["gone"] and told["adapters"] == []


@pytest.mark.slow
def test_a_run_that_is_stopped_goes_on_to_the_same_file(at_work, tmp_path):
    """Stopped from the page after a step, taken up again, and as an unbroken run would have it."""
    from comcat_diffusion.training.customize import customize

    images = sample(at_work)
    given = {"max_train_steps": 12, "max_bytes": 0, "skip_final_inference": True, "validation_steps": 100}
    id = at_work.post("/api/train", json=asked(images, settings=given)).json()["id"]
    wait_for(lambda: at_work.get(f"/api/jobs/{id}").json().get("done", 0) >= 1)
    at_work.post(f"/api/jobs/{id}/stop", json={})
    stopped = ended(at_work, id)
    assert stopped["state"] == "stopped" and stopped["can_go_on"] and stopped["result"]["steps"] < 12
    assert not any("resume_from_checkpoint" in line for line in stopped["log"])
    assert at_work.post(f"/api/jobs/{id}/resume", json={}).status_code == 200
    done = ended(at_work, id)
    assert done["state"] == "done" and done["result"]["steps"] == 12, done
    whole = customize(
        TrainConfig(
            instance_data_dir=str(at_work.folder / id / "images"), instance_prompt="a photo of sks teddy",
            trigger="sks", class_word="teddy", output_dir=str(tmp_path / "whole"), **given,
        )
    )  # fmt: skip
    assert whole.adapter.read_bytes() == (at_work.folder / id / "sks-teddy.safetensors").read_bytes()


@pytest.mark.slow
def test_a_base_that_is_kept_draws_what_a_fresh_one_does(tmp_path):
    """With another adapter, sampler and strength in between, of which nothing is left."""
    from comcat_diffusion.generation.generate import drawn, generate
    from comcat_diffusion.generation.order import order_of
    from comcat_diffusion.training.customize import customize
    from comcat_diffusion.ui.loaded import Loaded

    quick = {"skip_final_inference": True, "max_train_steps": 4, **QUICK}
    free = customize(TrainConfig(output_dir=str(tmp_path / "free"), **quick)).adapter
    lora = customize(TrainConfig(output_dir=str(tmp_path / "lora"), as_="lora", **quick)).adapter

    def order(adapter, name, **more):
        given = {"num_images": 1, "num_inference_steps": 8, "output_dir": str(tmp_path / name), "prompt": ["sks teddy"]}
        return GenerateConfig(adapter=[f"{adapter}:1"], **given | more)

    kept = Loaded()
    first = order(free, "first")
    for config in (order(lora, "a", scheduler="EulerDiscreteScheduler"), order(lora, "b"), first):
        (made,) = drawn(order_of(config), lambda done, total: None, lambda text: None, kept).files
    assert kept._pipe is not None
    (fresh,) = generate(order(free, "fresh")).files
    (other,) = generate(order(lora, "other")).files
    assert made.read_bytes() == fresh.read_bytes() != other.read_bytes()
    pipe = kept(first, "fp32", "embedded")
    assert pipe is kept(first, "fp32", "embedded") and not getattr(pipe.unet, "peft_config", None)
    kept.forget()
    assert kept._pipe is None


@pytest.mark.slow
def test_the_base_finds_masks(at_work):
    images = sample(at_work)
    answer = at_work.post(f"/api/images/{images}/outline", json={"word": "sks", "what": "teddy", "base": "embedded"})
    assert ended(at_work, answer.json()["id"])["state"] == "done"
    for one in shown(at_work, images):
        assert one["mask"] == "base"
        mask = Image.open(io.BytesIO(at_work.get(f"/api/images/{images}/{one['number']}/mask").content))
        black, white = mask.point(lambda v: 255 * (v > 127)).histogram()[0::255]
        assert 0.02 < white / (white + black) < 0.7
    answer = at_work.post(f"/api/images/{images}/outline", json={"word": "sks", "what": ""})
    assert answer.status_code == 422 and answer.json()["field"] == "what"


class Rembg(types.ModuleType):
    """A stand-in: cuts out what is red, and keeps what it was asked."""

    def __init__(self, broken=None):
        super().__init__("rembg")
        self.sessions, self.broken = [], broken

    def new_session(self, name):
        if self.broken:
            raise self.broken
        self.sessions.append(name)
        return name

    def remove(self, seen, session, only_mask):
        assert session == self.sessions[-1] and only_mask
        return seen.getchannel("R").point(lambda value: 255 * (value > 150))


def test_rembg_cuts_out_where_it_is_installed_and_downloads_for_whoever_said_yes(at_work, monkeypatch, tmp_path):
    monkeypatch.setenv("U2NET_HOME", str(tmp_path))
    images = brought(at_work, ("1.png", picture(1)), ("2.png", picture(2)))

    def cut(**more):
        return at_work.post(f"/api/images/{images}/cutout", json=more)

    if not cutouts.rembg_here():  # on a machine where it is installed, this is not seen
        assert at_work.get("/api/train").json()["rembg"] is None and "not installed" in cut().json()["message"]
    stand_in = Rembg()
    monkeypatch.setitem(sys.modules, "rembg", stand_in)
    assert at_work.get("/api/train").json()["rembg"] == {"model": False, "megabytes": 176}
    assert cut().status_code == 422 and stand_in.sessions == []  # nobody said yes to a download
    at_work.patch(f"/api/images/{images}/2", json={"crop": [16, 0, 80]})
    drawn = io.BytesIO()
    Image.new("L", (96, 80), 255).save(drawn, "PNG")
    assert ended(at_work, cut(download=True).json()["id"])["state"] == "done" and stand_in.sessions == ["u2net"]
    for number, red in ((1, (30, 20)), (2, (40, 30))):
        assert shown(at_work, images)[number - 1]["mask"] == "rembg"
        mask = pixels(at_work.get(f"/api/images/{images}/{number}/mask").content)
        assert mask[red[::-1]] == 255 and mask[70, 2] == 0
    at_work.put(f"/api/images/{images}/1/mask", content=drawn.getvalue())
    (tmp_path / "u2net.onnx").write_bytes(b"here")
    assert ended(at_work, cut().json()["id"])["result"]["numbers"] == [2]  # what somebody drew stays
    stand_in.broken = OSError("nothing comes")
    job = ended(at_work, cut().json()["id"])
    assert job["state"] == "failed" and "check the connection" in job["message"]


def test_a_description_calls_the_subject_by_its_words():
    assert named("a dog on a sofa", "dog", "sks dog", "a photo of sks dog") == "a sks dog on a sofa"
    assert named("a brown animal", "dog", "sks dog", "a photo of sks dog") == "a photo of sks dog, a brown animal"
    assert named("hotdogs", "dog", "sks dog", "a photo of sks dog") == "a photo of sks dog, hotdogs"
    assert named("", "", "sks", "a photo of sks") == "a photo of sks"


@pytest.mark.slow
def test_images_without_a_caption_are_described_by_a_model_that_is_at_hand(at_work):
    """BLIP with random weights, but it says "dog" to every picture: that becomes captions."""
    images = brought(at_work, ("1.png", picture(1)), ("2.png", picture(2)))
    body = {"word": "sks", "what": "dog"}
    assert at_work.get("/api/train").json()["captioner"] is False
    assert at_work.post(f"/api/images/{images}/caption", json=body).status_code == 422
    tiny_blip(at_work.folder / "captioners" / "blip")
    assert at_work.get("/api/train").json()["captioner"] is True
    at_work.patch(f"/api/images/{images}/1", json={"caption": "sks dog, asleep"})
    job = ended(at_work, at_work.post(f"/api/images/{images}/caption", json=body).json()["id"])
    assert job["state"] == "done", job
    first, second = (one["caption"] for one in shown(at_work, images))
    assert first == "sks dog, asleep"
    assert second.split()[:2] == ["sks", "dog"] and set(second.split()[2:]) == {"dog"}


def tiny_blip(folder):
    from transformers import (
        BertTokenizerFast,
        BlipConfig,
        BlipForConditionalGeneration,
        BlipImageProcessor,
        BlipProcessor,
    )

    words = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        "[DEC]",
        "[ENC]",
        "a",
        "dog",
        "cat",
        "on",
        "red",
        "blue",
        "sofa",
    ]
    folder.mkdir(parents=True)
    (folder / "vocab.txt").write_text("\n".join(words))
    small = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = small | {
        "vocab_size": len(words),
        "encoder_hidden_size": 32,
        "bos_token_id": 5,
        "eos_token_id": 3,
        "sep_token_id": 3,
    }
    vision = small | {"image_size": 32, "patch_size": 16}
    model = BlipForConditionalGeneration(BlipConfig(text_config=text, vision_config=vision, projection_dim=16))
    model.text_decoder.cls.predictions.bias.data[words.index("dog")] = 100.0
    model.save_pretrained(folder)
    size = {"height": 32, "width": 32}
    tokenizer = BertTokenizerFast(str(folder / "vocab.txt"), additional_special_tokens=["[DEC]", "[ENC]"])
    BlipProcessor(BlipImageProcessor(size=size), tokenizer).save_pretrained(folder)


@pytest.mark.slow
def test_two_subjects_are_drawn_where_they_are_painted(at_work):
    ids = []
    for word in ("sks", "zwx"):
        given = {"max_train_steps": 1, "max_bytes": 0, "skip_final_inference": True, "validation_steps": 9}
        images = brought(at_work, ("1.png", picture(1)), ("2.png", picture(2)))
        answer = at_work.post("/api/train", json=asked(images, word=word, settings=given))
        run = ended(at_work, answer.json()["id"])
        ids.append(f"{run['id'].split('/')[1]}/{run['adapters'][0]}")
    region = "data:image/png;base64," + base64.b64encode(png((64, 64), 255, "L")).decode()
    draw = {"prompt": "sks teddy and zwx teddy", "num_images": 1, "settings": {"num_inference_steps": 1}}
    chosen = [{"id": ids[0], "region": region}, {"id": ids[1], "region": region}]
    made = ended(at_work, at_work.post("/api/draw", json={**draw, "adapters": chosen}).json()["id"])
    assert made["state"] == "done", made
    content = at_work.get(f"/api/jobs/{made['id']}/files/{made['result']['pictures'][0]['file']}").content
    assert len(json.loads(Image.open(io.BytesIO(content)).text["comcat"])["regions"]) == 2


# Serving it


@pytest.fixture
def free_port():
    with closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def test_the_address_is_told_when_the_page_answers_and_its_port_is_taken_then(tmp_path, free_port, capsys):
    import httpx

    with app.running(UiConfig(output_dir=str(tmp_path / "one"), port=free_port), work=print):
        assert httpx.get(f"http://127.0.0.1:{free_port}").status_code == 200
        assert main(["ui", "--port", str(free_port), "--output_dir", str(tmp_path / "two")]) == commands.BAD_INPUT
    said = capsys.readouterr()
    assert said.err == f"comcat: Port {free_port} is taken: name another one, for instance --port {free_port + 1}.\n"
    assert "http" not in said.out and not (tmp_path / "two").exists()


def test_what_the_command_prints_is_the_address_with_its_word(tmp_path, free_port, monkeypatch, capsys):
    opened = []
    monkeypatch.setattr(app.webbrowser, "open", opened.append)
    monkeypatch.setattr(app.time, "sleep", lambda seconds: (_ for _ in ()).throw(KeyboardInterrupt))
    flags = ["--port", str(free_port), "--output_dir", str(tmp_path / "s"), "--token", "letmein", "--open_browser"]
    monkeypatch.setattr(app, "running", lambda config: _Server())
    assert main(["ui", *flags]) == 0
    address = f"http://127.0.0.1:{free_port}/?token=letmein"
    assert capsys.readouterr().out.startswith(address) and opened == [address]


class _Server:
    should_exit = False

    def __enter__(self):
        return self

    def __exit__(self, *error):
        return None


def test_the_address_is_one_that_a_browser_takes():
    for host, there in (("0.0.0.0", "127.0.0.1"), ("::", "[::1]"), ("studio.local", "studio.local")):
        assert address_of(UiConfig(host=host, port=7000, token="x")) == f"http://{there}:7000"


def test_without_its_server_the_command_says_how_to_get_it(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert main(["ui"]) == commands.BAD_INPUT
    assert capsys.readouterr().err == "comcat: comcat ui needs uvicorn: pip install 'comcat-diffusion[ui]'.\n"


def test_in_drawing_mode_the_page_offers_no_more_than_drawing(tmp_path):
    config = UiConfig(output_dir=str(tmp_path), host="0.0.0.0", draw_only=True)
    with browser(app.build(config, work=lambda folder: None)) as client:
        assert client.get("/api/texts").json()["teaches"] is False
        assert client.get("/api/draw").json()["groups"] == []
        for method, path in (
            ("POST", "/api/train"),
            ("POST", "/api/images"),
            ("PUT", "/api/adapters"),
            ("POST", "/api/bases"),
        ):
            assert client.request(method, path, json={}).status_code in (404, 405), path
        answer = client.post("/api/draw", json={"prompt": "a dog", "settings": {"num_inference_steps": 900}})
        assert "not offered here" in answer.json()["message"]


def test_a_page_without_the_embedded_base_offers_drawing_still(tmp_path, monkeypatch):
    """As the one in a Space of another base is."""
    monkeypatch.setattr(places, "_PACKAGE", tmp_path)
    config = UiConfig(output_dir=str(tmp_path), host="0.0.0.0", draw_only=True)
    with browser(app.build(config, work=lambda folder: None)) as client:
        assert client.get("/api/draw").json()["steps"] == [512, 64]
        answer = client.post("/api/draw", json={"prompt": "a dog", "adapters": []})
        assert answer.status_code < 500 and "This base is not here" in answer.json()["message"]


def test_a_frame_shows_the_page_where_it_may(tmp_path, page):
    """The hub shows Spaces in a frame of another site, whose browsers send no cookies of the usual kind."""
    assert "frame-ancestors 'none'" in page.get("/").headers["content-security-policy"]
    config = UiConfig(output_dir=str(tmp_path), host="0.0.0.0", draw_only=True, framed_by="https://example.org")
    with browser(app.build(config, work=lambda folder: None)) as client:
        client.cookies.clear()
        answer = client.get("/")
        policy = answer.headers["content-security-policy"]
        assert "frame-ancestors https://example.org" in policy and "'none'; form" in policy and "unsafe" not in policy
        assert "SameSite=None; Secure; Partitioned" in answer.headers["set-cookie"]
    for wrong in ("example.org", "https://example.org; script-src *", "http://example.org", "https://a b"):
        with pytest.raises(ValueError, match="--framed_by must be an address"):
            UiConfig(draw_only=True, framed_by=wrong)
    with pytest.raises(ValueError, match="--framed_by goes with --draw_only"):
        UiConfig(framed_by="https://example.org")


def test_a_persons_attentions_are_those_of_a_u_net_and_not_named_on_other_bases(page):
    """The preset names attn1 and attn2, which a transformer does not have."""
    (page.folder / "bases" / "tiny-sd3").mkdir(parents=True)
    index = '{"_class_name": "StableDiffusion3Pipeline"}'
    (page.folder / "bases" / "tiny-sd3" / "model_index.json").write_text(index)
    offered = {one["id"]: one for one in page.get("/api/bases").json()}
    assert offered["embedded"]["license"] == "Apache-2.0" and offered["embedded"]["unet"]
    assert offered["folder:tiny-sd3"]["name"] == "tiny-sd3" and not offered["folder:tiny-sd3"]["unet"]
    images, person = brought(page, ("1.png", picture(1))), {"subject": "person"}
    for base, are_named in (("embedded", True), ("folder:tiny-sd3", False)):
        answer = page.post("/api/train", json=asked(images, aims=person, base=base))
        told = page.get(f"/api/jobs/{answer.json()['id']}")
        assert ("target_modules" in told.json()["settings"]) is are_named
        assert str(page.folder.parent) not in told.text  # nor where things are on this machine
