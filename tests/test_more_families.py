"""Families beyond the zoo: streamed like stock, cut like stock, or refused in one sentence; dense models stream too.

The zoo of `families.py` has a hand-made reference for every family. Here one reference serves all: experts that no
token of a text selects can go without changing a single logit, as long as the router scores them one by one and
renormalises what it selects. Which ones those are is observed from stock transformers.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import families
from conftest import tiny_tokenizer
from moespresso import api
from moespresso.build import View
from moespresso.core.errors import UserError
from moespresso.core.plan import Plan, Stage, Treatment
from moespresso.core.unit import Unit
from moespresso.data import Source
from moespresso.effect import validated
from moespresso.model import quirks
from test_engine import close, streamed_logits, view_of, written

# Multi-head latent attention, and the same with an index of what to look at.
LATENT = {"q_lora_rank": 28, "kv_lora_rank": 24, "qk_nope_head_dim": 12, "qk_rope_head_dim": 8, "v_head_dim": 20,
          "num_key_value_heads": 4, "head_dim": 8}  # fmt: skip
INDEXED = LATENT | {"index_topk": 8, "index_head_dim": 16, "index_n_heads": 2}
# Eight experts under each of the names that count them; two answer a token.
ROUTED = {
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "moe_intermediate_size": 28,
    "n_group": 1,
    "topk_group": 1,
}
LINEAR = {"linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
          "layer_types": ["linear_attention", "full_attention", "linear_attention"], "moe_intermediate_size": 28,
          "shared_expert_intermediate_size": 24, "num_experts": 8, "head_dim": 16}  # fmt: skip

MIXTURES: dict[str, dict[str, Any]] = {
    "qwen3_next": LINEAR | {"norm_topk_prob": True},
    "granitemoeshared": {"num_local_experts": 8, "shared_intermediate_size": 24},
    "granitemoehybrid": {"num_local_experts": 8, "shared_intermediate_size": 24, "mamba_n_heads": 4, "mamba_d_head": 24,
                         "mamba_d_state": 6, "mamba_n_groups": 1, "mamba_chunk_size": 8,
                         "layer_types": ["mamba", "attention", "mamba"]},
    "flex_olmo": {"num_experts": 8, "norm_topk_prob": True},
    "lfm2_moe": {"num_experts": 8, "moe_intermediate_size": 28, "num_dense_layers": 1, "conv_L_cache": 3,
                 "layer_types": ["conv", "full_attention", "conv"]},
    "minimax": {"num_local_experts": 8, "head_dim": 16, "block_size": 8,
                "layer_types": ["linear_attention", "full_attention", "linear_attention"]},
    "glm4_moe_lite": LATENT | ROUTED,
    "glm_moe_dsa": INDEXED | ROUTED | {"first_k_dense_replace": 1},
    "deepseek_v32": INDEXED | ROUTED | {"first_k_dense_replace": 1},
    "exaone_moe": {"num_experts": 8, "num_shared_experts": 1, "moe_intermediate_size": 28, "sliding_window": 6},
    "nemotron_h": ROUTED | {"layers_block_type": ["linear_attention", "moe", "full_attention", "moe", "mlp"],
                            "num_hidden_layers": None, "moe_shared_expert_intermediate_size": 24, "mamba_num_heads": 4,
                            "mamba_head_dim": 12, "n_groups": 1, "ssm_state_size": 6, "chunk_size": 8, "expand": 1},
    "hy_v4": INDEXED | ROUTED | {"hc_mult": 2},
    "afmoe": {"num_experts": 8, "num_shared_experts": 1, "moe_intermediate_size": 28, "num_dense_layers": 1,
              "sliding_window": 6, "head_dim": 16},
}  # fmt: skip
OPAQUE: dict[str, tuple[dict[str, Any], str]] = {
    "deepseek_v4": ({"n_routed_experts": 8, "moe_intermediate_size": 28, "q_lora_rank": 28, "o_groups": 2,
                     "o_lora_rank": 8, "index_head_dim": 16, "index_n_heads": 2, "num_key_value_heads": 1,
                     "head_dim": 16}, "a table of expert numbers"),
    "zaya": ({"num_experts": 8, "num_experts_per_tok": 1, "moe_intermediate_size": 28, "router_hidden_size": 16,
              "head_dim": 16}, "does not follow the number of experts"),
    "gemma4_text": ({"enable_moe_block": True, "num_experts": 8, "top_k_experts": 2, "moe_intermediate_size": 28,
                     "head_dim": 16, "global_head_dim": 16, "hidden_size_per_layer_input": 0,
                     "num_kv_shared_layers": 0}, "not in a block of their own"),
    "llama4_text": ({"num_local_experts": 8, "num_experts_per_tok": 1, "intermediate_size_mlp": 40, "head_dim": 16,
                     "attention_chunk_size": 16}, "one dense product"),
}  # fmt: skip
DENSE: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "mistral": {"sliding_window": 6, "head_dim": 16},
    "gemma2": {"sliding_window": 6, "head_dim": 16},
    "gemma3_text": {"sliding_window": 6, "head_dim": 16},
    "phi3": {},
}

Written = Callable[[str, Mapping[str, Any]], Path]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Written:
    """`checkpoint(family, fields)` is the folder of a tiny random checkpoint, written when first asked for."""
    root = tmp_path_factory.mktemp("more")

    def folder(family: str, fields: Mapping[str, Any]) -> Path:
        path = root / family
        if not path.exists():
            _random_model(family, fields).save_pretrained(path)
            tiny_tokenizer().save_pretrained(path)
        return path

    return folder


def _random_model(family: str, fields: Mapping[str, Any]) -> PreTrainedModel:
    settings = {**families.COMMON, "num_attention_heads": 4, "num_experts_per_tok": 2, **fields}
    if family == "gemma4_text":
        del settings["num_experts_per_tok"]
    config = CONFIG_MAPPING[family](**{name: value for name, value in settings.items() if value is not None})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).eval()
        for tensor in [*model.parameters(), *model.buffers()]:
            if tensor.dim() > 1 and tensor.is_floating_point():
                tensor.data.normal_().mul_(1.5 * tensor.shape[-1] ** -0.5)
            elif tensor.is_floating_point() and tensor.dim():
                tensor.data.add_(0.1 * torch.randn_like(tensor))
    return model


def _unused_dropped(view: View, model: PreTrainedModel, ids: Tensor) -> Plan:
    """Drop two experts of every layer that none of `ids` selects in the stock model."""
    used: dict[int, set[int]] = {}

    def listen(layer: int) -> Callable[..., None]:
        return lambda _, args: used.setdefault(layer, set()).update(args[1].flatten().tolist())

    hooks = [
        module.register_forward_pre_hook(listen(int(re.findall(r"\.(\d+)\.", name)[0])))
        for name, module in model.named_modules()
        if re.search(r"(?<!shared_)experts$", name) and hasattr(module, "num_experts")
    ]
    families.logits_of(model, ids)
    for hook in hooks:
        hook.remove()
    assert used.keys() == {layer.index for layer in view.source.moe_layers}
    treatments = {}
    for layer, experts in used.items():
        dropped = sorted(set(range(8)) - experts)[:2]
        assert len(dropped) == 2
        kept = tuple(expert for expert in range(8) if expert not in dropped)
        treatments[Unit(layer, "experts")] = Treatment(keep=kept)
    return validated(Plan(view.source.digest, (Stage({"kind": "expert_drop"}, treatments),)), view.source)


@pytest.mark.parametrize("family", MIXTURES)
@pytest.mark.few(1)
def test_a_mixture_streams_and_is_cut_as_stock_would(
    checkpoint: Written, tmp_path: Path, family: str
) -> None:
    folder = checkpoint(family, MIXTURES[family])
    reference, view = families.reference(folder), view_of(folder)
    ids = families.random_ids(reference.config, 2, 17, 0)
    close(streamed_logits(view, ids), families.logits_of(reference, ids))
    few = ids[:1, :3]
    out = written(view, _unused_dropped(view, reference, few), tmp_path / "out")
    pressed = families.reference(out)
    close(families.logits_of(pressed, few), families.logits_of(reference, few))
    close(streamed_logits(view_of(out), ids), families.logits_of(pressed, ids))
    assert api.verify(out, against=folder)["ok"]


@pytest.mark.parametrize("family", sorted(MIXTURES.keys() - {"hy_v4"}))
@pytest.mark.parametrize("step", ["channel_prune:ratio=0.4", "sparsegpt"])
@pytest.mark.few(2)
def test_a_mixture_is_narrowed_and_pruned_for_stock(
    checkpoint: Written, family: str, step: str, text: Path, tmp_path: Path
) -> None:
    folder = checkpoint(family, MIXTURES[family])
    api.press(folder, out=tmp_path / "out", texts=[text], samples=4, length=16, steps=[step])
    found = api.verify(tmp_path / "out", against=folder)
    assert found["ok"], found


@pytest.mark.parametrize(
    "family", sorted(MIXTURES.keys() - {"granitemoeshared", "granitemoehybrid", "hy_v4"})
)
@pytest.mark.parametrize("more", [[], ["low_rank:method=shared_basis,ratio=0.1"]], ids=["", "bases"])
@pytest.mark.few(1)
def test_a_mixture_has_experts_of_any_width_that_make_up_for_others(
    checkpoint: Written, family: str, more: list[str], text: Path, tmp_path: Path
) -> None:
    folder = checkpoint(family, MIXTURES[family])
    steps = ["expert_drop:ratio=0.25", "refit", "channel_prune:ratio=0.4,per_expert=true,scope=global"]
    steps += more
    api.press(folder, out=tmp_path / "out", texts=[text], samples=4, length=16, steps=steps, target="plugin")
    found = api.verify(tmp_path / "out", against=folder)
    assert found["ok"], found


@pytest.mark.parametrize("family", ["afmoe", "nemotron_h", "hy_v4"])
@pytest.mark.parametrize("score", ["reap", "reconstruction"])
@pytest.mark.few(2)
def test_routers_of_other_shapes_are_measured(
    checkpoint: Written, text: Path, tmp_path: Path, family: str, score: str
) -> None:
    folder = checkpoint(family, MIXTURES[family])
    api.press(folder, out=tmp_path / "out", texts=[text], samples=4, length=16,
              steps=[f"expert_drop:ratio=0.25,score={score}"])  # fmt: skip
    assert api.verify(tmp_path / "out", against=folder)["ok"]


# With several hidden states a token, or experts in a latent width, how far an expert turns the residual stream is not known.
TURN_UNKNOWN = {
    "several": ("hy_v4", MIXTURES["hy_v4"]),
    "latent width": ("nemotron_h", MIXTURES["nemotron_h"] | {"moe_latent_size": 20}),
}


@pytest.mark.parametrize("reason", TURN_UNKNOWN)
def test_what_a_family_cannot_tell_is_not_made_up(
    checkpoint: Written, text: Path, tmp_path: Path, reason: str
) -> None:
    with pytest.raises(UserError, match=f"easy_ep .*{reason}: use score=reap$"):
        api.press(checkpoint(*TURN_UNKNOWN[reason]), out=tmp_path / "out", texts=[text], samples=4, length=16,
                  steps=["expert_drop:ratio=0.25,score=easy_ep"])  # fmt: skip
    assert not list((tmp_path / "out").glob("*.safetensors"))


@pytest.mark.parametrize("reason", TURN_UNKNOWN)
def test_the_default_score_is_one_that_the_model_has(
    checkpoint: Written, text: Path, tmp_path: Path, reason: str
) -> None:
    """It falls back aloud, and decides as the score does that it says."""
    folder = checkpoint(*TURN_UNKNOWN[reason])
    plans: dict[str, list[Stage]] = {}
    for name, said in {"default": "", "by name": ",score=reap"}.items():
        report = api.press(folder, out=tmp_path / name, texts=[text], samples=4, length=16,
                           steps=[f"expert_drop:ratio=0.25{said}"])  # fmt: skip
        plans[name] = list(report.plan.stages)
        aloud = [note for note in report.notes if "score=reap" in note and reason in note]
        assert len(aloud) == (name == "default")
        assert api.verify(tmp_path / name, against=folder)["ok"]
    assert plans["default"] == plans["by name"]


@pytest.mark.parametrize("family", OPAQUE)
def test_experts_that_cannot_be_cut_are_left_whole_and_all_else_is_done(
    checkpoint: Written, text: Path, tmp_path: Path, family: str
) -> None:
    fields, reason = OPAQUE[family]
    folder = checkpoint(family, fields)
    reference = families.reference(folder)
    ids = families.random_ids(reference.config, 2, 17, 0)
    close(streamed_logits(view_of(folder), ids), families.logits_of(reference, ids))
    assert any(re.search(f"left whole .*{reason}", note) for note in api.inspect(folder)["notes"])
    for step in (
        "expert_drop",
        "expert_merge:method=hc_smoe",
        "channel_prune",
        "rtn",
        "wanda",
        "low_rank",
        "refit",
    ):
        with pytest.raises(
            UserError, match=f"{reason}.*use block_drop, or a step with parts=attention"
        ) as refused:
            api.press(folder, out=tmp_path / "out", steps=[step], texts=[text], samples=4, length=16)
        assert "\n" not in str(refused.value)
    depth, attention = "block_drop:drop=1", "rtn:parts=attention,group_size=0"
    # Stock transformers does not read the one's packed attention, and the other must end with a layer of one kind.
    steps = {"deepseek_v4": [depth], "gemma4_text": [attention]}.get(family, [depth, attention])
    for number, step in enumerate(steps):
        target = "plugin" if family == "llama4_text" and step == attention else "transformers"
        api.press(
            folder,
            out=tmp_path / str(number),
            steps=[step],
            texts=[text],
            samples=4,
            length=16,
            target=target,
        )
        verified = api.verify(tmp_path / str(number), against=folder)
        assert verified["ok"], [check for check in verified["checks"] if not check["ok"]]


def test_a_plan_that_its_config_does_not_fit_is_refused_before_any_work(
    checkpoint: Written, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Should a count of experts ever be written where the family does not read it."""
    folder = checkpoint("flex_olmo", MIXTURES["flex_olmo"])
    monkeypatch.setattr("moespresso.model.unequal.with_count", lambda config, family, count: config)
    with pytest.raises(UserError, match="do not fit the model its config makes"):
        api.press(folder, out=tmp_path / "out", steps=["expert_drop:ratio=0.25,score=aimer"])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("family", DENSE)
