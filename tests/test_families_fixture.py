"""The tests' own reference, tested: is the zoo lively, and is a cut by hand a true cut?

Three independent truths hold `cut_by_hand` up: a stock model built with the smaller count computes
the same, masking the dropped experts in the whole model computes the same wherever a router allows
it, and the cut model survives being saved and loaded.
"""

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.models.phimoe.modeling_phimoe import sparsemixer

from families import (
    FAMILIES,
    build,
    cut_by_hand,
    expert_on_disk,
    experts_of,
    family_of,
    groups_of,
    instantiate,
    is_router,
    layer_of,
    logits_of,
    moe_blocks,
    random_ids,
    random_kept,
    read_tensor,
    reference,
    routers,
    same_model,
    tensor_files,
    write_checkpoint,
)

pytestmark = pytest.mark.filterwarnings("error")
every_family = pytest.mark.parametrize("name", list(FAMILIES))

# Routers that choose by sigmoid or by logit, with a bias: minus infinity there is a true cut.
BIASED = ["deepseek_v3", "glm4_moe", "dots1", "minimax_m2", "gpt_oss"]
# The rest normalise over all experts first, so that dropping one changes every probability.  ERNIE too:
# it adds its bias to probabilities, and the fewer the experts, the less the bias weighs.
SOFTMAX = [name for name in FAMILIES if name not in BIASED]

