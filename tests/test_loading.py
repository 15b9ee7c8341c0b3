"""Every folder is a model like any other: it loads in the dtype that is asked for, trains, casts, and saves as a plain checkpoint."""

import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors.model_compressors import model_compressor
from compressed_tensors.quantization import QuantizationArgs
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    CompressedTensorsConfig,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

import families
import moespresso
from conftest import tiny_tokenizer, write_model, write_wide
from families import expert_on_disk
from moespresso import api
from moespresso.build import Tensors, open_view, pick_dtype
from moespresso.core.errors import UserError
from moespresso.runtime import saving
from test_equivalent import TINY, write_deepseek

IDS = torch.randint(3, 96, (2, 24), generator=torch.Generator().manual_seed(0))

# One folder of each form that we write: the steps, and the layout it is exported to ("" : none).
FORMS: Mapping[str, tuple[tuple[str, ...], str]] = {
    "plain": (("expert_drop:keep=6,score=aimer",), ""),
    "narrower": (("channel_prune:ratio=0.25,score=magnitude,refit=none",), ""),
    "uneven": (("expert_drop:ratio=0.25,scope=global,score=aimer",), ""),
    "without attention": (("layer_drop:part=attention,drop=1,score=cosine",), ""),
    "4 bits": (("gptq:group_size=32",), ""),
    "3 bits": (("rtn:bits=3,group_size=32",), ""),
    "a scale a channel": (("rtn:group_size=0",), ""),
    "zeros of their own": (("hqq:group_size=32,symmetric=false",), ""),
    "bits by layer": (("rtn:layers=0:8,group_size=32",), ""),
    "attention": (("rtn:group_size=32,parts=attention",), ""),
    "experts and attention": (("rtn:group_size=32,parts=experts+attention",), ""),
    "uneven, 4 bits": (("expert_drop:ratio=0.25,scope=global,score=aimer", "rtn:group_size=32"), ""),
    "mask": (("wanda:sparsity=0.5,pack=true",), ""),
    "factors": (("low_rank:ratio=0.3",), ""),
    "bases": (("low_rank:method=shared_basis,ratio=0.25",), ""),
    "rows": (("attention_rank:ratio=0.25",), ""),
    "gptq layout": (("rtn:group_size=32",), "gptq"),
    "awq layout": (("rtn:group_size=32",), "awq"),
}
# Forms that transformers alone reads, and unpacks.
STOCK = ["4 bits", "3 bits", "a scale a channel", "experts and attention", "uneven, 4 bits"]
PACKED = [form for form in FORMS if form not in ("plain", "narrower", "uneven", "without attention")]


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Mixtral in bfloat16, with a generation config that no model has by itself."""
    folder = tmp_path_factory.mktemp("half") / "model"
    model = families.build("mixtral", hidden_size=64, intermediate_size=96).to(torch.bfloat16)
    model.generation_config = GenerationConfig(max_new_tokens=7, do_sample=True, top_k=11)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def form(half: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`form(name)` is a folder of that form, written when first asked for."""
    root = tmp_path_factory.mktemp("forms")

    def folder(name: str) -> Path:
        steps, layout = FORMS[name]
        out = root / name.replace(" ", "-")
        if not out.exists():
            pressed = out.with_suffix(".packed") if layout else out
            target = "transformers" if name in STOCK[:4] or layout else "plugin"
            api.press(half, out=pressed, steps=list(steps), target=target, texts=[text], samples=4, length=24)
            if layout:
                api.export(pressed, to=layout, out=out)
        return out

    return folder


def decoded(folder: Path) -> dict[str, Tensor]:
    """What every matrix of a folder is, by its name in a plain checkpoint."""
    view = open_view(folder)
    with Tensors(folder) as reader:
        return {piece.name: reader.whole(piece).clone() for piece in view.pieces}


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(IDS).logits.float()


def reloaded(folder: Path) -> Any:
    """What transformers makes of a folder with no word on dtypes, every key used and none missing."""
    loaded: Any = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    model, info = loaded
    assert not any(info.values()), info
    return model


