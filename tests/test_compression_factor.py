"""factor.py against the slow formulas: products materialized, every truncation the best there is."""

from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from comcat_diffusion.compression import factor
from comcat_diffusion.compression.cost import Unit
from comcat_diffusion.compression.factor import RIDGE, Moments, Narrowing, linear_product, qk_product, vo_product
from comcat_diffusion.compression.gates import Gate, candidate_widths
from tests import reference_compression as slow

H, D, C, E, N = 3, 4, 13, 11, 200
EXACT = {"rtol": 0.0, "atol": 1e-12}
WHITE = {"rtol": 0.0, "atol": 1e-9}  # through a root whose condition is the ridge's, a thousand, and its inverse


@pytest.fixture
def noise():
    generator = torch.Generator().manual_seed(0)
    return lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)


@pytest.fixture
def activations(noise):
    """Correlated tokens that are not centred, (N, C)."""
    return noise(N, C) @ noise(C, C) * torch.linspace(0.01, 2, C, dtype=torch.float64) + 2 * noise(C)


def seen(activations):
    moments = Moments.zero(activations.shape[-1], activations)
    for part in activations.split(70):
        moments.add(part.unsqueeze(0))
    return moments


def seen_by(weight, bias, activations):
    """What the layer (E, C) saw, as calibration counts it."""
    if weight.shape[0] >= weight.shape[1]:
        return seen(activations)
    narrowing = Narrowing.zero(weight.shape[1], weight.shape[0], weight)
    for part in activations.split(70):
        narrowing.add(part, part @ weight.T + (0 if bias is None else bias))
    return narrowing


def test_moments_are_those_of_all_tokens_together(activations):
    moments = seen(activations)
    assert moments.tokens == N
    assert_close(moments.mean, activations.mean(0), **EXACT)
    for centred, second in ((True, activations.T.cov(correction=0)), (False, activations.T @ activations / N)):
        ridge = RIDGE * second.diagonal().mean() * torch.eye(C, dtype=torch.float64)
        root = moments.root(centred)
        assert_close(root @ root.T, second + ridge, rtol=1e-12, atol=1e-10)


def test_a_token_of_weight_three_counts_as_three(activations):
    counts = torch.arange(N) % 4
    weighed, repeated = Moments.zero(C, activations), seen(activations.repeat_interleave(counts, 0))
    for part, weights in zip(activations.split(70), counts.double().split(70), strict=True):
        weighed.add(part.unsqueeze(0), weights)
    assert weighed.tokens == repeated.tokens == counts.sum()
    assert_close(weighed.mean, repeated.mean, **EXACT)
    assert_close(weighed.second(True), repeated.second(True), rtol=1e-10, atol=1e-10)
    assert (weighed.mean - activations.mean(0)).abs().max() > 1e-2


def test_sums_in_float32_know_the_spread_of_activations_far_from_zero(noise):
    far = noise(N, C) + 1000
    single = far.float()
    wanted = single.double().T.cov(correction=0)
    assert_close(seen(single).second(True), wanted, rtol=0, atol=1e-5)
    product = single.T @ single / N - single.mean(0).outer(single.mean(0))
    assert (product - wanted).abs().max() > 1e-2  # sums about zero would not


def test_moments_of_a_constant_weigh_nothing_and_few_tokens_can_be_inverted(noise):
    ones = torch.ones(5, C, dtype=torch.float64)
    constant = Moments.zero(C, ones)
    constant.add(ones)
    assert torch.equal(constant.root(True), torch.eye(C, dtype=torch.float64))
    narrowing, weight = Narrowing.zero(C, 3, ones), noise(3, C)
    narrowing.add(ones, ones @ weight.T)
    assert_close(narrowing.gram(weight.T, True), weight @ weight.T, **EXACT)
    few = seen(noise(3, C))
    assert torch.isfinite(torch.linalg.inv(few.root(True))).all()


