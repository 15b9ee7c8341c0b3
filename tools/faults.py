"""Faults that the tests must catch: the data of `mutants.py`.

Each is one line of a kernel turned into a plausible mistake: a sign, a transposed index, a damping forgotten, an order
turned round, an edge missed by one. `MODULES` says where each module lies, as one imports it, and which tests are about it (files, or
single ones of a file); who moves a module changes its line there. An `old` text must occur once in its module.
"""

from __future__ import annotations

from dataclasses import dataclass

# A short name: the module under `moespresso`, and the tests that are expected to notice.
MODULES: dict[str, tuple[str, tuple[str, ...]]] = {
    "allocation": (
        "kernels.allocation",
        (
            "test_widths.py::test_no_other_choice_loses_less",
            "test_widths.py::test_a_curve_that_bends_upwards_is_taken_as_a_line",
            "test_widths.py::test_layers_count_as_often_as_they_have_experts",
        ),
    ),
    "attention_rank": ("kernels.attention_rank", ("test_low_rank_kernels.py",)),
    "autoround": ("kernels.autoround", ("test_autoround.py",)),
    "bitmask": ("formats.bitmask", ("test_sparse_format.py",)),
    "compressed_tensors": ("formats.compressed_tensors", ("test_formats.py",)),
    "conditioning": ("kernels.conditioning", ("test_kernels.py",)),
    "gptq": ("kernels.gptq", ("test_kernels.py",)),
    "gptq_layout": ("formats.gptq", ("test_formats.py",)),
    "grids": ("formats.grids", ("test_kernels.py",)),
    "hqq": ("kernels.hqq", ("test_kernels.py",)),
    "integer": ("formats.integer", ("test_formats.py",)),
    "integer_layout": ("formats.integer_layout", ("test_formats.py",)),
    "joint_refit": ("kernels.joint_refit", ("test_channels.py",)),
    "low_rank": ("kernels.low_rank", ("test_low_rank_kernels.py",)),
    "masks": ("kernels.masks", ("test_prune_kernels.py",)),
    "neurons": ("kernels.neurons", ("test_channels.py",)),
    "obs": ("kernels.obs", ("test_channels.py",)),
    "packing": ("formats.packing", ("test_formats.py",)),
    "remains": ("effect.remains", ("test_remains.py",)),
    "rewrite": ("effect.rewrite", ("test_core.py",)),
    "rounding": ("formats.rounding", ("test_kernels.py",)),
    "routed": ("kernels.routed", ("test_channels.py",)),
    "shared_bases": ("kernels.shared_bases", ("test_bases.py",)),
    "slices": ("formats.slices", ("test_attention_rank.py::test_what_is_stored_comes_back",)),
    "sparsegpt": ("kernels.sparsegpt", ("test_prune_kernels.py",)),
}


@dataclass(frozen=True, slots=True)
class Fault:
    """`new` in the place of `old` in a module, which is wrong because of `what`; `tests` where others than the module's notice."""

    module: str
    what: str
    old: str
    new: str
    tests: tuple[str, ...] = ()