Routed = tuple[Tensor, Tensor, Tensor]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Tiny matrices are slower on many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One checkpoint of each family, written when first asked for."""

    class Folders(dict):
        def __missing__(self, name: str) -> Path:
            self[name] = write_checkpoint(name, tmp_path_factory.mktemp(name))
            return self[name]

    return Folders()


# The shapes


@every_family
def test_shapes_are_not_the_easy_ones(name: str):
    model = build(name)
    config = model.config
    assert config.num_attention_heads > config.num_key_value_heads or hasattr(config, "kv_lora_rank")
    assert all(num_experts > 2 * top_k for num_experts, top_k in experts_of(model).values())
    assert 2 <= len(experts_of(model)) <= config.num_hidden_layers


def test_the_zoo_has_every_oddity():
    models = {name: build(name) for name in FAMILIES}
    grouped = {name for name, model in models.items() if max(groups_of(model).values()) > 1}
    assert grouped == {"deepseek_v2", "deepseek_v3", "glm4_moe", "dots1"}
    assert all(r.topk_group < r.num_group for name in grouped for r in routers(models[name]).values())
    dense = {n for n, model in models.items() if len(moe_blocks(model)) < model.config.num_hidden_layers}
    assert dense == grouped | {"qwen2_moe", "qwen3_moe", "ernie4_5_moe", "jamba"}
    tied = {name for name, model in models.items() if model.config.tie_word_embeddings}
    assert tied == {"olmoe", "granitemoe", "ernie4_5_moe", "hunyuan_v1_moe"}
    assert list(experts_of(models["qwen3_moe"])) == list(experts_of(models["ernie4_5_moe"])) == [1, 3]
    assert [top_k for _, top_k in experts_of(models["hunyuan_v1_moe"]).values()] == [2, 3, 2]


@every_family
def test_routing_is_lively(name: str):
    model = build(name)
    chosen: dict[int, Tensor] = {}
    for index, router in routers(model).items():
        router.register_forward_hook(lambda _, __, out, index=index: chosen.__setitem__(index, out[2]))
    logits = logits_of(model, random_ids(model.config, 3, 40))
    assert logits.isfinite().all()
    assert 0.3 < logits.std(dim=-1).mean() < 20
    for index, (num_experts, _) in experts_of(model).items():
        used = chosen[index].unique()
        assert len(used) >= 0.7 * num_experts, f"layer {index} uses {used.tolist()} only"
        assert len(chosen[index].sort(dim=-1).values.unique(dim=0)) >= num_experts


# The files


@every_family
def test_files_are_awkward(name: str, folders: dict[str, Path]):
    files = tensor_files(folders[name])
    assert len(set(files.values())) == 3
    homes: dict[int | None, set[Path]] = {}
    for tensor, file in files.items():
        homes.setdefault(layer_of(tensor), set()).add(file)
    assert any(len(shards) > 1 for layer, shards in homes.items() if layer is not None)
    assert files["model.layers.0.input_layernorm.weight"] == max(files.values())
    dtypes = {tensor: read_tensor(folders[name], tensor).dtype for tensor in files}
    assert set(dtypes.values()) == {torch.bfloat16, torch.float16, torch.float32}
    assert all(dtypes[tensor] == torch.float32 for tensor in files if is_router(tensor))
    head = "lm_head.weight" in files
    assert head is not family_of(reference(folders[name])).config().tie_word_embeddings


@pytest.mark.parametrize("name", [n for n in FAMILIES if n not in ("gpt_oss", "granitemoe")])
def test_a_shard_border_cuts_an_expert(name: str, folders: dict[str, Path]):
    homes: dict[str, set[Path]] = {}
    for tensor, file in tensor_files(folders[name]).items():
        if ".experts." in tensor:
            homes.setdefault(tensor.rsplit(".", 2)[0], set()).add(file)
    assert any(len(shards) > 1 for shards in homes.values())


@every_family
def test_reference_holds_what_the_files_hold(name: str, folders: dict[str, Path]):
    model = reference(folders[name])
    for layer, block in moe_blocks(model).items():
        experts = block.experts
        for expert in range(experts.num_experts):
            gate_up, down = experts.gate_up_proj[expert], experts.down_proj[expert]
            if experts.is_transposed:
                gate_up, down = gate_up.T, down.T
            gate, up = gate_up.chunk(2) if experts.is_concatenated else (gate_up[0::2], gate_up[1::2])
            disk = expert_on_disk(name, folders[name], layer, expert)
            assert torch.equal(gate, disk["gate"].float())
            assert torch.equal(up, disk["up"].float())
            assert torch.equal(down, disk["down"].float())


@every_family
def test_reference_in_other_dtypes(name: str, folders: dict[str, Path]):
    for dtype in (torch.bfloat16, "auto"):
        model = reference(folders[name], dtype)
        assert model.dtype == torch.bfloat16
        assert logits_of(model, random_ids(model.config, 2, 9)).isfinite().all()


def test_correction_biases_need_float32(folders: dict[str, Path]):
    model = reference(folders["deepseek_v3"], torch.bfloat16)
    bias = routers(model)[2].e_score_correction_bias
    assert bias.dtype == torch.float32
    assert not torch.equal(bias, bias.bfloat16().float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_shard_and_one_dtype(dtype: torch.dtype, tmp_path: Path):
    folder = write_checkpoint("qwen3_moe", tmp_path, shards=1, mixed_dtypes=False, dtype=dtype)
    assert {read_tensor(folder, name).dtype for name in tensor_files(folder)} == {dtype}
    assert sorted(path.suffix for path in folder.iterdir()) == [".json", ".json", ".safetensors"]
    assert reference(folder, "auto").dtype == dtype


def test_the_seed_decides_every_byte(tmp_path: Path):
    folders = [write_checkpoint("jamba", tmp_path / str(n), seed=seed) for n, seed in enumerate((0, 0, 1))]
    bytes_of = [{path.name: path.read_bytes() for path in folder.iterdir()} for folder in folders]
    assert bytes_of[0] == bytes_of[1]
    changed = {file for file in bytes_of[0] if bytes_of[0][file] != bytes_of[2][file]}
    assert changed == {file for file in bytes_of[0] if file.endswith(".safetensors")}


# The cut


@every_family
def test_cutting_nothing_is_the_identity(name: str):
    model = build(name)
    ids = random_ids(model.config, 2, 20)
    whole = {layer: list(range(num_experts)) for layer, (num_experts, _) in experts_of(model).items()}
    same_model(cut_by_hand(model, whole), model, ids)
    same_model(cut_by_hand(model, {}), model, ids)


@every_family
def test_a_cut_is_the_stock_model_with_fewer_experts(name: str):
    model = build(name)
    ids = random_ids(model.config, 2, 20)
    before = logits_of(model, ids)
    cut = cut_by_hand(model, random_kept(model))
    after = logits_of(cut, ids)
    assert after.isfinite().all()
    assert (after - before).abs().max() > 1e-2
    assert torch.equal(logits_of(model, ids), before), "the whole model was changed"

    (count,) = {num_experts for num_experts, _ in experts_of(cut).values()}
    stock = instantiate(FAMILIES[name].config(**{FAMILIES[name].count_key: count}))
    stock.load_state_dict(cut.state_dict(), strict=True)
    assert experts_of(stock) == experts_of(cut)
    same_model(stock, cut, ids)


@every_family
def test_a_cut_survives_saving(name: str, folders: dict[str, Path], tmp_path: Path):
    cut = cut_by_hand(model := reference(folders[name]), random_kept(model, seed=1))
    cut.save_pretrained(tmp_path)
    again = reference(tmp_path)
    ids = random_ids(model.config, 2, 20)
    assert experts_of(again) == experts_of(cut)
    config = json.loads((tmp_path / "config.json").read_text())
    assert {config[FAMILIES[name].count_key]} == {num_experts for num_experts, _ in experts_of(cut).values()}
    same_model(again, cut, ids)


@every_family
def test_one_layer_alone_may_be_cut(name: str):
    model = build(name)
    last = max(experts_of(model))
    cut = cut_by_hand(model, {last: random_kept(model)[last]})
    assert experts_of(cut)[last] < experts_of(model)[last]
    assert {**experts_of(cut), last: 0} == {**experts_of(model), last: 0}
    assert getattr(cut.config, FAMILIES[name].count_key) == getattr(model.config, FAMILIES[name].count_key)
    assert logits_of(cut, random_ids(model.config, 2, 20)).isfinite().all()


@pytest.mark.parametrize("name", SOFTMAX)
def test_a_cut_equals_a_masked_softmax(name: str):
    model = build(name)
    kept = random_kept(model)
    ids = random_ids(model.config, 2, 20)
    cut = logits_of(cut_by_hand(model, kept), ids)
    for layer, router in routers(model).items():
        router.register_forward_hook(partial(_route_among, name, kept[layer]))
    assert torch.allclose(logits_of(model, ids), cut, atol=2e-5)


def _route_among(family: str, ids: list[int], router: Any, _: tuple, out: Routed) -> Routed:
    """Route anew from the router's own logits, with those of the dropped experts at minus infinity."""
    logits = torch.full_like(out[0], -torch.inf)
    logits[:, ids] = out[0][:, ids]
    if family == "phimoe":
        return logits, *sparsemixer(logits, router.router_jitter_noise, training=False)
    scores = probabilities = logits.softmax(-1)
    if family == "ernie4_5_moe":
        scores = (probabilities + router.moe_statics.e_score_correction_bias).where(
            logits.isfinite(), -torch.inf
        )
    if family == "deepseek_v2":
        grouped = scores.view(len(scores), router.num_group, -1)
        worst = grouped.amax(-1).topk(router.num_group - router.topk_group, largest=False).indices
        scores = grouped.scatter(1, worst[:, :, None].expand(-1, -1, grouped.shape[-1]), 0).flatten(1)
    chosen = scores.topk(router.top_k).indices
    gates = probabilities.gather(1, chosen) * getattr(router, "routed_scaling_factor", 1)
    if family not in ("qwen2_moe", "deepseek_v2", "jamba"):
        gates = gates / gates.sum(-1, keepdim=True)
    return logits, gates, chosen