def size_of(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def check_saved(model: PreTrainedModel, folder: Path) -> None:
    """A saved model is a plain checkpoint in its own dtype: no section, no byte more than its weights, the same logits."""
    config = json.loads((folder / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["dtype"] == str(model.dtype).removeprefix("torch.")
    again = reloaded(folder)
    assert again.dtype == model.dtype
    assert torch.equal(logits(again), logits(model))
    bytes_held = sum(p.numel() * p.element_size() for p in model.parameters())
    assert size_of(folder) < 1.02 * bytes_held + 20_000
    assert not {name for name in load_file(folder / "model.safetensors") if "weight_" in name}


@pytest.mark.parametrize("dtype", ["auto", "float32"])
@pytest.mark.parametrize("name", FORMS)
@pytest.mark.few(3)
def test_what_is_loaded_is_saved_as_a_plain_checkpoint(
    name: str, dtype: str, form: Callable[[str], Path], tmp_path: Path
):
    folder = form(name)
    model = moespresso.load(folder, dtype=dtype)
    wanted = torch.float16 if "layout" in name else torch.bfloat16
    assert model.dtype == (wanted if dtype == "auto" else torch.float32)
    model.save_pretrained(tmp_path)
    check_saved(model, tmp_path)
    # Names and values are those of the folder, decoded.
    truth, saved = decoded(folder), load_file(tmp_path / "model.safetensors")
    assert truth.keys() == saved.keys()
    for key, value in truth.items():
        assert torch.equal(saved[key], value.to(model.dtype)), key
    assert model.generation_config.max_new_tokens == 7
    assert model.generation_config.top_k == 11
    assert model.config.name_or_path == model.name_or_path == str(folder)


@pytest.mark.parametrize("name", ["plain", "4 bits", "attention", "mask", "rows", "gptq layout"])
@pytest.mark.few(2)
def test_what_is_loaded_can_be_trained_cast_and_moved(name: str, form: Callable[[str], Path], tmp_path: Path):
    model = moespresso.load(form(name), dtype=torch.float32, device="auto").to("cpu")
    assert all(parameter.requires_grad for parameter in model.parameters())
    before = {key: value.clone() for key, value in model.state_dict().items()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model.train()(IDS, labels=IDS).loss.backward()
    optimizer.step()
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert changed == before.keys() - {key for key in before if key.endswith("rotary_emb.inv_freq")}
    model.eval().save_pretrained(tmp_path)
    check_saved(model, tmp_path)
    assert {each.dtype for each in model.to(torch.bfloat16).parameters()} == {torch.bfloat16}
    assert {each.dtype for each in model.float().parameters()} == {torch.float32}


class Lora(nn.Module):
    """A product of two thin matrices beside a linear layer, in the way that adapters are."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Parameter(torch.randn(4, base.in_features).to(base.weight) * 0.1)
        self.up = nn.Parameter(torch.zeros(base.out_features, 4).to(base.weight))

    def forward(self, hidden: Tensor) -> Tensor:
        return self.base(hidden) + hidden @ self.down.T @ self.up.T

    def merged(self) -> nn.Linear:
        with torch.no_grad():
            self.base.weight += self.up @ self.down
        return self.base


class StackedLora(nn.Module):
    """The same beside a stack of experts, as a parametrization of it."""

    def __init__(self, stack: Tensor) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.randn(len(stack), 4, stack.shape[2]).to(stack) * 0.1)
        self.up = nn.Parameter(torch.zeros(len(stack), stack.shape[1], 4).to(stack))

    def forward(self, stack: Tensor) -> Tensor:
        return stack + self.up @ self.down


def adapt(model: Any) -> None:
    """Train adapters on attention and experts for two steps, and merge them."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for layer in model.model.layers:
        layer.self_attn.q_proj = Lora(layer.self_attn.q_proj)
        experts = layer.mlp.experts
        nn.utils.parametrize.register_parametrization(experts, "down_proj", StackedLora(experts.down_proj))
    optimizer = torch.optim.SGD([each for each in model.parameters() if each.requires_grad], lr=1.0)
    for _ in range(2):
        optimizer.zero_grad()
        model(IDS, labels=IDS).loss.backward()
        optimizer.step()
    for layer in model.model.layers:
        layer.self_attn.q_proj = layer.self_attn.q_proj.merged()
        nn.utils.parametrize.remove_parametrizations(layer.mlp.experts, "down_proj")


@pytest.mark.parametrize("name", ["experts and attention", "zeros of their own", "factors", "gptq layout"])
@pytest.mark.few(2)
def test_adapters_are_trained_merged_and_saved(name: str, form: Callable[[str], Path], tmp_path: Path):
    model = moespresso.load(form(name), dtype="float32")
    before = logits(model)
    adapt(model)
    assert float((logits(model) - before).abs().max()) > 1e-3
    model.save_pretrained(tmp_path)
    check_saved(model, tmp_path)


def test_dtypes_that_stay_wide_do(tmp_path: Path):
    """Some parameters are float32 whatever the rest is."""
    source = write_wide(tmp_path / "ernie", "ernie4_5_moe", moe_intermediate_size=64)
    api.press(source, out=tmp_path / "packed", steps=["rtn:group_size=32"])
    for dtype in ("bfloat16", "float16"):
        model, stock = moespresso.load(tmp_path / "packed", dtype=dtype), moespresso.load(source, dtype=dtype)
        kinds = {name: tensor.dtype for name, tensor in stock.state_dict().items()}
        assert {name: tensor.dtype for name, tensor in model.state_dict().items()} == kinds
        assert len(set(kinds.values())) == 2
        assert set(kinds.values()) == {torch.float32, getattr(torch, dtype)}
        model.save_pretrained(tmp_path / dtype)
        check_saved(model, tmp_path / dtype)


def test_the_dtype_of_a_config_that_says_none_is_that_of_its_files(
    form: Callable[[str], Path], tmp_path: Path
):
    for name in ("plain", "zeros of their own"):
        folder = tmp_path / name
        folder.mkdir()
        for file in form(name).iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
        config = json.loads((folder / "config.json").read_text())
        del config["dtype"]
        (folder / "config.json").write_text(json.dumps(config))
        assert moespresso.load(folder).dtype == torch.bfloat16


def test_experts_of_different_widths_load_in_any_dtype(half: Path, text: Path, tmp_path: Path):
    api.press(half, out=tmp_path / "ragged", texts=[text], samples=4, length=24, target="plugin",
              steps=["channel_prune:per_expert=true,ratio=0.25", "rtn:group_size=8"])  # fmt: skip
    found = {dtype: moespresso.load(tmp_path / "ragged", dtype=dtype) for dtype in ("auto", "float32")}
    assert {dtype: model.dtype for dtype, model in found.items()} == {
        "auto": torch.bfloat16,
        "float32": torch.float32,
    }
    first, second = (model.state_dict() for model in found.values())
    assert all(torch.equal(first[name], tensor.to(first[name].dtype)) for name, tensor in second.items())


def test_a_family_that_transformers_lacks_loads(tmp_path: Path):
    write_deepseek(tmp_path / "model", TINY, torch.bfloat16)
    model = moespresso.load(tmp_path / "model")  # its config says so, whatever its files hold
    assert (model.config.model_type, model.dtype) == ("qwen2_moe", torch.float32)
    model.save_pretrained(tmp_path / "saved")
    check_saved(model, tmp_path / "saved")


def test_an_original_loads_as_transformers_loads_it(tmp_path: Path):
    folder = write_model("qwen3_moe", tmp_path / "model")
    mine, stock = moespresso.load(folder, dtype=torch.float16), AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float16)  # fmt: skip
    assert all(torch.equal(mine.state_dict()[name], tensor) for name, tensor in stock.state_dict().items())
    assert moespresso.load(folder, dtype="torch.float32").dtype == torch.float32


def edited(source: Path, folder: Path, **changes: Any) -> Path:
    """A copy with another config.json; what is None goes."""
    shutil.copytree(source, folder)
    config = json.loads((folder / "config.json").read_text()) | changes
    kept = {key: value for key, value in config.items() if value is not None or key not in changes}
    (folder / "config.json").write_text(json.dumps(kept))
    return folder


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("family", families.FAMILIES)
@pytest.mark.few(1)
def test_the_dtype_that_no_config_names_is_the_one_stock_takes(family: str, shards: int, tmp_path: Path):
    """Its files begin with floats of another dtype: order in a file is by size, and stock goes by name."""
    written = write_model(family, tmp_path / "written", shards=shards)
    folder = edited(written, tmp_path / "model", dtype=None)
    stock = AutoModelForCausalLM.from_pretrained(folder)
    assert stock.dtype == torch.bfloat16
    assert moespresso.load(folder).dtype == stock.dtype
    view = open_view(folder)
    assert pick_dtype("auto", view, torch.device("cuda")) == stock.dtype
    assert pick_dtype("auto", view, torch.device("cpu")) == torch.float32
    if family not in ("mixtral", "jamba", "granitemoe", "deepseek_v3"):
        return
    packed, parts = tmp_path / "packed", "attention" if family == "granitemoe" else "experts"
    api.press(folder, out=packed, steps=[f"rtn:group_size=0,parts={parts}"], target="plugin")
    assert "dtype" not in json.loads((packed / "config.json").read_text())
    assert moespresso.load(packed).dtype == stock.dtype


def test_an_index_can_name_the_dtype(tmp_path: Path):
    folder = edited(write_model("mixtral", tmp_path / "written"), tmp_path / "model", dtype=None)
    index = folder / "model.safetensors.index.json"
    said = json.loads(index.read_text())
    for name, wanted in (("float16", torch.float16), ("float", torch.float32)):
        index.write_text(json.dumps(said | {"metadata": {"dtype": name}}))
        assert AutoModelForCausalLM.from_pretrained(folder).dtype == wanted
        assert moespresso.load(folder).dtype == wanted
    for name in ("int8", "nonsense"):
        index.write_text(json.dumps(said | {"metadata": {"dtype": name}}))
        with pytest.raises(UserError, match=f"config.json names no dtype, and that of its files is {name}"):
            moespresso.load(folder)
        assert moespresso.load(folder, dtype="bfloat16").dtype == torch.bfloat16


@pytest.mark.parametrize("said", [{"dtype": "half"}, {"dtype": None, "torch_dtype": "half"}])
@pytest.mark.few(1)
def test_dtypes_have_torchs_own_names(
    said: dict[str, Any], half: Path, form: Callable[[str], Path], tmp_path: Path
):
    for number, source in enumerate((half, form("4 bits"))):
        folder = edited(source, tmp_path / str(number), **said)
        assert AutoModelForCausalLM.from_pretrained(folder).dtype == torch.float16
        assert moespresso.load(folder).dtype == torch.float16
        assert moespresso.load(folder, dtype="float").dtype == torch.float32
    assert moespresso.load(half, dtype="half").dtype == torch.float16
    shutil.copy(tmp_path / "0" / "config.json", tmp_path / "config.json")
    for place in (tmp_path / "config.json", half):  # it is priced in that, too
        assert api.inspect(place)["bytes"]["total"] == api.inspect(half)["bytes"]["total"]


@pytest.mark.parametrize("name", ["double", "float64", "int8", "float8_e4m3fn"])
def test_a_dtype_of_the_config_that_cannot_be_used_is_named(
    name: str, half: Path, form: Callable[[str], Path], tmp_path: Path
):
    for number, source in enumerate((half, form("zeros of their own"))):
        folder = edited(source, tmp_path / str(number), dtype=name)
        known = str(getattr(torch, name)).removeprefix("torch.")
        with pytest.raises(UserError, match=f"config.json names dtype '{known}', which no model is computed in: write bfloat16") as told:  # fmt: skip
            moespresso.load(folder)
        assert "\n" not in str(told.value)
        assert moespresso.load(folder, dtype="bfloat16").dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["bf16", "torch.bfloat16", "sum", "", 5])
def test_a_dtype_that_torch_lacks_is_named(name: Any, half: Path, tmp_path: Path):
    folder = edited(half, tmp_path / "model", dtype=name)
    words = re.escape(f"{folder}/config.json names dtype {name!r}, which torch does not have: write bfloat16")
    for verb in (moespresso.load, api.inspect):
        with pytest.raises(UserError, match=words):
            verb(folder)


@pytest.mark.parametrize("kept", [{}, {"metadata": None}, {"metadata": []}])
def test_an_index_that_says_nothing_of_the_shards_loads(kept: dict[str, Any], half: Path, tmp_path: Path):
    truth, folder = AutoModelForCausalLM.from_pretrained(half), tmp_path / "model"
    truth.save_pretrained(folder, max_shard_size="100KB")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": json.loads(index.read_text())["weight_map"]} | kept))
    model = moespresso.load(folder)
    assert model.dtype == truth.dtype
    assert torch.equal(logits(model), logits(truth))
    model.save_pretrained(tmp_path / "saved")
    check_saved(model, tmp_path / "saved")


@pytest.mark.parametrize("section", [{}, [], False, "", 0])
@pytest.mark.few(2)
def test_an_empty_section_is_none(section: Any, half: Path, tmp_path: Path):
    model = moespresso.load(edited(half, tmp_path / "model", quantization_config=section))
    assert torch.equal(logits(model), logits(moespresso.load(half)))
    model.save_pretrained(tmp_path / "saved")
    check_saved(model, tmp_path / "saved")


@pytest.mark.parametrize("body", ["", "{", "no JSON", "[]", None])
@pytest.mark.parametrize("name", ["plain", "zeros of their own"])
def test_a_broken_generation_config_is_as_for_transformers(
    name: str, body: str | None, form: Callable[[str], Path], tmp_path: Path
):
    folder = edited(form(name), tmp_path / "model", eos_token_id=[2, 5])
    file = folder / "generation_config.json"
    file.unlink() if body is None else file.write_text(body)
    if body == "[]":
        with pytest.raises(
            UserError, match=f"{folder} cannot be loaded by transformers .*: mend what that names"
        ):
            moespresso.load(folder)
        return
    model = moespresso.load(folder)
    found = model.generation_config
    assert (found.max_new_tokens, found.eos_token_id) == (None, [2, 5])
    if name == "plain":
        assert found.to_dict() == reloaded(folder).generation_config.to_dict()


@pytest.mark.parametrize("name", ["plain", "zeros of their own"])
@pytest.mark.parametrize(
    "error", [ValueError("it is wrong.\nAnd more"), KeyError("metadata"), RuntimeError()]
)
def test_what_transformers_raises_is_one_sentence(
    error: Exception, name: str, form: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
):
    def fails(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(PreTrainedModel, "_load_pretrained_model", fails)
    with pytest.raises(UserError, match=r"cannot be loaded by transformers \(.+\): mend") as told:
        moespresso.load(form(name))
    assert "\n" not in str(told.value)
    assert (str(error).splitlines() or ["RuntimeError"])[0].rstrip(".") in str(told.value)


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"dtype": "bf16"}, r"dtype 'bf16' is none that a model computes in \(did you mean 'bfloat16'\?\)"),
        ({"dtype": "int8"}, "dtype 'int8' is none that a model computes in"),
        ({"dtype": torch.float8_e4m3fn}, "dtype 'float8_e4m3fn' is none"),
        ({"dtype": torch.int64}, "dtype 'int64' is none"),
        ({"dtype": "float64"}, "dtype 'float64' is none that a model computes in"),
        ({"dtype": torch.double}, "dtype 'float64' is none that a model computes in"),
        ({"dtype": "nn"}, "dtype 'nn' is none that a model computes in"),
        ({"device": "gpu"}, "device 'gpu' is not to be had here .*: use cpu, cuda or auto"),
        ({"device": "cuda:77"}, "device 'cuda:77' is not to be had here"),
        ({"device": "meta"}, r"device 'meta' is not to be had here \(.*\): use cpu, cuda or auto"),
    ],
)
def test_what_cannot_be_had_is_said(asked: dict[str, Any], words: str, half: Path):
    with pytest.raises(UserError, match=words) as told:
        moespresso.load(half, **asked)
    assert "\n" not in str(told.value)


