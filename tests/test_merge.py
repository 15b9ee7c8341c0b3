"""Expert merging: what a plan says is averaged is averaged, and the rest is left alone.

The references are stock transformers models that are averaged in memory (`merged_by_hand.py`), and plans whose result
must be the same bytes as another plan's: experts that are copies of each other leave nothing to average. Which experts
go together is the matter of `test_merge_groups.py`, what plans are refused that of `test_merge_plans.py`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel

import families
from conftest import tiny_tokenizer, write_model
from merged_by_hand import (
    Merge,
    Merges,
    merge_by_hand,
    put,
    read_stage,
    reordered,
    routed_groups,
    router_rows,
    written_stage,
)
from moespresso import api
from moespresso.build import open_view
from moespresso.core.plan import Plan
from moespresso.effect import price

Zoo = Callable[[str], Path]
TOLERANCE = 2e-5
every_family = pytest.mark.parametrize("name", list(families.FAMILIES))
# One of each way to lay out experts: one by one, in a stack, in a transposed and interleaved stack with biases.
LAYOUTS = ["mixtral", "granitemoe", "gpt_oss"]
every_layout = pytest.mark.parametrize("name", LAYOUTS)


@pytest.fixture(scope="module")
def precise(tmp_path_factory: pytest.TempPathFactory) -> Zoo:
    """The zoo in float32, where an average is not rounded away."""
    root = tmp_path_factory.mktemp("precise")

    def folder(name: str) -> Path:
        path = root / name
        return path if path.exists() else write_model(name, path, dtype=torch.float32)

    return folder


def close(found: Tensor, wanted: Tensor) -> None:
    assert float((found - wanted).abs().max()) <= TOLERANCE * max(1.0, float(wanted.abs().max()))


def same_logits(folder: Path, wanted: PreTrainedModel) -> None:
    """Stock transformers loads the folder, every key in its place, and it computes what the model in memory does."""
    loaded = families.reference(folder)
    ids = families.random_ids(loaded.config, 3, 17)
    close(families.logits_of(loaded, ids), families.logits_of(wanted, ids))


def stored(folder: Path) -> dict[str, tuple[str, tuple[int, ...], str]]:
    """Name -> dtype, shape and digest of the bytes of every tensor, read by safetensors itself."""
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118
                tensor = tensors.get_tensor(name)
                raw = tensor.contiguous().view(torch.uint8).numpy().tobytes()
                found[name] = (str(tensor.dtype), tuple(tensor.shape), hashlib.sha256(raw).hexdigest())
    return found


def nbytes(folder: Path) -> int:
    """Tensor bytes in a folder."""
    total = 0
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            total += sum(tensors.get_tensor(name).nbytes for name in tensors.keys())  # noqa: SIM118
    return total


def built(source: Path, out: Path, *stages: Merges) -> Path:
    """What `build` makes of a plan written by hand."""
    body = {
        "blueprint": open_view(source).source.digest,
        "stages": [written_stage(stage) for stage in stages],
    }
    path = out.with_suffix(".plan.json")
    path.write_text(json.dumps(body))
    api.build(source, plan=path, out=out)
    return out


def planned(folder: Path) -> list[Merges]:
    """The stages of a pressed folder's plan, as they stand in its manifest."""
    plan = json.loads((folder / "moespresso.json").read_text())["plan"]
    return [read_stage(stage) for stage in plan["stages"]]


def verified(folder: Path, source: Path) -> None:
    found = api.verify(folder, against=source)
    assert found["ok"], [check for check in found["checks"] if not check["ok"]]


