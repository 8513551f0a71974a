"""Low-rank factors of an attention head's two products and of a linear layer. Tensors in, tensors out, in float64.

With calibration activations the singular value decomposition is that of the whitened product L_x^T M L_c, where
L L^T = S is the second moment of what goes in, so what is dropped is what the data does not use: the error
tr(dM^T S_x dM S_c) is the mean square error of the output over the calibration data. Three terms come for free:

- Softmax ignores what is constant along the context, so keys are whitened by their covariance, not their moment.
- Where a bias follows, it takes over what truncation does to the mean input, mu (M - M_r): the truncated part then has
  to fit deviations from the mean only, and the covariance whitens it.
- A query bias is one more column of the keys, fold_query_bias(b_Q), exact and outside of the truncation.

Letters: H heads, C channels in, E channels out, D head width, K rank of the whole product, R rank kept.
"""

from dataclasses import dataclass

import torch

from comcat_diffusion import heads as maths

RIDGE = 1e-6  # of the mean variance of a channel, added to every channel so that few pictures do not divide by zero


@dataclass
class Moments:
    """Sums over tokens from which mean and covariance of the activations that enter a layer follow.

    They are sums of deviations from a pivot, the mean of the first tokens: so float32 is enough to hold them.
    """

    tokens: float  # their weights together
    pivot: torch.Tensor  # C
    total: torch.Tensor  # C
    square: torch.Tensor  # C, C; or its diagonal, C

    @classmethod
    def zero(cls, channels: int, like: torch.Tensor, diagonal: bool = False) -> "Moments":
        """No tokens seen yet; sums are kept where `like` is, in its precision, at least float32."""
        about = {"device": like.device, "dtype": torch.promote_types(like.dtype, torch.float32)}
        pivot, total = torch.zeros(2, channels, **about)
        return cls(0, pivot, total, torch.zeros((channels,) if diagonal else (channels, channels), **about))

    def add(self, activations: torch.Tensor, weights: torch.Tensor | None = None) -> None:
        """Count (..., C) activations in; `weights`, which broadcast to (...), say how much each token counts."""
        tokens = activations.detach().reshape(-1, activations.shape[-1]).to(self.pivot.dtype)  # N, C
        if not self.tokens:
            self.pivot = tokens.mean(0)
        tokens = tokens - self.pivot
        if weights is None:
            self.tokens += len(tokens)
            self.total += tokens.sum(0)
        else:
            weights = weights.to(tokens).expand(activations.shape[:-1]).reshape(-1, 1)  # N, 1
            self.tokens += float(weights.sum())
            self.total += (weights * tokens).sum(0)
            tokens = weights.sqrt() * tokens
        if self.square.ndim == 1:
            self.square += tokens.square_().sum(0)
        else:
            self.square.addmm_(tokens.mT, tokens)

    @property
    def mean(self) -> torch.Tensor:
        """(C,)."""
        return (self.pivot.double() + self.total.double() / self.tokens).cpu()

    def second(self, centred: bool) -> torch.Tensor:
        """Covariance or, not centred, second moment: (C, C), or its diagonal (C,)."""
        off = self.total.double().cpu() / self.tokens  # C, the mean's distance from the pivot
        outer = (lambda x: x.square()) if self.square.ndim == 1 else (lambda x: x.outer(x))
        second = self.square.double().cpu() / self.tokens - outer(off)
        return second if centred else second + outer(self.mean)

    def ridge(self, centred: bool) -> float:
        """What is added to the second moment of every channel."""
        second = self.second(centred)
        return RIDGE * float((second if second.ndim == 1 else second.diagonal()).mean().clamp_min(0))

    def root(self, centred: bool) -> torch.Tensor:
        """Lower L (C, C) with L L^T = covariance (or, not centred, second moment) plus the ridge."""
        second, ridge = self.second(centred), self.ridge(centred)
        if ridge == 0:  # the layer never saw anything but one constant input: nothing to weigh by
            return torch.eye(len(second), dtype=torch.float64)
        # Rounding of the batches' sums can leave eigenvalues slightly below zero; a larger ridge then mends it.
        for more in (1, 1e2, 1e4):
            root, failed = torch.linalg.cholesky_ex(second + torch.eye(len(second)).double() * (more * ridge))
            if not failed:
                return root
        raise ValueError("The calibration activations have no usable covariance; use more pictures, or float32.")


