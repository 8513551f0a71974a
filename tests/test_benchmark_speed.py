"""benchmarks/speed.py, run quick: every part measures something real and leaves a JSON of its own."""

import copy
import json

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file

from benchmarks import compression, speed, training, usage, variants
from benchmarks.attention import denoise
from comcat_diffusion import ComcatConfig, save_adapter
from comcat_diffusion.adapters.model import factors

HERE = ["layer", "step", "generation", "use", "growth", "bytes"]  # what needs no process of its own

pytestmark = pytest.mark.slow  # what is measured is not what a change of the package can break


def settings(*flags):
    return speed.settings_of(speed.command_line().parse_args(flags))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("speed")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(usage, "LOADED", 3)  # twenty take ten seconds to load
        speed.main(["--quick", "--parts", *HERE, "--output_dir", str(folder)])
    return folder


def rows_of(folder, part):
    return json.loads((folder / f"{speed.PARTS[part].name}-cpu.json").read_text())["rows"]


def test_each_part_leaves_a_json_of_its_own(folder):
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        [*(f"{speed.PARTS[part].name}-cpu.json" for part in HERE), "speed-growth-cpu.png"]
    )
    for part in HERE:
        report = json.loads((folder / f"{speed.PARTS[part].name}-cpu.json").read_text())
        assert {"commit", "dtype", "threads", "versions", "command"} <= set(report["circumstances"])
        assert report["settings"] == {"base": "SD 1.5", "resolution": 128, "batch": 1, "rank": 2, "rounds": 1}
        assert report["rows"]


def test_benchmarks_of_their_own_are_run_too(tmp_path, monkeypatch):
    asked = []
    wholes = {name: (file, asked.append, flags) for name, (file, _, flags) in speed.WHOLES.items()}
    monkeypatch.setattr(speed, "WHOLES", wholes)
    speed.main(["--quick", "--parts", "recipe", "compressed", "--threads", "1", "--output_dir", str(tmp_path)])
    for flags, module, file in zip(asked, (training, compression), ("training", "compression-cost"), strict=True):
        understood = module.command_line().parse_args(flags)
        assert understood.quick and understood.threads == 1 and understood.output == tmp_path / f"{file}-cpu.json"
    assert training.command_line().parse_args(asked[0]).parts == ["recipe"]


def test_earlier_results_make_one_table(folder, capsys):
    speed.main(["--show", *map(str, sorted(folder.glob("*.json")))])
    lines = capsys.readouterr().out.splitlines()
    rows = sum(len(rows_of(folder, part)) for part in HERE)
    assert sum(line.startswith("| ") for line in lines) == rows + 2
    for wanted in ("| generation, one U-Net forward: self+cross |  | bare |", "| growth | resolution 96 | lora |"):
        assert any(line.startswith(wanted) for line in lines)
    assert "| bytes | SDXL cross 1 | comcat | 17,049,600 bytes |  |" in lines


def test_memory_is_compared_with_the_bare_model_of_its_part():
    rows = [{"part": "memory", "variant": name, "peak_mib": mib} for name, mib in (("bare", 200.0), ("comcat", 250.0))]
    assert speed.line(rows[1], rows) == ("memory", "", "comcat", "250 MiB", "1.250")


def test_a_layer_grows_in_one_thing_at_a_time():
    grown = usage.growth_of(settings())
    assert [layer.resolution for layer in grown["resolution"]] == [256, 320, 384, 512]
    assert grown["rank"][1] == grown["batch"][0] == grown["adapters"][0] == grown["resolution"][0]
    assert [layer.adapters for layer in grown["adapters"]] == [1, 2, 4, 8] and grown["batch"][2].batch == 4


def test_tokens_grow_with_the_square_of_the_resolution(folder):
    tokens = {r["value"]: r["tokens"] for r in rows_of(folder, "growth") if r["grows"] == "resolution"}
    assert tokens == {64: 64, 80: 100, 96: 144, 128: 256}


@pytest.mark.parametrize("base", variants.BASES)
def test_every_bases_unet_runs_and_lora_has_as_many_parameters_in_self_attention(base):
    small = settings("--quick", "--base", base)
    unet = variants.bare_unet(small.device, small.dtype, small.base)
    with torch.no_grad():
        assert denoise(unet, small)().shape == (1, 4, 16, 16)
    counts = {
        kind: sum(p.numel() for p in variants.trainable(variants.variant(kind, unet, r".*\.attn1", 2)))
        for kind in ("comcat", "lora")
    }
    assert counts["comcat"] == counts["lora"] > 0


def test_results_of_another_base_bear_its_name():
    assert speed.file_name("step", "sd15") == "attention-step"
    assert speed.file_name("step", "sdxl") == "attention-step-sdxl"
    assert speed.file_name("bytes", "sdxl") == "speed-bytes"


def test_the_architectures_are_those_of_the_published_bases():
    millions = {}
    for base in variants.BASES.values():
        with torch.device("meta"):
            unet = UNet2DConditionModel(**base.unet)
        millions[base.name] = round(sum(parameter.numel() for parameter in unet.parameters()) / 1e6)
        largest = next(module for name, module in unet.named_modules() if name.endswith("attn1"))
        assert (largest.to_q.in_features, largest.heads) == (base.channels, base.heads)
    assert millions == {"SD 1.5": 860, "SD 2.1": 866, "SDXL": 2567}


def test_sizes_are_those_of_a_real_adapter(folder, tiny_unet, tmp_path):
    for options in variants.COMCAT.values():
        config = ComcatConfig(**{"r": 2, "target_modules": ["attn2"]} | options)
        expected = usage.adapter_size(tiny_unet(), copy.deepcopy(config))
        unet = tiny_unet(torch.float32)
        unet.add_adapter(config, "size")
        assert expected["parameters"] == sum(f.numel() for f in set(factors(unet, "size").values())) > 0
        save_adapter(unet, tmp_path / "size.safetensors", "size", dtype=torch.float16)
        tensors = load_file(tmp_path / "size.safetensors")
        assert expected["bytes"] == sum(tensor.nbytes for tensor in tensors.values())
    rows = rows_of(folder, "bytes")
    assert len(rows) == 3 * (2 + 3 + 3) * len(usage.RANKS)  # tied ones are of cross-attentions alone
    size = {tuple(row[k] for k in ("architecture", "targets", "variant", "rank")): row["parameters"] for row in rows}
    for (architecture, targets, kind, rank), count in size.items():
        assert count == rank * size[architecture, targets, kind, 1]  # linear in the rank
        assert size[architecture, "up", kind, rank] <= size[architecture, "cross", kind, rank]
        assert size[architecture, "cross", kind, rank] <= count or targets == "up"
        assert size[architecture, targets, "comcat_foldable", rank] <= count or kind == "comcat_tied"
        assert count <= size[architecture, targets, "comcat_foldable", rank] / 3 or kind != "comcat_tied"


def test_a_resolution_that_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="--resolution must be a multiple of 64"):
        settings("--resolution", "100")
