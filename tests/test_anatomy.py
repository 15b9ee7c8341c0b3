"""Anatomy: every family's layers against what its source says, and what is no plain sum of two branches is told apart.

The expectations of the families were written by reading their forwards; the toy layers below each break one rule.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import families
import test_more_families as more
from moespresso.runtime.anatomy import Anatomy, BranchParts, NotResidual, find_anatomy
from moespresso.runtime.parts import NoNorm, Silent, SilentMixer


def attention(body: str = "self_attn", pre: str | None = "input_layernorm", post: str | None = None,
              times: float = 1.0, answers: int | None = 2, **beside: int | None) -> BranchParts:  # fmt: skip
    return BranchParts(body, pre, post, times, answers, tuple(beside.items()))


def mlp(body: str = "mlp", pre: str | None = "post_attention_layernorm", post: str | None = None,
        times: float = 1.0, answers: int | None = None, **beside: int | None) -> BranchParts:  # fmt: skip
    return BranchParts(body, pre, post, times, answers, tuple(beside.items()))


PLAIN = Anatomy(attention(), mlp())
SANDWICH = Anatomy(attention(post="post_attention_layernorm"),
                   mlp(pre="pre_feedforward_layernorm", post="post_feedforward_layernorm"))  # fmt: skip
POST_ONLY = Anatomy(attention(pre=None, post="post_attention_layernorm"),
                    mlp(pre=None, post="post_feedforward_layernorm"))  # fmt: skip
SHARED = mlp("block_sparse_moe", shared_mlp=None)
JAMBA = mlp("feed_forward", pre="pre_ff_layernorm")
LFM2 = mlp("feed_forward", pre="ffn_norm")
NEXT = mlp(answers=2)  # it takes a bare tensor too
MAMBA = Anatomy(attention("mixer", pre="norm", answers=None), None)
FEED = Anatomy(None, mlp("mixer", pre="norm"))

# One anatomy for all layers, or one for each.
EXPECTED: dict[str, Anatomy | list[Anatomy]] = {
    **dict.fromkeys("""mixtral qwen2_moe qwen3_moe deepseek_v2 deepseek_v3 olmoe glm4_moe minimax_m2 ernie4_5_moe phimoe
                       dots1 hunyuan_v1_moe glm4_moe_lite deepseek_v32 exaone_moe llama qwen2 qwen3 mistral
                       phi3""".split(), PLAIN),
    "gpt_oss": Anatomy(attention(), mlp(answers=2)),
    "granitemoe": Anatomy(attention(times=0.6), mlp("block_sparse_moe", times=0.6)),
    "jamba": [Anatomy(branch, JAMBA) for branch in (attention("mamba", answers=None), attention(),
                                                    attention("mamba", answers=None), attention("mamba", answers=None),
                                                    attention())],
    "qwen3_next": [Anatomy(branch, NEXT) for branch in (attention("linear_attn", answers=None), attention(),
                                                        attention("linear_attn", answers=None))],
    "granitemoeshared": Anatomy(attention(), SHARED),
    "granitemoehybrid": [Anatomy(branch, SHARED) for branch in (attention("mamba", answers=None), attention(),
                                                                attention("mamba", answers=None))],
    "lfm2_moe": [Anatomy(branch, LFM2) for branch in (attention("conv", "operator_norm", answers=None),
                                                      attention(pre="operator_norm"),
                                                      attention("conv", "operator_norm", answers=None))],
    "nemotron_h": [MAMBA, FEED, Anatomy(attention("mixer", pre="norm"), None), FEED, FEED],
    "glm_moe_dsa": Anatomy(attention(answers=3), mlp()),
    "llama4_text": Anatomy(attention(), mlp("feed_forward", answers=2)),
    "afmoe": Anatomy(attention(post="post_attention_layernorm"), mlp(pre="pre_mlp_layernorm", post="post_mlp_layernorm")),
    **dict.fromkeys("gemma2 gemma3_text".split(), SANDWICH),
    **dict.fromkeys("flex_olmo olmo2".split(), POST_ONLY),
    "falcon_h1": Anatomy(attention("mamba", answers=None, self_attn=2), mlp("feed_forward", pre="pre_ff_layernorm")),
}  # fmt: skip
# Family -> why its layers are no plain sum.
OTHERWISE = {
    "phi": "self_attn and mlp stand side by side",
    "cohere": "self_attn and mlp stand side by side",
    "minimax": "rescales or replaces the residual stream",
    "zaya": "rescales or replaces the residual stream",
    "hy_v4": "cannot be followed",
    "deepseek_v4": "cannot be followed",
    "gemma4_text": "post_feedforward_layernorm is given more than the answer of a body",
}
FIELDS: dict[str, Mapping[str, Any]] = {
    **more.MIXTURES, **more.DENSE, **{name: fields for name, (fields, _) in more.OPAQUE.items()},
    "qwen3": {}, "olmo2": {}, "phi": {}, "cohere": {},
    "falcon_h1": {"mamba_d_ssm": 48, "mamba_n_heads": 4, "mamba_d_head": 12, "mamba_d_state": 6, "mamba_n_groups": 1},
}  # fmt: skip


def layers_of(family: str) -> nn.ModuleList:
    """The decoder layers of a tiny model of `family` on `meta`."""
    if family in families.FAMILIES:
        config = families.FAMILIES[family].config()
    else:
        fields = {**families.COMMON, "num_attention_heads": 4, "num_experts_per_tok": 2, **FIELDS[family]}
        if family == "gemma4_text":
            del fields["num_experts_per_tok"]
        config = CONFIG_MAPPING[family](
            **{name: value for name, value in fields.items() if value is not None}
        )
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config).model.layers


def test_every_family_of_the_zoo_is_expected_to_be_something() -> None:
    assert {*families.FAMILIES, *FIELDS} == {*EXPECTED, *OTHERWISE}


@pytest.mark.parametrize("family", EXPECTED)
def test_a_familys_layers_are_what_its_source_says(family: str) -> None:
    layers = layers_of(family)
    expected = EXPECTED[family]
    wanted = expected if isinstance(expected, list) else [expected] * len(layers)
    assert [find_anatomy(layer) for layer in layers] == wanted


@pytest.mark.parametrize("family", OTHERWISE)
def test_a_family_that_is_no_plain_sum_is_told_apart(family: str) -> None:
    for layer in layers_of(family):
        with pytest.raises(NotResidual, match=OTHERWISE[family]):
            find_anatomy(layer)


class Toy(nn.Module):
    """A layer with all a forward may need; the subclasses say what it does."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2, self.norm3 = (
            nn.LayerNorm(4),
            nn.RMSNorm(4),
            nn.LayerNorm(4, elementwise_affine=False),
        )
        self.self_attn, self.mlp, self.other = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.dropout = nn.Dropout(0.5)
        self.scale = 0.25


