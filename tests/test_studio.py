"""The studio in a real browser: Debian's Chromium, driven by Playwright. Where it is not installed, these are skipped.

`make test-browser` installs it, runs all of these and keeps a screenshot of each stage in runs/studio/; axe-core, which
it fetches for itself, looks at every page there. `make test` runs the first alone.
"""

import functools
import importlib.util
import io
import os
import re
import shutil
import socket
import sys
import time
import types
from contextlib import closing
from pathlib import Path

import pytest
from PIL import Image, ImageDraw

from comcat_diffusion import bases
from comcat_diffusion.training.config import TrainConfig
from comcat_diffusion.training.customize import customize
from comcat_diffusion.ui import app, settings
from comcat_diffusion.ui.config import UiConfig

BROWSER = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
AXE = Path(__file__).parents[1] / "runs" / "axe" / "node_modules" / "axe-core" / "axe.min.js"
SHOTS = os.environ.get("STUDIO_SHOTS")
playwright = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed: make test-browser")
pytestmark = pytest.mark.skipif(not BROWSER, reason="Chromium is not installed: make test-browser")
TRAIN = bases.assets() / "subject" / "train"
STEP = re.compile(r"Training · step \d+ of \d+")
AT = "(one) => one.style.getPropertyValue('--at')"  # where a divider is
SECONDS = 240_000  # milliseconds that a training of a few steps may take on a busy machine


@pytest.fixture(scope="module")
def chromium():
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield browser
        browser.close()


def port():
    with closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.fixture
def studio(tmp_path):
    """A page that does what it is asked, in a thread; its address."""
    from comcat_diffusion.ui.worker import run

    config = UiConfig(output_dir=str(tmp_path / "studio"), port=port())
    with app.running(config, work=run):
        yield f"http://127.0.0.1:{config.port}"


class Window:
    """A browser's window with cookies of its own; whatever its console says and whoever it asks is kept."""

    def __init__(self, chromium, address, **how):
        self.address = address
        self.context = chromium.new_context(**{"viewport": {"width": 1280, "height": 900}, "locale": "en-GB"} | how)
        self.page = self.context.new_page()
        self.said, self.asked = [], []
        self.page.on("console", lambda message: self.said.append(message.text) if message.type == "error" else None)
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("request", lambda request: self.asked.append(request.url))

    def go(self, place, wait):
        self.page.goto(f"{self.address}/#/{place}")
        self.page.locator(wait).first.wait_for()
        return self.page

    def sample(self):
        """The sample subject's images, looked over."""
        page = self.go("train", ".step")
        page.get_by_role("button", name="Try the sample subject").click()
        page.locator("li.image").nth(3).wait_for()
        page.locator(".remarks summary").wait_for(timeout=SECONDS)
        return page

    def number(self, name, value):
        """Type a number into one of the folded settings."""
        field = self.page.locator(f'.advanced [data-field="{name}"]')
        self.page.evaluate(
            "document.querySelectorAll('.advanced, .advanced details').forEach((one) => (one.open = true))"
        )
        field.locator("input[type=number]").fill(str(value))

    def start(self, **numbers):
        """Start a training of the sample subject; waits for its page."""
        page = self.sample()
        for name, value in {"num_validation_images": 1, "max_bytes": 0, **numbers}.items():
            self.number(name, value)
        page.get_by_role("button", name="Start training").click()
        page.wait_for_url("**/#/runs/**")
        return page

    def clean(self):
        """Nothing was said, and nobody else was asked."""
        assert self.said == []
        assert [url for url in self.asked if not url.startswith((self.address, "blob:", "data:"))] == []

    def look(self, name):
        """Keep a picture of the page, and have axe-core look at it."""
        self.page.wait_for_timeout(300)
        if SHOTS:
            Path(SHOTS).mkdir(parents=True, exist_ok=True)
            self.page.evaluate("window.scrollTo(0, 0)")  # or what sticks to the top would stand in the middle
            self.page.screenshot(path=f"{SHOTS}/{name}.png", full_page=not self.page.locator("dialog[open]").count())
        if AXE.is_file():
            self.page.evaluate(AXE.read_text("utf-8"))
            found = self.page.evaluate("axe.run()")["violations"]
            grave = [
                (one["id"], one["nodes"][0]["target"]) for one in found if one["impact"] in ("serious", "critical")
            ]
            assert grave == [], name

    def width(self):
        return self.page.evaluate("document.documentElement.scrollWidth")


