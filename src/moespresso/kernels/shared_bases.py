"""Bases that the experts of a layer share: W_e ~ A_e sum_m alpha_em B_m (MoBE, arXiv 2508.05257).

    minimise  sum_e  tr(D_e (W_e - A_e B(alpha_e)) C (W_e - A_e B(alpha_e))^T D_e)     B(alpha_e) = sum_m
              alpha_em B_m

with C the Hessian of what the experts are given and D_e the importance of an expert's rows (both may be
unknown: 1). A round takes one step along each alpha, a few steps of conjugate gradients towards the best
bases (their normal equations have m r unknowns a column: too many to hold), and then the best A. Such rounds
creep, so the next does not start from the last but from a little farther the same way (Nesterov's, arXiv
1810.05846), and where that led uphill, from the best once more.

Everything is float32 but the equations of each A, a few experts at a time.

Shapes: E experts, n of them at a time, with matrices of O x I; m bases of rank r.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from moespresso.kernels.conditioning import damped_factors, finite_or_identity

# Steps of conjugate gradients in a round.
_STEPS = 4
# The least importance of a row, as a share of the mean: every row is worth something.
_MIN_IMPORTANCE = 1e-3
# What may be off, as a share of the weights' squares, for the approximation to be exact.
_EXACT = 1e-9
# Where conjugate gradients have nothing left to find, as a share of what they start from.
_CONVERGED = 1e-10
# What is solved at a time, in bytes.
BYTES = 256 << 20


@dataclass(frozen=True, slots=True)
class Settings:
    """Rounds at most, the seed of the bases, and relative damping, which only settles what the data leave
    open (as in `low_rank`)."""

    rounds: int = 60
    seed: int = 0
    damping: float = 1e-6


DEFAULT = Settings()
# A, B and alpha.
Fit = tuple[Float[Tensor, "E O r"], Float[Tensor, "m r I"], Float[Tensor, "E m"]]


def fit(
    weights: Float[Tensor, "E O I"],
    hessian: Float[Tensor, "I I"] | None,
    rank: int,
    count: int,
    importance: Float[Tensor, "E O"] | None = None,
    settings: Settings = DEFAULT,
) -> Fit:
    """Factors A, `count` bases B and shares alpha with W_e ~ A_e sum_m alpha_em B_m.

    `hessian` is that of all experts' inputs, `importance` multiplies what a row is off by. The first of the
    bases is the best single one, the others start at random and unused; all have a mean square of one. The
    result is never worse (under the damped Hessian) than after fewer rounds: what did not come out, or is no
    number, is left.
    """
    rows = torch.ones_like(weights[..., 0]) if importance is None else importance
    # Where no row moves anything, all are alike.
    rows = rows / rows.mean() if float(rows.mean()) > 0 else torch.ones_like(rows)
    rows_EO1 = rows.float().clamp(min=_MIN_IMPORTANCE).unsqueeze(2)
    root_II = _root(weights, hessian, settings.damping)
    target_EOI = _onto(weights, rows_EO1, root_II)
    left_EOr, bases_mrI, shares_Em = _rounds(
        target_EOI, _start(target_EOI, rank, count, settings.seed), settings.rounds
    )
    bases_mrI = torch.linalg.solve_triangular(root_II, bases_mrI.double(), upper=True, left=False)
    sizes_m = bases_mrI.square().mean((1, 2)).sqrt().clamp(min=1e-30)
    return left_EOr / rows_EO1, (bases_mrI / sizes_m[:, None, None]).float(), shares_Em * sizes_m.float()


def _start(target: Float[Tensor, "E O I"], rank: int, count: int, seed: int) -> Fit:
    """The best single basis, and random ones that are not used yet."""
    left_EOr, first_rI = _single(target, rank)
    generator = torch.Generator().manual_seed(seed)
    others = torch.randn(count - 1, *first_rI.shape, generator=generator).to(first_rI)
    bases_mrI = torch.cat([first_rI[None], others * first_rI.square().mean().sqrt()])
    shares_Em = bases_mrI.new_zeros(len(left_EOr), count)
    shares_Em[:, 0] = 1
    return left_EOr, bases_mrI, shares_Em


def _rounds(target: Float[Tensor, "E O I"], start: Fit, rounds: int) -> Fit:
    """The fit after so many rounds, or when nothing is left to gain."""
    left, bases, shares = start
    left, loss = _best_left(target, left, bases, shares)
    total = sum(float(target[some].double().square().sum()) for some in _runs(target))
    ahead, speed, enough = (left, bases), 0, _EXACT * total
    for _ in range(rounds):
        if loss <= enough:
            break
        new_shares, new_bases = _nearer(target, *ahead, bases, shares)
        new_left, new_loss = _best_left(target, ahead[0], new_bases, new_shares)
        if not new_loss <= loss:
            if not speed:
                break
            ahead, speed = (left, bases), 0
            continue
        way = speed / (speed + 3)
        ahead = new_left + way * (new_left - left), new_bases + way * (new_bases - bases)
        left, bases, shares, loss, speed = new_left, new_bases, new_shares, new_loss, speed + 1
    return left, bases, shares


def _root(
    weights: Float[Tensor, "E O I"], hessian: Float[Tensor, "I I"] | None, damping: float
) -> Float[Tensor, "I I"]:
    """Upper R with R R^T the damped Hessian: |W R| is the output's error in the Frobenius norm."""
    if hessian is None:
        return torch.eye(weights.shape[-1], dtype=torch.float64, device=weights.device)
    return damped_factors(finite_or_identity(hessian[None])[0].double(), damping)[0][0]


