"""Expert Drop behind a router that stays whole, and layers that keep different numbers: what only the plugin loads.

The references are stock transformers models: experts that are gone answer with zeros, or with the mean of what they said
to the tokens they were selected for, found by hooks. Nothing of moespresso takes part in them but the tokenised text.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel

import families
from conftest import tiny_tokenizer, write_model, write_words
from merged_by_hand import merge_by_hand, read_stage
from moespresso import api
from moespresso.build import Tensors, open_view
from moespresso.core.errors import UserError
from moespresso.data import Batches, Sampling, Source, calibration
from moespresso.run import Recipe
from moespresso.statistics import MeanAnswers
from moespresso.stream import sweep
from test_merge_groups import answers_of
from test_scores import edited, observe, put, tokens_for

Zoo = Callable[[str], Path]
# Layer -> expert -> what it answers instead, or None.
Gone = dict[int, dict[int, Tensor | None]]
TOLERANCE = 2e-5
SAMPLES, LENGTH = 6, 32
every_family = pytest.mark.parametrize("name", list(families.FAMILIES))


@pytest.fixture(scope="module")
def precise(tmp_path_factory: pytest.TempPathFactory) -> Zoo:
    """The zoo in float32."""
    root = tmp_path_factory.mktemp("precise")

    def folder(name: str) -> Path:
        path = root / name
        return path if path.exists() else write_model(name, path, dtype=torch.float32)

    return folder


def pressed(source: Path, out: Path, text: Path | None, *steps: str, **options: Any) -> Path:
    texts = {} if text is None else {"texts": [text], "samples": SAMPLES, "length": LENGTH}
    api.press(source, out=out, steps=steps, **{"target": "plugin"} | texts | options)
    return out


def planned(folder: Path) -> list[dict[str, Any]]:
    """Treatments of every stage of a pressed folder's plan."""
    plan = json.loads((folder / "moespresso.json").read_text())["plan"]
    return [stage["treatments"] for stage in plan["stages"]]


def kept(treatments: Mapping[str, Any]) -> dict[int, list[int]]:
    return {int(unit[1:-8]): row["keep"] for unit, row in treatments.items() if unit.endswith(".experts")}


def batches_of(text: Path) -> Batches:
    return calibration([Source(str(text))], tiny_tokenizer(), Sampling(SAMPLES, LENGTH))


def close(found: Tensor, wanted: Tensor) -> None:
    assert float((found - wanted).abs().max()) <= TOLERANCE * max(1.0, float(wanted.abs().max()))


def same_logits(folder: Path, wanted: PreTrainedModel) -> None:
    """transformers with moespresso loads the folder, every key in its place, and it computes what the reference does."""
    loaded = families.reference(folder)
    ids = families.random_ids(loaded.config, 3, 17)
    close(families.logits_of(loaded, ids), families.logits_of(wanted, ids))


def verified(folder: Path, source: Path) -> None:
    found = api.verify(folder, against=source)
    assert found["ok"], [check for check in found["checks"] if not check["ok"]]


def generates(folder: Path) -> None:
    """Greedily, with the cache as without."""
    model = families.reference(folder)
    ids = families.random_ids(model.config, 2, 9)
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    assert torch.equal(model.generate(ids, **options), model.generate(ids, use_cache=False, **options))


# By hand


def lose(model: PreTrainedModel, gone: Gone) -> PreTrainedModel:
    """A copy whose routers still select experts that answer with zeros, or with a vector."""
    model = copy.deepcopy(model)
    for layer, vectors in gone.items():
        experts = families.moe_blocks(model)[layer].experts
        for name in {"down_proj", "down_proj_bias"} & dict(experts.named_parameters()).keys():
            getattr(experts, name).data[list(vectors)] = 0
        experts.register_forward_hook(_adding(vectors))
    return model