@pytest.fixture
def window(chromium, studio):
    opened = []

    def open_(**how):
        opened.append(Window(chromium, studio, **how))
        return opened[-1]

    yield open_
    for one in opened:
        one.context.close()


@pytest.mark.slow
def test_the_page_opens_and_says_what_it_finds(window):
    """The one that `make test` runs: images looked over, every page shown, nothing in the console, no one asked."""
    here = window()
    page = here.sample()
    assert page.locator(".sentence q").inner_text() == "a photo of sks teddy"
    assert page.locator("li.image textarea").first.input_value().startswith("a photo of a big sks teddy in the middle")
    for place in ("runs", "generate", "gallery", "adapters"):
        here.go(place, "h1")
        assert page.locator("nav a[aria-current]").get_attribute("href") == f"#/{place}"
    here.clean()


@pytest.mark.slow
def test_the_way_through(window):
    """Every folded group opened and left empty (a number was 0 then), a run, its picture, and taking it away."""
    here = window()
    here.go("train", ".step")
    here.look("01-empty")
    page = here.sample()
    here.look("02-images")
    here.number("max_train_steps", 16)
    groups = page.locator(".advanced details.group")
    assert groups.count() == 9 and page.locator(".advanced details.group:not([open])").count() == 0
    here.look("03-advanced")
    for name, value in (("num_validation_images", 2), ("max_bytes", 0), ("rank", 4)):
        here.number(name, value)
    here.number("rank", "")  # typed and emptied again
    page.get_by_role("button", name="Start training").click()
    page.wait_for_url("**/#/runs/sks-teddy")
    page.locator(".phases .here").wait_for(timeout=SECONDS)
    page.locator(".samples img").first.wait_for(timeout=SECONDS)
    assert page.locator(".samples th").first.inner_text() == "Base"
    page.get_by_text("left").first.wait_for(timeout=SECONDS)
    assert page.locator("progress").count() == 1  # and not three times
    here.look("04-training")
    page.reload()  # in the middle: it knows as much as before
    page.locator(".samples img").first.wait_for(timeout=SECONDS)
    page.locator(".chart .smooth").first.wait_for(timeout=SECONDS)
    page.get_by_text("The model knows sks teddy").wait_for(timeout=SECONDS)
    steps = page.locator(".samples th").all_inner_texts()
    assert steps == ["Base", *(f"Step {n}" for n in range(2, 17, 2))]
    assert page.locator(".samples img").count() == 2 * len(steps) and page.locator("progress").count() == 0
    head, first = (page.locator(what).first.bounding_box() for what in (".samples th", ".samples img"))
    assert head["y"] + head["height"] <= first["y"]  # a label covers no picture
    here.look("05-done")

    page.get_by_role("link", name="Generate with it").click()
    card = page.locator(".cards input[type=checkbox]")
    card.wait_for()
    assert card.is_checked()  # the new adapter is chosen, and its prompt is there
    prompt = page.get_by_label("Prompt", exact=True)
    assert "sks teddy" in prompt.input_value()
    page.get_by_label("Sampling steps", exact=True).fill("4")
    page.get_by_label("Number of images").fill("2")
    page.get_by_role("button", name="Generate", exact=True).click()
    handle = page.locator(".result .divider input")
    handle.wait_for(timeout=SECONDS)
    handle.focus()
    before = page.locator(".result .divider").evaluate(AT)
    for _ in range(5):
        page.keyboard.press("ArrowRight")
    assert (before, page.locator(".result .divider").evaluate(AT)) == (
        "50%",
        "55%",
    )
    here.look("06-generated")
    page.get_by_label("Strengths side by side").fill("0.5 1")
    page.get_by_role("button", name="Generate", exact=True).click()
    page.locator(".result table img").nth(3).wait_for(timeout=SECONDS)
    here.look("07-grid")
    page.reload()
    page.locator(".result table img").nth(3).wait_for(timeout=SECONDS)  # what was drawn is there again

    here.go("gallery", ".gallery li")
    assert page.locator(".gallery li").count() == 6
    here.look("08-gallery")
    page.locator(".gallery button").last.click()
    here.look("09-one-picture")
    page.get_by_role("button", name="Again with this seed").click()
    page.wait_for_url("**/#/generate")
    page.locator(".result .divider").wait_for(timeout=SECONDS)
    assert (
        page.get_by_label("Seed", exact=True).input_value() == "1"
        and page.get_by_label("Number of images").input_value() == "1"
    )

    here.go("adapters", ".cards a")
    here.look("10-adapters")
    page.locator(".cards a").first.click()
    page.locator("summary", has_text="ComfyUI, with the node").click()
    assert page.locator(".program[open] li").count() == 3
    here.look("11-take-away")
    with page.expect_download() as kept:
        page.get_by_role("link", name="Download").click()
    assert kept.value.suggested_filename == "sks-teddy.safetensors"
    here.go("runs", ".runs li")
    here.look("12-runs")
    here.clean()


