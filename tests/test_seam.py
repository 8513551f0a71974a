"""The seam: every processor, adapter and tool that shares an attention with ours (the table of SEAM.md, column C).

Live models are in float64, so that "the same function by another route" means 1e-10; where the very same operations
run, outputs are equal bit for bit.
"""

import copy
import io

import accelerate
import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models import attention_processor as processors
from diffusers.models.attention_processor import Attention
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from torch import nn
from torch.testing import assert_close

from comcat_diffusion.adapters import wide
from comcat_diffusion.adapters.config import ComcatConfig
from comcat_diffusion.adapters.model import factors
from tests.reference import FreeFactors, attention
from tests.slow import mostly, slow

SAME = {"rtol": 0.0, "atol": 1e-10}
CLEAR = 0.01  # an effect on the output this large cannot be rounding
CROSS = "down_blocks.0.attentions.0.transformer_blocks.0.attn2"


def distance(left: torch.Tensor, right: torch.Tensor) -> float:
    return (left - right).abs().max().item()


@pytest.fixture(params=[pytest.param(False, id="free"), slow(True, id="foldable")])  # the latter leaves heads as wide
def live(request, tiny_unet, randomize):
    """`live(dtype, targets)` gives a UNet with a random adapter named dog that acts."""

    def build(dtype=torch.float64, targets=("attn1", "attn2")):
        unet = tiny_unet(dtype)
        unet.add_adapter(ComcatConfig(r=3, target_modules=list(targets), foldable=request.param), "dog")
        randomize(unet, "dog")
        with torch.no_grad():
            assert distance(tiny_unet.run(unet).double(), tiny_unet.run(tiny_unet(dtype)).double()) > CLEAR
        return unet

    return build


def add_lora(unet: nn.Module) -> nn.Module:
    """A random LoRA named style on the four projections of every attention."""
    unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v", "to_out.0"]), "style")
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for _, parameter in sorted((n, p) for n, p in unet.named_parameters() if "lora_" in n):
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return unet


