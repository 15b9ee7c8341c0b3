"""Runs in 16 bits: every step, in bfloat16 and in float16, comes out near what it is in float32.

The contract, for each step, score and option that takes a way of its own: what the pressed model loses against the original
(mean token KL, both looked at in float32) is at most a little more than what the one loses that was pressed in float32, and the
two pressed models are nearer to each other than to the original by far (`BOUNDS`). The models are loud where real ones are: two channels
of the stream hold hundreds, what experts are given has a channel of 300, and what their down projections are given reaches thousands.
Squares of all of these are beyond float16, which ends at 65504, and next to them bfloat16's steps are large.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from conftest import tiny_tokenizer, write_words
from families import build, read_tensor, tensor_files, write_checkpoint
from moespresso import api
from moespresso.build import Tensors, View, make_meta_model, open_view, pick_dtype, precision
from moespresso.core.errors import UserError
from moespresso.core.layer import Fed
from moespresso.core.runtime import Runtime
from moespresso.data import Batches
from moespresso.data.text import Source
from moespresso.fit import Job, measure
from moespresso.kernels import RoutedExperts
from moespresso.methods import ExpertDrop, LayerDrop, scores
from moespresso.methods._awq import find_entrance, is_product
from moespresso.methods.expert_drop import expert_scores
from moespresso.model import MetaModel
from moespresso.quality import score_tokens
from moespresso.run import Decided, Recipe, decide
from moespresso.stream import SweepState, gradient_moments, sweep

HALVES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
# What may be lost, as a share of what float32's model loses, and how far the two may be from each other, as the same.
BOUNDS = {"bfloat16": (1.4, 0.6), "float16": (1.1, 0.25)}
SLACK = 0.003
LOUD = 400.0
SMALL: dict[str, dict[str, Any]] = {
    "mixtral": {},
    "qwen3_moe": {"moe_intermediate_size": 32, "decoder_sparse_step": 1, "head_dim": 16},
    "deepseek_v3": {"moe_intermediate_size": 32, "first_k_dense_replace": 1, "n_shared_experts": 1},
    "granitemoe": {},
    "gpt_oss": {"layer_types": ["full_attention", "sliding_attention"]},
}
EVERYWHERE = [
    "expert_drop:ratio=0.25,score=reconstruction",
    "expert_drop:ratio=0.25,renormalise=compensate,score=reap",
    "expert_drop:ratio=0.25,replace=novice,score=ean",
    "expert_merge:ratio=0.25",
    "layer_drop:drop=1,repair=linear",
]
# For models that keep experts as matrices of their own.
ON_MATRICES = [
    "gptq:group_size=8",
    "sparsegpt",
    "channel_prune:ratio=0.3,score=heapr",
    "awq:group_size=8,grid=2,clip=false",
]
ONCE = [
    *ON_MATRICES,
    "gptq:group_size=8,weighting=gate2,shrink=8,parts=experts+attention",
    "gptq:group_size=8,calibrate_all_experts=true,symmetric=false",
    "autoround:group_size=8,iterations=8",
    "sparsegpt:bits=4,sparsity=2:4,group_size=8,weighting=gate2",
    "wanda:gate=true,pack=true",
    "wanda:variant=true,parts=experts+attention",
    "low_rank:ratio=0.4,parts=experts+attention",
    "low_rank:method=shared_basis,ratio=0.2",
    "attention_rank:ratio=0.3",
    "channel_prune:ratio=0.3",
    "channel_prune:ratio=0.3,score=camera,alpha=0.5,refit=none",
    "channel_prune:ratio=0.3,score=wanda,refit=expert",
    "channel_prune:ratio=0.3,score=leverage",
    "channel_prune:ratio=0.3,scope=global",
    "channel_prune:ratio=0.3,per_expert=true,score=camera",
    "expert_drop:keep=6,score=easy_ep,scope=global",
    "layer_drop:drop=1,score=kl,repair=scale",
    "layer_drop:drop=1,score=cosine_moe,repair=bias",
    "layer_drop:drop=1,part=attention,repair=bias",
    "block_drop:drop=1",
    "block_drop:drop=1,contiguous=true,repair=scale",
    "block_drop:drop=1,score=kl,repair=linear",
    "expert_drop:keep=6|refit",
    "layer_drop:drop=1,part=attention|refit",
]  # fmt: skip
# Averages of experts whose channels are thousands of times as loud as their neighbours are worth nothing in any precision.
QUIET = ["expert_merge:keep=6,method=m_smoe", "expert_merge:keep=6,method=ream,sequential=true"]
CASES = [
    *(("mixtral", recipe) for recipe in [*EVERYWHERE, *ONCE]),
    *(("quiet", recipe) for recipe in QUIET),
    *((family, recipe) for family in SMALL if family != "mixtral" for recipe in EVERYWHERE),
    *((family, recipe) for family in ("qwen3_moe", "deepseek_v3") for recipe in ON_MATRICES),
    ("qwen3_moe", "attention_rank:ratio=0.3"),
    ("granitemoe", "sparsegpt"),
    ("granitemoe", "channel_prune:ratio=0.3,score=heapr"),
    ("granitemoe", "expert_drop:keep=6|refit"),
    ("gpt_oss", "attention_rank:ratio=0.3"),
]


def loud(folder: Path, family: str, inner: float = 500.0, **changes: Any) -> Path:
    """Write a model of the family whose stream, experts' inputs and experts' channels each have loud places."""
    same = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = build(family, **(same | SMALL[family] | changes))
    width = model.config.hidden_size
    rms = LOUD * (1.25 / width) ** 0.5
    with torch.no_grad():
        times = getattr(model.config, "embedding_multiplier", 1.0)
        embedding = model.get_input_embeddings().weight
        embedding[:, 3] += LOUD / times
        embedding[:, 11] -= LOUD / 2 / times
        for name, tensor in model.named_parameters():
            _make_loud(name, tensor, width, rms, inner if family != "gpt_oss" else 1.0)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def _make_loud(name: str, tensor: Tensor, width: int, rms: float, inner: float) -> None:
    if name.endswith(("input_layernorm.weight", "post_attention_layernorm.weight", "model.norm.weight")):
        tensor *= rms  # what is left of the others behind the norm is about one
        tensor[[3, 11]] = 0.02
        if "post_attention" in name:
            tensor[3] = 300 * rms / LOUD
    elif "mlp" not in name and "sparse_moe" not in name:
        return
    elif name.endswith("gate_up_proj") and tensor.shape[2] != width:  # transposed
        tensor[:, 3] /= 300
    elif name.endswith("gate_up_proj"):
        tensor[:, :, 3] /= 300
        tensor[:, tensor.shape[1] // 2] *= inner
    elif name.endswith("down_proj") and tensor.ndim == 3:
        tensor[:, :, 0] /= inner
    elif tensor.ndim == 2 and tensor.shape[1] == width and "down" not in name:
        tensor[:, 3] /= 300


def _batches() -> Batches:
    ids = torch.randint(3, 96, (8, 32), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[0, 20:] = mask[5, 9:] = False
    return Batches(ids, mask, {})


BATCHES = _batches()


@dataclass(frozen=True)
class Model:
    """A loud model in float32 with its last hidden states."""

    view: View
    reader: Tensors
    meta: MetaModel
    states: Tensor


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Model]:
    made: dict[str, Model] = {}

    def model(name: str) -> Model:
        if name not in made:
            family = "mixtral" if name == "quiet" else name
            inner = 1.0 if name == "quiet" else 500.0
            view = open_view(loud(tmp_path_factory.mktemp("loud") / name, family, inner))
            reader = Tensors(view.checkpoint.folder)
            made[name] = Model(view, reader, *_run(view, reader))
        return made[name]

    return model


def _run(view: View, reader: Tensors) -> tuple[MetaModel, Tensor]:
    meta = make_meta_model(view, reader, Runtime(dtype="float32"))
    return meta, sweep(meta, BATCHES.ids, BATCHES.mask)


def _decided(view: View, recipe: str, work: Path, dtype: str) -> Decided:
    work.mkdir(exist_ok=True)
    steps = (
        Recipe().with_options(model=view.checkpoint.folder, steps=recipe.split("|"), target="plugin").steps
    )
    return decide(Job(view, work, BATCHES, Runtime(dtype=dtype)), steps)


def _kl(one: tuple[MetaModel, Tensor], other: tuple[MetaModel, Tensor]) -> float:
    scored = score_tokens([one[0], other[0]], [one[1], other[1]], BATCHES)
    return float(scored.kl.sum() / scored.compared.sum())


@pytest.mark.parametrize(("name", "recipe"), CASES)
@pytest.mark.few(3)
def test_every_step_comes_out_near_float32(
    name: str, recipe: str, models: Callable[[str], Model], tmp_path: Path
):
    model = models(name)
    original = model.meta, model.states
    whole: tuple[MetaModel, Tensor] | None = None
    lost = 0.0
    for dtype in ("float32", *HALVES):
        made = _decided(model.view, recipe, tmp_path / dtype, dtype)
        pressed = _run(replace(model.view, plan=made.plan, fits=made.fits), model.reader)
        found = _kl(pressed, original)
        if whole is None:
            whole, lost = pressed, found
            assert lost > SLACK  # or nothing would be seen here
            continue
        more, apart = BOUNDS[dtype]
        assert found <= more * lost + SLACK, (dtype, found, lost)
        assert _kl(pressed, whole) <= apart * lost + SLACK, (dtype, lost)
        assert all(tensor.isfinite().all() for tensor in made.fits.values() if tensor.is_floating_point())
        assert not [line for line in made.warnings if "finite" in line]


@pytest.mark.parametrize("name", SMALL)
def test_every_score_of_experts_is_near_float32s(name: str, models: Callable[[str], Model], tmp_path: Path):
    """All of one measurement: a score may be off by a share of the largest of its layer, and no more."""
    view = models(name).view
    found: dict[str, dict[str, Tensor]] = {}
    for dtype in ("float32", *HALVES):
        (tmp_path / dtype).mkdir()
        steps = [ExpertDrop(), LayerDrop()]
        stats = measure(Job(view, tmp_path / dtype, BATCHES, Runtime(dtype=dtype)), steps, view)
        layer = view.blueprint.moe_layers[-1]
        found[dtype] = {
            f"{score} {gates}": torch.tensor(
                expert_scores(ExpertDrop(score=score, gates=gates), stats, layer)
            )
            for score in scores()
            if score not in ("aimer", "reconstruction", "random")
            for gates in ("model", "softmax")
        }
    for dtype, share in (("bfloat16", 0.15), ("float16", 0.02)):
        for score, wanted in found["float32"].items():
            assert float((found[dtype][score] - wanted).abs().max()) <= share * float(wanted.abs().max()), (
                score
            )


# Where tokens meet weights


@pytest.mark.parametrize("dtype", HALVES.values(), ids=HALVES)
def test_an_expert_is_computed_in_the_precision_of_its_tokens_and_its_squares_in_float32(dtype: torch.dtype):
    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)))

    module = SimpleNamespace(has_gate=False, act_fn=nn.functional.silu)
    hidden, up, down = 3000 * drawn(40, 8), drawn(4, 6, 8), drawn(4, 8, 6)
    index = torch.arange(80).view(40, 2) % 4
    whole = RoutedExperts(up, down, module, hidden, index, torch.full((40, 2), 0.5))
    half = replace(whole, hidden=hidden.to(dtype))
    every = range(4)
    assert half.inner(0, half.hidden, up[0]).dtype is dtype
    for found, wanted in [
        (half.hessians_in(every), whole.hessians_in(every)),
        (half.hessians_inner(every, up, by_gate=True), whole.hessians_inner(every, up, by_gate=True)),
        (half.squares_in(every, by_gate=False), whole.squares_in(every, by_gate=False)),
        (half.squares_inner(every, up.to(dtype), by_gate=True), whole.squares_inner(every, up, by_gate=True)),
        (half.squared_slopes(every, up), whole.squared_slopes(every, up)),
        (half.pooled_hessian(), whole.pooled_hessian()),
        (half.sums_and_maxima(every, up)[0], whole.sums_and_maxima(every, up)[0]),
    ]:
        assert found.dtype is torch.float32
        assert float((found - wanted).norm()) < 0.04 * float(wanted.norm())


def test_what_experts_hold_beyond_float16_is_told():
    module = SimpleNamespace(has_gate=False, act_fn=nn.functional.silu)
    hidden = torch.full((3, 4), 600.0, dtype=torch.float16)
    fed = Fed(hidden, torch.zeros(3, 1, dtype=torch.long), torch.ones(3, 1))
    experts = RoutedExperts(torch.full((1, 2, 4), 40.0), torch.ones(1, 4, 2), module, *vars_of(fed))
    with pytest.raises(UserError, match="use --dtype bfloat16 or float32"):
        experts.hessians_inner(range(1), experts.up, by_gate=False)


def vars_of(fed: Fed) -> tuple[Tensor, Tensor, Tensor]:
    return fed.hidden, fed.index, fed.weights


@pytest.mark.parametrize("recipe", ["expert_drop:keep=6,score=reconstruction", "expert_merge:keep=6"])
def test_an_expert_that_is_never_asked_by_a_token_may_answer_it_beyond_float16(recipe: str, tmp_path: Path):
    """Its answer is looked at all the same; what would be an infinity in float16 makes every distance the same."""
    model = build("mixtral", hidden_size=32, intermediate_size=32, num_hidden_layers=1)
    with torch.no_grad():
        block = model.model.layers[0].mlp
        model.model.embed_tokens.weight[:, 5] = 6.0
        block.gate.weight[6] = 0
        block.gate.weight[6, 5] = -9  # no token goes there
        block.experts.gate_up_proj[6] *= 80
        block.experts.down_proj[6] *= 80
    model.save_pretrained(tmp_path / "model")
    view = open_view(tmp_path / "model")
    made = {dtype: _decided(view, recipe, tmp_path / dtype, dtype) for dtype in ("float32", "float16")}
    assert (
        made["float16"].plan.stages[0].treatments.keys() == made["float32"].plan.stages[0].treatments.keys()
    )
    values = made["float16"].stats[0].values
    assert all(value == value and abs(value) < 1e30 for row in values.values() for value in row.values())


@pytest.mark.parametrize("dtype", HALVES)
def test_gradients_that_float16_cannot_hold_are_as_in_float32(dtype: str, tmp_path: Path):
    """Behind a stream of tens of thousands they are near 1e-7, where float16 has two or three values."""
    model = build("mixtral", hidden_size=32, intermediate_size=32, num_hidden_layers=2)
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(12000)
        model.lm_head.weight.mul_(0.001)
    model.save_pretrained(tmp_path / "model")
    view = open_view(tmp_path / "model")
    with Tensors(view.checkpoint.folder) as reader:
        whole, half = (
            gradient_moments(
                make_meta_model(view, reader, Runtime(dtype=each)), BATCHES.ids, BATCHES.mask, tmp_path
            )
            for each in ("float32", dtype)
        )
    for layer, wanted in whole.items():
        assert float((half[layer] - wanted).norm()) < 0.05 * float(wanted.norm())


# What is beyond float16


@pytest.fixture(scope="module")
def beyond(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose second layer answers with more than float16 holds."""
    model = build("mixtral", hidden_size=32, intermediate_size=32, num_hidden_layers=3)
    with torch.no_grad():
        model.model.layers[1].mlp.experts.down_proj.mul_(1e6)
    folder = tmp_path_factory.mktemp("beyond") / "model"
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    "recipe",
    ["expert_drop:keep=6", "expert_drop:keep=6,score=reconstruction", "gptq:group_size=8", "channel_prune:ratio=0.3,score=heapr",
     "layer_drop:drop=1,repair=linear", "block_drop:drop=1,score=kl", "low_rank:method=shared_basis,ratio=0.2", "attention_rank"],
)  # fmt: skip
@pytest.mark.few(4)
def test_a_model_that_float16_cannot_hold_is_refused_in_one_sentence(
    recipe: str, beyond: Path, tmp_path: Path
):
    view = open_view(beyond)
    with pytest.raises(UserError, match=r"float16.*: use --dtype bfloat16 or float32"):
        _decided(view, recipe, tmp_path / "half", "float16")
    if recipe == "expert_drop:keep=6":  # and bfloat16 can
        assert _decided(view, recipe, tmp_path / "brain", "bfloat16").plan.stages