def _onto(
    weights: Float[Tensor, "E O I"], rows: Float[Tensor, "E O 1"], root: Float[Tensor, "I I"]
) -> Float[Tensor, "E O I"]:
    """The weights where the error is a plain sum of squares."""
    moved = torch.empty_like(weights, dtype=torch.float32)
    for some in _runs(weights):
        moved[some] = (weights[some].double() * rows[some] @ root).float()
    return moved


def _single(target: Float[Tensor, "E O I"], rank: int) -> tuple[Float[Tensor, "E O r"], Float[Tensor, "r I"]]:
    """The one basis that is best for all experts, and their factors of about unit size; both have what
    matters most first."""
    gram_II = sum(each.mT @ each for some in _runs(target) for each in target[some].double())
    values, vectors = torch.linalg.eigh(gram_II)
    values_r, vectors_Ir = values.flip(0)[:rank], vectors.flip(1)[:, :rank]
    # Directions that no expert uses have no size to divide by.
    sizes_r = values_r.clamp(min=1e-14 * values_r.max() + _tiny(values_r)).sqrt()
    left = torch.cat([(target[some].double() @ (vectors_Ir / sizes_r)).float() for some in _runs(target)])
    return left, (sizes_r[:, None] * vectors_Ir.mT).float()


def _nearer(
    target: Float[Tensor, "E O I"],
    left: Float[Tensor, "E O r"],
    start: Float[Tensor, "m r I"],
    bases: Float[Tensor, "m r I"],
    shares: Float[Tensor, "E m"],
) -> tuple[Float[Tensor, "E m"], Float[Tensor, "m r I"]]:
    """Better shares for `left` and `bases`, and better bases for these, looked for from `start`."""
    squares_mrr, new_shares_Em = bases @ bases.mT, torch.empty_like(shares)
    grams, wanted_mrI, curve_mrr = list[Tensor](), torch.zeros_like(bases), torch.zeros_like(squares_mrr)
    for some in _runs(target):
        left_nOr = left[some]
        gram_nrr, pull_nrI = left_nOr.mT @ left_nOr, left_nOr.mT @ target[some]
        new_shares_Em[some] = _nearer_shares(shares[some], bases, squares_mrr, gram_nrr, pull_nrI)
        wanted_mrI += torch.einsum("em,eri->mri", new_shares_Em[some], pull_nrI)
        curve_mrr += torch.einsum("em,ers->mrs", new_shares_Em[some].square(), gram_nrr)
        grams.append(gram_nrr)

    def applied(some_bases: Tensor) -> Tensor:
        total = torch.zeros_like(some_bases)
        for some, gram_nrr in zip(_runs(target), grams, strict=True):
            share_nm = new_shares_Em[some]
            total += torch.einsum("em,eri->mri", share_nm, gram_nrr @ _mixed(share_nm, some_bases))
        return total

    factor_mrr, _ = torch.linalg.cholesky_ex(_ridged(curve_mrr, 1e-5))
    bases, off = start, wanted_mrI - applied(start)
    ahead = torch.cholesky_solve(off, factor_mrr)
    along, size = ahead, (off * ahead).sum()
    enough = _CONVERGED * (wanted_mrI * torch.cholesky_solve(wanted_mrI, factor_mrr)).sum()
    for _ in range(_STEPS):
        if size <= enough:
            break
        moved = applied(along)
        step = size / (along * moved).sum().clamp(min=_tiny(size))
        bases, off = bases + step * along, off - step * moved
        ahead = torch.cholesky_solve(off, factor_mrr)
        size, before = (off * ahead).sum(), size
        along = ahead + size / before.clamp(min=_tiny(size)) * along
    return new_shares_Em, bases