# Loaded by transformers


@pytest.fixture
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """compressed-tensors shows a bar for each of its passes."""
    monkeypatch.setattr(model_compressor, "tqdm", lambda modules, **_: modules)


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize("used", [False, True])
@pytest.mark.parametrize("name", STOCK)
@pytest.mark.few(1)
def test_what_transformers_decoded_is_saved_plainly(
    name: str, used: bool, form: Callable[[str], Path], tmp_path: Path
):
    model = AutoModelForCausalLM.from_pretrained(form(name))
    if used:  # what is not an expert is decoded by the first forward
        logits(model)
    with pytest.warns(
        UserWarning, match="were decoded when it was loaded: it is saved as a plain checkpoint"
    ):
        model.save_pretrained(tmp_path)
    check_saved(model, tmp_path)
    truth, saved = decoded(form(name)), load_file(tmp_path / "model.safetensors")
    assert {key: value.tolist() for key, value in saved.items()} == {
        key: value.tolist() for key, value in truth.items()
    }
    assert model.float().dtype == torch.float32  # it is plain from then on
    model.save_pretrained(tmp_path / "again", max_shard_size="100KB")
    assert torch.equal(logits(reloaded(tmp_path / "again")), logits(model))


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize("name", ["4 bits", "experts and attention"])
def test_adapters_on_what_transformers_decoded_are_saved(
    name: str, form: Callable[[str], Path], tmp_path: Path
):
    model = AutoModelForCausalLM.from_pretrained(form(name))
    before = logits(model)
    adapt(model)
    assert float((logits(model) - before).abs().max()) > 1e-2
    with pytest.warns(UserWarning, match="saved as a plain checkpoint"):
        # Trainers hand over a state dict of their own, with whatever is in it.
        model.save_pretrained(tmp_path, state_dict=model.state_dict())
    check_saved(model, tmp_path)