def _adding(vectors: Mapping[int, Tensor | None]) -> Callable[..., Tensor]:
    def add(_: Any, args: tuple[Tensor, Tensor, Tensor], out: Tensor) -> Tensor:
        for expert, vector in vectors.items():
            if vector is not None:
                out = out + (args[2] * (args[1] == expert)).sum(1, keepdim=True) * vector.to(out.dtype)
        return out

    return add


def means_of(model: PreTrainedModel, batches: Batches) -> dict[int, Tensor]:
    """Mean answer [E, H] of every expert over the tokens it is selected for, zeros where there are none."""
    found: dict[int, Tensor] = {}
    for layer, observed in observe(model, batches).items():
        answers = answers_of(model, layer, observed.hidden)
        found[layer] = torch.zeros_like(answers[0])
        for expert in range(len(found[layer])):
            tokens = (observed.index == expert).any(-1)
            if bool(tokens.any()):
                found[layer][expert] = answers[tokens, expert].mean(0)
    return found


def without(
    model: PreTrainedModel, keep: Mapping[int, Iterable[int]], means: Mapping[int, Tensor] | None
) -> Gone:
    """Everybody who is not kept is gone, with its mean answer or without."""
    return {
        layer: {
            e: None if means is None else means[layer][e] for e in range(count) if e not in set(keep[layer])
        }
        for layer, (count, _) in families.experts_of(model).items()
    }


