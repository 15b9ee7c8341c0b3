"""Evaluation: streamed and in chunks, yet the figures of whole models in memory and of all their logits.

The truth is computed from stock transformers' full logits, tokens x vocabulary at once, in float64.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from families import FAMILIES, random_ids, reference, tensor_files, write_checkpoint
from moespresso.build import Tensors, open_view
from moespresso.core.progress import Silent
from moespresso.data import Batches
from moespresso.model import MetaModel
from moespresso.quality import compare, evaluate, mean_interval

# A plain head, one that scales its logits (and is tied), one with a bias.
HEADS = ["mixtral", "granitemoe", "phimoe"]
Pair = tuple[Path, Path]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Pair]:
    """A model and the same one shaken, so that they agree now and then; written when first asked for."""
    made: dict[str, Pair] = {}

    def pair(name: str) -> Pair:
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            made[name] = write_checkpoint(name, folder / "one"), write_checkpoint(name, folder / "two")
            generator = torch.Generator().manual_seed(0)
            for tensor in tensor_files(made[name][1]):
                edited(
                    made[name][1],
                    tensor,
                    lambda x: x * (1 + 0.15 * torch.randn(x.shape, generator=generator)),
                )
        return made[name]

    return pair


def edited(folder: Path, name: str, change: Callable[[Tensor], Tensor]) -> None:
    """Change one tensor of a checkpoint."""
    file = tensor_files(folder)[name]
    tensors = load_file(file)
    changed = change(tensors[name].float()).to(tensors[name].dtype)
    save_file({**tensors, name: changed}, file, metadata={"format": "pt"})


@contextmanager
def skeletons(*folders: Path) -> Iterator[list[MetaModel]]:
    """The models in these folders, ready to stream."""
    with ExitStack() as stack:
        readers = [stack.enter_context(Tensors(folder, allow_nonfinite=True)) for folder in folders]
        yield [open_view(folder).meta_model(reader, torch.float32, torch.device("cpu"))
               for folder, reader in zip(folders, readers, strict=True)]  # fmt: skip


def evaluated(batches: Batches, model: Path, original: Path | None = None) -> dict[str, Any]:
    with skeletons(model) as (mine,):
        if original is None:
            return evaluate(mine, None, batches, Silent())
        with skeletons(original) as (other,):
            return evaluate(mine, other, batches, Silent())


def text(lengths: tuple[int, ...] = (16, 9, 13, 2), *, seed: int = 0) -> Batches:
    """Random rows as long as the longest, padded on the right."""
    ids = random_ids(FAMILIES["mixtral"].config(), len(lengths), max(lengths), seed)
    return Batches(ids, torch.arange(max(lengths)) < torch.tensor(lengths)[:, None], {})


@dataclass
class Truth:
    """Per sequence: summed negative log-likelihoods, predicted tokens, KL, agreements, compared positions."""

    nll: Tensor
    original_nll: Tensor
    predicted: Tensor
    kl: Tensor
    agreed: Tensor
    compared: Tensor


def in_memory(batches: Batches, model: Path, original: Path) -> Truth:
    """The same figures from all logits of both models at once."""
    mine, other = (_log_probabilities(folder, batches) for folder in (model, original))
    target = F.one_hot(batches.ids[:, 1:], mine.shape[-1]).double()
    known = batches.mask[:, 1:].double()
    valid = batches.mask.double()
    return Truth(
        nll=-((mine[:, :-1] * target).sum(-1) * known).sum(1),
        original_nll=-((other[:, :-1] * target).sum(-1) * known).sum(1),
        predicted=known.sum(1),
        kl=((other.exp() * (other - mine)).sum(-1) * valid).sum(1),
        agreed=((other.argmax(-1) == mine.argmax(-1)) * valid).sum(1),
        compared=valid.sum(1),
    )


def _log_probabilities(folder: Path, batches: Batches) -> Tensor:
    with torch.no_grad():
        logits = reference(folder)(batches.ids, attention_mask=batches.mask.long(), use_cache=False).logits
    return F.log_softmax(logits.double(), -1)


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("chunk", [None, 5, 1], ids=["whole", "chunks of 5", "chunks of 1"])
@pytest.mark.few(2)
def test_figures_are_those_of_all_logits_at_once(
    name: str, chunk: int | None, pairs: Callable[[str], Pair], monkeypatch: pytest.MonkeyPatch
):
    if chunk is not None:
        monkeypatch.setattr(compare, "_LOGITS", chunk * 96)
    batches = text()
    got, truth = evaluated(batches, *pairs(name)), in_memory(batches, *pairs(name))
    predicted, compared = float(truth.predicted.sum()), float(truth.compared.sum())
    nll, original = float(truth.nll.sum()) / predicted, float(truth.original_nll.sum()) / predicted
    assert (got["tokens"], got["sequences"]) == (40, 4)
    assert (predicted, compared) == (36, 40)
    assert got["perplexity"]["value"] == pytest.approx(math.exp(nll), rel=1e-5)
    assert got["perplexity_ratio"] == pytest.approx(math.exp(nll - original), rel=1e-5)
    assert got["kl"]["mean"] == pytest.approx(float(truth.kl.sum()) / compared, rel=1e-5)
    assert got["top1_agreement"] == pytest.approx(float(truth.agreed.sum()) / compared)
    low, high = mean_interval(truth.kl, truth.compared)[1:]
    assert got["kl"]["ci95"] == pytest.approx([low, high], rel=1e-5)
    low, high = mean_interval(truth.nll, truth.predicted)[1:]
    assert got["perplexity"]["ci95"] == pytest.approx([math.exp(low), math.exp(high)], rel=1e-5)
    json.dumps(got, allow_nan=False)


def test_two_models_differ_in_these_tests(pairs: Callable[[str], Pair]):
    got = evaluated(text(), *pairs("mixtral"))
    assert got["kl"]["mean"] > 0.1
    assert 0.1 < got["top1_agreement"] < 0.9
    assert abs(math.log(got["perplexity_ratio"])) > 0.01


def test_kl_is_of_the_original_from_the_pressed_and_not_the_other_way(pairs: Callable[[str], Pair]):
    first, second = pairs("mixtral")
    there, back = evaluated(text(), first, second), evaluated(text(), second, first)
    assert there["kl"]["mean"] != pytest.approx(back["kl"]["mean"], rel=0.01)
    assert there["perplexity_ratio"] == pytest.approx(1 / back["perplexity_ratio"], rel=1e-6)


@pytest.mark.parametrize("name", HEADS)
def test_a_model_is_the_same_as_itself(name: str, pairs: Callable[[str], Pair]):
    model, _ = pairs(name)
    got = evaluated(text(), model, model)
    assert got["kl"] == {"mean": 0.0, "ci95": [0.0, 0.0]}
    assert (got["top1_agreement"], got["perplexity_ratio"]) == (1.0, 1.0)


def test_alone_a_model_has_a_perplexity_and_nothing_to_compare(pairs: Callable[[str], Pair]):
    model, other = pairs("mixtral")
    alone, beside = evaluated(text(), model), evaluated(text(), model, other)
    assert set(alone) == {"tokens", "sequences", "perplexity"}
    assert set(beside) - set(alone) == {"kl", "top1_agreement", "perplexity_ratio"}
    assert alone["perplexity"] == beside["perplexity"]


def test_padding_changes_nothing(pairs: Callable[[str], Pair]):
    batches = text((12, 12))
    wider = Batches(F.pad(batches.ids, (0, 9), value=5), F.pad(batches.mask, (0, 9)), {})
    narrow, wide = (evaluated(rows, *pairs("mixtral")) for rows in (batches, wider))
    assert narrow["tokens"] == wide["tokens"] == 24
    assert flat(wide) == pytest.approx(flat(narrow), rel=1e-4)


def flat(figures: dict[str, Any]) -> list[float]:
    return [*figures["perplexity"]["ci95"], figures["perplexity"]["value"], *figures["kl"]["ci95"],
            figures["kl"]["mean"], figures["top1_agreement"], figures["perplexity_ratio"]]  # fmt: skip


def test_a_broken_model_never_looks_like_a_good_one(pairs: Callable[[str], Pair], tmp_path: Path):
    _, original = pairs("mixtral")
    broken = write_checkpoint("mixtral", tmp_path)
    edited(broken, "model.norm.weight", lambda weight: weight * math.nan)
    got = evaluated(text(), broken, original)
    assert not got["perplexity"]["value"] < 1e9
    assert not got["kl"]["mean"] < 1e9
    assert got["top1_agreement"] < 0.5


def test_a_ruined_model_gets_its_figures(pairs: Callable[[str], Pair], tmp_path: Path):
    _, original = pairs("mixtral")
    ruined = write_checkpoint("mixtral", tmp_path)
    edited(ruined, "lm_head.weight", lambda weight: weight * 3000)
    got = evaluated(text(), ruined, original)
    assert got["perplexity"]["value"] > 1e100
    assert got["kl"]["mean"] > 100


# Intervals


def test_the_interval_holds_the_truth_nineteen_times_in_twenty():
    generator = torch.Generator().manual_seed(0)
    hits = 0
    for _ in range(200):
        counts = torch.randint(20, 200, (50,), generator=generator)
        # Tokens of one sequence share their luck, as those of one text do.
        sums = counts * (3.0 + torch.randn(50, generator=generator)) + counts.sqrt() * torch.randn(
            50, generator=generator
        )
        mean, low, high = mean_interval(sums, counts)
        assert low < mean < high
        hits += low < 3.0 < high
    assert 0.90 <= hits / 200 <= 0.98


def test_the_mean_is_over_tokens_and_not_over_sequences():
    # Twenty words of 10 nats each, and twenty texts of 99 tokens and none.
    sums, counts = torch.tensor([10.0, 0.0] * 20), torch.tensor([1.0, 99.0] * 20)
    mean, low, high = mean_interval(sums, counts)
    assert mean == pytest.approx(0.1)
    assert 0.03 < low < 0.1 < high < 0.3


def test_one_sequence_tells_nothing_about_the_spread():
    assert mean_interval(torch.tensor([6.0]), torch.tensor([2.0])) == (3.0, 3.0, 3.0)


def test_an_interval_is_the_same_every_time_and_narrows_with_more_text():
    generator = torch.Generator().manual_seed(1)
    sums, counts = torch.rand(400, generator=generator) * 10, torch.full((400,), 5.0)
    assert mean_interval(sums, counts) == mean_interval(sums, counts)
    widths = [high - low for _, low, high in (mean_interval(sums[:n], counts[:n]) for n in (25, 400))]
    assert 2.5 < widths[0] / widths[1] < 6.5