@pytest.mark.usefixtures("quiet")
@pytest.mark.filterwarnings("ignore:You passed `quantization_config`")
def test_what_transformers_was_told_to_decode_is_saved(form: Callable[[str], Path], tmp_path: Path):
    asked = CompressedTensorsConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(form("experts and attention"), quantization_config=asked)
    with pytest.warns(UserWarning, match="saved as a plain checkpoint"):
        model.save_pretrained(tmp_path)
    check_saved(model, tmp_path)


@pytest.fixture
def alone() -> Iterator[None]:
    """transformers as it is where nobody imported moespresso."""
    taught = PreTrainedModel.save_pretrained
    original: Any = taught
    while hasattr(original, "__wrapped__"):
        original = original.__wrapped__
    PreTrainedModel.save_pretrained = original
    yield
    PreTrainedModel.save_pretrained = taught


@pytest.mark.usefixtures("quiet")
def test_a_saved_model_computes_as_it_did(tmp_path: Path):
    """Jamba computes in another order while its config says that it is quantized: gone once it is saved."""
    source = write_model("jamba", tmp_path / "model")
    api.press(source, out=tmp_path / "packed", steps=["rtn:group_size=8"])
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "packed", experts_implementation="eager")
    with pytest.warns(UserWarning, match="saved as a plain checkpoint"):
        model.save_pretrained(tmp_path / "saved")
    again: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", experts_implementation="eager")
    assert torch.equal(logits(again), logits(model))


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize("used", [False, True])
@pytest.mark.parametrize(("family", "parts"), [("granitemoe", "attention"), ("llama", "attention+dense")])
@pytest.mark.few(2)
def test_what_is_packed_and_no_expert_is_saved_plainly(family: str, parts: str, used: bool, tmp_path: Path):
    if family == "llama":
        shape = families.COMMON | {"hidden_size": 64, "num_attention_heads": 4}
        LlamaForCausalLM(LlamaConfig(**shape)).save_pretrained(tmp_path / "model")
        tiny_tokenizer().save_pretrained(tmp_path / "model")
    else:
        write_wide(tmp_path / "model", family)
    api.press(tmp_path / "model", out=tmp_path / "packed", steps=[f"rtn:group_size=0,parts={parts}"])
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    if used:
        logits(model)
    with pytest.warns(UserWarning, match="saved as a plain checkpoint"):
        model.save_pretrained(tmp_path / "saved")
    assert "quantization_config" not in json.loads((tmp_path / "saved" / "config.json").read_text())
    truth, saved = decoded(tmp_path / "packed"), load_file(tmp_path / "saved" / "model.safetensors")
    assert truth.keys() == saved.keys()
    assert all(torch.equal(saved[key], value) for key, value in truth.items())
    torch.testing.assert_close(logits(reloaded(tmp_path / "saved")), logits(model))
    model.save_pretrained(tmp_path / "again")  # it is plain from then on, and nothing is said


