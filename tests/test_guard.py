"""A folder of layers that differ is never taken for an ordinary model by those who do not know moespresso.

Every form is planned by hand on many families, written as a config with one tensor beside it, and shown to transformers
in a process without moespresso. What vLLM and llama.cpp's converter say is tried by `benchmarks/engine_guards.py`; here
the name that they choose their code by must be one that nobody has.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

import families
import test_more_families as more
from conftest import Zoo, write_model
from moespresso.build import View, open_view
from moespresso.core.errors import UserError
from moespresso.core.plan import Plan, Stage, Treatment
from moespresso.core.unit import Unit
from moespresso.model import is_unequal
from moespresso.runtime.unequal import install

install()

Treatments = dict[Unit, Treatment]

# Names for experts, heads and widths that are as different as they come; hybrids; one dense model.
SOME = ["qwen2_moe", "deepseek_v3", "gpt_oss", "llama"]
OTHERS = ["mixtral", "qwen3_moe", "granitemoe", "jamba", "ernie4_5_moe", "nemotron_h", "lfm2_moe", "minimax"]


def forms(view: View, layers: list[int]) -> Iterator[tuple[str, Treatments]]:
    """Every way in which `layers`, all mixtures, may become unlike others, each alone."""
    specs = {layer.index: layer for layer in view.source.layers}
    whole = [specs[index].experts for index in layers]
    fewer = [tuple(range(count - specs[index].groups)) for index, count in zip(layers, whole, strict=True)]
    experts = [Unit(index, "experts") for index in layers]
    widths = [specs[index].width for index in layers]
    for repair in ("skip",) if view.source.indivisible else ("skip", "novice"):
        yield (
            repair,
            {unit: Treatment(keep=kept, repair=repair) for unit, kept in zip(experts, fewer, strict=True)},
        )
    yield "ragged", {Unit(index, "experts", expert): Treatment(channels=width if expert else 8)
                     for index, width, count in zip(layers, widths, whole, strict=True) for expert in range(count)}  # fmt: skip
    yield "ragged and narrower", {Unit(index, "experts", expert): Treatment(channels=16 if expert else 8)
                                  for index, count in zip(layers, whole, strict=True) for expert in range(count)}  # fmt: skip
    if len(layers) < len(view.source.moe_layers):
        yield "width", {unit: Treatment(channels=8) for unit in experts}
        yield "count", {unit: Treatment(keep=kept) for unit, kept in zip(experts, fewer, strict=True)}
    if not view.source.indivisible:
        yield "mlp", {unit: Treatment(drop=True) for unit in experts}


def branches(view: View) -> Iterator[tuple[str, Treatments]]:
    """Every branch that a layer may lack, and all of a kind."""
    if view.source.indivisible:
        return
    for kind, part in (("attention", "attention"), ("mlp", "dense"), ("mlp", "experts")):
        units = [unit for layer in view.source.layers if kind in layer.bodies
                 for unit in [layer.unit(kind)] if unit.part == part]  # fmt: skip
        for name, some in (("one", units[:1]), ("every", units)):
            if some:
                yield f"{name} {part}", {unit: Treatment(drop=True) for unit in some}


def planned(view: View) -> Iterator[tuple[str, dict[str, Any]]]:
    """The config of every form that there is for a model, but for those that its family has a stock config for."""
    mixtures = [layer.index for layer in view.source.moe_layers]
    kinds = [("first", mixtures[:1]), ("last", mixtures[-1:]), ("every", mixtures)] if mixtures else []
    for words, layers in kinds:
        for name, treatments in forms(view, layers):
            yield f"{words} {name}", treatments_config(view, treatments)
    for name, treatments in branches(view):
        yield name, treatments_config(view, treatments)


def treatments_config(view: View, treatments: Treatments) -> dict[str, Any]:
    narrow = any(treatment.channels for treatment in treatments.values())
    method = {"kind": "channel_prune", "width": 8} if narrow else {"kind": "expert_drop"}
    plan = Plan(view.source.digest, (Stage(method, treatments),))
    return replace(view, plan=plan, stock=False).config


def folder_of(family: str, root: Path) -> Path:
    if family in families.FAMILIES:
        return write_model(family, root / family)
    settings = {**more.MIXTURES, **more.DENSE}[family]
    more._random_model(family, settings).save_pretrained(root / family)
    return root / family


@pytest.fixture(
    scope="module", params=[SOME, pytest.param(OTHERS, marks=pytest.mark.breadth)], ids=["some", "others"]
)
def guarded(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, Any]]:
    """Folder of every form of some families, with its config."""
    root, found = tmp_path_factory.mktemp("guard"), dict[str, dict[str, Any]]()
    for family in request.param:
        view = open_view(folder_of(family, root))
        for name, config in planned(view):
            if not is_unequal(config):
                continue
            out = root / f"{family}, {name}"
            out.mkdir()
            (out / "config.json").write_text(json.dumps(config))
            save_file({"nothing": torch.zeros(1)}, out / "model.safetensors", {"format": "pt"})
            found[str(out)] = config
    return found


def test_every_form_is_there(guarded: dict[str, dict[str, Any]]):
    names = {Path(folder).name.split(", ")[1] for folder in guarded}
    assert {"first skip", "every novice", "every ragged", "last ragged and narrower", "first width", "last count",
            "every mlp", "one attention", "every attention", "one dense"} <= names  # fmt: skip
    assert len(guarded) > 70


CODE = """
import json, sys, transformers
transformers.logging.set_verbosity_error()
for folder, name in json.load(sys.stdin):
    transformers.AutoConfig.from_pretrained(folder)
    for kind in ("AutoModelForCausalLM", "AutoModel", name):
        for mend in (False, True):
            try:
                getattr(transformers, kind).from_pretrained(folder, ignore_mismatched_sizes=mend)
                print(folder, kind, "loaded")
            except Exception as error:
                if type(error).__name__ != "AmbiguousGlobalPerLayerAttributeError":
                    print(folder, kind, type(error).__name__, str(error)[:200])
