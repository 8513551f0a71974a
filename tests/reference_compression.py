"""The slow formulas of compression, in float64: products materialized as C x C, candidates run one by one.

    logits_h = D^-1/2 [x M_h c^T + c u_h]      M_h the truncation of W_Q W_K^T,  u_h = W_K b_Q + mu (W_Q W_K^T - M_h)
    out      = sum_h softmax(logits_h) c V_h + b

Letters: B batch, N tokens, H heads, D head width, R rank, C channels.
"""

import torch

from tests.reference import rows_of_head


def root(second: torch.Tensor, ridge: float) -> torch.Tensor:
    """The symmetric square root (another root than the code's, which must not matter) with the ridge: (C, C)."""
    second = second + ridge * second.diagonal().mean() * torch.eye(len(second), dtype=torch.float64)
    values, vectors = torch.linalg.eigh(second)
    return vectors @ values.sqrt().diag() @ vectors.T


def truncated(matrix: torch.Tensor, rank: int, left=None, right=None) -> torch.Tensor:
    """The matrix of this rank nearest to (C, E), in the metric of the roots if these are given."""
    left = torch.eye(matrix.shape[0], dtype=torch.float64) if left is None else left
    right = torch.eye(matrix.shape[1], dtype=torch.float64) if right is None else right
    u, s, vh = torch.linalg.svd(left @ matrix @ right, full_matrices=False)
    near = u[:, :rank] * s[:rank] @ vh[:rank]
    return torch.linalg.inv(left) @ near @ torch.linalg.inv(right)


def qk_matrix(q, k, head: int, heads: int) -> torch.Tensor:
    """W_Q W_K^T of one head from two weights (H*D, C): (C, C)."""
    return rows_of_head(q, head, heads).T @ rows_of_head(k, head, heads)


def vo_matrix(v, out, head: int, heads: int) -> torch.Tensor:
    """W_V W_O of one head from (H*D, C) and (C, H*D): (C, C)."""
    return rows_of_head(v, head, heads).T @ rows_of_head(out.T, head, heads)


def attention(x, c, projections, heads: int, qk_rank: int, vo_rank: int) -> torch.Tensor:
    """(B, N, C), (B, M, C) -> (B, N, C): the dense attention with both products of every head truncated."""
    q, k, v, out = projections
    x, c = x.double(), c.double()
    width = q.weight.shape[0] // heads
    total = torch.zeros(*x.shape[:2], out.weight.shape[0], dtype=torch.float64)
    for head in range(heads):
        logits = x @ truncated(qk_matrix(q.weight, k.weight, head, heads), qk_rank) @ c.transpose(1, 2)
        if q.bias is not None:
            key_bias = rows_of_head(k.weight, head, heads).T @ rows_of_head(q.bias, head, heads)  # C
            logits = logits + (c @ key_bias).unsqueeze(1)
        values = c @ truncated(vo_matrix(v.weight, out.weight, head, heads), vo_rank)
        total = total + (logits * width**-0.5).softmax(-1) @ values
    for bias in (None if v.bias is None else out.weight.double() @ v.bias.double(), out.bias):
        total = total if bias is None else total + bias
    return total


def mixture(matrix: torch.Tensor, ranks, chances) -> torch.Tensor:
    """The authors' form: a weighted sum of truncations, each made by itself."""
    return sum(chance * truncated(matrix, rank) for rank, chance in zip(ranks, chances, strict=True))


def ridge_regression(x: torch.Tensor, y: torch.Tensor, prior: torch.Tensor, ridge: float, biased: bool):
    """min mean |y - x W - b|^2 + r |W - W_0|^2, token by token in one stacked problem: W (C, E), b (E,)."""
    middle, goal = (x.mean(0), y.mean(0)) if biased else (torch.zeros(x.shape[1]), torch.zeros(y.shape[1]))
    x, y = x.double() - middle, y.double() - goal
    amount = ridge * x.square().mean()
    rows = torch.cat([x / len(x) ** 0.5, amount.sqrt() * torch.eye(x.shape[1], dtype=torch.float64)])
    wanted = torch.cat([y / len(y) ** 0.5, amount.sqrt() * prior])
    weight = torch.linalg.lstsq(rows, wanted).solution
    return weight, goal - middle @ weight if biased else None


def token_sensitivity(model, blocks, pixels, draws: int, seed: int):
    """Of a picture's random output direction, one picture and draw after the other: mean square gradients by block and
    token (L, N), and second moments by block (L, C, C)."""
    chance, total, second = torch.Generator().manual_seed(seed), 0.0, 0.0
    for _ in range(draws):
        for picture in pixels.split(1):
            kept = []
            handles = [b.register_forward_hook(lambda *a, kept=kept: kept.append(a[2])) for b in blocks]
            features = model(picture).last_hidden_state[0]  # N, C
            for handle in handles:
                handle.remove()
            loss = 0.0
            for place, feature in enumerate(features):
                share = 0.5 if place == 0 else 0.5 / (len(features) - 1)
                step = torch.randn(len(feature), generator=chance, dtype=torch.float64)
                unit = (feature / feature.norm()).detach()
                step = step - (step @ unit) * unit
                loss = loss + share**0.5 * (step @ feature) / feature.norm().detach()
            gradients = [g[0] for g in torch.autograd.grad(loss, kept)]
            total = total + torch.stack([g.square().sum(-1) for g in gradients])
            second = second + torch.stack([g.T @ g for g in gradients])
    return total / (draws * len(pixels)), second / (draws * len(pixels))


def greedy_neurons(covariance: torch.Tensor, gains: torch.Tensor, ridge: float):
    """Neurons one by one, what is left of the output (E, M) gains computed anew from the Schur complement each time."""
    covariance = covariance + ridge * covariance.diagonal().mean() * torch.eye(len(covariance), dtype=torch.float64)

    def left(picked: list[int]) -> float:
        return float((gains @ unexplained(covariance, picked) @ gains.T).trace())

    picked, lost = [], [left([])]
    for _ in range(len(covariance)):
        free = [i for i in range(len(covariance)) if i not in picked]
        picked.append(min(free, key=lambda i: left([*picked, i])))
        lost.append(left(picked))
    return picked, lost


def unexplained(covariance: torch.Tensor, picked: list[int]) -> torch.Tensor:
    """(M, M): covariance of the neurons given the picked ones."""
    if not picked:
        return covariance
    inner = torch.linalg.inv(covariance[picked][:, picked])
    return covariance - covariance[:, picked] @ inner @ covariance[picked]