def cross_attention(**changes) -> nn.ModuleDict:
    """One attention as a model of its own: 16 channels, context of 24, two heads of 8."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        options = {"query_dim": 16, "cross_attention_dim": 24, "heads": 2, "dim_head": 8, "bias": True} | changes
        return nn.ModuleDict({"attn2": Attention(**options)}).double().requires_grad_(False)


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# LoRAs, IP-Adapters and processors in the same model


@torch.no_grad()
def test_a_lora_added_before_or_after_gives_the_same_output(live, tiny_unet, randomize):
    after = add_lora(live())
    foldable = after.peft_config["dog"].foldable
    config = ComcatConfig(r=3, target_modules=["attn1", "attn2"], foldable=foldable)
    before = add_lora(tiny_unet(torch.float64))
    before.add_adapter(config, "dog")
    fused = add_lora(tiny_unet(torch.float64))
    fused.set_adapters(["style"], [0.5])
    fused.fuse_lora()
    fused.unload_lora()
    fused.add_adapter(copy.deepcopy(config), "dog")
    fused.set_adapters(["dog"], [0.7])
    for unet in (after, before):
        unet.set_adapters(["dog", "style"], [0.7, 0.5])
    for unet in (before, fused):
        randomize(unet, "dog")
    assert torch.equal(tiny_unet.run(before), tiny_unet.run(after))
    assert_close(tiny_unet.run(fused), tiny_unet.run(after), **SAME)
    together = tiny_unet.run(after)
    for name in ("dog", "style"):
        after.set_adapters([name])
        assert distance(tiny_unet.run(after), together) > CLEAR


PROCESSORS = {
    "classic": lambda unet: unet.set_attn_processor(processors.AttnProcessor()),
    "sdpa": lambda unet: unet.set_attn_processor(processors.AttnProcessor2_0()),
    "sliced": lambda unet: unet.set_attention_slice(1),
    "default": lambda unet: (unet.set_attn_processor(processors.AttnProcessor()), unet.set_default_attn_processor()),
    "fused": lambda unet: unet.fuse_qkv_projections(),
}


@torch.no_grad()
@pytest.mark.parametrize("install", PROCESSORS.values(), ids=PROCESSORS)
def test_every_processor_of_the_host_computes_the_adapter_live_and_merged(live, tiny_unet, install):
    unet, base = live(), tiny_unet(torch.float64)
    names, output = list(unet.attn_processors), tiny_unet.run(unet)
    install(unet)
    install(base)
    assert list(unet.attn_processors) == names == list(tiny_unet().attn_processors)
    before = tiny_unet.run(unet)
    assert_close(before, output, **SAME)
    if not unet.get_submodule(CROSS).fused_projections:  # where merging is refused
        unet.fuse_lora()
        assert_close(tiny_unet.run(unet), output, **SAME)
        unet.unfuse_lora()
        assert torch.equal(tiny_unet.run(unet), before)
    unet.disable_adapters()
    assert torch.equal(tiny_unet.run(unet), tiny_unet.run(base))


@torch.no_grad()
def test_unfusing_the_projections_restores_the_output(live, tiny_unet):
    unet = live()
    output = tiny_unet.run(unet)
    unet.fuse_qkv_projections()
    unet.unfuse_qkv_projections()
    assert torch.equal(tiny_unet.run(unet), output)


class Halved(processors.AttnProcessor2_0):
    """A user's own processor, with a state and a result of its own."""

    def __init__(self):
        super().__init__()
        self.widths = []

    def __call__(self, attn, hidden_states, *args, **kwargs):
        self.widths.append(attn.to_q(hidden_states).shape[-1] // attn.heads)
        return 0.5 * super().__call__(attn, hidden_states, *args, **kwargs)


@torch.no_grad()
def test_a_processor_of_the_users_own_is_honoured(live, tiny_unet):
    unet, merged, base = live(), live(), tiny_unet(torch.float64)
    merged.fuse_lora()
    own = Halved()
    for model in (unet, merged, base):
        model.set_attn_processor(own if model is unet else Halved())
    foldable = unet.peft_config["dog"].foldable
    assert_close(tiny_unet.run(unet), tiny_unet.run(merged), **SAME)
    assert distance(tiny_unet.run(unet), tiny_unet.run(base)) > CLEAR
    assert set(own.widths) == ({8, 16} if foldable else {8 + 3, 16 + 3})


@torch.no_grad()
@pytest.mark.parametrize("name", ["PAGIdentitySelfAttnProcessor2_0", "PAGCFGIdentitySelfAttnProcessor2_0"])
def test_perturbed_attention_guidance_equals_that_of_the_merged_model(live, tiny_unet, name):
    unet, merged, base = live(), live(), tiny_unet(torch.float64)
    merged.fuse_lora()
    batch = 3 if "CFG" in name else 2
    sample, context = noise(batch, 4, 8, 8), noise(batch, 7, 24, seed=1)
    outputs = []
    for model in (unet, merged, base):
        for path, module in model.named_modules():
            if path.endswith("attn1"):
                module.set_processor(getattr(processors, name)())
        outputs.append(model(sample, 10, context)[0])
    assert_close(outputs[0], outputs[1], **SAME)
    assert distance(outputs[0], outputs[2]) > CLEAR


@torch.no_grad()
@pytest.mark.parametrize("name", ["IPAdapterAttnProcessor", "IPAdapterAttnProcessor2_0"])
def test_an_ip_adapter_keeps_its_own_keys_and_values_untouched(randomize, name):
    model = cross_attention()
    inject_adapter_in_model(ComcatConfig(r=3, alpha=4.5, target_modules=["attn2"]), model, "dog")
    randomize(model, "dog")
    own = factors(model, "dog")
    own = FreeFactors(1.5, *(own[f"attn2.{part}"] for part in ("q_down", "k_down", "v_down", "out_up")))
    host, scale = model["attn2"], 0.6
    processor = getattr(processors, name)(16, cross_attention_dim=24, num_tokens=(4,), scale=scale).double()
    host.set_processor(processor)
    x, text, picture = noise(2, 5, 16), noise(2, 7, 24, seed=1), noise(2, 4, 24, seed=2)  # B N C, B M C, B M C
    got = host(x, encoder_hidden_states=(text, [picture]))
    q, k, v, out = host.to_q, host.to_k, host.to_v, host.to_out[0]
    by_text = attention(x, text, (q, k, v, out), heads=2, adapters=(own,))
    pictured = (q, processor.to_k_ip[0], processor.to_v_ip[0], out)
    by_picture = attention(x, picture, pictured, heads=2, out_bias=False)
    assert_close(got, by_text + scale * by_picture, **SAME)
    assert distance(got, by_text) > CLEAR
    assert distance(got, attention(x, text, (q, k, v, out), heads=2) + scale * by_picture) > CLEAR


@torch.no_grad()
def test_an_ip_adapter_can_be_loaded_into_a_live_model(live, tiny_unet, randomize):
    def load(unet: nn.Module) -> torch.Tensor:
        shapes = {"proj.weight": (96, 12), "proj.bias": (96,), "norm.weight": (24,), "norm.bias": (24,)}
        image = {name: noise(*shape) for name, shape in shapes.items()}
        cross = [m for n, m in unet.named_modules() if n.endswith("attn2")]
        keys = {
            f"{2 * i + 1}.to_{part}_ip.weight": 0.3 * noise(m.to_q.out_features, 24, seed=i)
            for i, m in enumerate(cross)
            for part in "kv"
        }
        unet._load_ip_adapter_weights([{"image_proj": image, "ip_adapter": keys}], low_cpu_mem_usage=False)
        return unet.double()

    def run(unet: nn.Module) -> torch.Tensor:
        return tiny_unet.run(unet, added_cond_kwargs={"image_embeds": [noise(2, 1, 12)]})

    base, after = load(tiny_unet(torch.float64)), load(live())
    before = load(tiny_unet(torch.float64))
    before.add_adapter(copy.deepcopy(after.peft_config["dog"]), "dog")
    assert torch.equal(run(randomize(before, "dog")), run(after))
    assert distance(run(after), run(base)) > CLEAR
    assert distance(run(after), tiny_unet.run(live())) > CLEAR


@torch.no_grad()
def test_zero_columns_to_a_kernels_favourite_width_change_nothing(live, tiny_unet, monkeypatch):
    unet = live()
    output = tiny_unet.run(unet)
    monkeypatch.setitem(wide.WIDTH_MULTIPLE, "cpu", 8)
    assert_close(tiny_unet.run(unet), output, **SAME)
    unet.fuse_lora()
    assert unet.get_submodule(CROSS).to_q.out_features == 2 * (8 if unet.peft_config["dog"].foldable else 16)
    assert_close(tiny_unet.run(unet), output, **SAME)


# Tools that move, copy, store or compile the model


def test_gradient_checkpointing_gives_equal_gradients(live, tiny_unet):
    grads = []
    for checkpointing in (False, True):
        unet = live().train()
        if checkpointing:
            unet.enable_gradient_checkpointing()
        tiny_unet.run(unet).square().mean().backward()
        grads.append({name: parameter.grad for name, parameter in factors(unet, "dog").items()})
    for name, grad in grads[0].items():
        assert grad.abs().max() > 0 and torch.equal(grad, grads[1][name]), name


@torch.no_grad()
def test_a_deepcopy_is_independent_and_equal(live, tiny_unet, randomize):
    unet = live()
    output = tiny_unet.run(unet)
    twin = copy.deepcopy(unet)
    assert torch.equal(tiny_unet.run(twin), output)
    randomize(twin, "dog", seed=7)
    assert torch.equal(tiny_unet.run(unet), output) and distance(tiny_unet.run(twin), output) > CLEAR


@torch.no_grad()
@pytest.mark.parametrize("merged", [pytest.param(False, id="live"), slow(True, id="merged")])
def test_a_pickled_module_comes_back_equal_and_names_only_importable_classes(live, tiny_unet, merged):
    unet = live()
    if merged:
        unet.fuse_lora()
    buffer = io.BytesIO()
    torch.save(unet, buffer)
    assert b"ComcatAttention" not in buffer.getvalue() and b"ComcatLayer" in buffer.getvalue()
    loaded = torch.load(io.BytesIO(buffer.getvalue()), weights_only=False)
    assert torch.equal(tiny_unet.run(loaded), tiny_unet.run(unet))
    loaded.unfuse_lora()
    assert torch.equal(tiny_unet.run(loaded), tiny_unet.run(live()))


@torch.no_grad()
@pytest.mark.parametrize("how", mostly(["leaves", "whole"], "leaves"))
def test_offloading_changes_nothing(live, tiny_unet, how):
    unet, still, base = live(), live(), tiny_unet(torch.float64)
    if how == "leaves":  # what enable_sequential_cpu_offload uses
        accelerate.cpu_offload(unet, execution_device=torch.device("cpu"))
        assert all(parameter.device.type == "meta" for parameter in factors(unet, "dog").values())
    else:
        accelerate.cpu_offload_with_hook(unet, execution_device=torch.device("cpu"))
    assert torch.equal(tiny_unet.run(unet), tiny_unet.run(still))
    assert distance(tiny_unet.run(unet), tiny_unet.run(base)) > CLEAR


@pytest.mark.slow
@torch.no_grad()
def test_torch_compile_traces_a_block_in_one_graph(live, tiny_unet):
    block = live().get_submodule(CROSS.removesuffix(".attn2"))
    x, context = noise(2, 5, 16), noise(2, 7, 24, seed=1)
    compiled = torch.compile(block, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x, encoder_hidden_states=context), block(x, encoder_hidden_states=context))
    torch._dynamo.reset()


