"""What a plan does: what remains of a model, what is written in its place, what it costs, and whether it can
be done."""

from moespresso.effect.check import check_plan, validated
from moespresso.effect.cuts import Cut, Fits, cuts, fitted_key, is_left, is_part, key, needs_fit
from moespresso.effect.matrices import (
    REFIT,
    channels_of,
    check_all_storable,
    fits_on_text,
    format_of,
    is_matrix,
    is_stack,
    narrowed,
    scale_dtypes,
    step_of,
    treats_matrices,
)
from moespresso.effect.piece import Encoding, Fold, Member, Piece, laid_out, stored
from moespresso.effect.remains import SILENT_KV, Remains, dropped_units, merged_into, pressed_layers, remains
from moespresso.effect.rewrite import biased_stubs, folds_into, pieces, pressed_blueprint, price

__all__ = [
    "REFIT",
    "SILENT_KV",
    "Cut",
    "Encoding",
    "Fits",
    "Fold",
    "Member",
    "Piece",
    "Remains",
    "biased_stubs",
    "channels_of",
    "check_all_storable",
    "check_plan",
    "cuts",
    "dropped_units",
    "fits_on_text",
    "fitted_key",
    "folds_into",
    "format_of",
    "is_left",
    "is_matrix",
    "is_part",
    "is_stack",
    "key",
    "laid_out",
    "merged_into",
    "narrowed",
    "needs_fit",
    "pieces",
    "pressed_blueprint",
    "pressed_layers",
    "price",
    "remains",
    "scale_dtypes",
    "step_of",
    "stored",
    "treats_matrices",
    "validated",
]