@pytest.mark.slow
def test_a_base_comes_from_the_hub_and_the_page_shows_how_much_of_it_is_there(window, tmp_path, monkeypatch):
    """A hub on this machine that feeds bytes slowly; a reload in the middle changes nothing."""
    import huggingface_hub
    from huggingface_hub import constants, snapshot_download

    from comcat_diffusion.ui import download
    from tests.hub_server import running

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 100_000)
    (tmp_path / "hub").mkdir()
    scan = functools.partial(huggingface_hub.scan_cache_dir, tmp_path / "hub")
    monkeypatch.setattr(huggingface_hub, "scan_cache_dir", scan)
    here = window()
    with running("secret") as hub:
        fetch = functools.partial(snapshot_download, endpoint=hub.address, cache_dir=tmp_path / "hub")
        monkeypatch.setattr(download, "snapshot_download", fetch)
        hub.private["me/base"], hub.pause = False, 0.1
        hub.files["me/base"] = {
            "model_index.json": b'{"_class_name": "StableDiffusionPipeline"}', "README.md": b"---\nlicense: mit\n---\n",
            "unet/diffusion_pytorch_model.safetensors": b"x" * 6_000_000,
        }  # fmt: skip
        page = here.go("train", ".step")
        page.locator("summary", has_text="Download one from").click()
        page.get_by_label("Name on the hub").fill("nobody's")
        page.get_by_role("button", name="Download").click()
        assert "reads owner/name" in page.locator('[data-field="hub"] .fault').inner_text()
        page.get_by_label("Name on the hub").fill("me/base")
        page.get_by_role("button", name="Download").click()
        bar = page.locator(".fetching progress")
        page.locator(".fetching", has_text="of 6.0 MB").wait_for(timeout=SECONDS)
        until(lambda: bar.evaluate("(one) => one.value") > 0)
        first = bar.evaluate("(one) => one.value")
        hub.pause = 5.0  # a busy machine takes its time to look at a page, and the download shall not be over by then
        here.look("04-download")
        page.reload()
        page.locator(".fetching", has_text="of 6.0 MB").wait_for(timeout=SECONDS)
        hub.pause = 0.0
        page.get_by_text("It is here now.").wait_for(timeout=SECONDS)
        assert 0 < first < 1 and bar.count() == 0
    card = page.locator(".bases .choice", has_text="me/base")
    assert "Stable Diffusion" in card.inner_text() and "6.0 MB · mit" in card.inner_text()
    here.clean()