FAULTS: tuple[Fault, ...] = (
    # GPTQ
    Fault(
        "gptq",
        "small moments go first",
        "dim=1, descending=True, stable=True",
        "dim=1, descending=False, stable=True",
    ),
    Fault("gptq", "factors are not transposed", "_feedback(factors.mT)", "_feedback(factors)"),
    Fault(
        "gptq",
        "columns are divided in the place of rows",
        "matrix / matrix.diagonal(dim1=1, dim2=2).unsqueeze(-1)",
        "matrix / matrix.diagonal(dim1=1, dim2=2).unsqueeze(1)",
    ),
    Fault(
        "gptq",
        "errors have the wrong sign",
        "self.error[:, column] = self.weights[:, column] - ((values - zero).to(scale.dtype) * scale).float()",
        "self.error[:, column] = ((values - zero).to(scale.dtype) * scale).float() - self.weights[:, column]",
    ),
    Fault(
        "gptq",
        "no damping",
        "damped_factors(_permuted(hessians, order), settings.damping)",
        "damped_factors(_permuted(hessians, order), 0.0)",
    ),
    Fault(
        "gptq",
        "rows are ordered, columns are not",
        "return rows.gather(2, order.unsqueeze(1).expand(hessians.shape))",
        "return rows",
    ),
    Fault(
        "gptq",
        "a column pulls on itself",
        "torch.baddbmm(local_pull, local, error, alpha=-1)",
        "torch.baddbmm(local_pull, local, error, alpha=1)",
    ),
    Fault(
        "gptq",
        "blocks behind are told the opposite",
        "hessians[:, part.stop : group.stop, part], error - before)",
        "hessians[:, part.stop : group.stop, part], before - error)",
    ),
    Fault(
        "gptq",
        "scales move away from the best",
        "(old_NO.float() + shift_NO)",
        "(old_NO.float() - shift_NO)",
    ),
    Fault(
        "gptq",
        "unbiased for inputs that are all alike",
        "codes = unbias(weights, codes, hessians)",
        "codes = unbias(weights, codes)",
    ),
    # HQQ
    Fault(
        "hqq",
        "large errors are kept, small ones given up",
        ".div_(beta)).clamp_(min=0)",
        ".div_(beta)).clamp_(max=0)",
    ),
    Fault(
        "hqq",
        "the power is not that of the derivative",
        "size.clamp(min=1e-8), p - 1)",
        "size.clamp(min=1e-8), p)",
    ),
    Fault("hqq", "what is given up is added", "steps -= soft_threshold(", "steps += soft_threshold("),
    Fault("hqq", "zeros have the wrong sign", "zero = (values - steps).mean", "zero = (steps - values).mean"),
    Fault("hqq", "beta shrinks", "self.beta * self.kappa**turn", "self.beta / self.kappa**turn"),
    Fault(
        "hqq",
        "the slope is that of the inverse",
        "(x * y).sum(-1) / (x * x).sum(-1)",
        "(x * y).sum(-1) / (y * y).sum(-1)",
    ),
    # SparseGPT and masks
    Fault(
        "sparsegpt",
        "scores are divided by the pivots",
        ".square_().mul_(self.pivots",
        ".square_().div_(self.pivots",
    ),
    Fault(
        "sparsegpt", "scores look ahead", "upper=False, unitriangular=True", "upper=True, unitriangular=True"
    ),
    Fault(
        "sparsegpt",
        "the error of what was corrected",
        "self.error[:, column] = self.weights[:, column] - new",
        "self.error[:, column] = target - new",
    ),
    Fault(
        "sparsegpt",
        "feedback is divided by the other diagonal",
        "factors.mT / diagonal_NI.unsqueeze(-1)",
        "factors.mT / diagonal_NI.unsqueeze(1)",
    ),
    Fault(
        "sparsegpt",
        "pivots are not squared",
        "feedback_NII, diagonal_NI.square())",
        "feedback_NII, diagonal_NI)",
    ),
    Fault(
        "sparsegpt",
        "blocks round their shares for themselves",
        "share = total * part.stop // width - total * part.start // width",
        "share = total * (part.stop - part.start) // width",
    ),
    Fault(
        "sparsegpt",
        "rounding starts from what was pruned",
        "self.weights.copy_(weights.mT)\n",
        "self.weights.copy_(self.weights)\n",
    ),
    Fault("masks", "one less of equals stays", "dtype=torch.int32) <= room)", "dtype=torch.int32) < room)"),
    Fault("masks", "the border is one off", "scores.shape[1] - count + 1", "scores.shape[1] - count"),
    Fault(
        "masks",
        "shares are added up from the largest",
        "descending=True, stable=True).flip(-1)",
        "descending=True, stable=True)",
    ),
    Fault("masks", "sums in the place of shares", "order, sums / sums[..., -1:])", "order, sums)"),
    Fault(
        "masks",
        "what is no number stays",
        "masked_fill(scores.isnan(), -torch.inf)",
        "masked_fill(scores.isnan(), torch.inf)",
    ),
    # AutoRound
    Fault(
        "autoround",
        "the slope in the scale has the wrong sign",
        "steps_NOGg - self._grouped / scale.unsqueeze(-1) * inside_NOGg",
        "steps_NOGg + self._grouped / scale.unsqueeze(-1) * inside_NOGg",
    ),
    Fault(
        "autoround",
        "negative scales are pushed the wrong way",
        "gradient_NOGg * inside_NOGg * scale.unsqueeze(-1)",
        "gradient_NOGg * inside_NOGg",
    ),
    Fault("autoround", "the slope in the zero has the wrong sign", ".sum(-1) * -scale", ".sum(-1) * scale"),
    Fault(
        "autoround",
        "the low end moves the wrong way",
        "by_low = -low / last * by_scale",
        "by_low = low / last * by_scale",
    ),
    Fault(
        "autoround",
        "answers go to the wrong tokens",
        "rows = order[: sum(counts)] // index.shape[1]",
        "rows = order[: sum(counts)] % len(hidden)",
    ),
    Fault(
        "autoround",
        "gates are forgotten",
        "inner @ down[expert].T * gates_Bk[places, None]",
        "inner @ down[expert].T",
    ),
    Fault("autoround", "a push is larger than half a step", "clamp_(-0.5, 0.5)", "clamp_(-1.0, 1.0)"),
    # Shared bases
    Fault(
        "shared_bases",
        "importance is not undone",
        "return left_EOr / rows_EO1, (bases_mrI",
        "return left_EOr * rows_EO1, (bases_mrI",
    ),
    Fault(
        "shared_bases",
        "the data are not undone",
        "bases_mrI.double(), upper=True, left=False)",
        "bases_mrI.double(), upper=True, left=False) @ root_II",
    ),
    Fault(
        "shared_bases",
        "the slope of shares has the wrong sign",
        "pull - gram @ _mixed(shares, bases)",
        "pull + gram @ _mixed(shares, bases)",
    ),
    Fault("shared_bases", "what is left grows", "off - step * moved", "off + step * moved"),
    Fault(
        "shared_bases",
        "old factors are added to",
        "torch.cholesky_solve(wanted_nrO - normal_nrr @ start_nrO, factor",
        "torch.cholesky_solve(wanted_nrO, factor",
    ),
    Fault(
        "shared_bases",
        "the loss is of the other sign",
        "target_nOI.square().sum() - ((2 * wanted",
        "target_nOI.square().sum() + ((2 * wanted",
    ),
    Fault("shared_bases", "sizes are lost", "shares_Em * sizes_m.float()", "shares_Em"),
    # Neurons
    Fault(
        "neurons",
        "columns are not squared",
        "down.float().square().sum(1) * squares\n",
        "down.float().abs().sum(1) * squares\n",
    ),
    Fault("neurons", "the root is forgotten", "sum(1) * squares.sqrt()", "sum(1) * squares"),
    Fault(
        "neurons",
        "alpha weighs the other part",
        "(1 - alpha) * sums + alpha * maxima",
        "alpha * sums + (1 - alpha) * maxima",
    ),
    Fault(
        "neurons",
        "the refit goes the wrong way",
        "select(down, kept, 2) + torch.cholesky_solve",
        "select(down, kept, 2) - torch.cholesky_solve",
    ),
    Fault(
        "neurons",
        "a factor is not turned back",
        "return upper.flip(1, 2), raised",
        "return upper.mT, raised",
    ),
    Fault("neurons", "the best go", "order[:, order.shape[1] - keep :]", "order[:, :keep]"),
    Fault(
        "obs",
        "the price is multiplied",
        "weights_NHI.square().sum(1) / inverse_NII.diagonal",
        "weights_NHI.square().sum(1) * inverse_NII.diagonal",
    ),
    Fault(
        "obs",
        "others make it worse",
        "weights.baddbmm_(columns_NHm, gain_NmI, alpha=-1)",
        "weights.baddbmm_(columns_NHm, gain_NmI, alpha=1)",
    ),
    Fault(
        "obs",
        "the inverse is that of all",
        "inverse.baddbmm_(rows_NmI.mT, gain_NmI, alpha=-1)",
        "inverse.baddbmm_(rows_NmI.mT, gain_NmI, alpha=0)",
    ),
    Fault(
        "obs",
        "losses do not add up",
        "loss_N = loss_N + _take_over(",
        "loss_N = _take_over(",
    ),
    Fault(
        "joint_refit",
        "what is left grows",
        "features_nK @ change_HK.T, alpha=-1)",
        "features_nK @ change_HK.T, alpha=1)",
    ),
    Fault(
        "joint_refit",
        "drawn away from the original",
        "features.T @ rest - ridge * away.T",
        "features.T @ rest + ridge * away.T",
    ),
    Fault(
        "joint_refit",
        "gates are forgotten",
        "return tokens, inner * gates.float().unsqueeze(1)",
        "return tokens, inner",
    ),
    # Low rank
    Fault(
        "low_rank",
        "the data are forgotten",
        "moved = core if hessians is None else core @ _damped(hessians, damping)",
        "moved = core",
    ),
    Fault(
        "low_rank", "the least directions", ".eigenvectors.flip(-1)[..., :rank]", ".eigenvectors[..., :rank]"
    ),
    Fault("low_rank", "rows in the place of columns", "inverse.square().sum(1)", "inverse.square().sum(2)"),
    Fault(
        "low_rank",
        "important layers lose most",
        "(importance[layer] - importance[other]) / epsilon",
        "(importance[other] - importance[layer]) / epsilon",
    ),
    Fault("low_rank", "a cap below the ratio", "max(CAP, ratio), ratio", "CAP, ratio"),
    Fault(
        "attention_rank", "queries or keys in the place of both", ".sum(1) * _sizes(k", ".sum(1) + _sizes(k"
    ),
    Fault(
        "attention_rank",
        "heads of the wrong group",
        "unflatten(0, (kv_heads, -1)).sum(1) * _sizes",
        "unflatten(0, (-1, kv_heads)).sum(0) * _sizes",
    ),
    Fault(
        "attention_rank",
        "the data are forgotten",
        "None if hessian is None else hessian[None], rank",
        "None, rank",
    ),
    Fault("attention_rank", "no root", "return energy.sqrt().unflatten", "return energy.unflatten"),
    Fault(
        "attention_rank",
        "the frame is forgotten",
        "(frame @ left.double())",
        "(frame @ frame.mT @ frame[..., : left.shape[-1]])",
    ),
    # Grids, integers, rounding
    Fault(
        "grids",
        "the level more lies on the shorter side",
        "longer / (half + 0.5), shorter / (half - 0.5)",
        "longer / (half - 0.5), shorter / (half + 0.5)",
    ),
    Fault(
        "grids",
        "the worst range",
        "chosen(errors < lowest, grid, best)",
        "chosen(errors > lowest, grid, best)",
    ),
    Fault("grids", "importance is forgotten", "errors if counts is None else errors.mul_(counts)", "errors"),
    Fault(
        "grids",
        "no room for 0",
        "low, high = low.clamp(max=0), high.clamp(min=0)",
        "low, high = low.clamp(max=0), high",
    ),
    Fault("grids", "scales of 0", "torch.where(scale == 0, torch.ones_like(scale), scale)", "scale"),
    Fault(
        "integer",
        "zeros are added",
        "codes.values, codes.format).to(torch.int16) - codes.zero",
        "codes.values, codes.format).to(torch.int16) + codes.zero",
    ),
    Fault(
        "integer",
        "one level less",
        "levels(format) - 1)\n        values[part]",
        "levels(format) - 2)\n        values[part]",
    ),
    Fault(
        "integer",
        "ordered groups are of the outputs",
        "codes.scale.gather(-1, at)",
        "codes.scale.gather(-1, at.flip(-1))",
        ("test_packed_source.py",),
    ),
    Fault(
        "rounding",
        "lengths are turned round",
        "(toward * rows).sum(-1, keepdim=True) / (toward * decode(slab).float()).sum(-1, keepdim=True)",
        "(toward * decode(slab).float()).sum(-1, keepdim=True) / (toward * rows).sum(-1, keepdim=True)",
    ),
    Fault(
        "rounding", "inputs are forgotten", "rows if hessians is None else rows @ hessians[part[0]]", "rows"
    ),
    # Stored forms
    Fault(
        "packing",
        "values of 3 bits lose what lies over a border",
        "low |= packed[..., byte + 1] << (8 - shift)",
        "low |= packed[..., byte] << (8 - shift)",
    ),
    Fault(
        "packing",
        "AWQ's outputs in plain order",
        "AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)",
        "AWQ_ORDER = (0, 1, 2, 3, 4, 5, 6, 7)",
    ),
    Fault("packing", "shifted the wrong way", "first * bits - number * 8)", "number * 8 - first * bits)"),
    Fault(
        "gptq_layout",
        "GPTQ's zeros are stored as they are",
        "pack_words((codes.zero - 1).mT, bits)",
        "pack_words(codes.zero.mT, bits)",
    ),
    Fault(
        "compressed_tensors",
        "zeros are packed along the inputs",
        "plain(pack_words(codes.zero.mT, codes.format.bits).mT)",
        "pack_words(codes.zero, codes.format.bits)",
    ),
    Fault(
        "integer_layout",
        "an infinite scale is stored",
        "lost = ~narrow.isfinite() | (",
        "lost = narrow.isnan() | (",
    ),
    Fault(
        "bitmask",
        "one zero less is kept",
        "cells |= place <= lacking.unsqueeze(-1)",
        "cells |= place < lacking.unsqueeze(-1)",
    ),
    Fault(
        "bitmask",
        "every slab fills up anew",
        "lacking[matrices] = _fill(slab.view(len(slab), -1), lacking[matrices])",
        "_fill(slab.view(len(slab), -1), lacking[matrices])",
    ),
    Fault(
        "slices",
        "kept rows are not in order",
        "order[:, : format.rank].sort(dim=1).values",
        "order[:, : format.rank]",
    ),
    Fault("slices", "as many as fit are too many", "if most > format.rank:", "if most >= format.rank:"),
    # Hessians
    Fault(
        "conditioning",
        "many tokens are pulled more than few",
        "(tokens / (tokens + kappa))",
        "(kappa / (tokens + kappa))",
    ),
    Fault(
        "conditioning",
        "the factor of the other order",
        "factors[pending] = lower.flip(1, 2)",
        "factors[pending] = lower.mT",
    ),
    Fault(
        "conditioning", "dampings do not rise", "max(10 * share, MIN_RAISED)", "max(share, MIN_RAISED) * 2"
    ),
    Fault(
        "conditioning",
        "the ridge is not shared by the mean",
        "ridge[pending] = share * mean[pending]",
        "ridge[pending] = share",
    ),
    Fault(
        "routed",
        "slots are taken for tokens",
        "return slots // self.index.shape[1], self",
        "return slots % len(self.hidden), self",
    ),
    Fault(
        "routed",
        "gates are not squared in the sum",
        "len(rows) if gates is None else float(gates.float().square().sum())",
        "len(rows) if gates is None else float(gates.float().sum())",
    ),
    Fault(
        "routed",
        "steepness of an expert's own tokens",
        "square().sum(0) / max(len(self.hidden), 1)",
        "square().sum(0) / max(len(tokens), 1)",
        ("test_bases.py",),
    ),
    # How much goes where
    Fault(
        "allocation", "a curve that bends upwards", ">= _slope(hull[-1], point)", "< _slope(hull[-1], point)"
    ),
    Fault("allocation", "the price of all in the place of one", "[1] / count", "[1]"),
    Fault(
        "allocation",
        "the line before",
        "bisect_right(slopes, removed, key",
        "bisect_right(slopes, removed - 1, key",
    ),
    # What a plan leaves, and what it writes
    Fault(
        "remains",
        "the wider of two cuts",
        "min(channels_of[expert], channels), True",
        "max(channels_of[expert], channels), True",
    ),
    Fault(
        "remains",
        "the layer's word before the expert's",
        "return of_layer if of_expert is None else of_expert",
        "return of_expert if of_layer is None else of_layer",
    ),
    Fault(
        "remains",
        "who is left is gone",
        "tuple(sorted(kept - set(treatment.keep)))",
        "tuple(sorted(kept & set(treatment.keep)))",
    ),
    Fault(
        "remains",
        "who joined before does not come along",
        "leaders |= {member: into for member, leader in leaders.items() if leader == unit.expert}",
        "pass",
    ),
    Fault(
        "rewrite",
        "survivors keep their numbers",
        "position = kept_experts.index(entry.unit.expert)",
        "position = entry.unit.expert",
    ),
    Fault(
        "rewrite",
        "orders are put together the wrong way round",
        "fitted if order is None else order[fitted]",
        "fitted if order is None else fitted[order]",
        ("test_merge.py::test_a_merge_of_merges_is_an_average_of_averages",),
    ),
    Fault(
        "rewrite",
        "shares of shares are forgotten",
        "treatment.share * part.share, part.lines + line",
        "treatment.share, part.lines + line",
        ("test_merge.py::test_a_merge_of_merges_is_an_average_of_averages",),
    ),
    Fault(
        "rewrite",
        "a bias is multiplied once more",
        "values = values / entry.multiplier",
        "values = values * entry.multiplier",
        ("test_depth_repair.py::test_a_bias_goes_where_there_already_is_one",),
    ),
    Fault(
        "rewrite",
        "rows by their old numbers",
        "[rows_before.index(row) for row in piece.take]",
        "[row for row in piece.take]",
        ("test_awq.py::test_after_an_earlier_drop_they_take_the_rows_that_are_theirs",),
    ),
)
