"""Attention with fewer dims a head: what stays is what was, in fewer bytes, and the stock model computes the same with zeros.

The reader here knows the stored form from its description only; what is cut is looked up in the stock model's own matrices.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn

import families
import moespresso
from conftest import Zoo, write_wide
from moespresso import api
from moespresso.build import Tensors, open_view
from moespresso.core.errors import UserError
from moespresso.core.format import Format
from moespresso.data import Source
from moespresso.effect import price
from moespresso.formats import Slices
from moespresso.run import Recipe
from test_depth_kl import LENGTH, SAMPLES
from test_depth_steps import plan_of
from test_slim import disk, disk_of, press, proven

# Grouped heads alone; with biases; pairs of neighbouring dims; no rotary embedding, and Mamba beside it.
PLAIN = ["mixtral", "qwen2_moe", "ernie4_5_moe", "gpt_oss", "jamba"]
NORMED = ["qwen3_moe", "glm4_moe", "minimax_m2"]
MATRICES = ("q_proj", "k_proj", "v_proj", "o_proj")


def attention(tensors: dict[str, Tensor], layer: int) -> dict[str, Tensor]:
    """The attention tensors of a layer in float32, by their short names."""
    prefix = f"model.layers.{layer}.self_attn."
    return {name.removeprefix(prefix): t.float() for name, t in tensors.items() if name.startswith(prefix)}


def whole(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """What was written, with the rows and columns that went as zeros."""
    found = dict(tensors)
    for name in [name for name in tensors if name.endswith("weight_kept")]:
        stem = name.removesuffix("weight_kept")
        kept, index, shape = (found.pop(f"{stem}weight_{part}") for part in ("kept", "index", "shape"))
        dense = torch.zeros(*shape.tolist(), dtype=kept.dtype)
        for at, place in enumerate(index.tolist()):
            if stem.endswith("o_proj."):
                dense[:, place] = kept[:, at]
            else:
                dense[place] = kept[at]
        found[f"{stem}weight"] = dense
    return found


def by_head(rows: Tensor, heads: int) -> Tensor:
    return rows.unflatten(0, (heads, -1))


# What is written


@pytest.mark.parametrize("family", PLAIN + NORMED)
@pytest.mark.few(1)
def test_rows_and_columns_are_stored_and_the_stock_model_with_zeros_is_the_same(
    family: str, zoo: Zoo, text: Path, tmp_path: Path
):
    source = zoo(family)
    out = press(source, tmp_path / "out", "attention_rank:ratio=0.25", text=text, target="plugin")
    proven(out, source)
    tensors = disk(out)
    priced, whole_cost = price(plan_of(out), open_view(source).source), open_view(source).source.cost()
    assert priced.bytes == sum(t.nbytes for t in tensors.values()) < whole_cost.bytes
    assert priced == open_view(out).source.cost()
    some = ("v_proj", "o_proj") if family in NORMED else MATRICES
    names = [name for name in disk_of(source) if name.endswith(tuple(f"self_attn.{m}.weight" for m in some))]
    stored = sum(t.nbytes for name, t in tensors.items() if any(f"{m}.weight_" in name for m in some))
    assert stored <= 0.75 * sum(disk_of(source)[name].nbytes for name in names)

    # The same in zeros, which stock transformers loads by itself.
    zeros = press(source, tmp_path / "zeros", "attention_rank:ratio=0.25,pack=false", text=text)
    assert "logits within" in proven(zeros, source)["stock transformers loads it and agrees"]
    by_hand = whole(tensors)
    assert by_hand.keys() == disk(zeros).keys()
    assert all(torch.equal(tensor, by_hand[name]) for name, tensor in disk(zeros).items())
    with Tensors(out) as reader:
        for piece in open_view(out).pieces:
            assert torch.equal(reader.whole(piece), by_hand[piece.name]), piece.name
    loaded, stock = moespresso.load(out, dtype="float32"), families.reference(zeros)
    for name, tensor in loaded.state_dict().items():
        torch.testing.assert_close(tensor.float(), stock.state_dict()[name], rtol=2**-8, atol=0)
    ids = families.random_ids(stock.config, 2, 20)
    stock_logits = families.logits_of(stock, ids)
    assert float((families.logits_of(loaded, ids) - stock_logits).norm() / stock_logits.norm()) < 0.02


@pytest.mark.parametrize("family", PLAIN)
@pytest.mark.few(3)
def test_dims_of_queries_and_keys_stay_as_they_are_by_pairs_or_go(
    family: str, zoo: Zoo, text: Path, tmp_path: Path
):
    source = zoo(family)
    out = press(source, tmp_path / "out", "attention_rank:ratio=0.4,modules=qk", text=text, target="plugin")
    view, before, after = open_view(source), disk_of(source), whole(disk(out))
    # Nothing but the rows that go differs from the source.
    changed = {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
    assert {name.split("self_attn.")[-1].split(".")[0] for name in changed} == {"q_proj", "k_proj"}
    for layer in view.source.layers:
        if layer.mixer != "attention":
            continue
        assert layer.heads is not None
        old, new = attention(before, layer.index), attention(after, layer.index)
        group = layer.heads.count // layer.heads.kv_count
        stay = by_head(new["k_proj.weight"], layer.heads.kv_count).any(2)
        assert len(set(stay.sum(1).tolist())) == 1
        for unit in layer.heads.units:
            assert all(len({bool(own[dim]) for dim in unit}) == 1 for own in stay)
        for matrix, mask in (("q_proj", stay.repeat_interleave(group, 0)), ("k_proj", stay)):
            for kind in ("weight", "bias"):
                if f"{matrix}.{kind}" in old:
                    rows = old[f"{matrix}.{kind}"]
                    assert torch.equal(
                        new[f"{matrix}.{kind}"], rows * mask.flatten().view(-1, *[1] * (rows.ndim - 1))
                    )


def test_the_logits_are_those_of_a_stock_model_cut_by_hand(zoo: Zoo, text: Path, tmp_path: Path):
    for family in ("mixtral", "qwen2_moe"):
        out = press(zoo(family), tmp_path / family, "attention_rank:modules=qk", text=text, target="plugin")
        cut = families.reference(zoo(family))
        for number, layer in enumerate(cut.model.layers):
            new = attention(whole(disk(out)), number)
            with torch.no_grad():
                for matrix in ("q_proj", "k_proj"):
                    gone = ~new[f"{matrix}.weight"].any(1)
                    assert gone.any()
                    module = layer.self_attn.get_submodule(matrix)
                    module.weight[gone] = 0
                    if module.bias is not None:
                        module.bias[gone] = 0
        ids = families.random_ids(cut.config, 2, 20)
        found = moespresso.load(out, dtype="float32")
        expected = families.logits_of(cut, ids)
        assert float((families.logits_of(found, ids) - expected).norm() / expected.norm()) < 0.02


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "qwen3_moe"])
def test_values_go_through_one_basis_a_head_and_biases_with_them(
    family: str, zoo: Zoo, text: Path, tmp_path: Path
):
    source = zoo(family)
    out = press(source, tmp_path / "out", "attention_rank:ratio=0.3,modules=vo", text=text, target="plugin")
    heads = open_view(source).source.layers[0].heads
    assert heads is not None
    before, after = attention(disk_of(source), 0), attention(whole(disk(out)), 0)
    kept = int(by_head(after["v_proj.weight"], heads.kv_count).any(2).sum(1).unique())
    assert kept < heads.v_dim
    group = heads.count // heads.kv_count
    for head in range(heads.kv_count):
        old, new = (by_head(each["v_proj.weight"], heads.kv_count)[head] for each in (before, after))
        assert not new[kept:].any()
        basis = new @ torch.linalg.pinv(old)
        torch.testing.assert_close(basis @ old, new, rtol=0.02, atol=0.02)
        if "v_proj.bias" in before:
            bias, moved = (by_head(each["v_proj.bias"], heads.kv_count)[head] for each in (before, after))
            torch.testing.assert_close(moved, basis @ bias, rtol=0.02, atol=0.02)
        for member in range(head * group, (head + 1) * group):
            columns = after["o_proj.weight"].unflatten(1, (heads.count, -1))[:, member]
            assert columns[:, :kept].any()
            assert not columns[:, kept:].any()


class Spy(nn.Module):
    """Stands in for a matrix and keeps what that is given."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.given = inner, []

    def forward(self, hidden: Tensor) -> Tensor:
        self.given.append(hidden)
        return self.inner(hidden)


