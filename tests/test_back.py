"""Gradients at the experts' answers, layer by layer, against plain autograd through the whole stock model in memory."""

from __future__ import annotations

import errno
import os
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import families
from conftest import Zoo
from moespresso.build import Tensors, View, open_view
from moespresso.core.errors import UserError
from moespresso.core.layer import Layer
from moespresso.model import PausedBatch
from moespresso.model.experts import experts_forward
from moespresso.statistics import FedGradient
from moespresso.stream import back, gradient_moments, sweep, sweep_back
from test_engine import close, meta_of
from test_more_families import MIXTURES, _random_model

FAMILIES = ["mixtral", "qwen3_moe", "deepseek_v2", "deepseek_v3", "olmoe", "glm4_moe", "gpt_oss", "jamba", "granitemoe"]  # fmt: skip
over_families = pytest.mark.parametrize("family", FAMILIES)


@dataclass
class Truth:
    """What one layer's experts were given and how the summed loss pulls at their answer, tokens that are no padding."""

    hidden: Tensor
    index: Tensor
    weights: Tensor
    grad: Tensor


@pytest.fixture(autouse=True)
def _two_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several batches, and several pieces of text behind the head."""
    monkeypatch.setattr(back, "rows_at_once", lambda *_: 2)
    monkeypatch.setattr(back, "_LOGITS", 96 * 7)


def text_for(view: View, *, padded: bool, rows: int = 5, length: int = 13) -> tuple[Tensor, Tensor]:
    ids = torch.randint(3, view.source.vocab, (rows, length), generator=torch.Generator().manual_seed(4))
    mask = torch.ones_like(ids, dtype=torch.bool)
    if padded:
        mask[1, 7:] = mask[-1, 1:] = False  # the last row has no next token at all
    return ids, mask


def truth(model: Any, ids: Tensor, mask: Tensor) -> tuple[float, dict[int, Truth]]:
    """Mean loss, and what every layer's experts saw, by autograd through everything at once."""
    given: dict[int, tuple[Tensor, ...]] = {}
    grads: dict[int, Tensor] = {}

    def listen(layer: int) -> Any:
        def hook(_: Any, args: tuple[Tensor, ...], answer: Tensor) -> None:
            given[layer] = tuple(tensor.detach() for tensor in args)
            answer.register_hook(lambda grad: grads.update({layer: grad.reshape(-1, grad.shape[-1])}))

        return hook

    for layer, block in families.moe_blocks(model).items():
        block.experts.register_forward_hook(listen(layer))
    logits = model(ids, attention_mask=None if mask.all() else mask.long(), use_cache=False).logits[:, :-1]
    known = mask[:, :-1] & mask[:, 1:]
    loss = F.cross_entropy(logits[known], ids[:, 1:][known], reduction="sum")
    loss.backward()
    valid = mask.reshape(-1)
    seen = {
        layer: Truth(*(tensor.reshape(valid.numel(), -1)[valid] for tensor in (*given[layer], grads[layer])))
        for layer in given
    }
    return loss.item() / int(known.sum()), seen


class Gather:
    """A visitor that keeps everything."""

    def __init__(self) -> None:
        self.seen: dict[int, list[FedGradient]] = {}

    def __call__(self, layer: Layer, batches: Iterator[FedGradient]) -> None:
        self.seen[layer.spec.index] = list(batches)

    def all_of(self, layer: int, name: str) -> Tensor:
        return torch.cat([getattr(batch, name) for batch in self.seen[layer]])


def swept(folder: Path, ids: Tensor, mask: Tensor, work: Path, visit: Any) -> float:
    with Tensors(folder) as reader:
        return sweep_back(meta_of(open_view(folder), reader), ids, mask, visit, work=work)


@over_families
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.few(4)
def test_gradients_and_loss_are_those_of_the_whole_model(family: str, padded: bool, zoo: Zoo, tmp_path: Path):
    ids, mask = text_for(open_view(zoo(family)), padded=padded)
    loss, wanted = truth(families.reference(zoo(family)), ids, mask)
    found = Gather()
    assert swept(zoo(family), ids, mask, tmp_path, found) == pytest.approx(loss, rel=1e-5)
    assert list(found.seen) == sorted(wanted, reverse=True)
    for layer, said in wanted.items():
        assert len(found.seen[layer]) == 3
        assert torch.equal(found.all_of(layer, "index"), said.index)
        for name in ("hidden", "weights", "grad"):
            close(found.all_of(layer, name), getattr(said, name))
        assert float(said.grad.abs().max()) > 1e-3
        assert not found.all_of(layer, "grad").requires_grad
    assert not list(tmp_path.iterdir())