print(any(name.startswith("moespresso") for name in sys.modules))
"""


@pytest.mark.breadth
def test_transformers_without_moespresso_stops_whatever_it_loads_with(guarded: dict[str, dict[str, Any]]):
    asked = [
        (folder, config["architectures"][0].removeprefix("Moespresso")) for folder, config in guarded.items()
    ]
    said = subprocess.run([sys.executable, "-c", CODE], input=json.dumps(asked), capture_output=True, text=True, check=False)  # fmt: skip
    assert not said.returncode, said.stderr[-2000:]
    assert said.stdout.splitlines() == ["False"]


def test_no_engine_has_code_by_the_name(guarded: dict[str, dict[str, Any]]):
    for config in guarded.values():
        for part in (config, config.get("text_config", {})):
            assert not any(hasattr(transformers, name) for name in part.get("architectures", ()))
        assert config["architectures"]


def test_a_model_without_a_name_gets_one(zoo: Zoo, tmp_path: Path):
    view = open_view(write_model("mixtral", tmp_path / "bare"))
    raw = {key: value for key, value in view.checkpoint.config.items() if key != "architectures"}
    (tmp_path / "bare" / "config.json").write_text(json.dumps(raw))
    view = open_view(tmp_path / "bare")
    config = treatments_config(view, {Unit(0, "attention"): Treatment(drop=True)})
    assert config["architectures"] == ["MoespressoMixtralForCausalLM"]
    assert "architectures" not in view.config


# Where moespresso is imported


def different(family: str, own: dict[str, Any], folder: Path) -> Path:
    """A folder whose second layer says `own`."""
    config = families.FAMILIES[family].config(per_layer_config={"1": own})
    families.instantiate(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    "own", [{"num_local_experts": 6}, {"skip": ["attention"], "num_key_value_heads": 0},
            {"skip": ["expert.1+novice"], "num_local_experts": 0}]
)  # fmt: skip
def test_the_name_is_stock_in_memory_and_guarded_in_every_file(own: dict[str, Any], tmp_path: Path):
    folder = different("mixtral", own, tmp_path / "0")
    for number in (1, 2):
        model: Any = AutoModelForCausalLM.from_pretrained(folder)
        assert AutoConfig.from_pretrained(folder).architectures == ["MixtralForCausalLM"]
        assert model.config.architectures == ["MixtralForCausalLM"]
        folder = tmp_path / str(number)
        model.save_pretrained(folder)
        written = json.loads((folder / "config.json").read_text())
        assert written["architectures"] == ["MoespressoMixtralForCausalLM"]
        assert written["per_layer_config"] == {"1": own}
    assert model.config.to_dict()["architectures"] == ["MoespressoMixtralForCausalLM"]
    assert json.loads(model.config.to_json_string())["architectures"] == ["MoespressoMixtralForCausalLM"]


def test_other_heads_of_a_model_are_guarded_too(tmp_path: Path):
    folder = different("mixtral", {"skip": ["mlp"], "num_local_experts": 0}, tmp_path / "0")
    model: Any = transformers.MixtralForSequenceClassification.from_pretrained(folder)
    model.save_pretrained(tmp_path / "1")
    written = json.loads((tmp_path / "1" / "config.json").read_text())
    assert written["architectures"] == ["MoespressoMixtralForSequenceClassification"]


def test_ordinary_models_and_those_that_know_the_key_keep_their_names(tmp_path: Path):
    model = families.build("mixtral")
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["MixtralForCausalLM"]
    fields, _ = more.OPAQUE["gemma4_text"]
    settings = families.COMMON | fields | {"global_head_dim": 32, "num_attention_heads": 4}
    known: Any = more.CONFIG_MAPPING["gemma4_text"](**settings, architectures=["Gemma4ForCausalLM"])
    known.per_layer_config = {0: {"head_dim": 8, "num_experts": 4}}
    assert known.to_dict()["architectures"] == ["Gemma4ForCausalLM"]


def test_words_that_are_not_ours_are_written_as_they_are():
    config: Any = families.FAMILIES["mixtral"].config(architectures=["MixtralForCausalLM"])
    config.per_layer_config = {0: {"skip": ["somebody.elses"]}}
    assert config.to_dict()["architectures"] == ["MixtralForCausalLM"]


def test_a_zero_that_guards_nothing_is_still_refused():
    config = families.FAMILIES["mixtral"].config(per_layer_config={"1": {"num_local_experts": 0}})
    with pytest.raises((UserError, ZeroDivisionError, RuntimeError)):
        families.instantiate(config)


def test_what_is_even_again_has_its_old_name(zoo: Zoo):
    view = open_view(zoo("mixtral"))
    uneven = treatments_config(view, {Unit(0, "attention"): Treatment(drop=True)})
    checkpoint = replace(view.checkpoint, config=uneven)
    again = replace(view, checkpoint=checkpoint).config
    assert again == uneven
    even = treatments_config(replace(view, checkpoint=checkpoint), {Unit(0): Treatment(drop=True)})
    assert even["architectures"] == view.config["architectures"]
    assert not is_unequal(even)