@pytest.mark.parametrize("modules", ["qk", "vo"])
def test_the_answer_of_attention_is_nearer_than_with_dims_drawn_at_random(
    modules: str, zoo: Zoo, text: Path, tmp_path: Path
):
    source = zoo("mixtral")
    out = press(
        source, tmp_path / "out", f"attention_rank:ratio=0.4,modules={modules}", text=text, target="plugin"
    )
    model, new = families.reference(source), attention(whole(disk(out)), 0)
    ids = torch.tensor([api.load_tokenizer(source)(text.read_text())["input_ids"][:96]])

    def answer(matrices: dict[str, Tensor]) -> Tensor:
        attending = model.model.layers[0].self_attn
        old = {name: attending.get_submodule(name).weight.detach().clone() for name in MATRICES}
        spy = attending.o_proj = Spy(attending.o_proj)
        with torch.no_grad():
            for name in MATRICES:
                module = spy.inner if name == "o_proj" else attending.get_submodule(name)
                module.weight.copy_(matrices[f"{name}.weight"])
            families.logits_of(model, ids)
            given = spy.inner(spy.given[0])
            attending.o_proj = spy.inner
            for name in MATRICES:
                attending.get_submodule(name).weight.copy_(old[name])
        return given

    truth = attention(disk_of(source), 0)
    exact = answer(truth)
    error = float((answer(new) - exact).norm())
    heads = open_view(source).source.layers[0].heads
    assert heads is not None
    matrix = "k_proj" if modules == "qk" else "v_proj"
    kept = int(by_head(new[f"{matrix}.weight"], 2).any(2).sum(1).unique())
    for seed in range(5):
        draw = torch.Generator().manual_seed(seed)
        stay = torch.zeros(2, 16, dtype=torch.bool)
        for own in stay:
            units = heads.units if modules == "qk" else [(dim,) for dim in range(16)]
            for at in torch.randperm(len(units), generator=draw).tolist()[: kept // len(units[0])]:
                own[list(units[at])] = True
        many = stay.repeat_interleave(3, 0).flatten()
        cut = dict(truth)
        if modules == "qk":
            cut["q_proj.weight"] = truth["q_proj.weight"] * many[:, None]
            cut["k_proj.weight"] = truth["k_proj.weight"] * stay.flatten()[:, None]
        else:
            cut["v_proj.weight"] = truth["v_proj.weight"] * stay.flatten()[:, None]
            cut["o_proj.weight"] = truth["o_proj.weight"] * many
        assert error < 0.9 * float((answer(cut) - exact).norm())


# Amounts


def test_nothing_goes_where_nothing_is_to_go(zoo: Zoo, text: Path, tmp_path: Path):
    out = press(zoo("qwen2_moe"), tmp_path / "out", "attention_rank:ratio=0", text=text)
    before = disk_of(zoo("qwen2_moe"))
    assert all(torch.equal(tensor, before[name]) for name, tensor in disk(out).items())


def test_layers_that_turn_the_stream_less_lose_more(zoo: Zoo, text: Path, tmp_path: Path):
    out = press(
        zoo("mixtral"), tmp_path / "out", "attention_rank:ratio=0.4,allocation=entropy", text=text, target="plugin"
    )  # fmt: skip
    proven(out, zoo("mixtral"))
    assert price(plan_of(out), open_view(zoo("mixtral")).source).bytes == sum(
        t.nbytes for t in disk(out).values()
    )
    kept = {len(t) for name, t in disk(out).items() if name.endswith("v_proj.weight_index")}
    assert len(kept) > 1


def test_a_byte_budget_finds_the_ratio(zoo: Zoo, text: Path, tmp_path: Path):
    size = open_view(zoo("mixtral")).source.cost().bytes - 30_000
    out = press(zoo("mixtral"), tmp_path / "out", "attention_rank", text=text, size=size, target="plugin")
    assert size - 6000 < sum(tensor.nbytes for tensor in disk(out).values()) <= size
    with pytest.raises(UserError, match="use pack=true for --size"):
        press(zoo("mixtral"), tmp_path / "no", "attention_rank:pack=false", text=text, size=size)


def test_later_layers_see_what_the_cut_ones_let_through(zoo: Zoo, text: Path, tmp_path: Path):
    found = [whole(disk(press(zoo("mixtral"), tmp_path / on, f"attention_rank:sequential={on}", text=text, target="plugin")))
             for on in ("true", "false")]  # fmt: skip
    equal = {name: torch.equal(tensor, found[1][name]) for name, tensor in found[0].items()}
    assert all(same for name, same in equal.items() if "layers.0." in name)
    assert not all(equal.values())


# With other steps


@pytest.mark.parametrize(
    "steps",
    [
        ["expert_drop:keep=6", "attention_rank"],
        ["attention_rank", "expert_drop:keep=6,renormalise=compensate"],
        ["attention_rank", "layer_drop:part=attention,drop=1,score=cosine"],
        ["block_drop", "attention_rank:allocation=entropy"],
        ["attention_rank:pack=false", "rtn:group_size=32"],
        ["attention_rank:pack=false", "gptq:group_size=32,parts=experts+attention"],
    ],
)
@pytest.mark.few(1)
def test_before_and_after_other_steps(steps: list[str], text: Path, tmp_path: Path):
    source = write_wide(tmp_path / "source")
    out = press(source, tmp_path / "out", *steps, text=text, target="plugin")
    proven(out, source)
    assert price(plan_of(out), open_view(source).source).bytes == sum(t.nbytes for t in disk(out).values())


@pytest.mark.parametrize("step", ["expert_drop:keep=6", "block_drop", "wanda:parts=attention", "gptq:group_size=32",
                                  "attention_rank:ratio=0.5"])  # fmt: skip
@pytest.mark.few(1)
def test_a_cut_folder_goes_on(step: str, source: Path, text: Path, tmp_path: Path):
    cut = press(source, tmp_path / "cut", "attention_rank", text=text, target="plugin")
    out = press(cut, tmp_path / "out", step, text=text, target="plugin")
    proven(out, cut)


# Refusals


@pytest.mark.parametrize(
    ("family", "step", "reason"),
    [
        ("deepseek_v2", "attention_rank", r"is a multi-head latent attention \(MLA\).*use low_rank:parts=attention"),
        ("deepseek_v3", "attention_rank:modules=vo", "use low_rank:parts=attention"),
        ("qwen3_moe", "attention_rank:modules=qk", r"L0 of .* has a norm over .*\(q_norm\): use modules=vo"),
        ("hunyuan_v1_moe", "attention_rank:modules=qk", r"\(query_layernorm\): use modules=vo"),
        ("olmoe", "attention_rank", r"\(q_norm\) and clips values \(clip_qkv\), dim by dim: use low_rank"),
        ("mixtral", "attention_rank:modules=kq", "modules='kq' is unknown, did you mean 'qk'|modules='kq' is unknown"),
        ("mixtral", "attention_rank:modules=", "modules is empty: say qk, vo, or qk"),
        ("mixtral", "attention_rank:ratio=1", "must be at least 0 and below 1"),
        ("mixtral", "attention_rank:damping=-1", "must not be negative"),
        ("mixtral", "attention_rank", r"stores matrices without the rows or columns that went, which transformers does not read.*pack=false"),
    ],
)  # fmt: skip
def test_wishes_that_cannot_be(family: str, step: str, reason: str, zoo: Zoo, text: Path, tmp_path: Path):
    with pytest.raises(UserError, match=reason):
        press(zoo(family), tmp_path / "out", step, text=text)
    assert not (tmp_path / "out").exists()


def test_what_went_with_a_norm_is_said(zoo: Zoo, text: Path, tmp_path: Path):
    report = api.press(
        zoo("qwen3_moe"), out=tmp_path / "out", steps=["attention_rank"], texts=[text], samples=8, length=24, target="plugin"
    )  # fmt: skip
    assert any("queries and keys of 5 layers stay whole" in note for note in report.notes)


def test_other_steps_after_it_in_one_recipe_are_refused(source: Path, text: Path, tmp_path: Path):
    rounded = "rtn:group_size=32,parts=attention"
    for step in (rounded, "attention_rank"):
        with pytest.raises(UserError, match=r"in part: say pack=false there"):
            press(source, tmp_path / "out", "attention_rank", step, text=text, target="plugin")
    with pytest.raises(UserError, match="put the rounding last"):
        press(source, tmp_path / "out", rounded, "attention_rank", text=text, target="plugin")


@pytest.mark.parametrize("experts", ["rtn:group_size=32", "gptq:group_size=32", "wanda:pack=true"])
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.few(1)
def test_other_parts_are_treated_before_or_after_it(
    experts: str, first: bool, source: Path, text: Path, tmp_path: Path
):
    steps = ["attention_rank", experts] if first else [experts, "attention_rank"]
    proven(press(source, tmp_path / "out", *steps, text=text, target="plugin"), source)


@pytest.mark.parametrize(
    ("rank", "reason"),
    [(7, "which 6 heads cannot share: say a multiple of 6"), (12, "does not keep as many dims of q_proj and k_proj"),
     (97, "has no 97 rows to keep")],
)  # fmt: skip
def test_a_plan_by_hand_must_fit_the_heads(rank: int, reason: str, zoo: Zoo, text: Path, tmp_path: Path):
    out = press(zoo("mixtral"), tmp_path / "out", "attention_rank", text=text, target="plugin")
    body = json.loads(plan_of(out).to_json())
    body["stages"][0]["treatments"]["L0.attention.q_proj"]["format"]["rank"] = rank
    (tmp_path / "plan.json").write_text(json.dumps(body))
    recipe = Recipe().with_options(
        texts=(Source(str(text)),), samples=SAMPLES, length=LENGTH, target="plugin"
    )
    with pytest.raises(UserError, match=reason):
        api.build(zoo("mixtral"), plan=tmp_path / "plan.json", out=tmp_path / "by-hand", recipe=recipe)


# The stored form


@given(
    kind=st.sampled_from(["rows", "columns"]),
    rank=st.integers(1, 5),
    empty=st.integers(0, 2),
    seed=st.integers(0, 1000),
)
@settings(max_examples=60, deadline=None)
def test_what_is_stored_comes_back(kind: str, rank: int, empty: int, seed: int):
    draw = torch.Generator().manual_seed(seed)
    weights = torch.randn(3, 7, 6, generator=draw).to(torch.bfloat16)
    axis = 1 if kind == "rows" else 2
    for each in weights:
        gone = torch.randperm(each.shape[axis - 1], generator=draw)[max(0, rank - empty) :]
        each.index_fill_(axis - 1, gone, 0)
    format = Format(kind, rank=rank)  # pyright: ignore[reportArgumentType]
    parts = Slices().encode(weights, format)
    wanted = Slices().shapes(format, 7, 6, "BF16")
    assert {name: tuple(part.shape[1:]) for name, part in parts.items()} == {
        n: s for n, (s, _) in wanted.items()
    }
    assert torch.equal(Slices().decode(parts, format, (7, 6)), weights)


@pytest.mark.parametrize(
    ("part", "spoil", "reason"),
    [("weight_index", lambda t: t.flip(0), "in ascending order"), ("weight_index", lambda t: t + 90, "in ascending order"),
     ("weight_index", lambda t: t - 90, "in ascending order"), ("weight_kept", lambda t: t[1:], "as its format says"),
     ("weight_shape", lambda t: t // 100, "download it again"), ("weight_shape", lambda t: t * 3, "download it again"),
     ("weight_shape", None, "download it again"), ("weight_index", None, "is missing")],
)  # fmt: skip
@pytest.mark.few(2)
def test_a_damaged_part_is_told(part: str, spoil, reason: str, zoo: Zoo, text: Path, tmp_path: Path):
    out = press(zoo("mixtral"), tmp_path / "out", "attention_rank", text=text, target="plugin")
    tensors = disk(out)
    name = f"model.layers.1.self_attn.q_proj.{part}"
    if spoil is None:
        del tensors[name]
    else:
        tensors[name] = spoil(tensors[name]).contiguous()
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=reason):
        moespresso.load(out)