@pytest.mark.parametrize("rank", [1, 2, D])
def test_the_qk_product_is_truncated_head_by_head_as_if_it_were_materialized(noise, rank):
    q, k, bias = noise(H * D, C), noise(H * D, E), noise(H * D)
    factors = qk_product(q, bias, k, H).truncated(rank)
    assert factors.down.shape == (H, C, rank) and factors.up.shape == (H, rank, E)
    for head in range(H):
        wanted = slow.truncated(slow.qk_matrix(q, k, head, H), rank)
        assert_close(factors.down[head] @ factors.up[head], wanted, **EXACT)
        rows = slice(head * D, (head + 1) * D)
        assert_close(factors.bias[head], k[rows].T @ bias[rows], **EXACT)  # the key bias is whole at any rank
    assert (factors.bias.abs().amax(1) > 0.1).all()


def test_the_whitened_qk_product_is_the_best_in_the_metric_of_both_sides(noise, activations):
    q, k, bias, context = noise(H * D, C), noise(H * D, E), noise(H * D), noise(N, E) @ noise(E, E) + 1
    product = qk_product(q, bias, k, H, seen(activations), seen(context))
    left = slow.root(activations.T.cov(correction=0), RIDGE)
    right = slow.root(context.T.cov(correction=0), RIDGE)
    factors = product.truncated(2)
    for head in range(H):
        matrix = slow.qk_matrix(q, k, head, H)
        wanted = slow.truncated(matrix, 2, left, right)
        assert_close(factors.down[head] @ factors.up[head], wanted, **WHITE)
        rows = slice(head * D, (head + 1) * D)
        key_bias = k[rows].T @ bias[rows] + activations.mean(0) @ (matrix - wanted)
        assert_close(factors.bias[head], key_bias, **WHITE)
        assert (slow.truncated(matrix, 2) - wanted).abs().max() > 1e-2  # whitening changes something


def test_without_a_query_bias_there_is_no_key_bias_and_queries_are_weighed_with_their_mean(noise, activations):
    q, k = noise(H * D, C), noise(H * D, C)
    product = qk_product(q, None, k, H, seen(activations), seen(activations))
    left = slow.root(activations.T @ activations / N, RIDGE)
    right = slow.root(activations.T.cov(correction=0), RIDGE)
    factors = product.truncated(2)
    assert factors.bias is None and factors.offset is None
    wanted = slow.truncated(slow.qk_matrix(q, k, 0, H), 2, left, right)
    assert_close(factors.down[0] @ factors.up[0], wanted, **WHITE)


@pytest.mark.parametrize("biases", ["both", "value", "out", "none"])
def test_the_vo_product_has_one_output_bias(noise, activations, biases):
    v, out = noise(H * D, C), noise(E, H * D)
    bv, bo = noise(H * D), noise(E)
    bv, bo = (bv if biases in ("both", "value") else None), (bo if biases in ("both", "out") else None)
    for moments in (None, seen(activations)):
        factors = vo_product(v, bv, out, bo, H, moments).truncated(D)
        whole = torch.zeros(E, dtype=torch.float64)
        for bias in (None if bv is None else out @ bv, bo):
            whole = whole if bias is None else whole + bias
        assert_close(sum(factors.down[h] @ factors.up[h] for h in range(H)), (out @ v).T, rtol=0, atol=1e-10)
        if biases == "none":
            assert factors.bias is None
        else:
            assert_close(factors.bias.sum(0), whole, rtol=0, atol=1e-10)