def half(name: str) -> int:
    """About half of a family's experts, as many of each group."""
    model = families.build(name)
    layer, (count, _) = next(iter(families.experts_of(model).items()))
    return -(-count // 2 // families.groups_of(model)[layer]) * families.groups_of(model)[layer]


# Means


def found_means(folder: Path, batches: Batches) -> dict[int, Tensor]:
    """What the product measures, in float64."""
    view = open_view(folder)
    visitor = MeanAnswers({layer.index for layer in view.source.moe_layers})
    with Tensors(folder) as reader:
        sweep(view.meta_model(reader, torch.float64, torch.device("cpu")), batches.ids, batches.mask, visitor)
    return visitor.values


@every_family
@pytest.mark.few(1)
def test_a_novice_is_the_mean_answer_to_the_tokens_its_expert_was_selected_for(name: str, zoo: Zoo):
    """Padding aside, whatever stands on it."""
    batches = tokens_for(open_view(zoo(name)), 3, 16, short=(11,))
    means = means_of(families.reference(zoo(name), torch.float64), batches)
    found = found_means(zoo(name), batches)
    assert found.keys() == means.keys()
    for layer, rows in means.items():
        torch.testing.assert_close(found[layer], rows.float(), rtol=1e-5, atol=1e-6)
    other = torch.where(batches.mask, batches.ids, torch.tensor(7))
    assert not torch.equal(other, batches.ids)
    again = found_means(zoo(name), Batches(other, batches.mask, {}))
    for layer in means:
        torch.testing.assert_close(again[layer], found[layer], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("name", "bias", "value"),
    [("gpt_oss", "router.bias", -1e4), ("deepseek_v3", "gate.e_score_correction_bias", -50.0)],
)
def test_the_novice_of_an_expert_that_no_token_reached_says_nothing(
    name: str, bias: str, value: float, zoo: Zoo, tmp_path: Path
):
    folder = edited(zoo(name), tmp_path / name, {f"model.layers.2.mlp.{bias}": put(5, value)})
    rows = found_means(folder, tokens_for(open_view(folder), 6, 40))[2]
    assert not rows[5].any()
    assert bool(rows.isfinite().all())
    assert int(rows.any(-1).sum()) == len(rows) - 1


# Routers that stay whole


@every_family
@pytest.mark.few(1)
def test_dropped_experts_leave_their_mean_answers(name: str, precise: Zoo, text: Path, tmp_path: Path):
    source, step = precise(name), f"expert_drop:keep={half(name)},replace=novice,score=ean"
    out = pressed(source, tmp_path / "out", text, step)
    (treatments,) = planned(out)
    assert {row["repair"] for row in treatments.values()} == {"novice"}
    whole = families.reference(source)
    means = means_of(families.reference(source, torch.float64), batches_of(text))
    same_logits(out, lose(whole, without(whole, kept(treatments), means)))
    verified(out, source)
    assert api.inspect(out)["bytes"]["total"] == nbytes(out) < nbytes(source)


def nbytes(folder: Path) -> int:
    """Tensor bytes in a folder."""
    total = 0
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            total += sum(tensors.get_tensor(name).nbytes for name in tensors.keys())  # noqa: SIM118
    return total


@every_family
@pytest.mark.few(1)
def test_a_preserved_router_skips_the_terms_of_dropped_experts(name: str, precise: Zoo, tmp_path: Path):
    """Their gates are lost, not shared out among the others; no text is needed."""
    source = precise(name)
    out = pressed(
        source, tmp_path / "out", None, f"expert_drop:keep={half(name)},router=preserve,score=aimer"
    )
    (treatments,) = planned(out)
    assert {row["repair"] for row in treatments.values()} == {"skip"}
    whole = families.reference(source)
    same_logits(out, lose(whole, without(whole, kept(treatments), None)))
    verified(out, source)
    loaded = families.reference(out)
    for layer, router in families.routers(loaded).items():
        before = families.routers(whole)[layer].state_dict()
        assert all(torch.equal(tensor, before[row]) for row, tensor in router.state_dict().items())


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "deepseek_v2"])
@pytest.mark.few(1)
def test_it_generates(name: str, precise: Zoo, text: Path, tmp_path: Path):
    for end in ("replace=novice", "router=preserve"):
        generates(pressed(precise(name), tmp_path / end, text, f"expert_drop:keep={half(name)},{end}"))


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "minimax_m2"])
@pytest.mark.parametrize("end", ["replace=novice", "router=preserve"])
@pytest.mark.parametrize(
    "first", ["expert_drop:keep=6,score=ean", "expert_merge:keep=6,method=ream,router=mean"]
)
@pytest.mark.few(2)
def test_the_router_that_stays_is_the_one_that_an_earlier_step_left(
    first: str, end: str, name: str, precise: Zoo, text: Path, tmp_path: Path
):
    """Rows that a first step deletes or averages stay deleted and averaged; novices are measured on what it left."""
    source = precise(name)
    out = pressed(source, tmp_path / "out", text, first, f"expert_drop:keep=4,score=ean,{end}")
    one, two = json.loads((out / "moespresso.json").read_text())["plan"]["stages"]
    before = merge_by_hand(families.reference(source), read_stage(one))
    there = kept(one["treatments"])
    keep = {
        layer: [there[layer].index(e) for e in experts] for layer, experts in kept(two["treatments"]).items()
    }
    means = means_of(copy.deepcopy(before).double(), batches_of(text)) if end == "replace=novice" else None
    same_logits(out, lose(before, without(before, keep, means)))
    verified(out, source)


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "granitemoe"])
@pytest.mark.few(1)
def test_depth_steps_go_on_after_it(name: str, precise: Zoo, text: Path, tmp_path: Path):
    """A feed-forward part with novices in it may go, and a whole block; those that stay keep their novices."""
    source = precise(name)
    steps = (
        f"expert_drop:keep={half(name)},replace=novice,score=ean",
        "layer_drop:drop=1",
        "block_drop:drop=1",
    )
    out = pressed(source, tmp_path / "out", text, *steps)
    dropped, *cuts = planned(out)
    (part,), (block,) = (list(treatments) for treatments in cuts)
    assert part.endswith(".experts")
    whole = families.reference(source)
    means = means_of(families.reference(source, torch.float64), batches_of(text))
    wanted = lose(whole, without(whole, kept(dropped), means))
    wanted.model.layers[int(part[1:-8])].register_forward_hook(_before_feed_forward(wanted, int(part[1:-8])))
    wanted.model.layers = torch.nn.ModuleList(
        layer for index, layer in enumerate(wanted.model.layers) if f"L{index}" != block
    )
    wanted.config.num_hidden_layers -= 1
    same_logits(out, wanted)
    verified(out, source)
    generates(out)