@dataclass
class Narrowing:
    """What a layer with fewer outputs than inputs has seen.

    The second moment of its outputs is W^T S W, all that its truncation asks of S: a sixteenth of the numbers in the
    second layer of an MLP.
    """

    inputs: Moments  # with the diagonal only
    outputs: Moments

    @classmethod
    def zero(cls, into: int, outof: int, like: torch.Tensor) -> "Narrowing":
        """No tokens seen yet."""
        return cls(Moments.zero(into, like, diagonal=True), Moments.zero(outof, like))

    def add(self, activations: torch.Tensor, results: torch.Tensor, weights: torch.Tensor | None = None) -> None:
        """Count (..., C) activations and what the layer makes of them, (..., E), in."""
        self.inputs.add(activations, weights)
        self.outputs.add(results, weights)

    @property
    def mean(self) -> torch.Tensor:
        """(C,) of the inputs."""
        return self.inputs.mean

    def gram(self, matrix: torch.Tensor, centred: bool) -> torch.Tensor:
        """W^T (S + ridge) W, (E, E), of the layer's matrix (C, E)."""
        ridge = self.inputs.ridge(centred)
        return self.outputs.second(centred) + ridge * (matrix.mT @ matrix) if ridge else matrix.mT @ matrix


@dataclass(frozen=True)
class Factors:
    """A product as x -> (x down - offset) up + constant, per head; the mask or the truncation acts in between."""

    down: torch.Tensor  # H, C, R
    up: torch.Tensor  # H, R, E
    offset: torch.Tensor | None = None  # H, R: the mean input, lowered
    constant: torch.Tensor | None = None  # H, E: what the mean input and the bias give; None where no bias may stand

    @property
    def bias(self) -> torch.Tensor | None:
        """(H, E): the constant with the offset carried through."""
        if self.constant is None or self.offset is None:
            return self.constant
        return self.constant - (self.offset.unsqueeze(-2) @ self.up).squeeze(-2)


@dataclass(frozen=True)
class Product:
    """The decomposition of a product: every truncation of it."""

    u: torch.Tensor  # H, C, K
    s: torch.Tensor  # H, K, descending: error by dropping it, whitened
    vh: torch.Tensor  # H, K, E
    mean: torch.Tensor | None = None  # C
    constant: torch.Tensor | None = None  # H, E

    def truncated(self, rank: int) -> Factors:
        """The best factors of this rank, balanced: both carry sqrt(s)."""
        down, up = maths.truncate(self.u, self.s, self.vh, rank)
        return Factors(down, up, None if self.mean is None else self.mean @ down, self.constant)

    @property
    def energy(self) -> torch.Tensor:
        """(K + 1,): the part of the squared singular values, over all heads, that 0, 1, ... K ranks keep."""
        each = self.s.square().sum(0)  # K
        kept = torch.cat([each.new_zeros(1), each.cumsum(0)])
        return kept / kept[-1] if kept[-1] > 0 else torch.ones_like(kept)


def qk_product(
    q_weight: torch.Tensor,
    q_bias: torch.Tensor | None,
    k_weight: torch.Tensor,
    heads: int,
    query: Moments | None = None,
    context: Moments | None = None,
) -> Product:
    """W_Q W_K^T of every head, (H*D, C) and (H*D, E); `constant` (H, E) is the key bias that replaces b_Q."""
    left, right = maths.in_factors(q_weight.double(), heads), maths.in_factors(k_weight.double(), heads).mT
    constant = None if q_bias is None else maths.fold_query_bias(q_bias.double(), k_weight.double(), heads)
    left_root = None if query is None else query.root(centred=constant is not None)
    right_root = None if context is None else context.root(centred=True)
    mean = query.mean if query is not None and constant is not None else None
    return _product(left, right, left_root, right_root, mean, constant)