@pytest.mark.slow
def test_what_held_out_images_say_comes_into_the_curve_while_it_runs(window):
    """It is written a while after the loss of its step; an open log stays open meanwhile."""
    here = window()
    page = here.start(max_train_steps=16, validation_steps=4, validation_fraction=0.25)
    page.locator("summary", has_text="Log").click()
    page.get_by_text("The one with the lowest held-out loss").wait_for(timeout=SECONDS)
    assert page.locator(".chart circle.held").count() == 4
    assert (
        page.locator("details[open] .log").is_visible() and "Learning 'sks teddy'" in page.locator(".log").inner_text()
    )
    assert page.get_by_role("link", name="Contact sheet").count() == 1
    page.get_by_role("link", name="Take that one").click()
    page.locator("h1", has_text="sks teddy").wait_for()
    here.clean()


@pytest.mark.slow
def test_rembg_is_offered_where_it_is_and_asks_before_it_downloads(window, monkeypatch, tmp_path):
    """A stand-in for it, which cuts out what is not bright."""
    told = types.ModuleType("rembg")
    told.new_session = str
    told.remove = lambda picture, session, only_mask: picture.convert("L").point(lambda value: 255 * (value < 150))
    here = window()
    page = here.sample()
    assert page.get_by_role("button", name="Cut out by rembg").count() == (
        importlib.util.find_spec("rembg") is not None
    )
    monkeypatch.setitem(sys.modules, "rembg", told)
    monkeypatch.setenv("U2NET_HOME", str(tmp_path))
    page.reload()
    page.get_by_role("button", name="Cut out by rembg").click()
    assert "176 MB" in page.locator("dialog").inner_text()
    page.get_by_role("button", name="No, go back").click()
    assert page.locator(".image .mask").count() == 0
    page.get_by_role("button", name="Cut out by rembg").click()
    page.locator("dialog").get_by_role("button", name="Download").click()
    page.locator(".image .mask").nth(3).wait_for(timeout=SECONDS)
    assert "mask by rembg" in page.locator(".image .size").first.inner_text()
    here.look("19-cut-out")
    here.clean()


@pytest.mark.slow
def test_two_windows_a_run_belongs_to_one_of_them_and_is_stopped_and_resumed_there(window):
    mine, other = window(), window()
    page = mine.start(max_train_steps=40, validation_steps=40)
    page.get_by_text(STEP).wait_for(timeout=SECONDS)
    seen = other.go("runs", ".runs li")
    seen.locator(".runs a").click()
    seen.get_by_text("Somebody else started this run").wait_for()
    assert seen.get_by_role("button", name="Stop and keep").count() == 0
    waiting = other.start(max_train_steps=1)
    waiting.get_by_text("Waiting, 1 before it").wait_for()
    page.get_by_role("button", name="Stop and keep").click()
    page.get_by_text("What was learned is in the adapter").wait_for(timeout=SECONDS)
    assert "--" not in page.locator("main").inner_text().replace(
        "comcat train --config", ""
    )  # no flags that it has not
    mine.look("13-stopped")
    page.get_by_role("button", name="Go on").click()
    page.get_by_text("after 40 steps").wait_for(timeout=SECONDS)
    mine.clean()


@pytest.mark.slow
def test_odd_files_are_shown_each_with_what_is_wrong(window, tmp_path):
    made = Image.effect_noise((3000, 2600), 90).convert("RGB")
    made.save(tmp_path / "large.png")  # more than 12 MB
    assert (tmp_path / "large.png").stat().st_size > 12_000_000
    shutil.copy(TRAIN / "1.png", tmp_path / "dog (1).png")
    shutil.copy(TRAIN / "2.png", tmp_path / "<b>my-cat.png")
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8\xff no picture")
    (tmp_path / "phone.heic").write_bytes(b"\0\0\0\x18ftypheic" + b"\0" * 100)
    Image.new("RGB", (20, 20), "red").save(tmp_path / "tiny.png")
    (tmp_path / "notes.docx").write_bytes(b"PK")
    here = window()
    page = here.go("train", ".step")
    page.locator("input[type=file]").first.set_input_files(
        sorted(str(path) for path in tmp_path.iterdir() if path.is_file())
    )
    page.get_by_text("notes.docx is no picture").wait_for(timeout=SECONDS)
    page.locator("li.image:not(.waiting)").nth(5).wait_for(timeout=SECONDS)
    cards = {text.split("\n")[0]: text for text in page.locator("li.image").all_inner_texts()}
    assert set(cards) == {"dog (1).png", "<b>my-cat.png", "broken.jpg", "phone.heic", "tiny.png", "large.png"}
    assert (
        "cannot be read as a picture" in cards["broken.jpg"] and page.locator("main b", has_text="my-cat").count() == 0
    )
    page.get_by_label("What it is").fill("teddy")
    page.get_by_text("smaller than the resolution").first.wait_for(timeout=SECONDS)
    assert "smaller than the resolution" in page.locator("li.image", has_text="tiny.png").inner_text()
    here.look("14-odd-files")
    here.page.get_by_role("button", name="Remove broken.jpg").click()
    page.locator("li.image", has_text="broken.jpg").wait_for(state="detached")