@pytest.mark.parametrize("into, outof", [(13, 30), (30, 13), (13, 13)])
@pytest.mark.parametrize("whitened", [False, True])
@pytest.mark.parametrize("biased", [False, True])
def test_a_linear_layer_is_truncated_to_the_best_of_its_rank(noise, into, outof, whitened, biased):
    weight, bias = noise(outof, into), noise(outof) if biased else None
    inputs = noise(N, into) @ noise(into, into) + 1
    product = linear_product(weight, bias, seen_by(weight, bias, inputs) if whitened else None)
    second = inputs.T.cov(correction=0) if biased else inputs.T @ inputs / N
    left = slow.root(second, RIDGE) if whitened else None
    for rank in (1, 6, 13):
        factors = product.truncated(rank)
        wanted = slow.truncated(weight.T, rank, left)
        assert_close(factors.down[0] @ factors.up[0], wanted, rtol=0, atol=1e-8)
        if biased and whitened:
            assert_close(factors.bias[0], bias + inputs.mean(0) @ (weight.T - wanted), rtol=0, atol=1e-7)
    singular = torch.linalg.svdvals(weight.T if left is None else left @ weight.T)
    assert_close(product.s[0], singular, rtol=1e-6, atol=1e-6)


def test_a_layer_of_lower_rank_than_its_shape_is_kept_whole_by_that_rank(noise):
    weight = noise(20, 3) @ noise(3, 15)
    product = linear_product(weight, None)
    factors = product.truncated(3)
    assert_close(factors.down[0] @ factors.up[0], weight.T, rtol=0, atol=1e-6)  # Gram matrices see half the digits
    assert product.energy[3] > 1 - 1e-12 and product.energy[2] < 1 - 1e-3
    full = product.truncated(15)
    assert torch.isfinite(full.down).all() and torch.isfinite(full.up).all()


def test_a_weight_of_zeros_has_all_of_its_energy_in_nothing():
    product = linear_product(torch.zeros(4, 5, dtype=torch.float64), torch.ones(4, dtype=torch.float64))
    assert torch.equal(product.energy, torch.ones(5, dtype=torch.float64))
    assert torch.equal(product.truncated(2).bias[0], torch.ones(4, dtype=torch.float64))


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_the_error_on_the_calibration_data_is_never_larger_with_whitening(noise, activations, rank):
    """Of a linear layer, of the values and of the logits up to what softmax ignores."""
    weight, bias = noise(E, C), noise(E)
    linear = [linear_product(weight, bias, m).truncated(rank) for m in (None, seen_by(weight, bias, activations))]
    errors = [
        (activations @ f.down[0] @ f.up[0] + f.bias[0] - activations @ weight.T - bias).square().mean() for f in linear
    ]
    assert errors[1] < errors[0] * (1 - 1e-3)
    q, k, bias = noise(H * D, C), noise(H * D, C), noise(H * D)
    centred = activations - activations.mean(0)
    products = [qk_product(q, bias, k, H, m, m).truncated(rank) for m in (None, seen(activations))]
    for head in range(H):
        rows = slice(head * D, (head + 1) * D)
        dense = (activations @ q[rows].T + bias[rows]) @ (centred @ k[rows].T).T
        errors = [
            ((activations @ f.down[head] @ f.up[head] + f.bias[head]) @ centred.T - dense).square().mean()
            for f in products
        ]
        assert errors[1] < errors[0] * (1 - 1e-3)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_mask_on_the_singular_values_is_the_mixture_of_all_candidates(noise, seed):
    weight = noise(E, C)
    unit = Unit("u", "u", "linear", "mlp", 1, E, 0, C + E, 0, 10 * C * E)
    widths = candidate_widths(unit, 4)
    gate = Gate(unit, widths).double()
    gate.draw(1.0, torch.Generator().manual_seed(seed))
    product = linear_product(weight, None)
    factors = product.truncated(E)
    masked = factors.down[0] * gate.mask() @ factors.up[0]
    ranks = [E if width is None else width for width in widths]
    assert len(ranks) == 5 and gate.chosen.max() < 0.99
    assert_close(masked, slow.mixture(weight.T, ranks, gate.chosen), **EXACT)


def test_what_factor_computes_depends_on_torch_and_heads_alone():
    lines = Path(factor.__file__).read_text().splitlines()
    imports = [line for line in lines if line.startswith(("import", "from"))]
    assert imports == [
        "from dataclasses import dataclass",
        "import torch",
        "from comcat_diffusion import heads as maths",
    ]