@pytest.mark.slow
@torch.no_grad()
def test_torch_compile_traces_a_transformers_layer_in_one_graph(tiny_vit, randomize):
    vit = get_peft_model(tiny_vit(torch.float64), ComcatConfig(r=3, target_modules=["attention"]), "dog").eval()
    layer = randomize(vit, "dog").base_model.model.layers[0]
    x = noise(2, 5, 24)
    assert torch.equal(torch.compile(layer, backend="eager", fullgraph=True)(x), layer(x))
    torch._dynamo.reset()


@torch.no_grad()
def test_a_saved_live_unet_reloads_as_the_base(live, tiny_unet, tmp_path):
    live(torch.float32).save_pretrained(tmp_path)
    loaded, report = UNet2DConditionModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and all(".comcat." in key for key in report["unexpected_keys"])
    assert torch.equal(tiny_unet.run(loaded.eval()), tiny_unet.run(tiny_unet()))


@torch.no_grad()
@pytest.mark.parametrize("first", mostly(["adapter", "casting"], "adapter"))
def test_layerwise_casting_to_float8_leaves_the_factors_alone(live, tiny_unet, randomize, first):
    unet = live(torch.float32)
    config = copy.deepcopy(unet.peft_config["dog"])
    if first == "casting":
        unet = tiny_unet()
    unet.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    if first == "casting":
        unet.add_adapter(config, "dog")
        randomize(unet, "dog")
    assert all(parameter.dtype == torch.float32 for parameter in factors(unet, "dog").values())
    assert unet.get_submodule(CROSS).to_q.weight.dtype == torch.float8_e4m3fn
    rounded = live(torch.float32)  # the same model in plain float32, of weights that went through float8
    for name, parameter in rounded.named_parameters():
        parameter.copy_(unet.get_parameter(name).float())
    assert torch.equal(tiny_unet.run(unet), tiny_unet.run(rounded))