def test_branches_are_read_from_any_forward_that_is_a_sum() -> None:
    class Layer(Toy):
        def forward(
            self, hidden_states: Tensor, mask: Tensor, *, more: int = 3, **kwargs: Any
        ) -> tuple[Tensor, None]:
            answer, _, _ = self.self_attn(hidden_states=hidden_states, attention_mask=mask)
            hidden_states = hidden_states + self.dropout(self.norm1(self.dropout(answer))) * self.scale
            return hidden_states + self.scale * self.mlp(self.norm2(hidden_states)), None

    found = find_anatomy(Layer())
    assert found.attention == BranchParts("self_attn", None, "norm1", 0.25, 3)
    assert found.mlp == BranchParts("mlp", "norm2", None, 0.25, None)


def test_a_bare_mask_is_enough_to_be_a_mixer_and_no_branch_is_an_anatomy_too() -> None:
    class Mixing(Toy):
        def forward(self, x: Tensor) -> Tensor:
            return x + self.other(self.norm1(x), attention_mask=None)

    class Nothing(Toy):
        def forward(self, x: Tensor) -> Tensor:
            return x

    assert find_anatomy(Mixing()) == Anatomy(BranchParts("other", "norm1", None, 1.0, None), None)
    assert find_anatomy(Nothing()) == Anatomy(None, None)


def test_asking_changes_nothing_in_the_layer() -> None:
    class Layer(Toy):
        def forward(self, x: Tensor) -> Tensor:
            return x + self.mlp(x)

    layer = Layer().to("meta")
    children, state = dict(layer.named_children()), dict(layer.named_parameters())
    find_anatomy(layer)
    assert layer.training
    assert dict(layer.named_children()) == children
    assert all(found is state[name] for name, found in layer.named_parameters())