def test_a_dense_model_streams_as_stock_and_has_nothing_to_drop(
    checkpoint: Written, text: Path, tmp_path: Path, family: str
) -> None:
    folder = checkpoint(family, DENSE[family])
    reference = families.reference(folder)
    ids = families.random_ids(reference.config, 2, 17, 0)
    close(streamed_logits(view_of(folder), ids), families.logits_of(reference, ids))
    assert api.evaluate(folder, texts=[Source(str(text))], length=16, limit=2)["perplexity"]["value"] > 1
    with pytest.raises(UserError, match="is dense"):
        api.press(folder, out=tmp_path / "out", steps=["expert_drop:ratio=0.25,score=aimer"])
    assert not (tmp_path / "out").exists()


def test_a_model_built_otherwise_is_refused_in_one_sentence(checkpoint: Written) -> None:
    with pytest.raises(UserError, match=r"decoder layers of .* are not where this version looks"):
        api.inspect(checkpoint("gpt2", {}))


@pytest.mark.parametrize(
    ("family", "cure"),
    [
        ("deepseek_v41", "choose a model of a family that it has"),
        ("kimi_vl", "computes as deepseek_v3: give a checkpoint of that alone"),
        ("minimax_m1", "ends in -hf: give that one"),
    ],
)
def test_of_an_unknown_family_is_said_what_is_known(tmp_path: Path, family: str, cure: str) -> None:
    """And no other family is suggested that only has a name like it."""
    (tmp_path / "config.json").write_text(f'{{"model_type": "{family}"}}')
    with pytest.raises(
        UserError, match=rf"model_type '{family}' is unknown to transformers 5.* {cure}$"
    ) as refused:
        api.inspect(tmp_path / "config.json")
    assert "did you mean" not in str(refused.value)


def test_what_is_said_of_unknown_families_is_of_unknown_ones() -> None:
    assert quirks.ELSEWHERE.keys().isdisjoint(CONFIG_MAPPING)