@pytest.mark.parametrize("name", BIASED)
def test_a_cut_equals_a_bias_of_minus_infinity(name: str):
    model = build(name)
    kept = random_kept(model)
    ids = random_ids(model.config, 2, 20)
    cut = logits_of(cut_by_hand(model, kept), ids)
    for layer, bias in _selection_biases(model).items():
        dropped = sorted(set(range(bias.numel())) - set(kept[layer]))
        bias.data.view(-1)[dropped] = -torch.inf
    assert torch.allclose(logits_of(model, ids), cut, atol=2e-5)


@pytest.mark.parametrize("name", [*BIASED, "ernie4_5_moe"])
def test_the_biases_matter(name: str):
    model = build(name)
    ids = random_ids(model.config, 2, 20)
    before = logits_of(model, ids)
    for bias in _selection_biases(model).values():
        bias.data.zero_()
    assert (logits_of(model, ids) - before).abs().max() > 1e-2


def _selection_biases(model: PreTrainedModel) -> dict[int, Tensor]:
    """Return the biases that take part in choosing experts, by layer."""
    found: dict[int, Tensor] = {}
    for layer, block in moe_blocks(model).items():
        named = {**dict(block.named_parameters()), **dict(block.named_buffers())}
        (found[layer],) = [t for n, t in named.items() if n.endswith(("correction_bias", "router.bias"))]
    return found


@pytest.mark.parametrize(
    ("name", "ids", "said"),
    [
        ("mixtral", [0, 1], "fewer than top_k"),
        ("mixtral", [2, 1, 0], "ascending"),
        ("mixtral", [0, 1, 8], "below 8"),
        ("deepseek_v3", [0, 1, 2, 4, 5, 6, 8, 9], "as many experts"),
        ("deepseek_v3", [0, 4, 8], "fewer than top_k"),
        ("dots1", [0, 4, 8, 12], "fewer than top_k"),
        ("glm4_moe", [0, 1, 6, 7], "fewer than top_k"),
    ],
)
def test_impossible_cuts_are_refused(name: str, ids: list[int], said: str):
    model = build(name)
    with pytest.raises(ValueError, match=said):
        cut_by_hand(model, {max(experts_of(model)): ids})
