"""Least squares over activations with a ridge that pictures which were not fitted choose. Tensors in, tensors out.

    min over W, b of  mean |y - x W - b|^2 + r |W - W_0|^2

The tokens come in groups of similar pictures. Each group in turn is left out, and the ridge r is the one that predicts
it best: a few photographs show few directions, and what is fitted to them alone does not carry over to others.
All sums are kept by group, so that leaving one out costs no second pass.

Letters: N tokens, C channels in, K fewer of them, E channels out, G groups.
"""

import torch

RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)  # of the mean variance of a channel
UNTESTED = 1e-2  # the ridge where there is one group only, so that none can be left out
WHOLE = 256  # columns whose products are taken at once, both halves of the square
DIRECTIONS = 64  # of the output, at random, that a ridge is chosen by where there are more: they cost a solution each


class Regression:
    """Sums over tokens from which the regression of y on x follows, by group, as deviations from a pivot."""

    def __init__(self, groups: int) -> None:
        self.tokens = torch.zeros(groups, dtype=torch.float64)
        self.pivots: tuple[torch.Tensor, torch.Tensor] | None = None  # C; E. So float32 is enough for the products
        self.sums: tuple[torch.Tensor, ...] = ()  # x (G, C), y (G, E), xx (G, C, C), xy (G, C, E)

    def add(self, x: torch.Tensor, y: torch.Tensor, groups: torch.Tensor, weights: torch.Tensor | None = None) -> None:
        """Count in the activations (B, ..., C), what is wanted of them (B, ..., E), and the pictures' groups (B,).

        `weights` (...) say how much each token of a picture counts; all alike if they are not given.
        """
        each = x[0].numel() // x.shape[-1]  # tokens of a picture
        x, y = (_precise(values) for values in (x, y))  # N, C; N, E
        if self.pivots is None:
            self.pivots = x.mean(0).double(), y.mean(0).double()
            size, into, outof = len(self.tokens), x.shape[-1], y.shape[-1]
            shapes = ((into,), (outof,), (into, into), (into, outof))
            self.sums = tuple(torch.zeros(size, *shape, dtype=torch.float64) for shape in shapes)
        x, y = x - self.pivots[0].to(x.dtype), y - self.pivots[1].to(y.dtype)
        root = (torch.ones(each) if weights is None else weights.flatten().cpu()).to(x.dtype).sqrt()
        root = root.repeat(len(groups)).unsqueeze(-1)  # N, 1
        x, y, root = root * x, root * y, root
        belongs = groups.cpu().repeat_interleave(each)  # N
        for group in groups.unique().tolist():
            mine, wanted = x[belongs == group], y[belongs == group]
            counted = root[belongs == group]  # n, 1
            self.tokens[group] += float(counted.square().sum())
            parts = ((counted * mine).sum(0), (counted * wanted).sum(0), gram(mine), mine.mT @ wanted)
            for total, part in zip(self.sums, parts, strict=True):
                total[group] += part.double()

    def only(self, kept: torch.Tensor) -> "Regression":
        """The regression on these channels (K,) of x."""
        x, y, xx, xy = self.sums
        return self._with(self.pivots[0][kept], (x[:, kept], y, xx[:, kept][:, :, kept], xy[:, kept]))

    def through(self, basis: torch.Tensor) -> "Regression":
        """The regression on x B, for a basis (C, K)."""
        x, y, xx, xy = self.sums
        return self._with(self.pivots[0] @ basis, (x @ basis, y, basis.mT @ xx @ basis, basis.mT @ xy))

    def _with(self, pivot: torch.Tensor, sums: tuple[torch.Tensor, ...]) -> "Regression":
        made = Regression(len(self.tokens))
        made.tokens, made.pivots, made.sums = self.tokens, (pivot, self.pivots[1]), sums
        return made

    def moments(self, chosen: torch.Tensor, centred: bool) -> tuple[torch.Tensor, ...]:
        """(mean x, mean y, second moments xx and xy) of some groups; not centred, the moments are around zero."""
        tokens = self.tokens[chosen].sum()
        x, y, xx, xy = (total[chosen].sum(0) / tokens for total in self.sums)
        xx, xy = xx - x.outer(x), xy - x.outer(y)
        x, y = x + self.pivots[0], y + self.pivots[1]
        return (x, y, xx, xy) if centred else (x, y, xx + x.outer(x), xy + x.outer(y))

    @property
    def covariance(self) -> torch.Tensor:
        """(C, C) of x over all groups."""
        return self.moments(self.tokens > 0, True)[2]

    def solve(self, prior: torch.Tensor, biased: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The weight (C, E) near to `prior` that predicts y best, and its bias (E,) if one may stand."""
        x, y, xx, xy = self.moments(self.tokens > 0, biased)
        weight = _fit(xx, xy, prior, self.ridge(prior, biased))
        return weight, y - x @ weight if biased else None

    def ridge(self, prior: torch.Tensor, biased: bool) -> float:
        """Which of RIDGES predicts the groups best that are left out."""
        present = self.tokens > 0
        if int(present.sum()) < 2:
            return UNTESTED
        losses, some = torch.zeros(len(RIDGES), dtype=torch.float64), _some(prior.shape[1])
        prior = prior @ some
        for group in present.nonzero().flatten().tolist():
            out = torch.zeros_like(present)
            out[group] = True
            (x, y, xx, xy), (other_x, other_y, other_xx, other_xy) = (
                (of_x, of_y @ some, of_xx, of_xy @ some)
                for of_x, of_y, of_xx, of_xy in (self.moments(chosen, biased) for chosen in (present & ~out, out))
            )
            for place, ridge in enumerate(RIDGES):
                weight = _fit(xx, xy, prior, ridge)
                error = (weight * (other_xx @ weight - 2 * other_xy)).sum()  # but for the variance of y, always there
                if biased:
                    error = error + ((other_y - y) - (other_x - x) @ weight).square().sum()
                losses[place] += self.tokens[group] * error
        return RIDGES[int(losses.argmin())]


def gram(x: torch.Tensor) -> torch.Tensor:
    """x^T x, (C, C), of (N, C): what stands on both sides of the diagonal is computed once, half of the work."""
    if x.shape[1] <= WHOLE:
        return x.mT @ x
    first, second = x.tensor_split(2, dim=1)
    across = first.mT @ second
    return torch.cat([torch.cat([gram(first), across], 1), torch.cat([across.mT, gram(second)], 1)])


def _some(size: int) -> torch.Tensor:
    """(E, E), or (E, DIRECTIONS) with columns at random, always the same."""
    if size <= DIRECTIONS:
        return torch.eye(size, dtype=torch.float64)
    return torch.randn(size, DIRECTIONS, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def _precise(values: torch.Tensor) -> torch.Tensor:
    """(B, ..., C) as (N, C) on the CPU, in at least float32."""
    return values.detach().flatten(0, -2).to("cpu", torch.promote_types(values.dtype, torch.float32))


def _fit(xx: torch.Tensor, xy: torch.Tensor, prior: torch.Tensor, ridge: float) -> torch.Tensor:
    amount = ridge * xx.diagonal().mean().clamp_min(torch.finfo(xx.dtype).tiny)
    raised, wanted = xx + amount * torch.eye(len(xx), dtype=xx.dtype), xy + amount * prior
    root, failed = torch.linalg.cholesky_ex(raised)
    if failed:  # rounding of the batches' sums can leave eigenvalues below zero
        return torch.linalg.solve(raised, wanted)
    return torch.cholesky_solve(wanted, root)
