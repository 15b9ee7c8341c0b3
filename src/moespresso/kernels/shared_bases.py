"""Bases that the experts of a layer share: W_e ~ A_e sum_m alpha_em B_m (MoBE, arXiv 2508.05257).

    minimise  sum_e  tr(D_e (W_e - A_e B(alpha_e)) C (W_e - A_e B(alpha_e))^T D_e)     B(alpha_e) = sum_m alpha_em B_m

with C the second moments of what the experts are given and D_e the importance of an expert's rows (both may be unknown: 1).
A round takes one step along each alpha, a few steps of conjugate gradients towards the best bases (their normal equations
have m r unknowns a column: too many to hold), and then the best A. Such rounds creep, so the next does not start from what was
found but from a little farther the same way (Nesterov's, arXiv 1810.05846), and where that led uphill, from the best once more.

Everything is float32 but the equations of each A, a few experts at a time.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from moespresso.kernels.hessians import factored, usable

# Relative damping that only settles what the data leave open, as in `_low_rank`.
DAMPING = 1e-6
ROUNDS = 60
# Steps of conjugate gradients in a round.
_STEPS = 4
# The least importance of a row, as a share of the mean: every row is worth something.
_LEAST = 1e-3
# What may be off, as a share of the weights' squares, for the answer to be exact.
_EXACT = 1e-9
# Where conjugate gradients have nothing left to find, as a share of what they start from.
_FOUND = 1e-10
# What is solved at a time, in bytes.
_BYTES = 256 << 20


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

    `weights` are [E, out, in], `moments` [in, in] those of all experts' inputs, `importance` [E, out] multiplies what a row is off
    by. The first of the bases is the best single one, the others start at random and unused; all have a mean square of one. What is
    found is never worse (under the damped moments) than after fewer rounds: what did not come out, or is no number, is left.
    """
    rows = torch.ones_like(weights[..., 0]) if importance is None else importance
    # Where no row moves anything, all are alike.
    rows = rows / rows.mean() if float(rows.mean()) > 0 else torch.ones_like(rows)
    rows = rows.float().clamp(min=_LEAST).unsqueeze(2)
    root = _root(weights, moments, damping)
    target = _onto(weights, rows, root)
    left, first = _single(target, rank)
    draw = torch.Generator().manual_seed(seed)
    others = torch.randn(count - 1, *first.shape, generator=draw).to(first)
    bases = torch.cat([first[None], others * first.square().mean().sqrt()])
    shares = bases.new_zeros(len(left), count)
    shares[:, 0] = 1
    left, lost = _best_left(target, left, bases, shares)
    whole = sum(float(target[some].double().square().sum()) for some in _runs(target))
    ahead, speed, enough = (left, bases), 0, _EXACT * whole
    for _ in range(rounds):
        if lost <= enough:
            break
        new_shares, new_bases = _nearer(target, *ahead, bases, shares)
        new_left, now = _best_left(target, ahead[0], new_bases, new_shares)
        if not now <= lost:
            if not speed:
                break
            ahead, speed = (left, bases), 0
            continue
        way = speed / (speed + 3)
        ahead = new_left + way * (new_left - left), new_bases + way * (new_bases - bases)
        left, bases, shares, lost, speed = new_left, new_bases, new_shares, now, speed + 1
    bases = torch.linalg.solve_triangular(root, bases.double(), upper=True, left=False)
    sizes = bases.square().mean((1, 2)).sqrt().clamp(min=1e-30)
    return left / rows, (bases / sizes[:, None, None]).float(), shares * sizes.float()


def _root(weights: Tensor, moments: Tensor | None, damping: float) -> Tensor:
    """Upper R [in, in] with R R^T the damped moments: |W R| is the output's error in the Frobenius norm."""
    if moments is None:
        return torch.eye(weights.shape[-1], dtype=torch.float64, device=weights.device)
    return factored(usable(moments[None])[0].double(), damping)[0][0]


def _onto(weights: Tensor, rows: Tensor, root: Tensor) -> Tensor:
    """The weights [E, out, in] where the error is a plain sum of squares."""
    moved = torch.empty_like(weights, dtype=torch.float32)
    for some in _runs(weights):
        moved[some] = (weights[some].double() * rows[some] @ root).float()
    return moved


