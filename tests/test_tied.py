"""Which weights are tied is what transformers' own loader makes of config and files together, for every way to contradict."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import moespresso
from conftest import Zoo, tiny_tokenizer
from families import build, logits_of, random_ids, reference
from moespresso.core.errors import UserError
from moespresso.data import Source

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
Files = dict[str, Tensor]
# One whose class ties by itself, one that scales its logits, one whose head has a bias, one with latent attention.
FAMILIES = ("mixtral", "ernie4_5_moe", "granitemoe", "phimoe", "deepseek_v2")


def own_head(files: Files) -> Files:
    return files | {HEAD: torch.randn(files[EMBEDDING].shape, generator=torch.Generator().manual_seed(3)) / 4}


def equal_head(files: Files) -> Files:
    return files | {HEAD: files[EMBEDDING].clone()}


def nearly_equal_head(files: Files) -> Files:
    head = files[EMBEDDING].clone()
    head[-1, -1] += 1e-3
    return files | {HEAD: head}


def head_of_half_precision(files: Files) -> Files:
    return own_head(files) | {HEAD: own_head(files)[HEAD].bfloat16()}


def head_only(files: Files) -> Files:
    return {name: tensor for name, tensor in files.items() if name != EMBEDDING} | {HEAD: files[EMBEDDING]}


def embedding_only(files: Files) -> Files:
    return {name: tensor for name, tensor in files.items() if name != HEAD}


WAYS = (own_head, equal_head, nearly_equal_head, head_of_half_precision, head_only, embedding_only)
# Every way with one family, the most telling ones with the others.
CASES = [(FAMILIES[0], way) for way in WAYS]
CASES += [(family, way) for family in FAMILIES[1:] for way in (own_head, head_only)]


def tied(folder: Path, family: str, change: Callable[[Files], Files], *, said: bool | None = True) -> Path:
    """A checkpoint whose config says `said` of ties (None: nothing), whatever its files hold."""
    build(family).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config.pop("tie_word_embeddings", None)
    config |= {} if said is None else {"tie_word_embeddings": said}
    (folder / "config.json").write_text(json.dumps(config))
    file = folder / "model.safetensors"
    save_file(change(load_file(file)), file, {"format": "pt"})
    return folder


def same_logits(one: torch.nn.Module, other: torch.nn.Module) -> None:
    ids = random_ids(other.config, 2, 12)
    torch.testing.assert_close(logits_of(one, ids), logits_of(other, ids), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("family", "change"), CASES, ids=lambda value: getattr(value, "__name__", value))
@pytest.mark.few(2)
def test_what_is_loaded_is_what_transformers_loads(family, change, tmp_path: Path, text: Path):
    model = tied(tmp_path / "model", family, change)
    stock = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    scores = moespresso.evaluate(model, texts=[Source(str(text))], length=24, limit=4)
    assert scores["perplexity"]["value"] == pytest.approx(_perplexity(stock, text), rel=1e-3)
    moespresso.press(model, out=tmp_path / "out", steps=["expert_drop:ratio=0,score=aimer"])
    assert [c for c in moespresso.verify(tmp_path / "out", against=model)["checks"] if not c["ok"]] == []
    same_logits(reference(tmp_path / "out"), stock)


def _perplexity(model: torch.nn.Module, text: Path) -> float:
    ids = torch.tensor(tiny_tokenizer()(text.read_text())["input_ids"][: 4 * 24]).view(4, 24)
    with torch.inference_mode():
        log = model(ids).logits[:, :-1].log_softmax(-1)
    return float((-log.gather(-1, ids[:, 1:, None])).mean().exp())


@pytest.mark.parametrize("change", [own_head, head_only, equal_head], ids=lambda way: way.__name__)
@pytest.mark.few(1)
def test_results_that_only_moespresso_loads_keep_their_head(change, tmp_path: Path):
    model = tied(tmp_path / "model", "mixtral", change)
    steps = ["magnitude:sparsity=0.01,pack=true"]
    moespresso.press(model, out=tmp_path / "out", steps=steps, target="plugin")
    loaded = moespresso.load(tmp_path / "out")
    stock = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    assert torch.equal(loaded.lm_head.weight.float(), stock.lm_head.weight)
    assert torch.equal(loaded.model.embed_tokens.weight.float(), stock.model.embed_tokens.weight)
    assert moespresso.verify(tmp_path / "out", against=model)["ok"]


def test_the_class_ties_where_the_config_is_silent(tmp_path: Path):
    model = tied(tmp_path / "model", "ernie4_5_moe", embedding_only, said=None)
    assert moespresso.inspect(model)["tied"]
    same_logits(moespresso.load(model), reference(model))


def test_a_config_that_unties_wants_both(tmp_path: Path):
    model = tied(tmp_path / "model", "mixtral", embedding_only, said=False)
    with pytest.raises(UserError, match=r"lm_head\.weight"):
        moespresso.inspect(model)


def test_a_config_that_ties_wants_one(tmp_path: Path):
    neither = tied(tmp_path / "model", "mixtral", lambda files: embedding_only(head_only(files)))
    with pytest.raises(UserError, match=r"lm_head\.weight|embed_tokens\.weight"):
        moespresso.inspect(neither)


def test_two_heads_are_counted_and_said(tmp_path: Path, zoo: Zoo):
    one, both = (tied(tmp_path / way.__name__, "mixtral", way) for way in (embedding_only, own_head))
    alone, beside = moespresso.inspect(one), moespresso.inspect(both)
    assert (alone["tied"], beside["tied"]) == (True, False)
    table = beside["vocab"] * beside["hidden"]
    assert beside["params"]["total"] == alone["params"]["total"] + table
    assert beside["flops_2048"] == alone["flops_2048"]
    assert [note for note in beside["notes"] if "each keeps its own" in note]
    assert not [note for note in alone["notes"] if "each keeps its own" in note]
    swapped = moespresso.inspect(tied(tmp_path / "swapped", "mixtral", head_only))
    assert (swapped["tied"], swapped["flops_2048"]) == (True, alone["flops_2048"])
