"""Bases that the experts of a layer share: W_e ~ A_e sum_m alpha_em B_m (MoBE, arXiv 2508.05257).

    minimise  sum_e  tr(D_e (W_e - A_e B(alpha_e)) C (W_e - A_e B(alpha_e))^T D_e)     B(alpha_e) = sum_m alpha_em B_m

with C the second moments of what the experts are given and D_e the importance of an expert's rows (both may be unknown: 1).
Every round solves for one of alpha, B and A with the rest held. Such rounds creep, so the next does not start from the A
that was found but from one a little farther the same way (Nesterov's, arXiv 1810.05846), and where that led uphill, from
the best once more.

Tensors come and go in float32, and so do the two copies of the weights that are held; a few experts at a time are solved in
float64.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from moespresso.measure.hessians import factored, usable

# Relative damping that only settles what the data leave open, as in `_low_rank`.
DAMPING = 1e-6
ROUNDS = 60
# The least importance of a row, as a share of the mean: every row is worth something.
LEAST = 1e-3
# What is solved at a time, in bytes.
_BYTES = 256 << 20


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
    *,
    rounds: int = ROUNDS,
    seed: int = 0,
    damping: float = DAMPING,
    importance: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Factors A [E, out, r], bases B [count, r, in] and shares alpha [E, count] with W_e ~ A_e sum_m alpha_em B_m.

    `importance` [E, out] multiplies what a row is off by. `shared_basis` is the first of the bases; the others start at random
    and unused. What is found is never worse (under the damped moments) than after fewer rounds.
    """
    rows = torch.ones_like(weights[..., 0]) if importance is None else importance / importance.mean()
    rows = rows.float().clamp(min=LEAST).unsqueeze(2)
    root = _root(weights, moments, damping)
    left, first = shared_basis(weights.float() * rows, moments, rank, damping)
    draw = torch.Generator().manual_seed(seed)
    others = torch.randn(count - 1, *first.shape, generator=draw).to(root)
    bases = torch.cat([first.double()[None] @ root, others])
    bases[1:] *= bases[0].square().mean().sqrt()
    shares = root.new_zeros(len(left), count)
    shares[:, 0] = 1
    target, moved, lost, speed = _onto(weights, rows, root), left, torch.inf, 0
    for _ in range(rounds):
        new_shares, new_bases = _fit_bases(target, moved, bases, shares)
        new_left, now = _fit_left(target, moved, new_bases, new_shares)
        if now > lost and speed:
            moved, speed = left, 0
            continue
        if now > lost:
            break
        moved = new_left + speed / (speed + 3) * (new_left - left)
        left, bases, shares, lost, speed = new_left, new_bases, new_shares, now, speed + 1
    return left / rows, _unmoved(bases, root).float(), shares.float()


def _onto(weights: Tensor, rows: Tensor, root: Tensor) -> Tensor:
    """The weights [E, out, in] where the error is a plain sum of squares."""
    moved = torch.empty_like(weights, dtype=torch.float32)
    for some in _runs(weights):
        moved[some] = (weights[some].double() * rows[some] @ root).float()
    return moved


def _root(weights: Tensor, moments: Tensor | None, damping: float) -> Tensor:
    """Upper R [in, in] with R R^T the damped moments: |W R| is the output's error in the Frobenius norm."""
    if moments is None:
        return torch.eye(weights.shape[-1], dtype=torch.float64, device=weights.device)
    return factored(usable(moments[None])[0].double(), damping)[0][0]


def _unmoved(moved: Tensor, root: Tensor) -> Tensor:
    """`moved` R^-1."""
    return torch.linalg.solve_triangular(root, moved, upper=True, left=False)


def _fit_bases(target: Tensor, left: Tensor, bases: Tensor, shares: Tensor) -> tuple[Tensor, Tensor]:
    """The best alpha [E, m] for `left` [E, out, r] and `bases` [m, r, in]; then the best bases for these, all at once."""
    count, rank, width = bases.shape
    cross = torch.einsum("mri,nsi->mnrs", bases, bases)
    normal, wanted = bases.new_zeros(count, rank, count, rank), torch.zeros_like(bases)
    found = torch.empty_like(shares)
    for some in _runs(target):
        own = left[some].double()
        gram, pull = own.mT @ own, own.mT @ target[some].double()
        slopes = torch.einsum("mri,eri->em", bases, pull)
        here = _solved(
            torch.einsum("ers,mnrs->emn", gram, cross), slopes.unsqueeze(2), shares[some].unsqueeze(2)
        ).squeeze(2)
        normal += torch.einsum("em,en,ers->mrns", here, here, gram)
        wanted += torch.einsum("em,eri->mri", here, pull)
        found[some] = here
    flat = _solved(normal.flatten(2).flatten(0, 1), wanted.flatten(0, 1), bases.flatten(0, 1))
    return found, flat.view(count, rank, width)


def _fit_left(target: Tensor, left: Tensor, bases: Tensor, shares: Tensor) -> tuple[Tensor, float]:
    """The best A [E, out, r] for each expert's mixed basis, and what is then off, squared and summed."""
    found, lost = torch.empty_like(left), 0.0
    for some in _runs(target):
        aim, mixed = target[some].double(), torch.einsum("em,mri->eri", shares[some], bases)
        normal, wanted = mixed @ mixed.mT, mixed @ aim.mT
        own = _solved(normal, wanted, left[some].double().mT)
        lost += float(aim.square().sum() - ((2 * wanted - normal @ own) * own).sum())
        found[some] = own.mT.float()
    return found, lost


def _solved(normal: Tensor, wanted: Tensor, start: Tensor) -> Tensor:
    """The least squares whose normal equations these are, from `start`.

    The ridge pulls to where one stands, not to zero: singular equations are solved as well, and no step leads uphill.
    """
    ridge = (1e-8 * normal.diagonal(dim1=-2, dim2=-1).mean(-1)).clamp(min=_tiny(normal))
    eye = torch.eye(normal.shape[-1]).to(normal)
    factor = torch.linalg.cholesky(normal + ridge[..., None, None] * eye)
    return start + torch.cholesky_solve(wanted - normal @ start, factor)


def _runs(weights: Tensor) -> Iterator[slice]:
    """The experts, in runs that are solved at a time."""
    size = max(1, _BYTES // (8 * weights[0].numel()))
    for first in range(0, len(weights), size):
        yield slice(first, first + size)


def _tiny(like: Tensor) -> float:
    return torch.finfo(like.dtype).tiny