@pytest.mark.usefixtures("quiet")
def test_models_whose_activations_are_quantized_are_left_to_transformers(
    form: Callable[[str], Path], tmp_path: Path
):
    """Plain weights would not compute what they do."""
    write_wide(tmp_path / "model", "granitemoe")
    api.press(tmp_path / "model", out=tmp_path / "packed", steps=["rtn:group_size=0,parts=attention"])
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    for scheme in model.hf_quantizer.compressor.quantization_config.config_groups.values():
        scheme.input_activations = QuantizationArgs(num_bits=8)
    model.save_pretrained(tmp_path / "saved")
    assert "quantization_config" in json.loads((tmp_path / "saved" / "config.json").read_text())


@pytest.mark.usefixtures("quiet", "alone")
def test_a_model_that_was_there_before_the_import_is_saved(form: Callable[[str], Path], tmp_path: Path):
    model = AutoModelForCausalLM.from_pretrained(form("4 bits"))
    with pytest.raises(ValueError, match="Undefined Operation"):  # else this is not needed any more
        model.save_pretrained(tmp_path / "alone")
    saving.install()
    saving.install()
    with pytest.warns(UserWarning, match="saved as a plain checkpoint") as told:
        model.save_pretrained(tmp_path / "taught")
    assert len(told) == 1
    check_saved(model, tmp_path / "taught")