def test_a_silent_branch_is_still_a_branch() -> None:
    layer = layers_of("granitemoe")[0]
    layer.self_attn, layer.input_layernorm = SilentMixer(2, 0), NoNorm()
    layer.block_sparse_moe, layer.post_attention_layernorm = Silent(None), NoNorm()
    assert find_anatomy(layer) == Anatomy(
        attention(pre=None, times=0.6), mlp("block_sparse_moe", pre=None, times=0.6)
    )


def rescaled(self: Toy, x: Tensor) -> Tensor:
    return 0.5 * x + self.mlp(x)


def normed(self: Toy, x: Tensor) -> Tensor:
    x = self.norm1(x)
    return x + self.mlp(x)


def half_blind(self: Toy, x: Tensor) -> Tensor:
    first = self.self_attn(self.norm1(x))
    return x + 0.5 * first + self.mlp(self.norm2(x + first))


def side_by_side(self: Toy, x: Tensor) -> Tensor:
    normed = self.norm1(x)
    return x + self.self_attn(normed) + self.mlp(normed)


def side_by_side_in_one_norm(self: Toy, x: Tensor) -> Tensor:
    normed = self.norm1(x)
    return x + self.norm2(self.self_attn(normed) + self.mlp(normed))


def twice(self: Toy, x: Tensor) -> Tensor:
    x = x + self.self_attn(self.norm1(x))
    return x + self.mlp(self.norm1(x))


def two_of_a_kind(self: Toy, x: Tensor) -> Tensor:
    x = x + self.mlp(self.norm1(x))
    return x + self.other(self.norm2(x))


def added_unlike(self: Toy, x: Tensor) -> Tensor:
    normed = self.norm1(x)
    return x + self.mlp(normed) + 2 * self.other(normed)


def normed_apart(self: Toy, x: Tensor) -> Tensor:
    normed = self.norm1(x)
    return x + self.norm2(self.mlp(normed)) + self.norm3(self.other(normed))


def fed_unlike(self: Toy, x: Tensor) -> Tensor:
    return x + self.norm3(self.mlp(self.norm1(x)) + self.other(self.norm2(x)))


def scaled_inside(self: Toy, x: Tensor) -> Tensor:
    return x + self.norm2(3 * self.mlp(self.norm1(x)))


def scaled_before(self: Toy, x: Tensor) -> Tensor:
    return x + self.mlp(3 * self.norm1(x))


def norm_of_the_sum(self: Toy, x: Tensor) -> Tensor:
    return x + self.norm1(x + self.mlp(x))


def gated(self: Toy, x: Tensor) -> Tensor:
    return x + self.mlp(self.norm1(x)) ** 2


def clipped(self: Toy, x: Tensor) -> Tensor:
    return (x + self.mlp(self.norm1(x))).relu()


def asking_for_more(self: Toy, x: Tensor, table: dict[str, Tensor]) -> Tensor:
    return x + self.mlp(table["all"])


@pytest.mark.parametrize(
    ("forward", "reason"),
    [
        (rescaled, "rescales or replaces"),
        (normed, "rescales or replaces"),
        (half_blind, "neither the layer's input nor all that was added"),
        (side_by_side, "self_attn and mlp stand side by side"),
        (side_by_side_in_one_norm, "self_attn and mlp stand side by side"),
        (twice, "norm1 is called 2 times"),
        (two_of_a_kind, "two branches of one kind"),
        (added_unlike, "mlp and other are not fed and added alike"),
        (normed_apart, "mlp and other are normed apart"),
        (fed_unlike, "mlp and other are given different things"),
        (scaled_inside, "the answer that norm2 is given has been rescaled"),
        (scaled_before, "what mlp is given has been rescaled"),
        (norm_of_the_sum, "norm1 is given more than the answer of a body"),
        (gated, "more than add"),
        (clipped, "more than add"),
        (asking_for_more, "cannot be followed.*not subscriptable"),
    ],
)
def test_whatever_is_no_plain_sum_says_why(forward: Any, reason: str) -> None:
    layer = type("Layer", (Toy,), {"forward": forward})()
    with pytest.raises(NotResidual, match=reason):
        find_anatomy(layer)
