"""Joint attentions: the battery over every kind, and the slow formula, norms and rotations included.

Letters: B batch, N tokens of the picture, M of the text, H heads, D head width, R rank, C channels.
"""

import pytest
import torch
from peft import get_peft_model
from torch import nn
from torch.testing import assert_close

from comcat_diffusion.adapters import seam
from comcat_diffusion.adapters.config import ComcatConfig
from comcat_diffusion.adapters.model import ComcatModel, adapted_layers, default_targets
from tests.adapter_cases import WHOLES, Case, distance
from tests.reference import FreeFactors, rows_of_head
from tests.slow import mostly
from tests.test_adapter_battery import (  # noqa: F401 - run here over these cases
    test_a_new_adapter_changes_nothing,
    test_a_saved_peft_model_loads_exactly,
    test_a_scale_of_zero_is_the_base_bit_for_bit,
    test_disabling_a_merged_adapter_gives_the_base_and_enabling_it_gives_it_back,
    test_factors_saved_from_one_model_and_set_on_another_are_exact,
    test_merge_and_unload_leaves_a_plain_model_with_the_same_output,
    test_merged_equals_live_and_unmerge_gives_back_the_very_tensors,
    test_merging_one_adapter_after_another_equals_both_live,
    test_set_disable_enable_and_delete_are_exact,
    test_the_scale_is_linear_in_the_deltas,
    test_the_strength_is_alpha_over_rank,
    test_training_moves_the_factors_and_nothing_else,
    test_two_adapters_equal_their_concatenated_ranks,
    test_unload_gives_back_the_very_model,
    weights_of,
)
from tests.tiny_families import klein_transformer

KINDS = ("free", "foldable", "tied", "cores")
OF_TWO = "transformer_blocks.0.attn transformer_blocks.1.attn"  # streams, in FLUX
JOINT = {"tiny_sd3": "attn", "tiny_klein": OF_TWO, "tiny_flux1": OF_TWO, "tiny_qwen_image": OF_TWO}
TARGETS = {
    "sd3": ("tiny_sd3", "attn"),
    "sd3-self": ("tiny_sd3", "attn2"),
    "klein": ("tiny_klein", "attn"),
    "flux1": ("tiny_flux1", "attn"),
    "qwen_image": ("tiny_qwen_image", "attn"),
    "z_image": ("tiny_z_image", "layers.0.attention layers.1.attention"),
}
OFTEN = ("free-klein", "free-sd3-self", "foldable-sd3", "foldable-z_image", "tied-flux1", "cores-qwen_image")
TOO_WIDE = ("free-flux1", "foldable-flux1", "cores-flux1", "cores-sd3-self")  # no such kind; and as the others


def pytest_generate_tests(metafunc):
    if "case" in metafunc.fixturenames:
        kinds = KINDS[1:] if "merg" in metafunc.function.__name__ else KINDS  # wider heads have no weights of their own
        cases = [f"{kind}-{target}" for kind in kinds for target in TARGETS]
        cases = [case for case in cases if case not in TOO_WIDE]
        metafunc.parametrize("case", mostly(cases, *(case for case in OFTEN if case in cases)), indirect=True)


@pytest.fixture
def case(request, randomize, monkeypatch):
    kind, _, name = request.param.partition("-")
    tiny, target = TARGETS[name]
    monkeypatch.setitem(WHOLES, tiny, "proj_out" if tiny != "tiny_z_image" else "linear")
    close = 1e-10 if tiny == "tiny_sd3" else 1e-6  # diffusers rotates in float32
    return Case(request.getfixturevalue(tiny), target, kind, randomize, close)


def _heads(linear: nn.Linear, h: int, heads: int, features: torch.Tensor) -> torch.Tensor:
    bias = 0 if linear.bias is None else rows_of_head(linear.bias, h, heads)
    return features @ rows_of_head(linear.weight, h, heads).T + bias