@over_families
@pytest.mark.few(3)
def test_gradient_moments_are_their_formula_token_by_token(family: str, zoo: Zoo, tmp_path: Path):
    view, model = open_view(zoo(family)), families.reference(zoo(family))
    ids, mask = text_for(view, padded=True, rows=3)
    _, wanted = truth(model, ids, mask)
    with Tensors(zoo(family)) as reader:
        found = gradient_moments(meta_of(view, reader), ids, mask, tmp_path)
    assert found.keys() == wanted.keys()
    for layer, block in families.moe_blocks(model).items():
        down = block.experts.down_proj.detach()
        columns = down.mT if family == "gpt_oss" else down  # [E, H, I]
        for expert, matrix in enumerate(columns):
            close(found[layer][expert], slow_moments(wanted[layer], expert, matrix))
        assert found[layer].dtype == torch.float32


def slow_moments(said: Truth, expert: int, down: Tensor) -> Tensor:
    """w_k^T G w_k with G [H, H] = mean of d d^T over the expert's tokens, d the gradient at its own answer."""
    moment, tokens = torch.zeros(len(down), len(down), dtype=torch.float64), 0
    for chosen, gates, grad in zip(said.index, said.weights, said.grad, strict=True):
        for slot in (chosen == expert).nonzero().flatten().tolist():
            own = (gates[slot] * grad).double()
            moment, tokens = moment + torch.outer(own, own), tokens + 1
    return torch.einsum("hk,hi,ik->k", down.double(), moment / max(tokens, 1), down.double()).float()


def test_an_expert_without_a_token_is_not_stiff(zoo: Zoo, tmp_path: Path):
    view = open_view(zoo("mixtral"))
    ids, mask = text_for(view, padded=False, rows=1, length=2)
    found = Gather()
    swept(zoo("mixtral"), ids, mask, tmp_path, found)
    with Tensors(zoo("mixtral")) as reader:
        values = gradient_moments(meta_of(view, reader), ids, mask, tmp_path)
    for layer, stiff in values.items():
        asked = set(found.all_of(layer, "index").flatten().tolist())
        assert asked < set(range(8))
        assert {expert for expert in range(8) if stiff[expert].any()} <= asked
        assert stiff.isfinite().all()


def test_a_skeleton_that_was_swept_before_can_be_swept_back(zoo: Zoo, tmp_path: Path):
    """What `sweep` leaves behind was made in inference mode, which autograd must not meet. In bfloat16, for good measure:
    what is seen is handed out in float32, and has no more digits than it came with."""
    view = open_view(zoo("deepseek_v3"))
    ids, mask = text_for(view, padded=True)
    gathered = [Gather(), Gather()]
    with Tensors(zoo("deepseek_v3")) as reader:
        for found in gathered:
            meta = meta_of(view, reader, torch.bfloat16)
            if found is gathered[1]:
                sweep(meta, ids, mask)
            sweep_back(meta, ids, mask, found, work=tmp_path)
            assert all(parameter.is_meta for parameter in meta.layers.parameters())
    for layer in gathered[0].seen:
        fresh, again = (found.all_of(layer, "grad") for found in gathered)
        assert fresh.dtype == torch.float32
        assert torch.equal(fresh, fresh.bfloat16().float())
        assert torch.equal(fresh, again)


def test_batches_that_a_visitor_does_not_ask_for_go_on_all_the_same(zoo: Zoo, tmp_path: Path):
    ids, mask = text_for(open_view(zoo("mixtral")), padded=True)
    whole, first = Gather(), Gather()

    def only_the_first_layer(layer: Layer, batches: Iterator[FedGradient]) -> None:
        if layer.spec.index == 0:
            first(layer, batches)

    swept(zoo("mixtral"), ids, mask, tmp_path, whole)
    swept(zoo("mixtral"), ids, mask, tmp_path, only_the_first_layer)
    assert torch.equal(first.all_of(0, "grad"), whole.all_of(0, "grad"))