def _refused_below_zero():
    """The settings with a number of which `comcat train` refuses minus five, at their own flag."""
    for group in settings.asked_of(TrainConfig, "en"):
        for one in group["fields"]:
            try:
                TrainConfig(**{one["name"]: -5 if one["kind"] == "whole" else -5.0}) if one["kind"] in (
                    "whole",
                    "number",
                ) else None
            except ValueError as error:
                if str(error).startswith(f"--{one['name']} "):
                    yield one["name"]


@pytest.mark.slow
def test_a_wrong_number_in_any_field_is_one_sentence_at_that_field(window):
    here, wrong = window(), list(_refused_below_zero())
    page = here.sample()
    assert len(wrong) > 20
    for name in wrong:
        here.number(name, -5)
        page.get_by_role("button", name="Start training").click()
        fault = page.locator(f'.advanced [data-field="{name}"] .fault').first
        fault.wait_for()
        assert fault.inner_text().count(".") >= 1 and "--" not in fault.inner_text(), name
        field = page.locator(f'.advanced [data-field="{name}"] input[type=number]')
        assert field.get_attribute("aria-invalid") == "true" and fault.get_attribute("id") in field.get_attribute(
            "aria-describedby"
        )
        if name == "rank":
            here.look("15-wrong-number")
        here.number(name, "")
    for group in settings.asked_of(TrainConfig, "en"):
        for name in (one["name"] for one in group["fields"] if one["kind"] in ("whole", "number")):
            field = page.locator(f'.advanced [data-field="{name}"]')
            field.locator("input[type=number]").press_sequentially("-")  # no number, of which a browser tells nothing
            page.get_by_role("button", name="Start training").click()
            field.locator(".fault").first.wait_for()
            assert "number." in field.locator(".fault").first.inner_text(), name
            here.number(name, "")
    for label, wrong, said in (
        ("Attentions to adapt", "attn9", "the base has none of this name"),
        ("Word", "", "Give the subject a word of its own"),
    ):
        before = page.get_by_label(label, exact=True).input_value()
        page.get_by_label(label, exact=True).fill(wrong)
        if page.get_by_role("button", name="Start training").is_enabled():
            page.get_by_text(said).first.wait_for()
        else:  # nothing can be started without it, and the summary says so
            assert page.locator(".remarks").inner_text() == "Give the subject a word."
        page.get_by_label(label, exact=True).fill(before)
    here.clean()
    page.get_by_label("Word", exact=True).fill("dog")
    page.get_by_text("The base knows this word well").wait_for()
    page.get_by_label("New token", exact=True).fill("<my-cat>")
    page.get_by_label("It starts from").fill("cat")
    page.get_by_role("button", name="Start training").click()
    fault = page.locator('[data-field="word"] .fault').first
    assert "does not contain '<my-cat>'." in fault.inner_text()  # all of it: no name becomes markup