@torch.no_grad()
@pytest.mark.parametrize("factors_in", [pytest.param(torch.bfloat16, id="diffusers"), slow(torch.float32, id="peft")])
def test_a_bfloat16_model_is_as_close_to_float32_as_its_base(live, tiny_unet, randomize, factors_in):
    full = live(torch.float32)
    if factors_in == torch.bfloat16:  # diffusers' add_adapter leaves factors in the base's precision
        half = live(torch.bfloat16)
    else:  # PEFT raises them to float32
        half = get_peft_model(tiny_unet(torch.bfloat16), copy.deepcopy(full.peft_config["dog"]), "dog").eval()
        randomize(half, "dog")
    assert all(parameter.dtype == factors_in for parameter in factors(half, "dog").values())
    base_error = distance(tiny_unet.run(tiny_unet(torch.bfloat16)).float(), tiny_unet.run(tiny_unet()))
    error = distance(tiny_unet.run(half).float(), tiny_unet.run(full))
    # The adapter adds its own roundings of half precision, in q, k, v and the sum after them; its effect is over 0.3.
    assert 0 < error < 4 * base_error < 0.1
    assert distance(tiny_unet.run(full), tiny_unet.run(tiny_unet())) > 0.3


@torch.no_grad()
@pytest.mark.parametrize("model, target", [("tiny_clip", "self_attn"), ("tiny_vit", "attention")])
def test_eager_and_sdpa_attention_agree(request, randomize, model, target):
    tiny = request.getfixturevalue(model)
    host = tiny(torch.float64)
    host.add_adapter(ComcatConfig(r=3, target_modules=[target]), "dog")
    randomize(host, "dog")
    outputs = []
    for implementation in ("eager", "sdpa"):
        host.set_attn_implementation(implementation)
        outputs.append(tiny.run(host))
    # transformers' eager attention takes its softmax in float32, whatever the model's precision
    assert_close(*outputs, rtol=0, atol=1e-5)
    assert distance(outputs[0], tiny.run(tiny(torch.float64))) > CLEAR
