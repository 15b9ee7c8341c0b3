"""The demo models' forms, and a quick way to run and train their experts on a CPU.

The classes are those of ``transformers``, so that what is saved is exactly that family's checkpoint.
"""

from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    DeepseekV2Config,
    MistralConfig,
    MixtralConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen3MoeConfig,
)
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

# Every expert gets a multiple of this many rows: the CPU kernels are generated for each new shape, which
# costs more than multiplying a few rows for nothing.
PAD = 64

# Weight of the load-balancing loss: keeps experts alive, and is small, so that they may specialise and be
# used unequally.
BALANCE = 0.002

# The bundled ones; one for benchmarks; and the Mixtral form's dense twin, with the width that a token passes there.
FORMS = ("mixtral", "deepseek_v2", "qwen3_moe", "mistral")


def config_of(form: str, vocabulary: int, end: int = 0, pad: int = 1) -> PretrainedConfig:
    """The form's shape: every width a multiple of 64, so that every block format fits it."""
    common = {
        "vocab_size": vocabulary,
        "hidden_size": 128,
        "num_hidden_layers": 8,
        "max_position_embeddings": 1024,
        "tie_word_embeddings": True,
        "bos_token_id": end,
        "eos_token_id": end,
        "pad_token_id": pad,
        "dtype": "bfloat16",
    }
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    if form == "mixtral":
        return MixtralConfig(
            **common,
            intermediate_size=128,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=64,
            num_local_experts=8,
            num_experts_per_tok=2,
            router_aux_loss_coef=BALANCE,
            rope_parameters=rope,
        )
    if form == "mistral":
        return MistralConfig(
            **common,
            intermediate_size=256,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=64,
            sliding_window=None,
            rope_parameters=rope,
        )
    if form == "deepseek_v2":
        return DeepseekV2Config(
            **common,
            intermediate_size=256,
            moe_intermediate_size=64,
            num_attention_heads=2,
            num_key_value_heads=2,
            qk_nope_head_dim=64,
            qk_rope_head_dim=64,
            v_head_dim=64,
            kv_lora_rank=64,
            q_lora_rank=None,
            n_routed_experts=32,
            num_experts_per_tok=4,
            n_shared_experts=2,
            first_k_dense_replace=1,
            routed_scaling_factor=4.0,
            rope_parameters=rope,
        )
    return Qwen3MoeConfig(
        **(common | {"hidden_size": 192}),
        moe_intermediate_size=64,
        intermediate_size=256,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=64,
        num_experts=32,
        num_experts_per_tok=4,
        norm_topk_prob=True,
        decoder_sparse_step=1,
        mlp_only_layers=[],
        rope_parameters=rope,
    )


class SortedExperts(torch.autograd.Function):
    """SwiGLU experts over rows sorted by expert: one dense product after another, little padding.

    Written out by hand, backward included, because at these sizes the cost is in the many small steps
    around the products: gathers instead of scatters, no copies, the routing weight folded in early.
    """

    @staticmethod
    def forward(ctx, hidden, weights, gate_up, down, index):  # noqa: ANN001, ANN205
        picks, experts = index.shape[1], gate_up.shape[0]
        flat = index.reshape(-1)
        order = torch.argsort(flat, stable=True)
        counts = torch.bincount(flat, minlength=experts)
        padded = (counts + PAD - 1) // PAD * PAD
        shift = (padded.cumsum(0) - padded) - (counts.cumsum(0) - counts)
        place = torch.arange(order.numel(), device=order.device) + shift[flat[order]]
        sizes = padded.tolist()
        token = order.new_zeros(sum(sizes))  # a row of padding is a copy of the first token, with weight 0
        token[place] = order // picks
        scale = hidden.new_zeros(sum(sizes), 1)
        scale[place, 0] = weights.reshape(-1)[order].to(hidden.dtype)
        back = torch.empty_like(order)
        back[order] = place
        rows = hidden[token]
        both = _per_expert(rows, gate_up.mT, sizes)
        mids = swiglu(both)
        out = _per_expert(mids * scale, down.mT, sizes)
        ctx.save_for_backward(rows, scale, gate_up, down, both, mids, token, back)
        ctx.counts, ctx.picks = sizes, picks
        return out[back].view(-1, picks, out.shape[1]).sum(1)

    @staticmethod
    def backward(ctx, grad):  # noqa: ANN001, ANN205
        rows, scale, gate_up, down, both, mids, token, back = ctx.saved_tensors
        g_out = grad[token]
        g_scaled = _per_expert(g_out, down, ctx.counts)
        g_down = _weight_grad(g_out, mids * scale, ctx.counts)
        g_scale = (g_scaled * mids).sum(-1)
        g_both = swiglu_backward(g_scaled * scale, both)
        g_gate_up = _weight_grad(g_both, rows, ctx.counts)
        g_rows = _per_expert(g_both, gate_up, ctx.counts)
        g_hidden = g_rows[back].view(-1, ctx.picks, rows.shape[1]).sum(1)
        return g_hidden, g_scale[back].view(-1, ctx.picks), g_gate_up, g_down, None