def _normed(norm: nn.Module | None, made: torch.Tensor) -> torch.Tensor:
    """Root mean square over a head's columns."""
    if norm is None:
        return made
    return made / (made.square().mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight.double()


def _rotated(made: torch.Tensor, angles: torch.Tensor | None) -> torch.Tensor:
    """Each pair of neighbouring columns of (B, N, D) as a complex number, turned by (N, D/2) angles."""
    if angles is None:
        return made
    pairs = torch.complex(made[..., ::2], made[..., 1::2]) * torch.polar(torch.ones_like(angles), angles)
    return torch.stack([pairs.real, pairs.imag], dim=-1).flatten(-2)


def joint(
    host: nn.Module, x: torch.Tensor, c: torch.Tensor, adapters: tuple, angles: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Pictures (B, N, C) and texts (B, M, C), head by head, one product at a time.

        logits = D^-1/2 [q k^T + s (x Aq)(c Ak)^T for the picture's queries and the text's keys]

    q and k are normed, and then turned by `angles`, (M + N, D/2), of the text and then of the picture; of a foldable
    adapter Ak and Av are part of what is normed and turned, and all queries see them.
    """
    of_text, of_picture = (None, None) if angles is None else angles.split((c.shape[1], x.shape[1]))
    picture, text, heads = 0.0, 0.0, host.heads
    width = host.to_q.out_features // heads
    for h in range(heads):
        q, k, v = (_heads(p, h, heads, x) for p in (host.to_q, host.to_k, host.to_v))
        tq, tk, tv = (_heads(p, h, heads, c) for p in (host.add_q_proj, host.add_k_proj, host.add_v_proj))
        more_logits, more_values = torch.zeros(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
        for a in adapters:
            ak, av = (c @ rows_of_head(f, h, heads).T * a.scale for f in (a.k_down, a.v_down))  # B, M, R
            if isinstance(a, FreeFactors):
                more_logits = more_logits + x @ rows_of_head(a.q_down, h, heads).T @ ak.mT  # B, N, M
                more_values = more_values + av @ rows_of_head(a.out_up.T, h, heads)  # B, M, C
            else:
                tk = tk + ak @ rows_of_head(a.q_core, h, heads)
                tv = tv + av @ rows_of_head(a.out_core, h, heads)
        q, tq = _normed(host.norm_q, q), _normed(host.norm_added_q, tq)
        k, tk = _normed(host.norm_k, k), _normed(host.norm_added_k, tk)
        q, tq = _rotated(q, of_picture), _rotated(tq, of_text)
        k, tk = _rotated(k, of_picture), _rotated(tk, of_text)
        keys, values = torch.cat([k, tk], dim=1), torch.cat([v, tv], dim=1)
        logits = q @ keys.mT
        logits[..., x.shape[1] :] += more_logits
        weights = (logits * width**-0.5).softmax(-1)
        picture = picture + weights @ values @ rows_of_head(host.to_out[0].weight.T, h, heads)
        if more_values.ndim > 1:
            picture = picture + weights[..., x.shape[1] :] @ more_values
        weights = (tq @ keys.mT * width**-0.5).softmax(-1)
        if host.to_add_out is not None:
            text = text + weights @ values @ rows_of_head(host.to_add_out.weight.T, h, heads)
    bias, text_bias = (getattr(out, "bias", None) for out in (host.to_out[0], host.to_add_out))
    return picture + (0 if bias is None else bias), text + (0 if text_bias is None else text_bias)


@torch.no_grad()
@pytest.mark.parametrize("normed", [True, False])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tiny", list(JOINT))
def test_one_joint_attention_matches_the_slow_formula(tiny, kind, normed, fused, request, randomize):
    rotated = tiny != "tiny_sd3"
    if rotated and not normed:
        pytest.skip("there is none without norms")
    model = Case(request.getfixturevalue(tiny), JOINT[tiny], kind, randomize).adapted("dog", "cat")
    name, layer = next(iter(adapted_layers(model).items()))
    host, generator = model.get_submodule(name), torch.Generator().manual_seed(5)
    norms = [getattr(host, n) for n in ("norm_q", "norm_k", "norm_added_q", "norm_added_k")]
    for norm in norms:  # one of ones would hide which of them is taken
        norm.weight.copy_(0.5 + torch.rand(norm.weight.shape, generator=generator, dtype=torch.float64))
    if not normed:
        host.norm_q = host.norm_k = host.norm_added_q = host.norm_added_k = None
    if fused:
        model.base_model.model.fuse_qkv_projections()
    x, c = (torch.randn(2, tokens, 16, generator=generator, dtype=torch.float64) for tokens in (6, 5))
    angles, table = None, {}
    if rotated:
        angles = 3 * torch.rand(11, 4, generator=generator, dtype=torch.float64)
        turned = angles.float().repeat_interleave(2, dim=-1)  # of the base's columns: it knows of no others
        table = {"image_rotary_emb": (turned.cos(), turned.sin())}
    if tiny == "tiny_qwen_image":  # the picture's, and then the text's, as complex numbers
        turned = torch.polar(torch.ones_like(angles), angles).to(torch.complex64)
        table = {"image_rotary_emb": (turned[5:], turned[:5])}
    got = host(x, encoder_hidden_states=c, **table)
    if fused and not rotated:  # diffusers' processor of fused projections leaves the norms out
        host.norm_q = host.norm_k = host.norm_added_q = host.norm_added_k = None
    adapters = tuple(weights_of(layer, adapter) for adapter in ("dog", "cat"))
    close = 1e-6 if normed else 1e-11  # diffusers takes the mean square in float32
    for made, wanted in zip(got, joint(host, x, c, adapters, angles), strict=True):
        assert_close(made, wanted, rtol=0, atol=close)
    for fewer in (adapters[:1], ()):
        assert distance(got[0], joint(host, x, c, fewer, angles)[0]) > 0.05
    if rotated:
        assert distance(got[0], joint(host, x, c, adapters)[0]) > 0.05


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_a_normed_self_attention_matches_the_slow_formula(kind, tiny_sd3, randomize):
    model = Case(tiny_sd3, "attn2", kind, randomize).adapted("dog")
    name, layer = next(iter(adapted_layers(model).items()))
    host, a = model.get_submodule(name), weights_of(layer, "dog")
    x = torch.randn(2, 6, 16, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    bare, made = host.to_out[0].bias, host.to_out[0].bias
    for h in range(host.heads):
        q, k, v = (_heads(p, h, host.heads, x) for p in (host.to_q, host.to_k, host.to_v))
        out = rows_of_head(host.to_out[0].weight.T, h, host.heads)
        logits, values = _normed(host.norm_q, q) @ _normed(host.norm_k, k).mT, v @ out
        bare = bare + (logits * q.shape[-1] ** -0.5).softmax(-1) @ values
        ak, av = (x @ rows_of_head(f, h, host.heads).T * a.scale for f in (a.k_down, a.v_down))
        if kind == "free":
            logits = logits + x @ rows_of_head(a.q_down, h, host.heads).T @ ak.mT
            values = values + av @ rows_of_head(a.out_up.T, h, host.heads)
        else:
            k, v = k + ak @ rows_of_head(a.q_core, h, host.heads), v + av @ rows_of_head(a.out_core, h, host.heads)
            logits, values = _normed(host.norm_q, q) @ _normed(host.norm_k, k).mT, v @ out
        made = made + (logits * q.shape[-1] ** -0.5).softmax(-1) @ values
    assert_close(host(x), made, rtol=0, atol=1e-6)
    assert distance(made, bare) > 0.05


def test_the_text_is_what_is_adapted_by_default_and_what_a_free_adapter_leaves_alone(tiny_sd3, tiny_klein, randomize):
    model = tiny_sd3(torch.float64)
    assert default_targets(model) == ["attn"]
    assert default_targets(tiny_klein()) == OF_TWO.split()
    case = Case(tiny_sd3, "attn", "free", randomize)
    host = case.adapted("dog").get_submodule("base_model.model.transformer_blocks.0.attn")
    x, c = torch.randn(2, 6, 16, dtype=torch.float64), torch.randn(2, 5, 16, dtype=torch.float64)
    bare = tiny_sd3(torch.float64).get_submodule("transformer_blocks.0.attn")
    with torch.no_grad():
        (picture, text), (before, same) = host(x, encoder_hidden_states=c), bare(x, encoder_hidden_states=c)
    assert_close(text, same, rtol=0, atol=1e-12)  # the text does not look at what is for the picture
    assert distance(picture, before) > 0.01


@pytest.mark.parametrize("target", ["attn", "attn2"])
def test_a_free_adapter_has_no_weights_to_merge_into(target, tiny_sd3, randomize):
    model = Case(tiny_sd3, target, "free", randomize).adapted("dog")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match="keep it live, or train a foldable one"):
        model.merge_adapter()
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_processors_that_are_not_known_are_refused_by_name(tiny_sd3):
    class OtherJointProcessor:
        def __call__(self, *args, **kwargs):
            raise NotImplementedError

    model = tiny_sd3()
    model.transformer_blocks[1].attn.set_processor(OtherJointProcessor())
    with pytest.raises(ValueError, match=r"transformer_blocks.1.attn.*OtherJointProcessor uses in an unknown way|norm"):
        get_peft_model(model, ComcatConfig(r=1, target_modules=["attn"]))
    assert not any(seam.is_adapted(module) for module in model.modules())
    assert isinstance(get_peft_model(tiny_sd3(), ComcatConfig(r=1)).base_model, ComcatModel)


def _with_terms(
    adapters: tuple, h: int, heads: int, x: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | float, torch.Tensor | float]:
    """One head's keys and values, its more logits and its more outputs, of tokens (B, N, C) that look at themselves."""
    more_logits, more_values = 0.0, 0.0
    for a in adapters:
        ak, av = (x @ rows_of_head(f, h, heads).T * a.scale for f in (a.k_down, a.v_down))
        if isinstance(a, FreeFactors):
            more_logits = more_logits + x @ rows_of_head(a.q_down, h, heads).T @ ak.mT
            more_values = more_values + av @ rows_of_head(a.out_up.T, h, heads)
        else:
            k, v = k + ak @ rows_of_head(a.q_core, h, heads), v + av @ rows_of_head(a.out_core, h, heads)
    return k, v, more_logits, more_values


def stream(host: nn.Module, x: torch.Tensor, adapters: tuple, angles: torch.Tensor) -> torch.Tensor:
    """Words and then a picture, (B, N, C), with a feed-forward beside, from the rows and columns of two Linears."""
    made, inner = x @ host.to_qkv_mlp_proj.weight.T, host.heads * host.head_dim
    first, second = made[..., 3 * inner :].chunk(2, dim=-1)
    result = first * first.sigmoid() * second @ host.to_out.weight[:, inner:].T
    for h in range(host.heads):
        own = slice(h * host.head_dim, (h + 1) * host.head_dim)
        q, k, v = (made[..., n * inner : (n + 1) * inner][..., own] for n in range(3))
        k, v, more_logits, more_values = _with_terms(adapters, h, host.heads, x, k, v)
        q, k = _rotated(_normed(host.norm_q, q), angles), _rotated(_normed(host.norm_k, k), angles)
        weights = ((q @ k.mT + more_logits) * host.head_dim**-0.5).softmax(-1)
        result = result + weights @ (v @ host.to_out.weight[:, own].T + more_values)
    return result


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_an_attention_over_one_stream_matches_the_slow_formula(kind, tiny_klein, randomize):
    target = "single_transformer_blocks.0.attn"
    model, generator = Case(tiny_klein, target, kind, randomize).adapted("dog", "cat"), torch.Generator().manual_seed(5)
    layer = adapted_layers(model)[f"base_model.model.{target}"]
    host, x = layer.owner, torch.randn(2, 11, 16, generator=generator, dtype=torch.float64)
    for norm in (host.norm_q, host.norm_k):
        norm.weight.copy_(0.5 + torch.rand(norm.weight.shape, generator=generator, dtype=torch.float64))
    angles = 3 * torch.rand(11, 4, generator=generator, dtype=torch.float64)
    turned = angles.float().repeat_interleave(2, dim=-1)
    got = host(x, image_rotary_emb=(turned.cos(), turned.sin()))
    adapters = tuple(weights_of(layer, adapter) for adapter in ("dog", "cat"))
    assert_close(got, stream(host, x, adapters, angles), rtol=0, atol=1e-6)  # diffusers rotates in float32
    for fewer in (adapters[:1], ()):
        assert distance(got, stream(host, x, fewer, angles)) > 0.05


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS[1:])
def test_heads_that_are_projected_elsewhere_match_the_slow_formula(kind, tiny_flux1, randomize):
    target = "single_transformer_blocks.0.attn"
    model, generator = Case(tiny_flux1, target, kind, randomize).adapted("dog", "cat"), torch.Generator().manual_seed(5)
    layer = adapted_layers(model)[f"base_model.model.{target}"]
    host, x = layer.owner, torch.randn(2, 11, 16, generator=generator, dtype=torch.float64)
    angles = 3 * torch.rand(11, 4, generator=generator, dtype=torch.float64)
    turned = angles.float().repeat_interleave(2, dim=-1)
    got = host(x, image_rotary_emb=(turned.cos(), turned.sin()))
    adapters = tuple(weights_of(layer, adapter) for adapter in ("dog", "cat"))
    for used in (adapters, adapters[:1]):
        heads = []
        for h in range(host.heads):
            q, k, v = (_heads(p, h, host.heads, x) for p in (host.to_q, host.to_k, host.to_v))
            for a in used:
                ak, av = (x @ rows_of_head(f, h, host.heads).T * a.scale for f in (a.k_down, a.v_down))
                k, v = k + ak @ rows_of_head(a.q_core, h, host.heads), v + av @ rows_of_head(a.out_core, h, host.heads)
            q, k = _rotated(_normed(host.norm_q, q), angles), _rotated(_normed(host.norm_k, k), angles)
            heads.append((q @ k.mT * q.shape[-1] ** -0.5).softmax(-1) @ v)
        off = distance(got, torch.cat(heads, dim=-1))
        assert off < 1e-6 if used == adapters else off > 0.05  # diffusers rotates in float32


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_an_attention_over_one_stream_alone_matches_the_slow_formula(kind, tiny_z_image, randomize):
    """Of two samples, of which one is shorter; its padding is looked at by nobody."""
    target = "layers.0.attention"
    model = Case(tiny_z_image, target, kind, randomize).adapted("dog", "cat")
    generator = torch.Generator().manual_seed(5)
    layer = adapted_layers(model)[f"base_model.model.{target}"]
    host, x = layer.owner, torch.randn(2, 11, 16, generator=generator, dtype=torch.float64)
    for norm in (host.norm_q, host.norm_k):
        norm.weight.copy_(0.5 + torch.rand(norm.weight.shape, generator=generator, dtype=torch.float64))
    angles = 3 * torch.rand(2, 11, 4, generator=generator, dtype=torch.float64)
    there = torch.arange(11) < torch.tensor([[11], [7]])
    table = torch.polar(torch.ones_like(angles), angles).to(torch.complex64)
    got = host(x, attention_mask=there, freqs_cis=table)
    adapters = tuple(weights_of(layer, adapter) for adapter in ("dog", "cat"))
    for used in (adapters, adapters[:1], ()):
        made = 0.0
        for h in range(host.heads):
            q, k, v = (_heads(p, h, host.heads, x) for p in (host.to_q, host.to_k, host.to_v))
            k, v, more_logits, more_values = _with_terms(used, h, host.heads, x, k, v)
            q, k = _rotated(_normed(host.norm_q, q), angles), _rotated(_normed(host.norm_k, k), angles)
            logits = (q @ k.mT + more_logits) * q.shape[-1] ** -0.5
            weights = logits.masked_fill(~there[:, None], -torch.inf).softmax(-1)
            made = made + weights @ (v @ rows_of_head(host.to_out[0].weight.T, h, host.heads) + more_values)
        off = distance(got, made)
        assert off < 1e-6 if used == adapters else off > 0.05  # diffusers rotates in float32


def test_attentions_over_words_or_picture_alone_are_refused_by_name(tiny_z_image):
    model = tiny_z_image()
    assert default_targets(model) == ["layers.0.attention", "layers.1.attention"]
    with pytest.raises(ValueError, match="'(noise|context)_refiner.0.attention'.*blocks that see words and picture"):
        get_peft_model(model, ComcatConfig(r=1, foldable=True, target_modules=["attention"]))
    assert not any(seam.is_adapted(module) for module in model.modules())


def test_what_is_half_of_another_block_is_refused_by_name(tiny_flux1):
    model = tiny_flux1()
    with pytest.raises(ValueError, match="A free adapter widens heads.*outside of the attention: choose another kind"):
        get_peft_model(model, ComcatConfig(r=1, target_modules=["attn"]))
    assert not any(seam.is_adapted(module) for module in model.modules())
    wide = klein_transformer(mlp_ratio=4.0)
    with pytest.raises(ValueError, match=r"'single_transformer_blocks.0.attn'.*not three times as wide as its heads"):
        get_peft_model(wide, ComcatConfig(r=1, target_modules=["attn"]))
    assert isinstance(get_peft_model(wide, ComcatConfig(r=1)).base_model, ComcatModel)


@torch.no_grad()
@pytest.mark.parametrize("rank", [1, 2])
def test_columns_that_are_turned_are_even_in_number(rank, tiny_klein, randomize):
    """A free adapter of one column is filled up by one of zeros, in which nothing is."""
    case = Case(tiny_klein, OF_TWO, "free", randomize)
    model = case.adapted("dog", r=rank, alpha=float(rank))
    assert distance(case.run(model), case.base()) > 0.01


@pytest.mark.slow
@torch.no_grad()
def test_torch_compile_traces_a_rotated_block_in_one_graph(tiny_klein, randomize):
    model = Case(tiny_klein, OF_TWO, "free", randomize).adapted("dog", dtype=torch.float32)
    block, generator = model.base_model.model.transformer_blocks[0], torch.Generator().manual_seed(5)
    x, c, one, two = (torch.randn(2, *size, generator=generator) for size in ((6, 16), (5, 16), (1, 96), (1, 96)))
    angles = torch.rand(11, 8, generator=generator)
    asked = {"temb_mod_img": one, "temb_mod_txt": two, "image_rotary_emb": (angles.cos(), angles.sin())}
    compiled = torch.compile(block, backend="eager", fullgraph=True)(x, c, **asked)
    for got, wanted in zip(compiled, block(x, c, **asked), strict=True):
        assert torch.equal(got, wanted)
    torch._dynamo.reset()
