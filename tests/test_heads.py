"""heads.py against formulas written out per head, in float64."""

import pytest
import torch
from torch.testing import assert_close

from comcat_diffusion import heads as maths

H, D, R, C, E = 3, 4, 2, 13, 11
EXACT = {"rtol": 0.0, "atol": 1e-12}


@pytest.fixture
def noise():
    generator = torch.Generator().manual_seed(0)
    return lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)


def test_split_heads_puts_the_channels_of_head_0_first_and_join_heads_undoes_it(noise):
    features = noise(2, 5, H * D)
    split = maths.split_heads(features, H)
    assert split.shape == (2, 5, H, D)
    for head in range(H):
        assert torch.equal(split[..., head, :], features[..., head * D : (head + 1) * D])
    assert torch.equal(maths.join_heads(split), features)


def test_interleave_widens_each_head_and_separate_undoes_it(noise):
    base, one, two = noise(2, 5, H * D), noise(2, 5, H * R), noise(2, 5, H * 1)
    wide = maths.interleave(base, one, two, heads=H)
    expected = [
        part[..., head * width : (head + 1) * width]
        for head in range(H)
        for part, width in ((base, D), (one, R), (two, 1))
    ]
    assert torch.equal(wide, torch.cat(expected, dim=-1))
    for part, back in zip((base, one, two), maths.separate(wide, D, R, 1, heads=H), strict=True):
        assert torch.equal(part, back)


def test_interleave_of_nothing_more_changes_nothing(noise):
    base = noise(2, 5, H * D)
    assert torch.equal(maths.interleave(base, heads=H), base)


def test_widen_in_projects_to_the_interleaved_features(noise):
    weight, extra, bias, more = noise(H * D, C), noise(H * R, C), noise(H * D), noise(H * R)
    x = noise(2, 5, C)
    wide = torch.nn.functional.linear(x, maths.widen_in(weight, extra, heads=H), maths.widen_in(bias, more, heads=H))
    assert_close(wide, maths.interleave(x @ weight.T + bias, x @ extra.T + more, heads=H), **EXACT)


def test_widen_out_sums_the_parts_of_the_interleaved_features(noise):
    weight, extra = noise(C, H * D), noise(C, H * R)
    mixed, more = noise(2, 5, H * D), noise(2, 5, H * R)
    wide = maths.interleave(mixed, more, heads=H) @ maths.widen_out(weight, extra, heads=H).T
    assert_close(wide, mixed @ weight.T + more @ extra.T, **EXACT)


def test_logit_gain_turns_the_wide_scale_into_the_trained_one():
    assert maths.logit_gain(40, 42) * 42**-0.5 == pytest.approx(40**-0.5, rel=1e-15)


def test_in_factors_are_the_transposed_rows_of_each_head_and_in_weight_undoes_them(noise):
    weight = noise(H * D, C)
    factors = maths.in_factors(weight, H)
    assert factors.shape == (H, C, D)
    for head in range(H):
        assert torch.equal(factors[head], weight[head * D : (head + 1) * D].T)
    assert torch.equal(maths.in_weight(factors), weight)


def test_out_factors_are_the_transposed_columns_of_each_head_and_out_weight_undoes_them(noise):
    weight = noise(E, H * D)
    factors = maths.out_factors(weight, H)
    assert factors.shape == (H, D, E)
    for head in range(H):
        assert torch.equal(factors[head], weight[:, head * D : (head + 1) * D].T)
    assert torch.equal(maths.out_weight(factors), weight)


def test_joint_product_is_each_heads_product(noise):
    left, right = noise(H * D, C), noise(E, H * D)
    product = maths.joint_product(maths.in_factors(left, H), maths.out_factors(right, H))
    for head in range(H):
        rows = slice(head * D, (head + 1) * D)
        assert_close(product[head], (right[:, rows] @ left[rows]).T, **EXACT)


@pytest.mark.parametrize("channels, width, outputs", [(13, 4, 11), (5, 9, 13), (13, 9, 5), (6, 6, 6), (7, 1, 7)])
def test_product_svd_is_the_svd_of_the_materialized_product(noise, channels, width, outputs):
    left, right = noise(H, channels, width), noise(H, width, outputs)
    u, s, vh = maths.product_svd(left, right)
    kept = min(channels, width, outputs)
    assert u.shape == (H, channels, kept) and s.shape == (H, kept) and vh.shape == (H, kept, outputs)
    for head in range(H):
        assert_close(s[head], torch.linalg.svdvals(left[head] @ right[head])[:kept], **EXACT)
        assert_close(u[head] * s[head] @ vh[head], left[head] @ right[head], **EXACT)
        assert_close(u[head].T @ u[head], torch.eye(kept, dtype=torch.float64), **EXACT)
        assert_close(vh[head] @ vh[head].T, torch.eye(kept, dtype=torch.float64), **EXACT)


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_truncate_loses_exactly_the_tail_of_the_singular_values(noise, rank):
    left, right = noise(H, C, D), noise(H, D, E)
    u, s, vh = maths.product_svd(left, right)
    down, up = maths.truncate(u, s, vh, rank)
    assert down.shape == (H, C, rank) and up.shape == (H, rank, E)
    error = torch.linalg.matrix_norm(left @ right - down @ up)
    assert_close(error, s[:, rank:].square().sum(dim=1).sqrt(), **EXACT)  # Eckart-Young: no factors do better
    assert error.min() > 0.1


def test_truncate_to_the_full_rank_is_exact_and_balanced(noise):
    left, right = noise(H, C, D), noise(H, D, E)
    down, up = maths.truncate(*maths.product_svd(left, right), rank=D)
    assert_close(down @ up, left @ right, **EXACT)
    assert_close(down.mT @ down, up @ up.mT, **EXACT)


def test_fold_query_bias_leaves_the_softmax_unchanged(noise):
    wq, wk, bq, bk = noise(H * D, C), noise(H * D, E), noise(H * D), noise(H * D)
    x, c = noise(5, C), noise(7, E)
    folded = maths.fold_query_bias(bq, wk, H)
    assert folded.shape == (H, E)
    for head in range(H):
        rows = slice(head * D, (head + 1) * D)
        whole = (x @ wq[rows].T + bq[rows]) @ (c @ wk[rows].T + bk[rows]).T
        product = x @ wq[rows].T @ wk[rows] @ c.T
        short = product + c @ folded[head]
        assert_close(short.softmax(dim=-1), whole.softmax(dim=-1), **EXACT)
        assert (product.softmax(dim=-1) - whole.softmax(dim=-1)).abs().max() > 0.1


@pytest.mark.parametrize("with_out_bias", [True, False])
def test_fold_value_bias_leaves_the_output_unchanged(noise, with_out_bias):
    values, wo, bv = noise(7, H * D), noise(C, H * D), noise(H * D)
    bo = noise(C) if with_out_bias else None
    weights = noise(H, 5, 7).softmax(dim=-1)

    def mixed(features):
        return torch.cat([weights[h] @ features[:, h * D : (h + 1) * D] for h in range(H)], dim=-1)

    whole = mixed(values + bv) @ wo.T + (0 if bo is None else bo)
    assert_close(mixed(values) @ wo.T + maths.fold_value_bias(bv, wo, bo), whole, **EXACT)
    assert (mixed(values) @ wo.T - whole).abs().max() > 0.1