def half(name: str) -> int:
    """About half of a family's experts, as many of each group."""
    model = families.build(name)
    layer, (count, _) = next(iter(families.experts_of(model).items()))
    groups = families.groups_of(model)[layer]
    return -(-count // 2 // groups) * groups


def paired(model: PreTrainedModel, *, first: float = 0.3, **more: Any) -> Merges:
    """In every router group, experts of the second half merge into those of the first, which get the share `first`."""
    merges: Merges = {}
    for layer in families.moe_blocks(model):
        merge = merges[layer] = Merge([], **more)
        for group in routed_groups(model, layer):
            couples = list(zip(group, group[len(group) - len(group) // 2 :], strict=False))
            gone = {member for _, member in couples}
            merge.keep += [expert for expert in group if expert not in gone]
            merge.groups |= {leader: {leader: first, member: 1 - first} for leader, member in couples}
    return merges


def in_line(merges: Merges) -> Merges:
    """The same with all members put in line with their leaders."""
    return {layer: Merge(merge.keep, merge.groups, set().union(*merge.groups.values()) - merge.groups.keys(), merge.mean)
            for layer, merge in merges.items()}  # fmt: skip


def only_kept(merges: Merges) -> Merges:
    """Expert Drop with the same experts kept."""
    return {layer: Merge(merge.keep) for layer, merge in merges.items()}


def crafted(
    name: str, folder: Path, change: Callable[[PreTrainedModel], None], dtype: torch.dtype = torch.bfloat16
) -> Path:
    """A checkpoint of a random model that was changed, saved by transformers."""
    model = families.build(name)
    change(model)
    model.to(dtype).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


# Copies


def make_twins(model: PreTrainedModel, *, shuffled: bool) -> None:
    """Every member of `paired` becomes a copy of its leader, its router row too; `shuffled`: its channels are permuted."""
    generator = torch.Generator().manual_seed(4)
    for layer, merge in paired(model).items():
        for leader, shares in merge.groups.items():
            for member in shares.keys() - {leader}:
                width = moe_width(model, layer)
                order = torch.randperm(width, generator=generator) if shuffled else torch.arange(width)
                put(model, layer, member, reordered(model, layer, leader, order))
                for rows in router_rows(model, layer):
                    rows[member] = rows[leader]


def moe_width(model: PreTrainedModel, layer: int) -> int:
    """Intermediate channels of an expert."""
    down = families.moe_blocks(model)[layer].experts.down_proj
    return down.shape[1 if families.family_of(model).name == "gpt_oss" else 2]


@every_family
@pytest.mark.few(1)
def test_merging_copies_with_permuted_channels_gives_back_the_expert(name: str, tmp_path: Path):
    """Put in line, the copies are equal to the last bit, so that their averages and those of their equal router rows are
    what Expert Drop leaves; out of line they are not."""
    source = crafted(name, tmp_path / "source", lambda model: make_twins(model, shuffled=True))
    merges = paired(families.reference(source), mean=True)
    dropped = stored(built(source, tmp_path / "dropped", only_kept(merges)))
    assert stored(built(source, tmp_path / "in-line", in_line(merges))) == dropped
    assert stored(built(source, tmp_path / "as-they-are", merges)) != dropped


@every_layout
@pytest.mark.few(1)
def test_merging_equal_experts_is_dropping_all_but_one(name: str, tmp_path: Path):
    """In line or not, rows averaged or not. All that changes is what the router has to choose from."""
    source = crafted(name, tmp_path / "source", lambda model: make_twins(model, shuffled=False))
    merges = paired(families.reference(source))
    dropped = stored(built(source, tmp_path / "dropped", only_kept(merges)))
    for number, same in enumerate([merges, in_line(merges), paired(families.reference(source), mean=True)]):
        assert stored(built(source, tmp_path / str(number), same)) == dropped


def make_alike(model: PreTrainedModel) -> None:
    """All experts of a layer are the same, and the router likes them all the same."""
    for layer, (count, _) in families.experts_of(model).items():
        for expert in range(1, count):
            put(model, layer, expert, reordered(model, layer, 0, torch.arange(moe_width(model, layer))))
            for rows in router_rows(model, layer):
                rows[expert] = rows[0]


def gates_of(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """The sum of a token's gates in the first MoE layer."""
    said: list[Tensor] = []
    router = next(iter(families.routers(model).values()))
    handle = router.register_forward_hook(lambda _, __, out: said.append(out[1]))
    families.logits_of(model, ids)
    handle.remove()
    return said[0].sum(-1)


# A token's gates are shares of a softmax over all experts and stay so: with fewer experts each is larger.
SWELLS = {"qwen2_moe", "deepseek_v2", "jamba"}


@pytest.mark.parametrize("name", [name for name in families.FAMILIES if name != "phimoe"])
@pytest.mark.few(2)
def test_where_all_experts_are_alike_merging_changes_nothing_but_gates(name: str, tmp_path: Path):
    """Whichever are selected, they answer the same: the logits stay where a token's gates have a fixed sum, and where
    they are a softmax over all, their sum grows by just as much as there are fewer."""
    source = crafted(name, tmp_path / "source", make_alike, torch.float32)
    before = families.reference(source)
    merges = in_line(paired(before, mean=True))
    after = families.reference(built(source, tmp_path / "out", merges))
    ids = families.random_ids(before.config, 2, 11)
    layer, merge = next(iter(merges.items()))
    grown = families.experts_of(before)[layer][0] / len(merge.keep) if name in SWELLS else 1.0
    torch.testing.assert_close(gates_of(after, ids), grown * gates_of(before, ids))
    if name not in SWELLS:
        close(families.logits_of(after, ids), families.logits_of(before, ids))


# What is left alone


@pytest.mark.parametrize("name", [*LAYOUTS, "deepseek_v2"])
@pytest.mark.few(1)
def test_an_expert_that_nobody_joins_keeps_its_bytes(zoo: Zoo, tmp_path: Path, name: str):
    """In a stack, too, where its neighbours are averaged; the zoo's dtypes differ from expert to expert."""
    whole = families.reference(zoo(name))
    merges = in_line(paired(whole, mean=True))
    for merge in merges.values():  # in every layer one couple parts: the member goes as in Expert Drop
        merge.groups.popitem()
    out = built(zoo(name), tmp_path / "out", merges)
    for layer, merge in merges.items():
        alone = [expert for expert in merge.keep if expert not in merge.groups]
        assert alone
        for expert in alone:
            before = families.expert_on_disk(name, zoo(name), layer, expert)
            after = families.expert_on_disk(name, out, layer, merge.keep.index(expert))
            for part, tensor in before.items():
                assert torch.equal(after[part], tensor)
                assert after[part].dtype == tensor.dtype
    changed = {file for file, row in stored(out).items() if stored(zoo(name)).get(file, row) != row}
    assert all(
        "experts" in file or "_linear" in file or families.is_router(file) or "router" in file
        for file in changed
    )


def test_a_merge_that_keeps_all_experts_writes_the_same_bytes(zoo: Zoo, text: Path, tmp_path: Path):
    out = tmp_path / "out"
    api.press(zoo("mixtral"), out=out, texts=[text], samples=2, length=16, steps=["expert_merge:keep=8"])
    assert stored(out) == stored(zoo("mixtral"))


@every_layout
def test_an_average_is_rounded_once(name: str, zoo: Zoo, tmp_path: Path):
    """In a bfloat16 checkpoint each value is the nearest one to the exact average."""
    merges = paired(families.reference(zoo(name)))
    out = built(zoo(name), tmp_path / "out", merges)
    for layer, merge in merges.items():
        for leader, shares in merge.groups.items():
            found = families.expert_on_disk(name, out, layer, merge.keep.index(leader))
            members = {expert: families.expert_on_disk(name, zoo(name), layer, expert) for expert in shares}
            for part, tensor in found.items():
                exact = sum(share * members[expert][part].double() for expert, share in shares.items())
                assert tensor.dtype == members[leader][part].dtype
                rounding = torch.finfo(tensor.dtype).eps / 2 * 1.001
                assert bool(((tensor.double() - exact).abs() <= rounding * exact.abs() + 1e-7).all())


# Every family


def test_by_hand_means_what_it_says():
    """The reference itself: an average of two experts with weights of one and three is one and a half with equal shares."""
    model = families.build("mixtral")
    experts = families.moe_blocks(model)[1].experts
    for expert, value in ((2, 1.0), (5, 2.0)):
        put(model, 1, expert, {"down_proj": torch.full_like(experts.down_proj[0], value)})
    merged = merge_by_hand(model, {1: Merge([0, 1, 2, 3], {2: {2: 0.25, 5: 0.75}}, set(), True)})
    down = families.moe_blocks(merged)[1].experts.down_proj
    assert torch.equal(down[2], torch.full_like(down[2], 1.75))
    rows, old = router_rows(merged, 1)[0], router_rows(model, 1)[0]
    torch.testing.assert_close(rows[2], 0.25 * old[2] + 0.75 * old[5])
    assert torch.equal(rows[[0, 1, 3]], old[[0, 1, 3]])


@every_family
@pytest.mark.few(2)
def test_a_pressed_merge_is_the_stock_model_averaged_by_hand(
    name: str, precise: Zoo, text: Path, tmp_path: Path
):
    out = tmp_path / "out"
    report = api.press(precise(name), out=out, texts=[text], samples=6, length=32,
                       steps=[f"expert_merge:keep={half(name)},method=m_smoe"])  # fmt: skip
    (merges,) = planned(out)
    assert any(merge.aligned for merge in merges.values())
    same_logits(out, merge_by_hand(families.reference(precise(name)), merges))
    verified(out, precise(name))
    assert report.after.bytes == nbytes(out) < report.before.bytes
    assert price(report.plan, open_view(precise(name)).source) == open_view(out).blueprint.cost()


@every_family
@pytest.mark.few(2)
def test_a_plan_by_hand_is_built_without_text_from_weights_alone(name: str, precise: Zoo, tmp_path: Path):
    """Some members in line and some not, some experts alone, shares that are not equal, rows and biases averaged."""
    whole = families.reference(precise(name))
    merges = paired(whole, first=0.4, mean=True)
    for layer, merge in merges.items():
        if len(routed_groups(whole, layer)) == 1:  # four make one, of which two led before
            lost = merge.groups.pop(1)
            merge.keep.remove(1)
            merge.groups[0] = dict.fromkeys((*merge.groups[0], *lost), 0.25)
        merge.aligned = {expert for shares in merge.groups.values() for expert in shares if expert % 3}
    out = built(precise(name), tmp_path / "out", merges)
    same_logits(out, merge_by_hand(whole, merges))
    verified(out, precise(name))
    plan = Plan.load(tmp_path / "out.plan.json")
    assert price(plan, open_view(precise(name)).source).bytes == nbytes(out)


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "deepseek_v2"])
@pytest.mark.parametrize("options", ["method=hc_smoe", "method=hc_smoe,align=true", "method=ream,group=2,router=mean",
                                     "method=ream,align=false", "method=m_smoe,router=mean", "method=ream,sequential=true"])  # fmt: skip
@pytest.mark.few(3)
def test_every_method_averages_what_its_plan_says(
    name: str, options: str, precise: Zoo, text: Path, tmp_path: Path
):
    out = tmp_path / "out"
    steps = [f"expert_merge:keep={half(name)},{options}"]
    api.press(precise(name), out=out, texts=[text], samples=6, length=32, steps=steps)
    (merges,) = planned(out)
    align = "align=true" in options or ("hc_smoe" not in options and "align=false" not in options)
    assert any(merge.aligned for merge in merges.values()) == align
    assert all(merge.mean == ("router=mean" in options) for merge in merges.values())
    same_logits(out, merge_by_hand(families.reference(precise(name)), merges))


# Several steps


def chained(model: PreTrainedModel, *, means: tuple[bool, bool]) -> tuple[Merges, Merges]:
    """Of every router group the last expert merges into the first, then the first into the second: an average that
    becomes a member of another."""
    stages: tuple[Merges, Merges] = ({}, {})
    for layer in families.moe_blocks(model):
        one, two = Merge([], mean=means[0]), Merge([], mean=means[1])
        for first, second, *middle, last in routed_groups(model, layer):
            one.keep += [first, second, *middle]
            one.groups[first] = {first: 0.375, last: 0.625}
            two.keep += [second, *middle]
            two.groups[second] = {first: 0.75, second: 0.25}
        one.aligned = {last for last in range(families.experts_of(model)[layer][0]) if last not in one.keep}
        two.aligned = set(one.groups)
        stages[0][layer], stages[1][layer] = one, two
    return stages


def renumbered(stage: Merges, before: Merges) -> Merges:
    """A stage in the numbers of a checkpoint that the one before has been written to."""
    return {
        layer: Merge(
            [before[layer].keep.index(expert) for expert in merge.keep],
            {before[layer].keep.index(leader): {before[layer].keep.index(e): share for e, share in shares.items()}
             for leader, shares in merge.groups.items()},
            {before[layer].keep.index(expert) for expert in merge.aligned},
            merge.mean,
        )
        for layer, merge in stage.items()
    }  # fmt: skip


@pytest.mark.parametrize("name", [*LAYOUTS, "deepseek_v2"])
@pytest.mark.parametrize("means", [(True, False), (False, True)])
@pytest.mark.few(1)
def test_a_merge_of_merges_is_an_average_of_averages(
    name: str, means: tuple[bool, bool], precise: Zoo, tmp_path: Path
):
    """In one go, in two goes and by hand: an average is put in line as a whole, and each step asks for its own rows."""
    whole = families.reference(precise(name))
    one, two = chained(whole, means=means)
    once = built(precise(name), tmp_path / "once", one, two)
    same_logits(once, merge_by_hand(whole, one, two))
    first = built(precise(name), tmp_path / "first", one)
    twice = built(first, tmp_path / "twice", renumbered(two, one))
    same_logits(once, families.reference(twice))
    verified(once, precise(name))


SEVERAL = [
    ["expert_merge:keep=6,method=m_smoe", "expert_merge:keep=4,method=m_smoe,router=mean"],
    [
        "expert_merge:keep=6,method=ream,group=2,router=mean",
        "expert_merge:keep=4,method=hc_smoe,align=true,rescore=false",
    ],
    ["expert_drop:keep=6,score=ean", "expert_merge:keep=4,router=mean"],
    ["expert_merge:keep=5,method=m_smoe", "expert_drop:keep=4,score=ean"],
]


@pytest.mark.parametrize("steps", SEVERAL)
@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
@pytest.mark.few(2)
def test_steps_follow_one_another(name: str, steps: list[str], precise: Zoo, text: Path, tmp_path: Path):
    out = tmp_path / "out"
    api.press(precise(name), out=out, texts=[text], samples=6, length=32, steps=steps)
    stages = planned(out)
    assert len(stages) == len(steps)
    same_logits(out, merge_by_hand(families.reference(precise(name)), *stages))
    verified(out, precise(name))
