"""The census of families finds every mixture, makes it as a checkpoint that loads, and sees the faults that it is there to see."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path[:0] = [str(BENCHMARKS), str(BENCHMARKS / "rivals")]

import stock_transformers as stock  # noqa: E402
import tables  # noqa: E402
import zoo  # noqa: E402

# By its path, since the tests' own zoo has the same name.
_spec = importlib.util.spec_from_file_location("benchmark_families", BENCHMARKS / "families.py")
assert _spec is not None
assert _spec.loader is not None
families = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(families)
MODELS = Path(transformers.__file__).parent / "models"


def home(config: type) -> str:
    """The folder of a family's code."""
    return config.__module__.split(".")[2]


def test_every_folder_of_the_library_with_decorated_experts_is_found():
    decorated = {
        path.parent.name
        for path in MODELS.glob("*/modeling_*.py")
        if "@use_experts_implementation" in path.read_text()
    }
    headed = {home(CONFIG_MAPPING[family]) for family in CONFIG_MAPPING if zoo.head_of(family)}
    here = {home(CONFIG_MAPPING[name]) for name in zoo.found() if name in CONFIG_MAPPING}
    inside = {home(type(part)) for name in zoo.found() for part in parts(zoo.config_of(name))}
    assert len(decorated) > 40
    assert (decorated & headed) - (here | inside) == set()


def parts(config: transformers.PreTrainedConfig) -> list[transformers.PreTrainedConfig]:
    """A config and those inside it."""
    inside = [getattr(config, key, None) for key in config.sub_configs]
    return [
        config,
        *(part for each in inside if isinstance(each, transformers.PreTrainedConfig) for part in parts(each)),
    ]


def test_tables_name_what_is_there():
    models = {
        part.model_type or type(part).__name__ for name in zoo.found() for part in parts(zoo.config_of(name))
    }
    names = {type(part).__name__ for name in zoo.found() for part in parts(zoo.config_of(name))}
    assert set(zoo.FIELDS) - models - names == set()
    assert {name.partition("@")[0] for name in zoo.LAYOUTS} <= set(zoo.found())