@pytest.mark.usefixtures("quiet", "alone")
@pytest.mark.filterwarnings("ignore:You passed `quantization_config`")
def test_there_is_a_way_without_moespresso(form: Callable[[str], Path], tmp_path: Path):
    """What the documentation says: decode on loading, save under the names in memory."""
    asked = CompressedTensorsConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(form("4 bits"), quantization_config=asked)
    model.save_pretrained(tmp_path, save_original_format=False)
    check_saved(model, tmp_path)


def test_plain_models_are_saved_by_transformers_alone(form: Callable[[str], Path], tmp_path: Path):
    model = AutoModelForCausalLM.from_pretrained(form("plain"))
    model.save_pretrained(tmp_path)  # a warning would be an error here
    check_saved(model, tmp_path)


# Exported


@pytest.mark.parametrize("name", PACKED)
@pytest.mark.few(1)
def test_a_packed_folder_is_exported_as_what_it_decodes_to(
    name: str, form: Callable[[str], Path], tmp_path: Path
):
    folder, out = form(name), tmp_path / "out"
    report = api.export(folder, to="plain", out=out)
    assert report.packing == ""
    assert any(note.endswith("packed are stored as what they decode to") for note in report.notes)
    assert [check for check in api.verify(out, against=folder)["checks"] if not check["ok"]] == []
    plain, model = reloaded(out), moespresso.load(folder)
    assert plain.dtype == model.dtype
    assert torch.equal(logits(plain), logits(model))
    assert "quantization_config" not in json.loads((out / "config.json").read_text())
    truth, written = decoded(folder), load_file(out / "model.safetensors")
    assert {key: (value.dtype, value.tolist()) for key, value in written.items()} == {
        key: (value.dtype, value.tolist()) for key, value in truth.items()
    }
    assert expert_on_disk("mixtral", out, 0, 1).keys() == {"gate", "up", "down"}
    # What was plain is copied, and what is plain can be packed again.
    assert open_view(out).source.cost().params == open_view(folder).source.cost().params
    with pytest.raises(UserError, match="holds no packed matrices: it is plain already"):
        api.export(out, to="plain", out=tmp_path / "again")


def test_a_wrong_value_in_an_exported_folder_is_found(form: Callable[[str], Path], tmp_path: Path):
    out = tmp_path / "out"
    api.export(form("4 bits"), to="plain", out=out)
    stored = load_file(out / "model.safetensors")
    name = next(name for name in stored if ".experts." in name)
    stored[name][0, 0] += 1
    save_file(stored, out / "model.safetensors", {"format": "pt"})
    failed = {check["name"] for check in api.verify(out, against=form("4 bits"))["checks"] if not check["ok"]}
    assert "every tensor is what the plan makes of the original" in failed
