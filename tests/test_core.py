"""The words everyone speaks: addresses, plans, prices and steps say the same thing in every room.

Prices are held against the known totals of four real models, whose headers are written here from their configs'
numbers; what a plan writes is held against what stock transformers saves after a cut by hand.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from families import FAMILIES, cut_by_hand, random_kept, reference, tensor_files
from moespresso.checkpoint import open_checkpoint
from moespresso.core import registry
from moespresso.core.blueprint import Blueprint, Entry, LayerSpec, TensorRef
from moespresso.core.cost import Cost
from moespresso.core.errors import UserError, did_you_mean
from moespresso.core.format import Format
from moespresso.core.method import Selects
from moespresso.core.plan import Plan, Stage, Treatment
from moespresso.core.registry import methods, parse_step
from moespresso.core.stats import Stats
from moespresso.core.unit import PARTS, Unit
from moespresso.effect import pieces, pressed_blueprint, price, validated
from moespresso.methods import ExpertDrop
from moespresso.model import read_blueprint

every_family = pytest.mark.parametrize("name", list(FAMILIES))
quickly = settings(max_examples=50, deadline=None, derandomize=True, database=None)
Shapes = dict[str, tuple[int, ...]]


# Addresses


def units() -> st.SearchStrategy[Unit]:
    """Every well-formed address: a part outside the layers, an expert, or a part of a layer."""
    layers, experts = st.integers(0, 200), st.integers(0, 999)
    matrices = st.none() | st.sampled_from(["gate", "up", "down", "down_bias", "q_proj", "weight", "A_log"])
    inner = st.sampled_from([part for part in PARTS if part != "other"])
    return (
        st.builds(Unit, st.none(), st.sampled_from(PARTS))
        | st.builds(Unit, layers)
        | st.builds(Unit, layers, st.just("experts"), experts, matrices)
        | st.builds(Unit, layers, inner, st.none(), matrices)
    )


@quickly
@given(units())
def test_an_address_is_read_back_as_printed(unit: Unit):
    assert Unit.parse(str(unit)) == unit


@quickly
@given(st.lists(units(), max_size=8))
def test_addresses_sort_by_layer_part_and_expert(some: list[Unit]):
    ordered = sorted(some)
    places = [(-1 if u.layer is None else u.layer, PARTS.index(u.part), -1 if u.expert is None else u.expert)
              for u in ordered]  # fmt: skip
    assert places == sorted(places)
    backwards = some[::-1]
    assert sorted(backwards) == ordered


def test_addresses_print_as_documented():
    assert str(Unit(12, "experts", 37, "down")) == "L12.E37.down"
    assert [str(Unit(12, "router")), str(Unit(3)), str(Unit(None, "head"))] == ["L12.router", "L3", "head"]


@pytest.mark.parametrize(
    "text", ["", "E3", "L", "L1.", "L1.expert", "L-1.E2", "Lx.E2", "L1.E2.a.b", "L1.E2 ", "experts.3"]
)
def test_what_is_no_address_is_refused_by_name(text: str):
    with pytest.raises(UserError, match=r"is not a unit address such as L12\.E37\.down"):
        Unit.parse(text)


# Plans


def treatments() -> st.SearchStrategy[Treatment]:
    numbers = st.sets(st.integers(0, 63), min_size=1).map(lambda found: tuple(sorted(found)))
    formats = st.builds(Format, st.sampled_from(["integer", "sparse"]), st.integers(2, 8), st.just(64),
                        st.booleans(), st.sampled_from([0.5, 1.0]))  # fmt: skip
    return st.builds(
        Treatment,
        keep=st.none() | numbers,
        scale=st.floats(0.1, 2.0),
        into=st.none() | st.integers(0, 9),
        channels=st.none() | st.integers(1, 9),
        format=st.none() | formats,
        repair=st.none() | st.just("refit"),
    )


def plans() -> st.SearchStrategy[Plan]:
    settings = st.dictionaries(
        st.sampled_from(["kind", "score", "keep"]), st.text() | st.integers() | st.none()
    )
    stages = st.builds(Stage, settings, st.dictionaries(units(), treatments(), max_size=4))
    return st.builds(
        Plan,
        st.text(),
        st.lists(stages, max_size=3).map(tuple),
        st.dictionaries(st.text(), st.lists(st.integers())),
        st.text(),
        st.integers(0, 2**40),
    )


@quickly
@given(plans())
def test_a_plan_survives_json(plan: Plan):
    again = Plan.from_json(plan.to_json())
    assert again == plan
    assert again.digest == plan.digest


def test_a_plan_survives_a_file(tmp_path: Path):
    plan = keeping({2: (0, 3), 10: (1, 2)}, scale=0.75)
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan
    with pytest.raises(UserError, match="does not exist"):
        Plan.load(tmp_path / "other.json")


def test_a_plans_digest_knows_the_decision_and_not_its_order():
    one, two = (Unit(2, "experts"), Treatment(keep=(0,))), (Unit(10, "experts"), Treatment(keep=(1,)))
    forwards, backwards = (Plan("x", (Stage({}, dict(rows)),)) for rows in ((one, two), (two, one)))
    assert forwards.digest == backwards.digest
    assert forwards.digest != keeping({2: (0,), 10: (2,)}).digest


@pytest.mark.parametrize(
    "broken",
    [
        "[1]",
        "not json",
        "{}",
        '{"blueprint": "x", "stages": [{"method": {}}]}',
        '{"blueprint": "x", "stages": [{"method": {}, "treatments": {"L0.experts": {"keeep": [0]}}}]}',
        '{"blueprint": "x", "stages": [{"method": {}, "treatments": {"L0.experts": {"keep": 3}}}]}',
        '{"blueprint": "x", "stages": [{"method": {}, "treatments": {"L0.experts": {"scale": "two"}}}]}',
    ],
)
def test_what_is_no_plan_is_the_users_mistake(broken: str):
    with pytest.raises(UserError, match="not a moespresso plan"):
        Plan.from_json(broken)


@quickly
@given(st.lists(st.sets(st.integers(0, 11)), max_size=4))
def test_what_is_kept_is_what_every_stage_keeps(sets: list[set[int]]):
    stages = tuple(stage for kept in sets for stage in keeping({3: tuple(sorted(kept))}).stages)
    expected = set(range(12)).intersection(*sets)
    assert Plan("x", stages).kept_experts(3, 12) == tuple(sorted(expected))
    assert Plan("x", stages).kept_experts(4, 12) == tuple(range(12))


@quickly
@given(st.lists(st.floats(0.1, 3.0), max_size=4))
def test_scales_of_stages_multiply(scales: list[float]):
    stages = tuple(stage for scale in scales for stage in keeping({3: (0,)}, scale=scale).stages)
    assert math.isclose(Plan("x", stages).routed_scale(3), math.prod(scales))
    assert Plan("x", stages).routed_scale(4) == 1.0


def keeping(kept: Mapping[int, tuple[int, ...]], *, digest: str = "x", scale: float = 1.0) -> Plan:
    """A plan of one stage that keeps these experts."""
    rows = {Unit(layer, "experts"): Treatment(keep=ids, scale=scale) for layer, ids in kept.items()}
    return Plan(digest, (Stage({"kind": "expert_drop"}, rows),))


# What a plan may not do


def sketch(*layers: LayerSpec) -> Blueprint:
    """A blueprint of layers alone, without tensors."""
    return Blueprint("made", "made-up", "x", 8, 16, False, layers, ())


GROUPED = sketch(LayerSpec(0, "attention"), LayerSpec(1, "attention", 12, top_k=3, groups=3, floor=6))


def test_an_empty_plan_fits_and_another_models_plan_does_not():
    assert validated(Plan("x"), GROUPED) == Plan("x")
    with pytest.raises(UserError, match="made for another checkpoint"):
        validated(Plan("y"), GROUPED)


@pytest.mark.parametrize(
    ("kept", "complaint"),
    [
        ((0, 4, 8), "L1 would keep 3 experts, but its router .* needs at least 6"),
        ((), "would keep 0 experts"),
        ((0, 1, 2, 3, 4, 8), "3 groups, which must all keep the same number"),
        ((0, 1, 4, 5, 8, 12), "keeps expert 12 of L1, which has 12"),
        ((-1, 1, 4, 5, 8, 9), "keeps expert -1 of L1"),
    ],
)
def test_a_router_must_be_left_something_to_choose(kept: tuple[int, ...], complaint: str):
    with pytest.raises(UserError, match=complaint):
        validated(keeping({1: kept}), GROUPED)
    validated(keeping({1: (0, 1, 4, 5, 8, 9)}), GROUPED)


def test_the_floor_holds_for_all_stages_together():
    first, second = keeping({1: (0, 1, 4, 5, 8, 9)}), keeping({1: (1, 2, 5, 6, 9, 10)})
    both = Plan("x", (*first.stages, *second.stages))
    assert both.kept_experts(1, 12) == (1, 5, 9)
    with pytest.raises(UserError, match="would keep 3"):
        validated(both, GROUPED)


@pytest.mark.parametrize(
    "unit", [Unit(0, "experts"), Unit(7, "experts"), Unit(1, "attention"), Unit(None, "head")]
)
def test_only_routed_experts_are_treated(unit: Unit):
    with pytest.raises(UserError, match="has no routed experts there"):
        validated(Plan("x", (Stage({}, {unit: Treatment(keep=(0,))}),)), GROUPED)


@pytest.mark.parametrize(
    ("unit", "treatment"),
    [
        (Unit(1, "experts", 3), Treatment(keep=(0, 1, 4, 5, 8, 9))),
        (Unit(1, "experts", None, "down"), Treatment(keep=(0, 1, 4, 5, 8, 9))),
        (Unit(1, "experts", 3), Treatment(into=2)),
        (Unit(1, "experts"), Treatment(channels=2)),
        (Unit(1, "experts"), Treatment(format=Format("integer", 4))),
        (Unit(1, "experts"), Treatment(repair="refit")),
    ],
)
def test_a_treatment_that_this_version_cannot_carry_out_is_not_ignored_in_silence(
    unit: Unit, treatment: Treatment
):
    with pytest.raises(UserError):
        validated(Plan("x", (Stage({}, {unit: treatment}),)), GROUPED)


# What a plan writes


@every_family
def test_pieces_are_what_stock_transformers_saves_after_the_same_cut(name: str, zoo: Any, tmp_path: Path):
    blueprint = read_blueprint(open_checkpoint(zoo(name)))
    model = reference(zoo(name))
    kept = random_kept(model, _fewer(blueprint))
    cut_by_hand(model, kept).save_pretrained(tmp_path)
    plan = keeping({layer: tuple(ids) for layer, ids in kept.items()}, digest=blueprint.digest)
    written = pieces(blueprint, validated(plan, blueprint))
    assert {piece.name: piece.shape for piece in written} == _header(tmp_path)
    assert len({piece.name for piece in written}) == len(written)
    assert price(plan, blueprint).bytes == sum(piece.ref.nbytes for piece in written) < blueprint.cost().bytes
    assert {layer.experts for layer in pressed_blueprint(blueprint, plan).moe_layers} == {_fewer(blueprint)}


def _fewer(blueprint: Blueprint) -> int:
    """About three quarters of the experts, the same in every group."""
    layer = blueprint.moe_layers[0]
    return layer.experts - max(1, layer.experts // 4 // layer.groups) * layer.groups


def _header(folder: Path) -> Shapes:
    shapes: Shapes = {}
    for tensor, file in tensor_files(folder).items():
        with safe_open(file, "pt") as shard:
            shapes[tensor] = tuple(shard.get_slice(tensor).get_shape())
    return shapes


@every_family
def test_an_empty_plan_writes_the_source(name: str, zoo: Any):
    blueprint = read_blueprint(open_checkpoint(zoo(name)))
    written = pieces(blueprint, Plan(blueprint.digest))
    assert [piece.source for piece in written] == list(blueprint.entries)
    assert all(
        piece.name == piece.source.ref.name and piece.shape == piece.source.ref.shape for piece in written
    )
    assert all(piece.take is None and piece.scale == 1 for piece in written)
    assert price(Plan(blueprint.digest), blueprint) == blueprint.cost()


def test_survivors_move_up_and_shared_tensors_give_their_rows():
    entries = (
        _entry("layers.1.mlp.gate.weight", (4, 8), Unit(1, "router", None, "weight"), axis=0),
        _entry("layers.1.mlp.statics.bias", (1, 4), Unit(1, "router", None, "bias"), axis=1),
        *(
            _entry(f"layers.1.mlp.experts.{e}.down.weight", (8, 6), Unit(1, "experts", e, "down"))
            for e in range(4)
        ),
        _entry("layers.1.mlp.experts.down", (4, 6, 8), Unit(1, "experts", None, "down"), axis=0),
        _entry("layers.1.mlp.shared.0.down.weight", (8, 6), Unit(1, "shared")),
    )
    blueprint = Blueprint(
        "made", "made-up", "x", 8, 16, False, (LayerSpec(0, "none"), LayerSpec(1, "attention", 4)), entries
    )
    router, bias, first, second, fused, shared = pieces(blueprint, keeping({1: (1, 3)}, scale=0.5))
    assert (router.shape, router.axis, router.take, router.scale) == ((2, 8), 0, (1, 3), 1.0)
    assert (bias.shape, bias.axis, bias.take) == ((1, 2), 1, (1, 3))
    assert [piece.name.split(".")[4] for piece in (first, second)] == ["0", "1"]
    assert [piece.source.unit.expert for piece in (first, second)] == [1, 3]
    assert (fused.shape, fused.take) == ((2, 6, 8), (1, 3))
    assert [piece.scale for piece in (first, second, fused, shared)] == [0.5, 0.5, 0.5, 1.0]
    assert shared.name == "layers.1.mlp.shared.0.down.weight"


def _entry(name: str, shape: tuple[int, ...], unit: Unit, axis: int | None = None) -> Entry:
    return Entry(TensorRef(name, shape, "BF16", "model.safetensors"), unit, axis)


def test_what_is_outside_the_graph_passes_through():
    stray = Entry(TensorRef("layers.1.mlp.x", (4,), "BF16", "f"), Unit(1), in_graph=False, ahead=Unit(0))
    blueprint = Blueprint("made", "made-up", "x", 8, 16, False, (LayerSpec(1, "attention", 4),), (stray,))
    assert [piece.name for piece in pieces(blueprint, keeping({1: (0, 1)}))] == [stray.ref.name]
    assert blueprint.outside == (stray,)


# Prices of real models, from their configs' numbers alone


def _moe(prefix: str, experts: int, hidden: int, width: int, parts: tuple[str, str, str]) -> Shapes:
    """Router and experts of a MoE block; `parts` are the names of gate, up and down."""
    shapes: Shapes = {f"{prefix}.gate.weight": (experts, hidden)}
    for expert in range(experts):
        for part in parts:
            shape = (hidden, width) if part == parts[2] else (width, hidden)
            shapes[f"{prefix}.experts.{expert}.{part}.weight"] = shape
    return shapes


def _attention(prefix: str, hidden: int, q: int, kv: int) -> Shapes:
    shapes = {"q_proj": (q, hidden), "k_proj": (kv, hidden), "v_proj": (kv, hidden), "o_proj": (hidden, q)}
    return {f"{prefix}.self_attn.{name}.weight": shape for name, shape in shapes.items()}


def _frame(hidden: int, vocab: int, layers: int) -> Shapes:
    """Embedding, head and norms."""
    norms = {f"model.layers.{layer}.{name}_layernorm.weight": (hidden,)
             for layer in range(layers) for name in ("input", "post_attention")}  # fmt: skip
    ends = {"model.embed_tokens.weight": (vocab, hidden), "lm_head.weight": (vocab, hidden)}
    return {**ends, **norms, "model.norm.weight": (hidden,)}


def _gated(prefix: str, hidden: int, width: int) -> Shapes:
    shapes = {"gate_proj": (width, hidden), "up_proj": (width, hidden), "down_proj": (hidden, width)}
    return {f"{prefix}.{name}.weight": shape for name, shape in shapes.items()}


LLAMA = ("gate_proj", "up_proj", "down_proj")


def _config(
    family: str, hidden: int, vocab: int, layers: int, heads: int, kv_heads: int, **rest: Any
) -> dict[str, Any]:
    """The fields that all configs have, and `rest`."""
    return {"model_type": family, "hidden_size": hidden, "vocab_size": vocab, "num_hidden_layers": layers,
            "num_attention_heads": heads, "num_key_value_heads": kv_heads, "tie_word_embeddings": False,
            **rest}  # fmt: skip


def mixtral_8x7b() -> tuple[dict[str, Any], Shapes]:
    config = _config("mixtral", 4096, 32000, 32, 32, 8, intermediate_size=14336, num_local_experts=8,
                     num_experts_per_tok=2)  # fmt: skip
    shapes = _frame(4096, 32000, 32)
    for layer in range(32):
        shapes |= _attention(f"model.layers.{layer}", 4096, 4096, 1024)
        shapes |= _moe(f"model.layers.{layer}.block_sparse_moe", 8, 4096, 14336, ("w1", "w3", "w2"))
    return config, shapes


def deepseek_v2_lite() -> tuple[dict[str, Any], Shapes]:
    config = _config("deepseek_v2", 2048, 102400, 27, 16, 16, intermediate_size=10944,
                     moe_intermediate_size=1408, n_routed_experts=64, n_shared_experts=2, num_experts_per_tok=6,
                     first_k_dense_replace=1, kv_lora_rank=512, q_lora_rank=None, qk_nope_head_dim=128,
                     qk_rope_head_dim=64, v_head_dim=128, topk_method="greedy", n_group=1, topk_group=1,
                     routed_scaling_factor=1.0)  # fmt: skip
    shapes = _frame(2048, 102400, 27) | _gated("model.layers.0.mlp", 2048, 10944)
    for layer in range(27):
        attention = {"q_proj": (16 * 192, 2048), "kv_a_proj_with_mqa": (512 + 64, 2048),
                     "kv_a_layernorm": (512,), "kv_b_proj": (16 * 256, 512), "o_proj": (2048, 16 * 128)}  # fmt: skip
        shapes |= {
            f"model.layers.{layer}.self_attn.{name}.weight": shape for name, shape in attention.items()
        }
    for layer in range(1, 27):
        shapes |= _moe(f"model.layers.{layer}.mlp", 64, 2048, 1408, LLAMA)
        shapes |= _gated(f"model.layers.{layer}.mlp.shared_experts", 2048, 2816)
    return config, shapes


def olmoe_1b_7b() -> tuple[dict[str, Any], Shapes]:
    config = _config(
        "olmoe", 2048, 50304, 16, 16, 16, intermediate_size=1024, num_experts=64, num_experts_per_tok=8
    )
    shapes = _frame(2048, 50304, 16)
    for layer in range(16):
        shapes |= _attention(f"model.layers.{layer}", 2048, 2048, 2048)
        shapes |= {f"model.layers.{layer}.self_attn.{x}_norm.weight": (2048,) for x in "qk"}
        shapes |= _moe(f"model.layers.{layer}.mlp", 64, 2048, 1024, LLAMA)
    return config, shapes


def qwen3_30b_a3b() -> tuple[dict[str, Any], Shapes]:
    config = _config("qwen3_moe", 2048, 151936, 48, 32, 4, head_dim=128, intermediate_size=6144,
                     moe_intermediate_size=768, num_experts=128, num_experts_per_tok=8)  # fmt: skip
    shapes = _frame(2048, 151936, 48)
    for layer in range(48):
        shapes |= _attention(f"model.layers.{layer}", 2048, 4096, 512)
        shapes |= {f"model.layers.{layer}.self_attn.{x}_norm.weight": (128,) for x in "qk"}
        shapes |= _moe(f"model.layers.{layer}.mlp", 128, 2048, 768, LLAMA)
    return config, shapes


def open_unwritten(folder: Path, config: dict[str, Any], shapes: Shapes) -> Blueprint:
    """The blueprint of a bf16 checkpoint whose header is there and whose tensors are a hole in the file."""
    header: dict[str, Any] = {}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    (folder / "config.json").write_text(json.dumps(config))
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    return read_blueprint(open_checkpoint(folder))


@pytest.mark.parametrize(
    ("make", "params", "active", "kv_bytes"),
    [
        (mixtral_8x7b, 46_702_792_704, 12_879_925_248, 128 << 10),
        (deepseek_v2_lite, 15_706_484_224, 2_661_150_208, 27 * 2 * (512 + 64)),
        (olmoe_1b_7b, 6_919_161_856, 1_282_017_280, 16 * 2 * 2 * 2048),
        (qwen3_30b_a3b, 30_532_122_624, 3_353_032_704, 48 * 2 * 2 * 512),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
@pytest.mark.few(3)
def test_real_models_weigh_what_is_published(
    make: Any, params: int, active: int, kv_bytes: int, tmp_path: Path
):
    cost = open_unwritten(tmp_path, *make()).cost()
    assert (cost.params, cost.active_params, cost.kv_bytes_per_token) == (params, active, kv_bytes)
    assert cost.bytes == 2 * params


def test_mixtral_8x7b_is_priced_as_the_paper_prices_it(tmp_path: Path):
    blueprint = open_unwritten(tmp_path, *mixtral_8x7b())
    plan = validated(
        keeping({layer: tuple(range(6)) for layer in range(32)}, digest=blueprint.digest), blueprint
    )
    whole, pressed = blueprint.cost(), price(plan, blueprint)
    assert round(whole.bytes / 2**30, 2) == 86.99
    assert round(pressed.bytes / 2**30, 2) == 65.99
    assert whole.flops == pytest.approx(54.4e12, rel=0.01)
    # Dropping experts saves memory, not work: as many are active, and the router is two rows shorter.
    assert whole.active_params - pressed.active_params == 32 * 2 * 4096
    assert pressed.flops == pytest.approx(whole.flops, rel=1e-4)
    assert pressed.kv_bytes_per_token == whole.kv_bytes_per_token
    assert whole.peak_load_bytes == 2 * (
        8 * 3 * 4096 * 14336 + 2 * 4096 * (4096 + 1024) + 2 * 4096 + 8 * 4096
    )


def test_real_layers_are_described(tmp_path: Path):
    blueprint = open_unwritten(tmp_path, *deepseek_v2_lite())
    dense, first = blueprint.layers[0], blueprint.layers[1]
    assert (dense.experts, dense.width) == (0, 10944)
    assert (first.experts, first.shared_experts, first.top_k, first.groups, first.floor) == (64, 2, 6, 1, 6)
    assert (first.width, first.qk_width, first.v_width, first.kv_width) == (1408, 16 * 192, 16 * 128, 576)
    assert (len(blueprint.moe_layers), blueprint.hidden, blueprint.vocab, blueprint.tied) == (
        26,
        2048,
        102400,
        False,
    )
    parts = blueprint.bytes_by_part()
    assert parts["experts"] == 26 * 64 * 3 * 2048 * 1408 * 2
    assert parts["shared"] == 26 * 3 * 2048 * 2816 * 2
    assert parts["embedding"] == 2 * 102400 * 2048 * 2
    assert sum(parts.values()) == blueprint.cost().bytes


def test_a_small_blueprint_is_priced_by_hand():
    entries = (
        _entry("embed", (16, 8), Unit(None, "embedding")),
        _entry("a.q", (6, 8), Unit(0, "attention")),
        *(_entry(f"a.experts.{e}.down", (8, 5), Unit(0, "experts", e, "down")) for e in range(4)),
        Entry(TensorRef("mtp", (100,), "F32", "f"), Unit(9), in_graph=False),
    )
    layer = LayerSpec(0, "attention", 4, top_k=1, qk_width=6, v_width=4, kv_width=7)
    tied = Blueprint("made", "made-up", "x", 8, 16, True, (layer,), entries)
    active = 16 * 8 + 6 * 8 + 8 * 5
    flops = 2 * 2048 * active + 2 * 2048**2 * (6 + 4)
    assert tied.cost() == Cost(
        bytes=2 * (128 + 48 + 160) + 400, params=128 + 48 + 160 + 100, active_params=active, flops=flops,
        kv_bytes_per_token=14, peak_load_bytes=2 * (48 + 160),
    )  # fmt: skip


# Stats


def test_stats_survive_a_file(tmp_path: Path):
    values = {Unit(3, "experts", 1): {"gate": 0.25}, Unit(3, "experts"): {"tokens": 7.0}}
    stats = Stats("k", "b", 7, values, ("oh",), {"samples": 2}, ("routing",))
    (tmp_path / "stats.json").write_text(stats.to_json())
    assert Stats.load(tmp_path / "stats.json") == stats
    with pytest.raises(UserError, match=r"hold no 'gate' for L3\.experts: measure again"):
        stats.of(3, 2, "gate")
    (tmp_path / "plan.json").write_text(Plan("x").to_json())
    with pytest.raises(UserError, match="is not a moespresso stats file"):
        Stats.load(tmp_path / "plan.json")


# Steps


def test_text_and_mapping_make_the_same_step():
    step = parse_step("expert_drop:ratio=0.25,score=man,protect_super=false,seed=3")
    assert step == ExpertDrop(ratio=0.25, score="man", protect_super=False, seed=3)
    assert step == parse_step(
        {"kind": "expert_drop", "ratio": 0.25, "score": "man", "protect_super": False, "seed": 3}
    )
    assert parse_step("expert_drop") == ExpertDrop()
    assert parse_step("expert_drop:keep=none,ratio=0.5") == ExpertDrop(ratio=0.5)


@pytest.mark.parametrize(
    ("step", "complaint"),
    [
        ("expert_dorp:keep=4", r"step kind 'expert_dorp' is unknown \(did you mean 'expert_drop'\?\)"),
        ("expert_drop:keap=4", r"has no setting 'keap' \(did you mean 'keep'\?\)"),
        ("expert_drop:score=reep", r"score='reep' is unknown \(did you mean 'reap'\?\)"),
        ("expert_drop:score=zzz", r"score='zzz' is unknown \(choose from aimer, "),
        ("expert_drop:keep=six", r"keep='six' must be of type int"),
        ("expert_drop:keep=6.5", r"keep='6.5' must be of type int"),
        ("expert_drop:ratio=much", r"ratio='much' must be of type float"),
        ("expert_drop:reverse=maybe", r"reverse='maybe' must be true or false"),
        ("expert_drop:keep", r"'keep' is not of the form setting=value"),
        ({"keep": 4}, "step kind '' is unknown"),
    ],
)
def test_a_wrong_step_is_refused_in_one_sentence(step: Any, complaint: str):
    with pytest.raises(UserError, match=complaint) as caught:
        parse_step(step)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", [6.5, True])
def test_a_number_of_experts_is_never_rounded_in_silence(value: Any):
    with pytest.raises(UserError, match="keep"):
        parse_step({"kind": "expert_drop", "keep": value})


OWN_METHOD = '''"""Drop nothing at all."""
from dataclasses import dataclass
from typing import ClassVar
from moespresso.core.method import Selects
from moespresso.core.plan import Decision, Stage
from moespresso.core.registry import method
@method
@dataclass(frozen=True)
class DropNothing(Selects):
    """share: of nothing."""
    kind: ClassVar[str] = "drop_nothing"
    share: float = 0.0
    def outline(self, source, before):
        return Stage(self.describe(), {})
    def decide(self, stats, blueprint):
        return Decision({})
'''


@pytest.fixture
def own_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """A registry that forgets afterwards."""
    monkeypatch.setattr(registry, "_METHODS", dict(registry._METHODS))


@pytest.mark.usefixtures("own_registry")
def test_use_imports_a_users_own_method(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "my_methods.py").write_text(OWN_METHOD)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match="'drop_nothing' is unknown"):
        parse_step({"kind": "drop_nothing"})
    step = parse_step({"use": "my_methods", "kind": "drop_nothing", "share": "0.5"})
    assert (type(step).__name__, step.share) == ("DropNothing", 0.5)
    assert "drop_nothing" in methods()
    with pytest.raises(UserError, match=r"drop_nothing has no setting 'shore' \(did you mean 'share'"):
        parse_step("drop_nothing:shore=1")


@pytest.mark.usefixtures("own_registry")
def test_an_own_method_that_leaves_out_what_its_role_asks_for_is_told(tmp_path: Path, monkeypatch):
    (tmp_path / "half_methods.py").write_text(OWN_METHOD.partition("    def decide")[0])
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(
        UserError, match="drop_nothing: DropNothing does not say decide, which its role asks for"
    ):
        parse_step({"use": "half_methods", "kind": "drop_nothing"})


def test_use_of_what_is_not_there_is_the_users_mistake():
    with pytest.raises(UserError, match="`use: no_such_methods` cannot be imported"):
        parse_step({"use": "no_such_methods", "kind": "x"})


def test_two_methods_of_one_name_are_our_mistake():
    with pytest.raises(AssertionError, match="two methods named expert_drop"):

        @registry.method
        class Other(Selects):
            kind = "expert_drop"
            outline = decide = None


def test_a_close_word_is_offered_and_a_far_one_gets_the_choices():
    assert did_you_mean("kepe", ["keep", "ratio"]) == " (did you mean 'keep'?)"
    assert did_you_mean("zzz", ["ratio", "keep"]) == " (choose from keep, ratio)"
