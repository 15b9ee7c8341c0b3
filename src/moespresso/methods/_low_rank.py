"""Narrower matrices in closed form: low rank, bases that experts share, fewer channels, and how much of which layer.

With C the second moments of a projection's inputs, W' in the place of W costs tr((W - W') C (W - W')^T) of output error:

    rank r     W' = U U^T W, with U the r leading eigenvectors of W C W^T (C^-1/2 is not needed)
    shared     W_e' = A_e B, the same of all experts' matrices on top of each other, by their Gram sum_e W_e^T W_e;
               with several bases, W_e' = A_e sum_m alpha_em B_m, as MoBE has it (arXiv 2508.05257)
    channels   those of the highest ridge leverage [C (C + lambda I)^-1]_ii, and layers by entropy, both as in MoDeGPT
               (arXiv 2408.09632); the refit of what stays is in `_channels.py`

Tensors come and go in float32; in between all is float64, about four times the size of what was given: give it fewer
matrices at once where that is too much.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

import torch
from torch import Tensor

from moespresso.measure.hessians import factored, ridged, usable

# Relative damping that only settles what the data leave open: of two answers alike on them, the one nearer to the weights.
DAMPING = 1e-6
# The largest share that is removed of a layer.
CAP = 0.95


def truncated(
    weights: Tensor, moments: Tensor | None, rank: int, damping: float = DAMPING
) -> tuple[Tensor, Tensor]:
    """Factors [N, out, r] and [N, r, in] of the best `weights` [N, out, in] of a rank under `moments` [N or 1, in, in].

    The left ones have orthonormal columns, the most important first: a lower rank is a prefix. No rank is above that of the
    full matrix, min(out, in).
    """
    frame, core = _framed(weights.double())
    moved = core if moments is None else core @ _damped(moments, damping)
    left = _leading(moved @ core.mT, rank)
    return (frame @ left).float(), (left.mT @ core).float()


def shared_basis(
    weights: Tensor, moments: Tensor | None, rank: int, damping: float = DAMPING
) -> tuple[Tensor, Tensor]:
    """Factors [E, out, r] and the one basis [r, in] that together come closest to `weights` [E, out, in] of all experts.

    Under `moments` [in, in], which are thus of all experts' inputs. The most important directions come first.
    """
    root = _root(weights, moments, damping)
    wide = (each.double() for each in weights)
    gram = sum((each.mT @ each for each in wide), torch.zeros_like(root))
    values, vectors = torch.linalg.eigh(root.mT @ gram @ root)
    values, vectors = values.flip(0)[:rank], vectors.flip(1)[:, :rank]
    # Directions that no expert uses have no size to divide by.
    sizes = values.clamp(min=1e-14 * values.max() + _tiny(values)).sqrt()
    onto = root @ vectors / sizes
    left = torch.stack([(each.double() @ onto).float() for each in weights])
    return left, _unmoved(sizes[:, None] * vectors.mT, root).float()


def shared_bases(
    weights: Tensor,
    moments: Tensor | None,
    rank: int,
    count: int,
    iterations: int = 30,
    seed: int = 0,
    damping: float = DAMPING,
) -> tuple[Tensor, Tensor, Tensor]:
    """Factors A [E, out, r], bases B [count, r, in] and shares alpha [E, count] with W_e ~ A_e sum_m alpha_em B_m.

    Alternating least squares from `shared_basis`, which is the first of the bases; the others start at random and unused.
    Each step solves for one of A, alpha and B_m with the rest held, so the error (under the damped moments) never rises.
    """
    root = _root(weights, moments, damping)
    left, first = (each.double() for each in shared_basis(weights, moments, rank, damping))
    target, first = weights.double() @ root, first @ root
    draw = torch.Generator().manual_seed(seed)
    others = torch.randn(count - 1, *first.shape, generator=draw, dtype=first.dtype).to(first)
    bases = torch.cat([first[None], others * first.square().mean().sqrt()])
    shares = left.new_zeros(len(left), count)
    shares[:, 0] = 1
    for _ in range(iterations):
        gram, pull = left.mT @ left, left.mT @ target
        shares = _fit_shares(shares, bases, gram, pull)
        _fit_bases(bases, shares, gram, pull)
        left = _fit_left(left, _mixed(shares, bases), target)
    return left.float(), _unmoved(bases, root).float(), shares.float()


def leverage(moments: Tensor, damping: float) -> Tensor:
    """Ridge leverage [N, I] of every channel: near 1 where no others tell what it holds.

    The ridge is `damping` times the mean diagonal of each of `moments` [N, I, I]. Near 0 every channel that is no exact sum
    of others scores 1; with a large one the order is that of the diagonal.
    """
    return _leverage(_sound(moments), damping)


def entropy_allocation(
    importance: Sequence[float], ratio: float, epsilon: float | None = None
) -> list[float]:
    """The share to remove of each layer: phi of mean `ratio` that maximises sum_l s_l (1 - phi_l) + epsilon H(phi).

    It is in proportion to exp(-s_l / epsilon) and at most CAP (or `ratio`, where that is more); what the cap cuts off goes to
    the others in the same proportion, which is again the maximum. By default epsilon is the scores' standard deviation.
    """
    epsilon = epsilon or statistics.pstdev(importance) or 1.0
    cap, left = max(CAP, ratio), ratio * len(importance)
    shares = [0.0] * len(importance)
    order = sorted(range(len(importance)), key=importance.__getitem__)
    for place, layer in enumerate(order):
        # The largest share comes first: once one is below the cap, all that follow are.
        rest = sum(math.exp((importance[layer] - importance[other]) / epsilon) for other in order[place:])
        shares[layer] = min(cap, left / rest)
        left -= shares[layer]
    return shares


# Moments


def _sound(moments: Tensor) -> Tensor:
    """`moments` [N, in, in] in float64, identity where nothing was seen."""
    return usable(moments)[0].double()


def _damped(moments: Tensor, damping: float) -> Tensor:
    moments = _sound(moments)
    return ridged(moments, damping * moments.diagonal(dim1=1, dim2=2).mean(1))


def _root(weights: Tensor, moments: Tensor | None, damping: float) -> Tensor:
    """Upper R [in, in] with R R^T the damped moments: |W R| is the output's error in the Frobenius norm."""
    if moments is None:
        return torch.eye(weights.shape[-1], dtype=torch.float64, device=weights.device)
    return factored(_sound(moments[None]), damping)[0][0]