def test_evaluating_takes_a_precision_too(beyond: Path, text: Path, models: Callable[[str], Model]):
    with pytest.raises(UserError, match="L1 answers with more than float16 holds"):
        api.evaluate(beyond, texts=[Source(str(text))], length=32, limit=2, runtime=Runtime(dtype="float16"))
    folder = models("mixtral").view.checkpoint.folder
    found = {
        dtype: api.evaluate(
            folder, texts=[Source(str(text))], length=32, limit=4, runtime=Runtime(dtype=dtype)
        )
        for dtype in ("float32", *HALVES)
    }
    wanted = math.log(found["float32"]["perplexity"]["value"])
    for dtype in HALVES:
        assert math.log(found[dtype]["perplexity"]["value"]) == pytest.approx(wanted, rel=0.02)


# What is stored


@pytest.mark.parametrize(
    ("recipe", "exact", "dtype"),
    [("wanda:parts=experts+attention", ("w1", "w2", "w3", "q_proj", "o_proj"), "bfloat16"),
     ("sparsegpt:sparsity=0", ("w1", "w2", "w3"), "float16"),
     ("channel_prune:ratio=0.3,refit=none", ("w1", "w2", "w3"), "bfloat16"), ("expert_drop:keep=7|refit", ("w1", "w3"), "float16")],
)  # fmt: skip
@pytest.mark.few(1)
def test_weights_that_a_step_leaves_alone_are_the_stored_ones(
    recipe: str, exact: tuple[str, ...], dtype: str, tmp_path: Path
):
    """In a checkpoint of float32, none of whose weights 16 bits hold."""
    source = write_checkpoint("mixtral", tmp_path / "source", dtype=torch.float32)
    tiny_tokenizer().save_pretrained(source)
    text = write_words(tmp_path / "words.txt", 100)
    api.press(source, out=tmp_path / "out", steps=recipe.split("|"), texts=[text], samples=4, length=24, target="plugin",
              runtime=Runtime(dtype=dtype))  # fmt: skip
    there = {float(value) for name in tensor_files(source) if "layers.1." in name
             for value in read_tensor(source, name).flatten()}  # fmt: skip
    names = [name for name in tensor_files(tmp_path / "out")
             if "layers.1." in name and name.removesuffix(".weight").endswith(exact)]  # fmt: skip
    assert names
    for name in names:
        left = {float(value) for value in read_tensor(tmp_path / "out", name).flatten() if value}
        assert left
        assert left <= there, name


