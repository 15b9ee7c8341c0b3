"""Faults that the tests must catch: the data of `mutants.py`.

Each is one line of a kernel turned into a plausible mistake: a sign, a transposed index, a damping forgotten, an order
turned round, an edge missed by one. `MODULES` says where each module lies, as one imports it, and which tests are about it (files, or
single ones of a file); who moves a module changes its line there. An `old` text must occur once in its module.
"""

from __future__ import annotations

from dataclasses import dataclass

# A short name: the module under `moespresso`, and the tests that are expected to notice.
MODULES: dict[str, tuple[str, tuple[str, ...]]] = {
    "attention_rank": ("kernels.attention_rank", ("test_low_rank_kernels.py",)),
    "autoround": ("kernels.autoround", ("test_autoround.py",)),
    "bitmask": ("formats.bitmask", ("test_sparse_format.py",)),
    "channels": ("kernels.channels", ("test_channels.py",)),
    "compressed_tensors": ("formats.compressed_tensors", ("test_formats.py",)),
    "gptq": ("kernels.gptq", ("test_kernels.py",)),
    "gptq_layout": ("formats.gptq", ("test_formats.py",)),
    "grids": ("formats.grids", ("test_kernels.py",)),
    "hessians": ("kernels.hessians", ("test_kernels.py",)),
    "hqq": ("kernels.hqq", ("test_kernels.py",)),
    "integer": ("formats.integer", ("test_formats.py",)),
    "integer_layout": ("formats.integer_layout", ("test_formats.py",)),
    "joint_refit": ("kernels.joint_refit", ("test_channels.py",)),
    "low_rank": ("kernels.low_rank", ("test_low_rank_kernels.py",)),
    "masks": ("kernels.masks", ("test_prune_kernels.py",)),
    "packing": ("formats.packing", ("test_formats.py",)),
    "remains": ("effect.remains", ("test_remains.py",)),
    "removal": ("kernels.removal", ("test_channels.py",)),
    "rewrite": ("effect.rewrite", ("test_core.py",)),
    "rounding": ("formats.rounding", ("test_kernels.py",)),
    "routed": ("kernels.routed", ("test_channels.py",)),
    "shared_bases": ("kernels.shared_bases", ("test_bases.py",)),
    "slices": ("formats.slices", ("test_attention_rank.py::test_what_is_stored_comes_back",)),
    "sparsegpt": ("kernels.sparsegpt", ("test_prune_kernels.py",)),
    "widths": (
        "kernels.widths",
        (
            "test_widths.py::test_no_other_choice_loses_less",
            "test_widths.py::test_a_curve_that_bends_upwards_is_taken_as_a_line",
            "test_widths.py::test_layers_count_as_often_as_they_have_experts",
        ),
    ),
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
        "gptq", "small moments go first", "descending=True, stable=True)", "descending=False, stable=True)"
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
        "factored(_permuted(hessians, order), damping)",
        "factored(_permuted(hessians, order), 0.0)",
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
        "torch.baddbmm(mine, local, error, alpha=-1)",
        "torch.baddbmm(mine, local, error, alpha=1)",
    ),
    Fault(
        "gptq",
        "blocks behind are told the opposite",
        "hessians[:, here.stop : part.stop, here], error - before)",
        "hessians[:, here.stop : part.stop, here], before - error)",
    ),
    Fault(
        "gptq",
        "scales move away from the best",
        "old.float() + (steps * pull)",
        "old.float() - (steps * pull)",
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
    Fault("hqq", "what is given up is added", "steps -= shrink(", "steps += shrink("),
    Fault("hqq", "zeros have the wrong sign", "zero = (values - steps).mean", "zero = (steps - values).mean"),
    Fault("hqq", "beta shrinks", "beta * kappa**turn", "beta / kappa**turn"),
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
        "self.error[:, column] = self.weights[:, column] - met",
        "self.error[:, column] = wanted - met",
    ),
    Fault(
        "sparsegpt",
        "feedback is divided by the other diagonal",
        "factors.mT / diagonal.unsqueeze(-1)",
        "factors.mT / diagonal.unsqueeze(1)",
    ),
    Fault("sparsegpt", "pivots are not squared", "feedback, diagonal.square())", "feedback, diagonal)"),
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
    Fault("masks", "sums in the place of shares", "order, given / given[..., -1:])", "order, given)"),
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
        "steps - self._grouped / scale.unsqueeze(-1) * inside",
        "steps + self._grouped / scale.unsqueeze(-1) * inside",
    ),
    Fault(
        "autoround",
        "negative scales are pushed the wrong way",
        "slopes * inside * scale.unsqueeze(-1)",
        "slopes * inside",
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
        "inner @ down[expert].T * gates[places, None]",
        "inner @ down[expert].T",
    ),
    Fault("autoround", "a push is larger than half a step", "clamp_(-0.5, 0.5)", "clamp_(-1.0, 1.0)"),
    # Shared bases
    Fault(
        "shared_bases", "importance is not undone", "return left / rows, (bases", "return left * rows, (bases"
    ),
    Fault(
        "shared_bases",
        "the data are not undone",
        "bases.double(), upper=True, left=False)",
        "bases.double(), upper=True, left=False) @ root",
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
        "torch.cholesky_solve(wanted - normal @ own, torch",
        "torch.cholesky_solve(wanted, torch",
    ),
    Fault(
        "shared_bases",
        "the loss is of the other sign",
        "aim.square().sum() - ((2 * wanted",
        "aim.square().sum() + ((2 * wanted",
    ),
    Fault("shared_bases", "sizes are lost", "shares * sizes.float()", "shares"),
    # Channels
    Fault(
        "channels",
        "columns are not squared",
        "down.float().square().sum(1) * squares\n",
        "down.float().abs().sum(1) * squares\n",
    ),
    Fault("channels", "the root is forgotten", "sum(1) * squares.sqrt()", "sum(1) * squares"),
    Fault(
        "channels",
        "alpha weighs the other part",
        "(1 - alpha) * squares + alpha * peaks",
        "alpha * squares + (1 - alpha) * peaks",
    ),
    Fault(
        "channels",
        "the refit goes the wrong way",
        "taken(down, kept, 2) + torch.cholesky_solve",
        "taken(down, kept, 2) - torch.cholesky_solve",
    ),
    Fault(
        "channels",
        "a factor is not turned back",
        "return upper.flip(1, 2), ridge, raised",
        "return upper.mT, ridge, raised",
    ),
    Fault("channels", "the best go", "order[:, order.shape[1] - keep :]", "order[:, :keep]"),
    Fault(
        "removal",
        "the price is multiplied",
        "weights.square().sum(1) / inverse.diagonal",
        "weights.square().sum(1) * inverse.diagonal",
    ),
    Fault(
        "removal",
        "others make it worse",
        "weights.baddbmm_(own, gain, alpha=-1)",
        "weights.baddbmm_(own, gain, alpha=1)",
    ),
    Fault(
        "removal",
        "the inverse is that of all",
        "inverse.baddbmm_(rows.mT, gain, alpha=-1)",
        "inverse.baddbmm_(rows.mT, gain, alpha=0)",
    ),
    Fault(
        "removal",
        "losses do not add up",
        "lost = lost + _remove(",
        "lost = _remove(",
    ),
    Fault(
        "joint_refit", "what is left grows", "features @ change.T, alpha=-1)", "features @ change.T, alpha=1)"
    ),
    Fault(
        "joint_refit",
        "drawn away from the original",
        "features.T @ left - ridge * away.T",
        "features.T @ left + ridge * away.T",
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
        "moved = core if moments is None else core @ _damped(moments, damping)",
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
        "None if moments is None else moments[None], rank",
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
        "grids", "the worst range", "chosen(found < lowest, grid, best)", "chosen(found > lowest, grid, best)"
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
        "(seen * own).sum(-1, keepdim=True) / (seen * decode(here).float()).sum(-1, keepdim=True)",
        "(seen * decode(here).float()).sum(-1, keepdim=True) / (seen * own).sum(-1, keepdim=True)",
    ),
    Fault("rounding", "inputs are forgotten", "own if hessians is None else own @ hessians[part[0]]", "own"),
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
    # Second moments
    Fault(
        "hessians",
        "many tokens are pulled more than few",
        "(tokens / (tokens + kappa))",
        "(kappa / (tokens + kappa))",
    ),
    Fault(
        "hessians",
        "the factor of the other order",
        "factors[left] = lower.flip(1, 2)",
        "factors[left] = lower.mT",
    ),
    Fault("hessians", "dampings do not rise", "max(10 * share, SMALLEST)", "max(share, SMALLEST) * 2"),
    Fault(
        "hessians",
        "the ridge is not shared by the mean",
        "ridge[left] = share * mean[left]",
        "ridge[left] = share",
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
    Fault("widths", "a curve that bends upwards", ">= _slope(hull[-1], point)", "< _slope(hull[-1], point)"),
    Fault("widths", "the price of all in the place of one", "[1] / count", "[1]"),
    Fault(
        "widths", "the line before", "bisect_right(slopes, gone, key", "bisect_right(slopes, gone - 1, key"
    ),
    # What a plan leaves, and what it writes
    Fault(
        "remains",
        "the wider of two cuts",
        "min(found[expert], channels), True",
        "max(found[expert], channels), True",
    ),
    Fault(
        "remains",
        "the layer's word before the expert's",
        "return whole if own is None else own",
        "return own if whole is None else whole",
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
        "found |= {member: into for member, leader in found.items() if leader == unit.expert}",
        "pass",
    ),
    Fault(
        "rewrite",
        "survivors keep their numbers",
        "position = kept.index(entry.unit.expert)",
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
        "[there.index(row) for row in piece.take]",
        "[row for row in piece.take]",
        ("test_awq.py::test_after_an_earlier_drop_they_take_the_rows_that_are_theirs",),
    ),
)