def _per_expert(rows: Tensor, matrices: Tensor, counts: list[int]) -> Tensor:
    out = rows.new_empty(rows.shape[0], matrices.shape[2])
    start = 0
    for matrix, count in zip(matrices, counts, strict=True):
        torch.mm(rows[start : start + count], matrix, out=out[start : start + count])
        start += count
    return out


def _weight_grad(left: Tensor, right: Tensor, counts: list[int]) -> Tensor:
    out = left.new_empty(len(counts), left.shape[1], right.shape[1])
    start = 0
    for expert, count in enumerate(counts):
        torch.mm(left[start : start + count].T, right[start : start + count], out=out[expert])
        start += count
    return out


def swiglu(both: Tensor) -> Tensor:
    gate, up = both.chunk(2, -1)
    return nn.functional.silu(gate) * up


def swiglu_backward(grad: Tensor, both: Tensor) -> Tensor:
    gate, up = both.chunk(2, -1)
    squashed = torch.sigmoid(gate)
    return torch.cat([grad * up * squashed * (1 + gate * (1 - squashed)), grad * gate * squashed], -1)


def sorted_experts(self: nn.Module, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    return SortedExperts.apply(hidden, weights, self.gate_up_proj, self.down_proj, index)


def plain_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float,
    **kwargs: object,
) -> tuple[Tensor, None]:
    """Causal attention as two batched products: for short rows in bf16 quicker than the fused CPU kernel."""
    batch, heads, length, width = query.shape
    groups = heads // key.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=query.device).triu(1)
    bias = query.new_zeros(length, length).masked_fill_(causal, float("-inf"))
    bias = bias.repeat(groups, 1)
    q = query.reshape(batch * key.shape[1], groups * length, width)
    k = key.reshape(batch * key.shape[1], length, width)
    v = value.reshape(batch * key.shape[1], length, -1)
    scores = torch.baddbmm(bias, q, k.mT, alpha=scaling)
    out = torch.bmm(scores.softmax(-1), v)
    return out.view(batch, heads, length, -1).transpose(1, 2), None


ALL_EXPERTS_FUNCTIONS.register("sorted", sorted_experts)
ALL_ATTENTION_FUNCTIONS.register("plain", plain_attention)


class TiedLoss(torch.autograd.Function):
    """Mean cross entropy of ``hidden @ head.T`` in slices small enough to stay in the cache.

    The gradient is taken on the way forward, so that the logits of a batch never exist all at once.
    """

    ROWS = 512

    @staticmethod
    def forward(ctx, hidden, head, targets):  # noqa: ANN001, ANN205
        loss = hidden.new_zeros((), dtype=torch.float32)
        g_hidden = torch.empty_like(hidden)
        g_head = torch.zeros_like(head)
        head = head.to(hidden.dtype)
        for start in range(0, len(targets), TiedLoss.ROWS):
            rows = slice(start, start + TiedLoss.ROWS)
            logs = torch.log_softmax((hidden[rows] @ head.T).float(), -1)
            wanted = targets[rows, None]
            loss -= logs.gather(1, wanted).sum()
            errors = logs.exp_().scatter_add_(1, wanted, logs.new_full((len(wanted), 1), -1.0))
            errors = errors.div_(len(targets)).to(hidden.dtype)
            g_hidden[rows] = errors @ head
            g_head += errors.T @ hidden[rows]
        ctx.save_for_backward(g_hidden, g_head)
        return loss / len(targets)

    @staticmethod
    def backward(ctx, grad):  # noqa: ANN001, ANN205
        g_hidden, g_head = ctx.saved_tensors
        return g_hidden * grad, g_head * grad, None


def routers(model: PreTrainedModel) -> list[nn.Module]:
    return [module for name, module in model.named_modules() if name.endswith("mlp.gate")]


def build(
    form: str, vocabulary: int, experts: str = "sorted", attention: str = "plain", start: Path | None = None
) -> PreTrainedModel:
    """The form with new weights, or with those of the exported model ``start``."""
    options = {"dtype": torch.float32, "attn_implementation": "sdpa"}
    if start is None:
        model = AutoModelForCausalLM.from_config(config_of(form, vocabulary), **options)
    else:
        model = AutoModelForCausalLM.from_pretrained(start, **options)
    if form != "mistral":
        model.set_experts_implementation(experts)
    model.set_attn_implementation(attention)
    return model