@pytest.mark.parametrize("dtype", HALVES.values(), ids=HALVES)
def test_factors_find_their_way_in_16_bits(dtype: torch.dtype):
    """Weights of real models are near float16's smallest normal number, 6e-5, where halves of them are rounded."""
    model = build(
        "qwen2_moe", hidden_size=32, num_hidden_layers=1, mlp_only_layers=[], layer_types=["full_attention"]
    )
    layer: Any = model.model.layers[0]
    with torch.no_grad():
        for small in (layer.mlp.gate.weight, layer.mlp.shared_expert.up_proj.weight):
            small.mul_(3e-4)
    model.set_experts_implementation("moespresso")
    layer.to(dtype)
    found = find_entrance(layer, layer.mlp.experts)
    assert found.norm == "post_attention_layernorm.weight"
    assert {name.split(".")[1] for name in found.readers} == {"gate", "shared_expert", "shared_expert_gate"}
    assert is_product(layer.mlp.experts, layer.mlp.experts.down_proj.shape[-1])


# Taken up again


@pytest.mark.parametrize(
    ("recipe", "dtype"),
    [("gptq:group_size=8", "bfloat16"), ("expert_drop:keep=6", "float16"), ("channel_prune:ratio=0.3,score=heapr", "float16")],
)  # fmt: skip
@pytest.mark.few(1)
def test_a_run_in_16_bits_is_taken_up_where_it_was(
    recipe: str, dtype: str, models: Callable[[str], Model], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    view = models("mixtral").view
    whole = _decided(view, recipe, tmp_path / "whole", dtype)
    save = SweepState.save

    def dies(self: SweepState, layer: int, hidden: list[Tensor]) -> None:
        save(self, layer, hidden)
        assert hidden[0].dtype is HALVES[dtype]
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(SweepState, "save", dies)
        with pytest.raises(KeyboardInterrupt):
            _decided(view, recipe, tmp_path / "killed", dtype)
    again = _decided(view, recipe, tmp_path / "killed", dtype)
    assert again.plan == whole.plan
    assert again.fits.keys() == whole.fits.keys()
    assert all(torch.equal(tensor, whole.fits[name]) for name, tensor in again.fits.items())


def test_what_auto_stands_for_names_the_files_of_a_run(models: Callable[[str], Model]):
    """Hidden states in bfloat16, which a GPU takes for such a checkpoint, are no beginning for a run on a CPU."""
    view = models("quiet").view
    assert precision(view, Runtime()) == precision(view, Runtime(dtype="float32")) == "torch.float32"
    other = replace(
        view, checkpoint=replace(view.checkpoint, config={**view.checkpoint.config, "dtype": "bfloat16"})
    )
    assert pick_dtype("auto", other, torch.device("cuda")) == torch.bfloat16