@pytest.mark.few(3)
@pytest.mark.parametrize("name", zoo.found())
def test_a_family_is_tiny_and_has_experts(name: str):
    config = zoo.config_of(name)
    with torch.device("meta"):
        model = getattr(transformers, zoo.head_of(config.model_type) or "")._from_config(config)
    assert 50_000 < sum(weight.numel() for weight in model.parameters()) < 4_000_000
    assert any("experts" in key or "router" in key or ".down_embed" in key for key in model.state_dict())


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of the census."""
    folder = tmp_path_factory.mktemp("census") / "model"
    assert zoo.write("qwen3_moe", folder) == "Qwen3MoeForCausalLM"
    return folder


def test_a_checkpoint_lies_in_files_with_a_tokenizer(small: Path):
    assert len(list(small.glob("*.safetensors"))) > 1
    assert {"config.json", "tokenizer.json", "chat_template.jinja"} <= {path.name for path in small.iterdir()}
    assert {tensor.dtype for tensor in stock.read(small).values()} == {torch.bfloat16}


def damaged(small: Path, out: Path, name: str, change: bool) -> Path:
    """A copy in which a tensor is gone, or changed."""
    shutil.copytree(small, out)
    for path in out.glob("*.safetensors"):
        held = load_file(path)
        if name in held:
            tensor = held.pop(name)
            save_file(held | ({name: tensor + 1} if change else {}), path, metadata={"format": "pt"})
    return out


@pytest.mark.parametrize(("name", "change", "words"), [
    ("model.norm.weight", True, "1 tensors outside the language model are not the original's (model.norm.weight)"),
    ("lm_head.weight", False, "1 missing keys (lm_head.weight)"),
    ("model.layers.2.mlp.gate.weight", False, "1 missing keys (model.layers.2.mlp.gate.weight)"),
])  # fmt: skip
def test_a_fault_is_seen(small: Path, tmp_path: Path, name: str, change: bool, words: str):
    before = stock.read(small)
    out = damaged(small, tmp_path / "out", name, change)
    if not change:
        index = json.loads((out / "model.safetensors.index.json").read_text())
        del index["weight_map"][name]
        (out / "model.safetensors.index.json").write_text(json.dumps(index))
    assert words in stock.faults(small, out, before, [])
    assert stock.faults(small, small, before, []) == []


def test_what_is_numbered_inside_the_language_model_may_change():
    names = "llm.layers.0.experts.0.down", "llm.residual.queries.1", "llm.norm", "llm.vision.1.w", "mtp.fc"
    before = {name: torch.zeros(2) for name in names}
    assert stock.outside(before, {}) == ["llm.norm", "llm.vision.1.w"]


def layer(prefix: str, experts: int, width: int) -> dict[str, torch.Tensor]:
    """The experts of a layer, apart."""
    return {f"{prefix}mlp.experts.{each}.down_proj.weight": torch.zeros(64, width) for each in range(experts)}


@pytest.mark.parametrize("ahead", ["mtp.layers.0.", "model.layers.2."])
@pytest.mark.parametrize("fused", [False, True])
def test_prediction_layers_that_stay_behind_are_seen(tmp_path: Path, ahead: str, fused: bool):
    (tmp_path / "config.json").write_text(json.dumps({"num_hidden_layers": 2}))

    def whole(experts: int, width: int, behind: tuple[int, int]) -> dict[str, torch.Tensor]:
        stacks = {
            f"model.layers.{each}.mlp.experts.down_proj": torch.zeros(experts, 64, width) for each in range(2)
        }
        apart = {
            key: t for each in range(2) for key, t in layer(f"model.layers.{each}.", experts, width).items()
        }
        return (stacks if fused else apart) | layer(ahead, *behind)

    before = whole(8, 64, (8, 64))
    assert stock.behind(tmp_path, tmp_path, before, whole(6, 64, (6, 64))) == []
    for cut in ((6, 64), (8, 48)):
        [words] = stock.behind(tmp_path, tmp_path, before, whole(*cut, (8, 64)))
        assert f"{(8, 64)}" in words
        assert f"{cut}" in words


@pytest.mark.parametrize(
    ("ignore", "seen"),
    [(["re:mtp.*"], False), (["mtp.layers.0.mlp.experts.0.down_proj"], False), (["lm_head"], True)],
)
def test_plain_experts_that_are_taken_for_packed_are_seen(tmp_path: Path, ignore: list[str], seen: bool):
    config = {"num_hidden_layers": 2, "quantization_config": {"ignore": ignore}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert bool(stock.unnamed(tmp_path, layer("mtp.layers.0.", 1, 64))) == seen


@pytest.mark.parametrize(("one", "other"), [
    ("MODEL: model_type 'a' wraps a language model (b) with", "MODEL: model_type 'c' wraps a language model (d) with"),
    ("gptq: MODEL (gpt_oss) has (model.layers.0.mlp.experts.down_proj)", "gptq: MODEL (aria_text) has (language_model.layers.1.mlp.experts.fc2.weight)"),
])  # fmt: skip
def test_families_share_a_sentence(one: str, other: str):
    assert tables.general(one) == tables.general(other)


def test_a_table_counts_and_numbers():
    fine, refused = dict.fromkeys(("inspect", "gptq"), "ok"), {"inspect": "no <b>", "gptq": ""}
    rows = {"a": {"class": "A", "steps": fine}, "b@hub": {"class": "B", "steps": refused}}
    steps = ("inspect", "gptq")
    assert tables.families(rows, steps).splitlines()[2:] == [
        "| `a` | A | ok | ok |",
        "| `b@hub` | B | [1] | - |",
        "",
        r"1. no \<b\>",
    ]
    assert tables.counted(rows, steps).splitlines()[-1] == "| all | 2 | 1 | 1 | 1 |"


@pytest.mark.breadth
@pytest.mark.parametrize(("name", "refused"), [("qwen3_moe", set()), ("gpt_oss", {"gptq", "channel_prune"})])
def test_a_family_goes_through_the_census(tmp_path: Path, name: str, refused: set[str]):
    families.text_for(tmp_path)
    row = families.row_of(name, tmp_path)
    assert {step for step, words in row["steps"].items() if words != families.OK} == refused
    assert not any("crashed" in words or str(tmp_path) in words for words in row["steps"].values())
    kept = tmp_path / "found" / f"{name}.json"
    kept.write_text(json.dumps(row | {"class": "as kept"}))
    assert families.row_of(name, tmp_path)["class"] == "as kept"