def _before_feed_forward(model: PreTrainedModel, index: int) -> Callable[..., Tensor]:
    """A hook that gives a layer's residual stream as it is before the second norm."""
    seen: list[Tensor] = []
    model.model.layers[index].post_attention_layernorm.register_forward_pre_hook(
        lambda _, args: seen.append(args[0])
    )
    return lambda _, __, out: seen.pop() if isinstance(out, Tensor) else (seen.pop(), *out[1:])


# Refused


LATER = [
    "expert_drop:keep=4,score=aimer",
    "expert_merge:keep=4",
    "expert_drop:keep=6,router=preserve,score=aimer",
]


@pytest.mark.parametrize("end", ["replace=novice", "router=preserve"])
@pytest.mark.parametrize("later", LATER)
@pytest.mark.few(1)
def test_experts_behind_it_cannot_change_again(end: str, later: str, zoo: Zoo, text: Path, tmp_path: Path):
    """Not in the same recipe, and not when the written folder is pressed again."""
    first, out = f"expert_drop:keep=6,{end}", tmp_path / "out"
    with pytest.raises(UserError) as said:
        pressed(zoo("mixtral"), out, text, first, later)
    sentence = (
        f"{later.split(':')[0]}: the router of L0 still selects 2 experts that are gone, so its experts cannot change again: "
        "do this step before the one with router=preserve or replace=novice"
    )
    assert str(said.value) == sentence
    assert not out.exists()
    with pytest.raises(UserError, match="still selects 2 experts that are gone"):
        pressed(pressed(zoo("mixtral"), out, text, first), tmp_path / "again", text, later)


@pytest.mark.parametrize("target", ["transformers", "vllm", "llama.cpp"])
@pytest.mark.parametrize("end", ["replace=novice", "router=preserve"])
def test_stock_engines_are_not_given_such_routers(
    target: str, end: str, zoo: Zoo, text: Path, tmp_path: Path
):
    with pytest.raises(UserError) as said:
        pressed(zoo("mixtral"), tmp_path / "out", text, f"expert_drop:keep=6,{end}", target=target)
    assert str(said.value) == (
        f"this plan leaves routers whole that select experts that are gone (L0, L1, L2), which {target} cannot load; the "
        "nearest plan that it can is router=rows,replace=none, or say --target plugin (loads where moespresso is imported)"
    )


# Built again


def test_novices_are_found_again_on_the_same_text_only(zoo: Zoo, text: Path, tmp_path: Path):
    step = "expert_drop:keep=6,replace=novice"
    out = pressed(zoo("gpt_oss"), tmp_path / "out", text, step)
    plan = tmp_path / "plan.json"
    plan.write_text(json.dumps(json.loads((out / "moespresso.json").read_text())["plan"]))

    def build(name: str, *texts: Path) -> Path:
        recipe = Recipe().with_options(texts=tuple(Source(str(path)) for path in texts), target="plugin")
        api.build(zoo("gpt_oss"), plan=plan, out=tmp_path / name, recipe=recipe)
        return tmp_path / name

    again = build("again", text)
    about = ("moespresso.json", "README.md")
    assert {path.name: path.read_bytes() for path in out.iterdir() if path.name not in about} == {
        path.name: path.read_bytes() for path in again.iterdir() if path.name not in about
    }
    with pytest.raises(UserError) as said:
        build("none")
    assert str(said.value) == (
        "this plan is fitted on real text: give --text FILE or --dataset NAME, as it was made with"
    )
    with pytest.raises(
        UserError, match=r"^the text given is not the one the plan was calibrated on: give the same files"
    ):
        build("other", write_words(tmp_path / "other.txt", 800, seed=9))
    assert not (tmp_path / "none").exists()
    assert not (tmp_path / "other").exists()


