"""comcat ui: the page does what the commands do, through the same settings; asked as a browser asks it."""

import socket
import sys
import threading
from contextlib import closing
from dataclasses import MISSING, fields

import gradio as gr
import httpx
import pytest
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError
from PIL import Image

from comcat_diffusion import bases, commands, read_adapter
from comcat_diffusion.cli import main
from comcat_diffusion.config import read_toml
from comcat_diffusion.generation.config import GenerateConfig
from comcat_diffusion.training.config import TrainConfig
from comcat_diffusion.ui import page
from comcat_diffusion.ui.config import UiConfig
from comcat_diffusion.ui.forms import form
from comcat_diffusion.ui.port import address_of

TRAIN = bases.assets() / "subject" / "train"


@pytest.fixture(scope="module")
def free_port():
    def find():
        with closing(socket.socket()) as free:
            free.bind(("127.0.0.1", 0))
            return free.getsockname()[1]

    return find


@pytest.fixture(scope="module")
def port(free_port):
    return free_port()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("studio")


@pytest.fixture(scope="module")
def ask(folder, port):
    """Asks an endpoint of the running page; what is not named is left as the page shows it."""
    served = page.serve(UiConfig(output_dir=str(folder), port=port), background=True)
    client = Client(f"http://127.0.0.1:{port}", verbose=False)
    endpoints = client.view_api(return_format="dict", print_info=False)["named_endpoints"]

    def asked(endpoint, **values):
        shown = endpoints[endpoint]["parameters"]
        given = [values.pop(p["label"], p.get("parameter_default")) for p in shown]
        assert not values
        return client.predict(*given, api_name=endpoint)

    yield asked
    served.close(verbose=False)


def test_a_subject_is_taught_and_drawn(ask, folder):
    pictures = [handle_file(path) for path in sorted(TRAIN.iterdir())]
    files = "Pictures of the subject, with .txt captions if wanted. None: the sample subject."
    teach = {files: pictures, "instance_prompt": "a photo of sks teddy", "max_train_steps": 2}
    said, _, _ = ask("/teach", **teach, rank=3, max_bytes=0, num_validation_images=1)
    adapter = folder / "a-photo-of-sks-teddy" / "sks-teddy.safetensors"
    assert f"Saved {adapter}" in said and "Learning 'sks teddy' from 4 pictures." in said
    header = read_adapter(adapter)
    assert header.config["unet"]["r"] == 3 and header.notes.instance_prompt == "a photo of sks teddy"
    captions = sorted(path.name for path in adapter.with_name("pictures").glob("*.txt"))
    assert captions == ["1.txt", "2.txt", "3.txt", "4.txt"]

    offered = ask("/adapters")["choices"]
    assert [value for _, value in offered] == [str(adapter)]
    draw = {"adapter": [f"{adapter}:0.5"], "prompt": "{subject}", "num_images": 2, "num_inference_steps": 2}
    for left in (["subject"], ["subject", "subject-2"]):  # the same prompt again replaces nothing
        drawn, _ = ask("/draw", **draw, compare=True)
        assert len(drawn) == 2 and sorted(path.name for path in (folder / "pictures").iterdir()) == left
    sheet = Image.open(folder / "pictures" / "subject-2" / "sheet.png")
    assert '"scale": 0.5' in sheet.text["comcat"]


@pytest.mark.parametrize(
    ("endpoint", "values", "message"),
    [
        ("/teach", {"rank": 0}, "--rank must be at least 1"),
        ("/teach", {"lr_warmup_steps": 500}, "--lr_warmup_steps 500 must be shorter than --max_train_steps 400"),
        ("/teach", {"pretrained_model_name_or_path": "nowhere"}, "--instance_data_dir is missing"),
        ("/draw", {"adapter": ["nope.safetensors"], "prompt": "sks dog"}, "no adapter file nope.safetensors"),
        ("/draw", {"adapter": [], "prompt": "a dog"}, "--adapter is missing"),
        ("/draw", {"adapter": ["x"], "prompt": ""}, "--prompt is missing"),
    ],
)
def test_a_mistake_is_one_sentence_and_leaves_nothing(ask, folder, endpoint, values, message):
    before = sorted(folder.rglob("*"))
    with pytest.raises(AppError, match=message) as refused:
        ask(endpoint, **values)
    assert "\n" not in str(refused.value) and sorted(folder.rglob("*")) == before


class Bar:
    def __init__(self):
        self.seen = []

    def __call__(self, done, desc):
        self.seen.append(done)


def asked_for(settings, first=(), without=(), **typed):
    """A form, and its values: as shown, but for what is typed."""
    with gr.Blocks():
        made = form(settings, first, without)
    assert not typed.keys() - made.components.keys()
    return made, tuple(typed.get(name, component.value) for name, component in made.components.items())


def test_the_form_asks_for_every_flag_and_left_alone_gives_the_defaults():
    for kind in (TrainConfig, GenerateConfig):
        made, values = asked_for(kind)
        assert set(made.components) == {item.name for item in fields(kind) if not item.metadata.get("file_only")}
        given = made.given(values)
        for item in fields(kind):
            default = item.default if item.default is not MISSING else item.default_factory()
            assert given.get(item.name, default) == default
            assert type(given.get(item.name, default)) is type(default)