def vo_product(
    v_weight: torch.Tensor,
    v_bias: torch.Tensor | None,
    out_weight: torch.Tensor,
    out_bias: torch.Tensor | None,
    heads: int,
    context: Moments | None = None,
) -> Product:
    """W_V W_O of every head, (H*D, C) and (E, H*D); the sum over heads of the bias (H, E) is the output bias."""
    left, right = maths.in_factors(v_weight.double(), heads), maths.out_factors(out_weight.double(), heads)
    constant = None
    if v_bias is not None or out_bias is not None:
        zeros = v_weight.new_zeros(len(v_weight))
        folded = maths.fold_value_bias((zeros if v_bias is None else v_bias).double(), out_weight.double(), out_bias)
        constant = (folded / heads).expand(heads, -1)  # every head brings its share of the one output bias
    root = None if context is None else context.root(centred=constant is not None)
    mean = context.mean if context is not None and constant is not None else None
    return _product(left, right, root, None, mean, constant)


def linear_product(weight: torch.Tensor, bias: torch.Tensor | None, seen: Moments | Narrowing | None = None) -> Product:
    """A linear layer (E, C) as a product of one head; what it has seen is a Narrowing where E < C, else Moments.

    From the eigenvectors of the smaller Gram matrix, several times faster than an SVD; the factors are projections of
    the weight itself, so that the full rank is exact however small the smallest singular value.
    """
    matrix = weight.double().mT  # C, E
    if matrix.shape[0] > matrix.shape[1]:
        s, v = _eigen(matrix.mT @ matrix if seen is None else seen.gram(matrix, bias is not None))  # E; E, E
        u, vh = (matrix @ v).div_(_above_zero(s)), v.mT
    else:
        root = None if seen is None else seen.root(centred=bias is not None)
        white = matrix if root is None else root.mT @ matrix  # C, E
        s, v = _eigen(white @ white.mT)  # C; C, C
        u, vh = v if root is None else _solve(root, v), (v.mT @ white).div_(_above_zero(s).unsqueeze(-1))
    mean = seen.mean if seen is not None and bias is not None else None
    constant = None if bias is None else bias.double().unsqueeze(0)
    if mean is not None:
        constant = constant + mean @ matrix
    return Product(u.unsqueeze(0), s.unsqueeze(0), vh.unsqueeze(0), mean, constant)


def _product(left, right, left_root, right_root, mean, constant) -> Product:  # noqa: ANN001
    """Whiten, decompose by QR and a small core (heads.product_svd), and take the whitening back."""
    white_left = left if left_root is None else left_root.mT @ left  # H, C, D
    white_right = right if right_root is None else right @ right_root  # H, D, E
    u, s, vh = maths.product_svd(white_left, white_right)
    u = u if left_root is None else _solve(left_root, u)
    vh = vh if right_root is None else _solve(right_root, vh.mT).mT
    if mean is not None:
        constant = constant + (mean @ left).unsqueeze(-2).matmul(right).squeeze(-2)  # H, E
    return Product(u, s, vh, mean, constant)


def _solve(root: torch.Tensor, vectors: torch.Tensor) -> torch.Tensor:
    """L^-T v, which takes whitening by L^T back."""
    return torch.linalg.solve_triangular(root.mT, vectors, upper=True)


def _eigen(gram: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Singular values, largest first, and their vectors."""
    values, vectors = torch.linalg.eigh(gram)
    return values.flip(-1).clamp_min(0).sqrt(), vectors.flip(-1)


def _above_zero(s: torch.Tensor) -> torch.Tensor:
    """Singular values to divide by: what is less than rounding is lifted to it."""
    return s.clamp_min(s[0] * torch.finfo(s.dtype).eps if s[0] > 0 else 1.0)