def _unmoved(moved: Tensor, root: Tensor, upper: bool = True) -> Tensor:
    """`moved` R^-1."""
    return torch.linalg.solve_triangular(root, moved, upper=upper, left=False)


def _leverage(moments: Tensor, damping: float) -> Tensor:
    """[C (C + ridge I)^-1]_ii = 1 - ridge [(C + ridge I)^-1]_ii."""
    factors, ridge, _ = factored(moments, damping)
    inverse = torch.linalg.solve_triangular(factors, torch.eye(factors.shape[-1]).to(factors), upper=True)
    return 1 - ridge[:, None] * inverse.square().sum(1)


# Factors


def _framed(weights: Tensor) -> tuple[Tensor, Tensor]:
    """Q with orthonormal columns and T with W = Q T, T not taller than wide: what is decomposed has the smaller side."""
    if weights.shape[1] > weights.shape[2]:
        return tuple(torch.linalg.qr(weights))
    return torch.eye(weights.shape[1]).to(weights), weights


def _leading(gram: Tensor, rank: int) -> Tensor:
    """The first eigenvectors, as columns."""
    return torch.linalg.eigh(gram).eigenvectors.flip(-1)[..., :rank]


# Alternating least squares


def _fit_shares(shares: Tensor, bases: Tensor, gram: Tensor, pull: Tensor) -> Tensor:
    """The best alpha [E, m], given `gram` A_e^T A_e [E, r, r] and `pull` A_e^T W_e [E, r, in]."""
    normal = torch.stack([torch.einsum("ers,nrs->en", gram, each @ bases.mT) for each in bases], dim=1)
    wanted = torch.einsum("mri,eri->em", bases, pull).unsqueeze(-1)
    return shares + _step(normal, wanted - normal @ shares.unsqueeze(-1)).squeeze(-1)


def _fit_bases(bases: Tensor, shares: Tensor, gram: Tensor, pull: Tensor) -> None:
    """One B_m after the other, in place."""
    for number, own in enumerate(shares.T):
        coupling = torch.einsum("en,ers->nrs", own[:, None] * shares, gram)
        wanted = torch.einsum("e,eri->ri", own, pull) - (coupling @ bases).sum(0)
        bases[number] += _step(coupling[number], wanted)


def _fit_left(left: Tensor, mixed: Tensor, target: Tensor) -> Tensor:
    """The best A [E, out, r] for each expert's `mixed` basis [E, r, in]."""
    normal = mixed @ mixed.mT
    return left + _step(normal, mixed @ target.mT - normal @ left.mT).mT


def _mixed(shares: Tensor, bases: Tensor) -> Tensor:
    """Each expert's basis sum_m alpha_em B_m [E, r, in]."""
    return torch.einsum("em,mri->eri", shares, bases)


def _step(normal: Tensor, slope: Tensor) -> Tensor:
    """The step to the least squares whose normal equations these are.

    The ridge pulls to where one stands, not to zero: singular equations are solved as well, and no step leads uphill.
    """
    ridge = (1e-8 * normal.diagonal(dim1=-2, dim2=-1).mean(-1)).clamp(min=_tiny(normal))
    eye = torch.eye(normal.shape[-1]).to(normal)
    return torch.cholesky_solve(slope, torch.linalg.cholesky(normal + ridge[..., None, None] * eye))


def _tiny(like: Tensor) -> float:
    return torch.finfo(like.dtype).tiny