def test_what_is_typed_comes_back_as_the_settings_take_it():
    typed = {"rank": 4.0, "learning_rate": 0.5, "validation_prompt": " a dog \n\na cat", "kind": "free", "alpha": None}
    made, values = asked_for(TrainConfig, ("rank",), ("seed",), **typed)
    assert next(iter(made.components)) == "rank" and "seed" not in made.components
    given = made.given(values)
    assert given["rank"] == 4 and type(given["rank"]) is int and given["learning_rate"] == 0.5
    assert given["validation_prompt"] == ["a dog", "a cat"] and given["kind"] == "free" and "alpha" not in given


def test_stopping_keeps_what_is_learned(tmp_path):
    stop, bar = threading.Event(), Bar()
    stop.set()
    made, values = asked_for(TrainConfig, without=page._OWN_OF_TRAIN, max_train_steps=50)
    said, adapter, samples = page.teach(tmp_path, made, None, values, page._Progress(bar, stop))
    assert "Stopped after step 1." in said and samples is None and bar.seen == [(1, 50)]
    assert read_adapter(adapter).notes.trigger == "sks"
    again = read_toml(TrainConfig, tmp_path / "sample-subject" / "run.toml")
    assert again["max_train_steps"] == 50


def test_pictures_that_cannot_be_read_leave_no_copies(tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no picture")
    made, values = asked_for(TrainConfig, without=page._OWN_OF_TRAIN, instance_prompt="a photo of sks dog")
    watcher = page._Progress(Bar(), threading.Event())
    with pytest.raises(gr.Error, match="broken.png"):
        page._told(page.teach, tmp_path / "studio", made, [str(broken)], values, watcher)
    with pytest.raises(gr.Error, match="same name"):
        page._told(page.teach, tmp_path / "studio", made, [str(broken)] * 2, values, watcher)
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path != broken]


def test_without_gradio_the_command_says_how_to_get_it(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert main(["ui"]) == commands.BAD_INPUT
    assert capsys.readouterr().err == "comcat: comcat ui needs gradio: pip install 'comcat-diffusion[ui]'.\n"


def test_a_port_that_is_taken_is_one_sentence(ask, port, tmp_path, capsys):
    assert main(["ui", "--port", str(port), "--output_dir", str(tmp_path)]) == commands.BAD_INPUT
    said = capsys.readouterr()
    assert said.err == f"comcat: Port {port} is taken: name another one, for instance --port {port + 1}.\n"
    assert "http" not in said.out and not list(tmp_path.iterdir())


def test_the_address_is_told_when_the_page_answers(tmp_path, free_port):
    """Asked from within: what the command prints, it prints of a page that is there."""
    answers = []

    def ask(address):
        answers.append((address, httpx.get(address).status_code))

    served = page.serve(UiConfig(output_dir=str(tmp_path), port=free_port()), background=True, on_answer=ask)
    served.close(verbose=False)
    assert answers == [(f"http://127.0.0.1:{served.server_port}", 200)]


@pytest.mark.parametrize(
    ("host", "message"), [("nowhere.invalid", "is no address"), ("192.0.2.1", "is no address of this machine")]
)
def test_a_host_that_is_none_is_one_sentence(host, message, tmp_path, capsys):
    assert main(["ui", "--host", host, "--output_dir", str(tmp_path)]) == commands.BAD_INPUT
    (sentence,) = capsys.readouterr().err.splitlines()
    assert sentence.startswith(f"comcat: --host {host} ") and message in sentence


def test_the_address_is_one_that_a_browser_takes():
    for host, shown in (("0.0.0.0", "127.0.0.1"), ("::", "[::1]"), ("studio.local", "studio.local")):
        assert address_of(UiConfig(host=host, port=7000)) == f"http://{shown}:7000"


def test_who_may_come_in_and_whether_a_browser_opens_is_asked_for(tmp_path, monkeypatch, free_port):
    launched = []
    monkeypatch.setattr(gr.Blocks, "launch", lambda self, **settings: launched.append(settings))
    for flags in ([], ["--host", "0.0.0.0", "--open_browser"]):
        assert main(["ui", "--port", str(free_port()), "--output_dir", str(tmp_path), *flags]) == 0
    assert [(one["server_name"], one["inbrowser"], one["share"]) for one in launched] == [
        ("127.0.0.1", False, False),
        ("0.0.0.0", True, False),
    ]
    assert main(["ui", "--port", "0", "--output_dir", str(tmp_path)]) == commands.BAD_INPUT


def test_in_drawing_mode_the_page_offers_no_more_than_drawing(tmp_path):
    (tmp_path / "dog.safetensors").touch()
    made = page.build(tmp_path, teaches=False)
    (draw,) = [function for function in made.fns.values() if function.api_name == "draw"]
    labels = [component.label for component in draw.inputs]
    assert labels == ["adapter", "prompt", "num_images", "seed", "scale", "compare"]
    assert draw.inputs[0].value == [str(tmp_path / "dog.safetensors")]
    assert not any(function.api_name == "teach" for function in made.fns.values())