def _nearer_shares(
    shares: Float[Tensor, "n m"],
    bases: Float[Tensor, "m r I"],
    squares: Float[Tensor, "m r r"],
    gram: Float[Tensor, "n r r"],
    pull: Float[Tensor, "n r I"],
) -> Float[Tensor, "n m"]:
    """`shares` one step on, as far as it goes downhill: `squares` are B_m B_m^T, `gram` is A_e^T A_e,
    `pull` A_e^T W_e."""
    slope_nm = torch.einsum("mri,eri->em", bases, pull - gram @ _mixed(shares, bases))
    along_nm = slope_nm / torch.einsum("ers,mrs->em", gram, squares).clamp(min=_tiny(gram))
    moved_nrI = _mixed(along_nm, bases)
    bend_n = (moved_nrI * (gram @ moved_nrI)).sum((1, 2)).clamp(min=_tiny(gram))
    return shares + along_nm * ((slope_nm * along_nm).sum(1) / bend_n)[:, None]


def _best_left(
    target: Float[Tensor, "E O I"],
    left: Float[Tensor, "E O r"],
    bases: Float[Tensor, "m r I"],
    shares: Float[Tensor, "E m"],
) -> tuple[Float[Tensor, "E O r"], float]:
    """The best A for each expert's mixed basis, and what is then off, squared and summed. What the
    equations leave open stays as in `left`."""
    best_EOr, loss = torch.empty_like(left), 0.0
    for some in _runs(target):
        target_nOI, mixed_nrI = target[some].double(), _mixed(shares[some], bases).double()
        normal_nrr, wanted_nrO = mixed_nrI @ mixed_nrI.mT, mixed_nrI @ target_nOI.mT
        start_nrO, factor_nrr = left[some].double().mT, torch.linalg.cholesky_ex(_ridged(normal_nrr)).L
        new_nrO = start_nrO + torch.cholesky_solve(wanted_nrO - normal_nrr @ start_nrO, factor_nrr)
        loss += float(target_nOI.square().sum() - ((2 * wanted_nrO - normal_nrr @ new_nrO) * new_nrO).sum())
        best_EOr[some] = new_nrO.mT.float()
    return best_EOr, loss


def _mixed(shares: Float[Tensor, "n m"], bases: Float[Tensor, "m r I"]) -> Float[Tensor, "n r I"]:
    """Each expert's basis sum_m alpha_em B_m."""
    return torch.einsum("em,mri->eri", shares, bases)


def _ridged(normal: Float[Tensor, "N r r"], share: float = 1e-8) -> Float[Tensor, "N r r"]:
    """Normal equations that a Cholesky factorization does not stop at."""
    ridge = (share * normal.diagonal(dim1=-2, dim2=-1).mean(-1)).clamp(min=_tiny(normal))
    return normal + ridge[:, None, None] * torch.eye(normal.shape[-1]).to(normal)


def _runs(weights: Float[Tensor, "E O I"]) -> Iterator[slice]:
    """The experts, in runs that are solved at a time."""
    size = max(1, BYTES // (8 * weights[0].numel()))
    for first in range(0, len(weights), size):
        yield slice(first, first + size)


def _tiny(like: Float[Tensor, ...]) -> float:
    return torch.finfo(like.dtype).tiny