@pytest.mark.slow
def test_what_is_wrong_in_any_field_of_a_drawing_is_one_sentence_at_that_field(window):
    here = window()
    page = here.go("generate", "form")
    page.get_by_role("group", name="Adapters").wait_for()
    page.evaluate("document.querySelectorAll('details').forEach((one) => (one.open = true))")

    def refused(name, said):
        page.get_by_role("button", name="Generate", exact=True).click()
        fault = page.locator(f'[data-field="{name}"] .fault')
        fault.wait_for(timeout=SECONDS)
        assert said in fault.inner_text() and "--" not in fault.inner_text(), name
        assert page.locator(".fault").count() == 1

    refused("prompt", "is empty")
    page.get_by_label("Prompt", exact=True).fill("a red apple")
    numbers = {
        "num_images": [("0", "1 to 64"), ("1.5", "whole number")], "seed": [("-1", "at least 0")],
        "width": [("90", "multiple of 16"), ("-16", "at least 1")], "height": [("1.5", "whole number")],
        "num_inference_steps": [("0", "at least 1"), ("5000", "at most 1000")], "batch_size": [("0", "at least 1")],
        "strengths": [("abc", "must be a number"), ("1 500", "-100 to 100")], "device": [("warp9", "no such device")],
    }  # fmt: skip
    for name, wrongs in numbers.items():
        field = page.locator(f'[data-field="{name}"] input:not([type=range])')
        before = field.input_value()
        for wrong, said in wrongs:
            field.fill(wrong)
            refused(name, said)
        field.fill(before)
    page.locator('[data-field="guidance_scale"] input[type=number]').press_sequentially("-")
    refused("guidance_scale", "must be a number")
    here.look("17-wrong-drawing")
    here.clean()


@pytest.mark.slow
def test_pictures_have_the_shape_that_is_chosen_and_a_dropped_one_brings_it_back(window):
    here = window()
    page = here.go("generate", "form")
    page.get_by_label("Prompt", exact=True).fill("a big red apple in the middle, white background")
    page.get_by_label("Sampling steps", exact=True).fill("3")
    page.get_by_label("Number of images").fill("1")
    page.get_by_label("Shape").select_option("4:5")
    assert [page.get_by_label(side, exact=True).input_value() for side in ("Width", "Height")] == ["64", "80"]
    page.get_by_role("button", name="Generate", exact=True).click()
    drawn = page.locator(".result img.whole")
    drawn.wait_for(timeout=SECONDS)
    assert drawn.evaluate("(one) => [one.naturalWidth, one.naturalHeight]") == [64, 80]
    box = drawn.bounding_box()
    assert box["width"] / box["height"] == pytest.approx(0.8, abs=0.01)
    with page.expect_download() as kept:
        page.get_by_role("link", name="Download").click()
    page.get_by_label("Shape").select_option("1:1")
    assert page.get_by_label("Width", exact=True).input_value() == ""
    content = list(Path(kept.value.path()).read_bytes())
    transfer = page.evaluate_handle(
        "(bytes) => { const all = new DataTransfer(); all.items.add(new File([new Uint8Array(bytes)], 'one.png', "
        "{ type: 'image/png' })); return all; }", content)  # fmt: skip
    page.dispatch_event(".generate-form", "drop", {"dataTransfer": transfer})
    playwright.expect(page.get_by_label("Shape")).to_have_value("4:5")
    assert page.get_by_label("Height", exact=True).input_value() == "80"
    assert page.get_by_label("Sampling steps", exact=True).input_value() == "3"
    here.clean()