def _single(target: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The one basis [r, in] that is best for all experts, and their factors [E, out, r] of about unit size; both have what matters
    most first."""
    gram = sum(each.mT @ each for some in _runs(target) for each in target[some].double())
    values, vectors = torch.linalg.eigh(gram)
    values, vectors = values.flip(0)[:rank], vectors.flip(1)[:, :rank]
    # Directions that no expert uses have no size to divide by.
    sizes = values.clamp(min=1e-14 * values.max() + _tiny(values)).sqrt()
    left = torch.cat([(target[some].double() @ (vectors / sizes)).float() for some in _runs(target)])
    return left, (sizes[:, None] * vectors.mT).float()


def _nearer(
    target: Tensor, left: Tensor, start: Tensor, bases: Tensor, shares: Tensor
) -> tuple[Tensor, Tensor]:
    """Better shares [E, m] for `left` [E, out, r] and `bases` [m, r, in], and better bases for these, looked for from `start`."""
    squares, found = bases @ bases.mT, torch.empty_like(shares)
    grams, wanted, curve = list[Tensor](), torch.zeros_like(bases), torch.zeros_like(squares)
    for some in _runs(target):
        own = left[some]
        gram, pull = own.mT @ own, own.mT @ target[some]
        found[some] = _nearer_shares(shares[some], bases, squares, gram, pull)
        wanted += torch.einsum("em,eri->mri", found[some], pull)
        curve += torch.einsum("em,ers->mrs", found[some].square(), gram)
        grams.append(gram)

    def applied(some_bases: Tensor) -> Tensor:
        total = torch.zeros_like(some_bases)
        for some, gram in zip(_runs(target), grams, strict=True):
            total += torch.einsum("em,eri->mri", found[some], gram @ _mixed(found[some], some_bases))
        return total

    factor, _ = torch.linalg.cholesky_ex(_ridged(curve, 1e-5))
    bases, off = start, wanted - applied(start)
    ahead = torch.cholesky_solve(off, factor)
    along, size = ahead, (off * ahead).sum()
    least = _FOUND * (wanted * torch.cholesky_solve(wanted, factor)).sum()
    for _ in range(_STEPS):
        if size <= least:
            break
        moved = applied(along)
        step = size / (along * moved).sum().clamp(min=_tiny(size))
        bases, off = bases + step * along, off - step * moved
        ahead = torch.cholesky_solve(off, factor)
        size, before = (off * ahead).sum(), size
        along = ahead + size / before.clamp(min=_tiny(size)) * along
    return found, bases


def _nearer_shares(shares: Tensor, bases: Tensor, squares: Tensor, gram: Tensor, pull: Tensor) -> Tensor:
    """`shares` [E, m] one step on, as far as it goes downhill: `gram` is A_e^T A_e [E, r, r], `pull` A_e^T W_e [E, r, in]."""
    slope = torch.einsum("mri,eri->em", bases, pull - gram @ _mixed(shares, bases))
    along = slope / torch.einsum("ers,mrs->em", gram, squares).clamp(min=_tiny(gram))
    moved = _mixed(along, bases)
    bend = (moved * (gram @ moved)).sum((1, 2)).clamp(min=_tiny(gram))
    return shares + along * ((slope * along).sum(1) / bend)[:, None]


def _best_left(target: Tensor, left: Tensor, bases: Tensor, shares: Tensor) -> tuple[Tensor, float]:
    """The best A [E, out, r] for each expert's mixed basis, and what is then off, squared and summed. What the equations leave
    open stays as in `left`."""
    found, lost = torch.empty_like(left), 0.0
    for some in _runs(target):
        aim, mixed = target[some].double(), _mixed(shares[some], bases).double()
        normal, wanted, own = mixed @ mixed.mT, mixed @ aim.mT, left[some].double().mT
        own = own + torch.cholesky_solve(wanted - normal @ own, torch.linalg.cholesky_ex(_ridged(normal)).L)
        lost += float(aim.square().sum() - ((2 * wanted - normal @ own) * own).sum())
        found[some] = own.mT.float()
    return found, lost


def _mixed(shares: Tensor, bases: Tensor) -> Tensor:
    """Each expert's basis sum_m alpha_em B_m [E, r, in]."""
    return torch.einsum("em,mri->eri", shares, bases)


def _ridged(normal: Tensor, share: float = 1e-8) -> Tensor:
    """Normal equations [N, r, r] that a Cholesky factorization does not stop at."""
    ridge = (share * normal.diagonal(dim1=-2, dim2=-1).mean(-1)).clamp(min=_tiny(normal))
    return normal + ridge[:, None, None] * torch.eye(normal.shape[-1]).to(normal)


def _runs(weights: Tensor) -> Iterator[slice]:
    """The experts, in runs that are solved at a time."""
    size = max(1, _BYTES // (8 * weights[0].numel()))
    for first in range(0, len(weights), size):
        yield slice(first, first + size)


def _tiny(like: Tensor) -> float:
    return torch.finfo(like.dtype).tiny