def test_one_batch_is_remembered_at_a_time_and_a_layers_file_goes_with_it(zoo: Zoo, tmp_path: Path):
    ids, mask = text_for(open_view(zoo("mixtral")), padded=False)
    held: list[int] = []
    files: list[int] = []

    def watch(layer: Layer, batches: Iterator[FedGradient]) -> None:
        graphs: list[weakref.ref[Any]] = []
        hook = layer.module.register_forward_hook(lambda _, __, output: graphs.append(weakref.ref(output)))
        files.append(len(list(tmp_path.glob("back-*/*"))))
        for number, _ in enumerate(batches, 1):
            assert len(graphs) == number  # run when it is asked for, not before
            held.append(sum(graph() is not None for graph in graphs))
        hook.remove()

    swept(zoo("mixtral"), ids, mask, tmp_path, watch)
    assert held == [0] * 9  # 3 layers, 3 batches: by the time a batch is shown, its graph is gone
    assert files == [4, 3, 2]


def test_weights_get_no_gradients(zoo: Zoo, tmp_path: Path):
    ids, mask = text_for(open_view(zoo("olmoe")), padded=False)

    def look(layer: Layer, batches: Iterator[FedGradient]) -> None:
        for _ in batches:
            assert all(p.grad is None and not p.requires_grad for p in layer.module.parameters())

    swept(zoo("olmoe"), ids, mask, tmp_path, look)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_experts_fit_for_autograd_answer_as_the_others_do(dtype: torch.dtype, zoo: Zoo):
    """Also where a selected expert is not there any more, and where none is."""
    experts = families.moe_blocks(families.reference(zoo("mixtral"), dtype))[0].experts
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(20, 48, generator=generator).to(dtype)
    index = torch.rand(20, 9, generator=generator).topk(3).indices
    for weights in (torch.rand(20, 3, generator=generator), torch.rand(20, 3, generator=generator).to(dtype)):
        for chosen in (index, torch.full_like(index, 8)):
            given = (experts, hidden, chosen, weights)
            assert torch.equal(back._weighted_sum(*given), experts_forward(*given))
    assert (index == 8).any()


# What goes wrong


@pytest.mark.parametrize("fatal", [1, 5])
def test_a_full_disk_is_told_and_nothing_is_left_behind(
    fatal: int, zoo: Zoo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    ids, mask = text_for(open_view(zoo("mixtral")), padded=False)
    asked: list[int] = []

    def full(file: int, start: int, size: int) -> None:
        asked.append(size)
        if len(asked) == fatal:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(UserError, match="disk is full"):
        swept(zoo("mixtral"), ids, mask, tmp_path, Gather())
    # Room for all the layers is asked for before any of them is run.
    assert asked == [ids.numel() * 48 * 4] * fatal
    assert not list(tmp_path.iterdir())


def test_what_a_killed_run_left_goes(zoo: Zoo, tmp_path: Path):
    (tmp_path / "back-left").mkdir()
    (tmp_path / "back-left" / "0").write_bytes(b"hidden states")
    ids, mask = text_for(open_view(zoo("mixtral")), padded=False)
    swept(zoo("mixtral"), ids, mask, tmp_path, Gather())
    assert not list(tmp_path.iterdir())


def test_a_family_that_hands_on_more_than_hidden_states_is_refused(tmp_path: Path):
    folder = tmp_path / "model"
    _random_model("glm_moe_dsa", MIXTURES["glm_moe_dsa"]).save_pretrained(folder)
    ids, mask = text_for(open_view(folder), padded=False)
    with pytest.raises(UserError, match="hand on more than hidden states"):
        swept(folder, ids, mask, tmp_path, Gather())


def test_what_is_computed_between_layers_or_left_for_later_ones_is_refused(
    zoo: Zoo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """No family of the zoo does either; gradients that leave it out would be wrong without a word."""
    ids, mask = text_for(open_view(zoo("mixtral")), padded=False)

    def go_on(self: PausedBatch, output: Tensor) -> None:
        plain(self, output)
        self.hidden = self.hidden * 2

    def run(self: PausedBatch, layer: Any, hidden: Tensor | None = None) -> Tensor:
        self.kwargs["shared"].update(keys=hidden)
        return layer(hidden, *self.args, **self.kwargs)

    plain = PausedBatch.go_on
    with monkeypatch.context() as patch:
        patch.setattr(PausedBatch, "go_on", go_on)
        with pytest.raises(UserError, match="hand on more"):
            swept(zoo("mixtral"), ids, mask, tmp_path, Gather())
    begin = back.begin

    def with_a_box(*args: Any) -> list[PausedBatch]:
        batches = begin(*args)
        for batch in batches:
            batch.kwargs["shared"] = {}
        return batches

    monkeypatch.setattr(back, "begin", with_a_box)
    monkeypatch.setattr(PausedBatch, "run", run)
    with pytest.raises(UserError, match="hand on more"):
        swept(zoo("mixtral"), ids, mask, tmp_path, Gather())