@pytest.mark.slow
def test_two_subjects_are_painted_and_drawn_again_as_they_were(window, studio, tmp_path):
    """Of a picture of two subjects the gallery gives back the prompt, the sampler by name, the shape and the paint."""
    for word, what in (("sks", "teddy"), ("ohwx", "fox")):
        (tmp_path / word).mkdir()
        shutil.copy(TRAIN / "1.png", tmp_path / word / "1.png")
        own = {"instance_data_dir": str(tmp_path / word), "trigger": word, "class_word": what}
        learned = TrainConfig(**own, output_dir=str(tmp_path / f"{word}-run"), max_train_steps=30, learning_rate=1e-2,
                              instance_prompt=f"a photo of {word} {what}", skip_final_inference=True)  # fmt: skip
        shelf = tmp_path / "studio" / "adapters"
        shelf.mkdir(exist_ok=True)
        shutil.copy(customize(learned).adapter, shelf)
    here = window()
    page = here.go("generate", ".cards input")
    for box in page.locator(".cards input").all():
        box.check()
    page.get_by_label("Prompt", exact=True).fill("sks teddy and ohwx fox, white background")
    page.get_by_label("Shape").select_option("16:9")
    page.get_by_label("Sampling steps", exact=True).fill("3")
    page.get_by_label("Number of images").fill("1")
    page.get_by_label("Sampler").select_option(label="DPM++ 2M")
    page.locator("summary", has_text="Where each acts").click()
    canvas = page.locator(".regions canvas")
    for n, across in ((0, 0.25), (1, 0.75)):
        page.locator(".layers input").nth(n).check()
        canvas.scroll_into_view_if_needed()
        box = canvas.bounding_box()
        assert box["width"] / box["height"] == pytest.approx(80 / 48, rel=0.02)
        for down in (0.2, 0.8):
            page.mouse.move(box["x"] + box["width"] * across, box["y"] + box["height"] * down)
            page.mouse.down()
            page.mouse.up()
    page.get_by_role("button", name="Generate", exact=True).click()
    page.locator(".result .divider").wait_for(timeout=SECONDS)
    here.look("18-two-subjects")
    here.go("gallery", ".gallery li")
    page.locator(".gallery button").first.click()
    assert "DPM++ 2M" in page.locator("dialog .facts").inner_text()
    page.get_by_role("button", name="Again with this seed").click()
    page.locator(".result .divider").wait_for(timeout=SECONDS)
    assert page.get_by_label("Shape").input_value() in ("3:2", "16:9")
    drawn = here.context.request.get(f"{studio}/api/pictures").json()
    assert [one["region"] for job in drawn for one in job["request"]["adapters"]] == [True] * 4
    first, second = (
        here.context.request.get(f"{studio}/api/jobs/{job['id']}/files/{job['pictures'][0]['file']}").body()
        for job in drawn
    )
    assert Image.open(io.BytesIO(first)).tobytes() == Image.open(io.BytesIO(second)).tobytes()
    here.clean()


@pytest.mark.slow
def test_an_image_is_cut_and_masked_by_mouse_and_by_keys(window, tmp_path):
    made = Image.new("RGB", (300, 200), "white")
    ImageDraw.Draw(made).ellipse((200, 50, 290, 140), fill="purple")
    made.save(tmp_path / "wide.png")
    here = window()
    page = here.go("train", ".step")
    page.locator("input[type=file]").first.set_input_files(str(tmp_path / "wide.png"))
    page.get_by_role("button", name="Crop and mask").click()
    canvas = page.locator("dialog canvas")
    box = canvas.bounding_box()
    page.mouse.move(box["x"] + box["width"] * 0.8, box["y"] + box["height"] * 0.5)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] * 0.85, box["y"] + box["height"] * 0.5)
    page.mouse.up()
    canvas.focus()
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Space")
    page.get_by_label("Across").fill("100")
    here.look("16-mask")
    page.get_by_role("button", name="Keep").click()
    page.locator(".image .mask").wait_for()
    page.locator(".image .crop").wait_for()
    set_ = page.evaluate("localStorage.images")
    one = here.context.request.get(f"{here.address}/api/images/{set_}").json()["pictures"][0]
    assert one["crop"] == [100, 0, 200] and one["mask"] == "drawn"
    content = here.context.request.get(f"{here.address}/api/images/{set_}/1/mask").body()
    mask = Image.open(io.BytesIO(content)).convert("L").resize((300, 200))
    assert mask.getpixel((245, 100)) > 200 and mask.getpixel((50, 100)) < 20
    page.get_by_label("Caption of wide.png").fill("sks ball at the right")
    page.get_by_label("What it is").fill("ball")
    page.locator("summary", has_text="Write captions").click()
    page.get_by_role("button", name="Replace all").click()
    caption = page.get_by_label("Caption of wide.png")
    playwright.expect(caption).to_have_value("a photo of sks ball, white background")
    here.clean()