# Layers that keep different numbers


@pytest.mark.parametrize(
    ("name", "keep"),
    [("mixtral", 5), ("gpt_oss", 5), ("granitemoe", 5), ("minimax_m2", 5), ("deepseek_v2", 9)],
)
@pytest.mark.parametrize("end", ["", ",replace=novice"])
@pytest.mark.few(2)
def test_layers_keep_what_the_whole_model_needs_most(
    name: str, keep: int, end: str, precise: Zoo, text: Path, tmp_path: Path
):
    """Scope=global: unequal layers load, compute what the model cut by hand does, generate, and verify."""
    source = precise(name)
    out = pressed(source, tmp_path / "out", text, f"expert_drop:keep={keep},scope=global,score=msan{end}")
    (treatments,) = planned(out)
    chosen, whole = kept(treatments), families.reference(source)
    assert len({len(experts) for experts in chosen.values()}) > 1
    assert sum(len(experts) for experts in chosen.values()) == keep * len(chosen)
    if end:
        means = means_of(families.reference(source, torch.float64), batches_of(text))
        same_logits(out, lose(whole, without(whole, chosen, means)))
    else:
        same_logits(out, families.cut_by_hand(whole, chosen))
        assert [layer.experts for layer in open_view(out).blueprint.moe_layers] == [
            len(row) for row in chosen.values()
        ]
    verified(out, source)
    generates(out)


@pytest.mark.parametrize("target", ["transformers", "vllm"])
@pytest.mark.parametrize(
    ("name", "asked", "nearest"), [("mixtral", 5, 5), ("deepseek_v2", 8, 6), ("dots1", 15, 12)]
)
@pytest.mark.few(2)
def test_stock_engines_are_offered_the_nearest_even_plan(
    target: str, name: str, asked: int, nearest: int, zoo: Zoo, text: Path, tmp_path: Path
):
    step = f"expert_drop:keep={asked},scope=global"
    with pytest.raises(UserError) as said:
        pressed(zoo(name), tmp_path / "out", text, step, target=target)
    assert str(said.value) == (
        f"expert_drop: scope=global leaves unequal layers, which {target} cannot load; the nearest plan that it can is "
        f"scope=layer,keep={nearest}, or say --target plugin"
    )
    assert not (tmp_path / "out").exists()
    pressed(zoo(name), tmp_path / "out", text, f"expert_drop:scope=layer,keep={nearest}", target=target)


# Several steps, in one go and one by one

NOVICE, MERGE = "expert_drop:keep=5,replace=novice,score=ean", "expert_merge:keep=5,method=ream,router=mean"
PAIRS = [
    ("mixtral", NOVICE, "block_drop:repair=linear"),
    ("gpt_oss", NOVICE, "layer_drop:part=attention,repair=scale"),
    ("gpt_oss", NOVICE, "layer_drop"),
    ("mixtral", "layer_drop:part=attention,repair=linear", NOVICE),
    ("qwen2_moe", "expert_drop:keep=7,renormalise=compensate", NOVICE),
    ("gpt_oss", MERGE, "layer_drop:part=attention,repair=linear"),
    ("granitemoe", "layer_drop:part=attention,repair=linear", MERGE),
]


@pytest.mark.parametrize(("name", "first", "second"), PAIRS)
@pytest.mark.few(1)
def test_two_steps_in_one_go_are_two_presses(
    name: str, first: str, second: str, precise: Zoo, text: Path, tmp_path: Path
):
    """A map that a repair puts into experts goes into novices too, and what is merged or measured has it already."""
    once = pressed(precise(name), tmp_path / "once", text, first, second)
    twice = pressed(pressed(precise(name), tmp_path / "one", text, first), tmp_path / "two", text, second)
    same_logits(once, families.reference(twice))
    verified(once, precise(name))
