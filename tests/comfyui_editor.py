"""The editor's part of `make test-comfyui`: ComfyUI's own page, in Chromium, opens the example and draws it.

The workflow and the picture with it inside are given to the page as a drop of the file gives them. Steps and size are
made small; all else stays as it is in the example. COMFYUI_SHOTS names a folder for a picture of the page.
"""

from __future__ import annotations

import base64
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import safetensors.torch
import torch
from diffusers import AutoencoderTiny, DiffusionPipeline

from tests.comfyui_bases import checkpoint

if TYPE_CHECKING:
    from tests.comfyui_check import ComfyUI

EXAMPLES = Path(__file__).parents[1] / "integrations" / "comfyui" / "example_workflows"
BASE, ADAPTER = "v1-5-pruned-emaonly.safetensors", "sks-dog.safetensors"  # as the example names them
SIDE, STEPS = 128, 2
PAGE = "() => window.app?.graph && Object.keys(LiteGraph.registered_node_types).length > 100"
OPEN = """async ([name, type, content]) => {
    const bytes = Uint8Array.from(atob(content), (one) => one.charCodeAt(0));
    app.graph.clear();
    await app.handleFile(new File([bytes], name, {type}));
    await new Promise((done) => setTimeout(done, 1500));  // until what a new workflow shows has settled
    const nodes = app.graph.nodes ?? app.graph._nodes;
    return nodes.map((node) => ({
        type: node.type,
        known: node.type in LiteGraph.registered_node_types,
        wrong: !!node.has_errors,
        wired: (node.inputs ?? []).filter((input) => input.link != null).length,
        values: Object.fromEntries((node.widgets ?? []).map((widget) => [widget.name, widget.value])),
    }));
}"""
DRAW = """async (small) => {
    for (const node of app.graph.nodes ?? app.graph._nodes)
        for (const widget of node.widgets ?? []) if (widget.name in small) widget.value = small[widget.name];
    await app.queuePrompt(0, 1);
}"""


def prepare(base: Path, pipe: DiffusionPipeline, adapter: Path) -> None:
    """The files that the example names, in a folder for ComfyUI; a tiny autoencoder goes into the checkpoint."""
    path = base / "models" / "checkpoints" / BASE
    checkpoint(pipe, path)
    torch.manual_seed(4)
    tiny, found = AutoencoderTiny(), safetensors.torch.load_file(path)
    for name, tensor in tiny.state_dict().items():
        side, _, number, rest = name.split(".", 3)
        place = int(number) + (side == "decoder")  # before whose layers a clamp stands there
        found[f"first_stage_model.taesd_{side}.{place}.{rest}"] = tensor.half()
    safetensors.torch.save_file(found, path)
    shutil.copyfile(adapter, base / "models" / "comcat" / ADAPTER)


def compare(running: ComfyUI, expect) -> None:
    """Both files open without a node that is not known or not wired, hold the same, and draw."""
    from playwright.sync_api import sync_playwright

    shots = Path(os.environ["COMFYUI_SHOTS"]) if "COMFYUI_SHOTS" in os.environ else None
    with sync_playwright() as play:
        place = os.environ.get("CHROMIUM") or shutil.which("chromium")
        browser = play.chromium.launch(executable_path=place, args=["--no-sandbox"])
        try:
            page = browser.new_page(viewport={"width": 1600, "height": 900})
            page.goto(f"http://127.0.0.1:{running.port}/")
            page.wait_for_function(PAGE, timeout=180_000)
            opened = {}
            for name, kind in (("comcat.json", "application/json"), ("comcat.png", "image/png")):
                content = base64.b64encode((EXAMPLES / name).read_bytes()).decode()
                opened[name] = page.evaluate(OPEN, [name, kind, content])
                page.keyboard.press("Escape")  # out of the templates, which a new user is shown first
                if shots:
                    page.wait_for_timeout(1000)
                    page.screenshot(path=shots / f"editor-{name}.png")
            for name, nodes in opened.items():
                strange = [node["type"] for node in nodes if not node["known"] or node["wrong"]]
                expect(f"{name}: {len(nodes)} nodes open, those not known are", strange, [])
            expect("the picture holds the same as the workflow", *opened.values())
            (ours,) = [node for node in nodes if node["type"] == "ComcatLoadAdapter"]
            told = ours["values"]["adapter"], ours["values"]["strength"], ours["wired"]
            expect("the adapter is chosen, and wired to model and clip", told, (ADAPTER, 1.0, 2))
            before = running._ask("/history").keys()
            page.evaluate(DRAW, {"width": SIDE, "height": SIDE, "steps": STEPS})
            made = running.finished(before)
            expect("the page's own queue draws it", made["status"]["status_str"], "success")
            (file,) = [file for one in made["outputs"].values() for file in one.get("images", ())]
            expect("into a picture", (running.base / "output" / file["filename"]).is_file(), True)
            if shots:
                page.wait_for_timeout(2000)
                page.screenshot(path=shots / "editor-drawn.png")
        finally:
            browser.close()