@pytest.mark.slow
def test_the_keyboard_alone_starts_a_run(window):
    here = window()
    page = here.go("train", ".step")

    def reach(name):
        for _ in range(140):
            page.keyboard.press("Tab")
            if name in page.evaluate(
                "document.activeElement.matches('button') ? document.activeElement.innerText : ''"
            ):
                return
        raise AssertionError(name)

    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "skip"
    page.keyboard.press("Enter")
    reach("Try the sample subject")
    page.keyboard.press("Enter")
    page.locator("li.image").nth(3).wait_for()
    reach("Start training")
    page.keyboard.press("Enter")
    page.wait_for_url("**/#/runs/**")
    reach("Cancel")
    page.keyboard.press("Enter")
    page.locator("dialog[open]").wait_for()
    reach("No, go back")
    page.keyboard.press("Enter")
    page.locator("dialog").wait_for(state="detached")
    reach("Cancel")
    page.keyboard.press("Enter")
    page.locator("dialog .danger").focus()
    page.keyboard.press("Enter")
    page.locator(".state.cancelled").wait_for(timeout=SECONDS)


@pytest.mark.slow
@pytest.mark.parametrize("colours", ["light", "dark"])
def test_a_phone_shows_all_of_it_in_german(window, colours):
    here = window(viewport={"width": 390, "height": 844}, locale="de-DE", color_scheme=colours, device_scale_factor=2)
    page = here.go("train", ".step")
    page.get_by_role("button", name="Beispielmotiv ausprobieren").click()
    page.locator("li.image").nth(3).wait_for()
    for place in ("train", "runs", "generate", "gallery", "adapters"):
        here.go(place, "h1")
        assert here.width() == 390, place
        here.look(f"20-phone-{colours}-{place}")
    assert page.locator("html").get_attribute("lang") == "de"
    here.clean()


@pytest.mark.slow
def test_a_restarted_server_goes_on_with_what_ran(chromium, tmp_path):
    """A run outlives its server: the page that is reloaded shows it going on to its end."""
    from comcat_diffusion.ui.worker import run

    config = UiConfig(output_dir=str(tmp_path / "studio"), port=port())
    here = Window(chromium, f"http://127.0.0.1:{config.port}")
    with app.running(config, work=run):
        page = here.start(max_train_steps=60, validation_steps=60)
        page.get_by_text(STEP).wait_for(timeout=SECONDS)
    status = (tmp_path / "studio" / "runs" / "sks-teddy" / "status.json").read_text()
    assert '"queued"' in status and list((tmp_path / "studio" / "runs").glob("*/checkpoints/*"))
    with app.running(config, work=run):
        page.reload()
        page.get_by_text("The model knows").wait_for(timeout=SECONDS)
        assert "after 60 steps" in page.locator(".hero").inner_text()
        steps = page.evaluate(
            "async () => (await (await fetch('/api/jobs/runs/sks-teddy')).json()).losses.map((one) => one.step)"
        )
        assert [step for step in steps if step] == sorted(set(steps)) and len(set(steps)) == 60
    here.context.close()


@pytest.mark.slow
def test_a_worker_in_a_process_of_its_own_is_ended_by_a_cancel_and_the_next_job_gets_another(tmp_path):
    """The only one here that needs no browser, but a process that imports torch."""
    from comcat_diffusion.ui.jobs import Queue
    from comcat_diffusion.ui.worker import Process

    process = Process()
    queue = Queue(tmp_path, process, process.end)
    request = {"settings": {"instance_prompt": "a photo of sks teddy", "max_train_steps": 5000}, "own_images": False}
    long = queue.add("train", "long", "me", request, lambda folder: None)
    short = {"settings": request["settings"] | {"max_train_steps": 1, "skip_final_inference": True, "max_bytes": 0}}
    after = queue.add("train", "short", "me", request | short, lambda folder: None)
    until(lambda: long.status.get("done", 0) > 1)
    assert queue.position(after) == 1
    queue.cancel(long)
    until(lambda: after.status["state"] in ("done", "failed"))
    queue.close()
    assert (long.status["state"], after.status["state"]) == ("cancelled", "done")


def until(is_so, seconds=90):
    for _ in range(seconds * 10):
        if is_so():
            return
        time.sleep(0.1)
    raise AssertionError
