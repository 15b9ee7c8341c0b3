"""Score a text under one model, or under two side by side, from their last hidden states."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from moespresso.core.progress import Progress
from moespresso.data import Batches
from moespresso.model import MetaModel
from moespresso.quality.bootstrap import mean_interval
from moespresso.stream import Watch, sweep

# Logits computed at once: 64 MiB in float32.
_LOGITS = 16 << 20
_LARGEST_EXPONENT = 709.0


@dataclass(frozen=True)
class Scored:
    """Per sequence [N]: summed negative log-likelihood of the next tokens and how many; and against an
    original the summed KL, agreements of the most likely token, and how many positions were compared."""

    nll: Tensor
    predicted: Tensor
    kl: Tensor
    agreed: Tensor
    compared: Tensor
    original_nll: Tensor


def evaluate(
    model: MetaModel, original: MetaModel | None, batches: Batches, progress: Progress
) -> dict[str, Any]:
    """Perplexity of `model` on the batches and, against `original`, mean token KL and top-1 agreement."""
    models = [model] if original is None else [model, original]
    labels = ["layers"] if original is None else ["layers, pressed", "layers, original"]
    hidden = [sweep(meta, batches.ids, batches.mask, watch=Watch(progress, label))
              for meta, label in zip(models, labels, strict=True)]  # fmt: skip
    return summary(score_tokens(models, hidden, batches), batches, compared=original is not None)


def summary(scored: Scored, batches: Batches, *, compared: bool) -> dict[str, Any]:
    """The figures of an evaluation, as plain data."""
    nll, low, high = mean_interval(scored.nll, scored.predicted)
    result: dict[str, Any] = {
        "tokens": batches.num_tokens,
        "sequences": len(batches),
        "perplexity": {"value": _exp(nll), "ci95": [_exp(low), _exp(high)]},
    }
    if compared:
        kl, kl_low, kl_high = mean_interval(scored.kl, scored.compared)
        result["kl"] = {"mean": kl, "ci95": [kl_low, kl_high]}
        result["top1_agreement"] = float(scored.agreed.sum() / scored.compared.sum())
        result["perplexity_ratio"] = _exp(nll - float(scored.original_nll.sum() / scored.predicted.sum()))
    return result


def _exp(value: float) -> float:
    """e to the `value`; a ruined model may be beyond what a float holds."""
    return math.exp(value) if not value > _LARGEST_EXPONENT else math.inf


@torch.inference_mode()
def score_tokens(models: Sequence[MetaModel], hidden: Sequence[Tensor], batches: Batches) -> Scored:
    """Compute heads chunk by chunk from last hidden states [N, L, H] of one model, or of the pressed and
    the original."""
    sequences, length = batches.ids.shape
    sums = {name: torch.zeros(sequences, dtype=torch.float64)
            for name in ("nll", "predicted", "kl", "agreed", "compared", "original_nll")}  # fmt: skip
    targets = torch.cat([batches.ids[:, 1:], batches.ids[:, :1]], 1).reshape(-1)
    has_target = torch.cat([batches.mask[:, 1:], torch.zeros(sequences, 1, dtype=torch.bool)], 1).reshape(-1)
    positions = torch.nonzero(batches.mask.reshape(-1)).squeeze(-1)
    flat = [states.reshape(sequences * length, -1) for states in hidden]
    with ExitStack() as stack:
        for meta in models:
            stack.enter_context(meta.outer())
        rows = max(1, _LOGITS // models[0].model.config.get_text_config().vocab_size)
        for chunk in positions.split(rows):
            logs = [F.log_softmax(meta.logits(states[chunk].to(meta.device)).float(), -1)
                    for meta, states in zip(models, flat, strict=True)]  # fmt: skip
            for name, values in _per_token(logs, targets[chunk], has_target[chunk]).items():
                sums[name].index_add_(0, chunk // length, values.double().cpu())
    return Scored(**sums)


@torch.inference_mode()
def token_kl(
    models: Sequence[MetaModel], candidates: Sequence[Sequence[Tensor]], original: Tensor, mask: Tensor
) -> list[float]:
    """Mean token KL(original || candidate) of every candidate.

    Last hidden states: of the original [N, L, H], with `mask` [N, L]; of the candidates in batches of the
    same rows [B, L, H], so that they need not be put together. `models` are the candidates' model and the
    original: heads and all that lies outside the layers.
    """
    sums = torch.zeros(len(candidates), dtype=torch.float64)
    sizes = [len(batch) for batch in candidates[0]]
    model, source = models

    def logs(meta: MetaModel, states: Tensor) -> Tensor:
        return F.log_softmax(meta.logits(states.to(meta.device)).float(), -1)

    with model.outer(), source.outer():
        rows = max(1, _LOGITS // model.model.config.get_text_config().vocab_size)
        for valid, truth, *batches in zip(mask.split(sizes), original.split(sizes), *candidates, strict=True):
            for chunk in torch.nonzero(valid).split(rows):
                at = chunk.unbind(1)
                wanted = logs(source, truth[at])
                for number, states in enumerate(batches):
                    sums[number] += _kl(wanted, logs(model, states[at])).sum().double().cpu()
    return (sums / mask.sum()).tolist()


def _kl(original: Tensor, pressed: Tensor) -> Tensor:
    """KL per position [n] from log-probabilities [n, V]."""
    # What the original rules out adds nothing, whatever the pressed model says (0 x inf would be NaN); a NaN of either
    # model stays one.
    return (original.exp() * (original - pressed)).masked_fill(original == -math.inf, 0.0).sum(1)


def _per_token(logs: list[Tensor], targets: Tensor, has_target: Tensor) -> dict[str, Tensor]:
    """What each position [n] adds, from log-probabilities [n, V]."""
    pressed, original = logs[0], logs[-1]
    known = has_target.to(pressed.device)
    at = targets.to(pressed.device).unsqueeze(1)

    def nll(log: Tensor) -> Tensor:
        return -log.gather(1, at).squeeze(1) * known

    values = {"nll": nll(pressed), "predicted": known.float(), "compared": torch.ones_like(pressed[:, 0])}
    if len(logs) == 2:
        values["original_nll"] = nll(original)
        values["kl"] = _kl(original, pressed)
        values["agreed"] = (pressed.argmax(1) == original.argmax(1)).float()
    return values
