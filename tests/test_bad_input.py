"""The user's mistakes: exit code 2, one sentence that says what, where and how to mend it, and nothing lost.

Every test here goes through the command line. What shows in headers, config or settings is refused before anything
is written; what shows later leaves what was finished, and no manifest.
"""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from conftest import Zoo, tiny_tokenizer
from families import tensor_files
from moespresso.build import write
from moespresso.checkpoint import MANIFEST, claim
from moespresso.checkpoint.files import INDEX
from moespresso.cli import main
from moespresso.model.quirks import REFUSED

AIMER, REAP = "expert_drop:keep=5,score=aimer", "expert_drop:keep=5,score=reap"
HIDDEN, WIDTH = 48, 40

Damage = Callable[[Path], object]
Edit = Callable[[dict[str, Tensor]], object]


def expert(layer: int, number: int, matrix: str) -> str:
    return f"model.layers.{layer}.block_sparse_moe.experts.{number}.{matrix}.weight"


def shard_of(model: Path, name: str) -> Path:
    return tensor_files(model)[name]


def edit(name: str, change: Edit) -> Damage:
    """A damage to the shard that holds `name`; the index follows."""

    def damage(model: Path) -> None:
        path = shard_of(model, name)
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path, metadata={"format": "pt"})
        body = json.loads((model / INDEX).read_text())
        others = {key: file for key, file in body["weight_map"].items() if file != path.name}
        body["weight_map"] = others | dict.fromkeys(tensors, path.name)
        (model / INDEX).write_text(json.dumps(body))

    return damage


def reshape(name: str, *shape: int) -> Damage:
    """Give a tensor another shape (its own values, as many as are needed)."""

    def change(tensors: dict[str, Tensor]) -> None:
        count = torch.Size(shape).numel()
        tensors[name] = tensors[name].reshape(-1).repeat(2)[:count].reshape(shape)

    return edit(name, change)


def spoil(name: str, *places: int) -> Damage:
    """Put a NaN into some places of a tensor."""

    def change(tensors: dict[str, Tensor]) -> None:
        for place in places:
            tensors[name].view(-1)[place] = float("nan")

    return edit(name, change)


def configure(**changes: object) -> Damage:
    def damage(model: Path) -> None:
        path = model / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return damage


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def model(zoo: Zoo, tmp_path: Path) -> Path:
    """A mixtral to damage: 3 layers, 8 experts, top-3."""
    return Path(shutil.copytree(zoo("mixtral"), tmp_path / "model"))


Refused = Callable[..., str]


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Refused:
    """Run a command that must be refused, and return its sentence; the model must not change."""

    def run(*argv: object, model: Path, late: bool = False) -> str:
        before = contents(model)
        around = sorted(path.name for path in tmp_path.iterdir())
        capsys.readouterr()
        code = main([str(word) for word in argv])
        said = capsys.readouterr()
        assert code == 2, said.err
        assert said.out == ""
        assert "Traceback" not in said.err
        *earlier, sentence = said.err.rstrip("\n").split("\n")
        assert late or earlier == []
        assert not [line for line in earlier if line.startswith("moespresso:")]
        assert sentence.startswith("moespresso: ")
        assert not re.search(r"[.!?]\s+[A-Z]", sentence), f"more than one sentence: {sentence}"
        assert contents(model) == before
        if not late:
            assert sorted(path.name for path in tmp_path.iterdir()) == around
        return sentence

    return run


@pytest.fixture
def press(refused: Refused, model: Path, tmp_path: Path) -> Refused:
    """Press the model into `out`, which must be refused before `out` is there."""

    def run(*more: object, step: str = AIMER) -> str:
        return refused("press", model, "--out", tmp_path / "out", "--step", step, *more, model=model)

    return run


TRUNCATE: Damage = lambda model: _cut(shard_of(model, "lm_head.weight"))  # noqa: E731


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


def _rename_expert(tensors: dict[str, Tensor]) -> None:
    for name in [name for name in tensors if ".experts.7." in name and ".layers.2." in name]:
        tensors[name.replace(".7.", ".9.")] = tensors.pop(name)


def _add_expert(tensors: dict[str, Tensor]) -> None:
    for name in [name for name in tensors if ".experts.7." in name and ".layers.2." in name]:
        tensors[name.replace(".7.", ".8.")] = tensors[name].clone()


def _drop_expert(tensors: dict[str, Tensor]) -> None:
    for name in [name for name in tensors if ".experts.7." in name and ".layers.2." in name]:
        del tensors[name]


LAST = expert(2, 7, "w2")
FILES: dict[str, tuple[Damage, str]] = {
    "a missing shard": (lambda m: shard_of(m, "lm_head.weight").unlink(), r"model-00003-of-00003\.safetensors"),
    "a truncated shard": (TRUNCATE, r"model-00003-of-00003\.safetensors is truncated"),
    "an index naming a missing file": (
        lambda m: (m / INDEX).write_text((m / INDEX).read_text().replace("00002-of", "00007-of")),
        "names model-00007-of-00003",
    ),
    "no index": (lambda m: (m / INDEX).unlink(), INDEX),
    "no config": (lambda m: (m / "config.json").unlink(), r"config\.json is missing"),
    "a config that is not JSON": (lambda m: (m / "config.json").write_text("{,"), r"config\.json is not valid JSON"),
    "a norm of the wrong shape": (reshape("model.norm.weight", HIDDEN - 1), r"model\.norm\.weight"),
    "an expert of the wrong shape": (reshape(LAST, HIDDEN, WIDTH - 1), re.escape(LAST)),
    "a transposed expert": (reshape(LAST, WIDTH, HIDDEN), re.escape(LAST)),
    "a transposed head": (reshape("lm_head.weight", HIDDEN, 96), r"lm_head\.weight"),
    "a router with a row too few": (
        reshape("model.layers.1.block_sparse_moe.gate.weight", 7, HIDDEN), r"layers\.1\..*gate\.weight"
    ),
    "a missing expert": (edit(LAST, _drop_expert), "expert 7 in L2"),
    "a missing matrix": (edit(LAST, lambda tensors: tensors.pop(LAST)), "down projection of expert 7 in L2"),
    "an expert out of the row": (edit(LAST, _rename_expert), "expert 7 in L2"),
    "an expert too many": (edit(LAST, _add_expert), "has 9 .* in L2"),
    "a missing norm": (edit("model.norm.weight", lambda tensors: tensors.pop("model.norm.weight")), r"model\.norm\.weight"),
    "a missing head": (edit("lm_head.weight", lambda tensors: tensors.pop("lm_head.weight")), r"lm_head\.weight"),
    "another count in the config": (configure(num_local_experts=16), "expert 8 in L0"),
    "another width in the config": (configure(intermediate_size=80), "experts"),
    "nonsense in the config": (configure(hidden_size="wide"), r"config\.json|hidden_size"),
    "no model_type": (configure(model_type=None), "no model_type"),
    "an unknown model_type": (configure(model_type="mixtrall"), "did you mean 'mixtral'"),
    "custom code": (configure(model_type="ownmoe", auto_map={"AutoModel": "m.M"}), "custom code .* never run"),
    "a quantized model": (configure(quantization_config={"quant_method": "gptq", "bits": 4}), "already quantized"),
}  # fmt: skip


class TestModel:
    @pytest.mark.parametrize("name", list(FILES))
    def test_damaged(self, model: Path, press: Refused, name: str):
        damage, words = FILES[name]
        damage(model)
        assert re.search(words, press())

    @pytest.mark.parametrize("name", ["a missing shard", "a missing expert", "an unknown model_type"])
    def test_damaged_for_other_verbs(
        self, model: Path, refused: Refused, text: Path, tmp_path: Path, name: str
    ):
        damage, words = FILES[name]
        damage(model)
        assert re.search(words, refused("inspect", model, model=model))
        assert re.search(words, refused("evaluate", model, "--text", text, model=model))
        assert re.search(
            words, refused("measure", model, "--out", tmp_path / "s", "--step", AIMER, model=model)
        )

    @pytest.mark.parametrize("family", sorted(REFUSED))
    def test_families_that_are_not_supported(self, model: Path, press: Refused, family: str):
        configure(model_type=family)(model)
        assert re.search(f"'{family}' is not supported", press())

    def test_no_folder(self, model: Path, refused: Refused, tmp_path: Path):
        said = refused("press", tmp_path / "no", "--out", tmp_path / "out", "--step", AIMER, model=model)
        assert "is not a folder" in said

    def test_a_dense_model(self, tmp_path: Path, refused: Refused):
        config = LlamaConfig(
            vocab_size=96, hidden_size=48, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4
        )
        LlamaForCausalLM(config).save_pretrained(tmp_path / "dense")
        said = refused(
            "press", tmp_path / "dense", "--out", tmp_path / "out", "--step", AIMER, model=tmp_path / "dense"
        )
        assert "needs routed experts" in said
        assert "dense" in said

    def test_no_tokenizer(self, model: Path, press: Refused, text: Path):
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (model / name).unlink()
        assert "no tokenizer" in press("--text", text, step=REAP)


class TestSettings:
    @pytest.mark.parametrize(
        ("step", "words"),
        [
            ("expert_drop:keep=9,score=aimer", "keep=9 in L0 is more than the 8 experts"),
            ("expert_drop:keep=2,score=aimer", r"keep=2 in L0 is under 3.*top_k=3"),
            ("expert_drop:ratio=0.9,score=aimer", "is under 3"),
            ("expert_drop:ratio=1.0,score=aimer", "ratio=1.0"),
            ("expert_drop:keep=5,ratio=0.5", "keep or ratio, not both"),
            ("expert_drop:keep=five", "keep='five' must be of type int"),
            ("expert_drop:keep=-1", "is under 3"),
            ("expert_drop:keep", "'keep' is not of the form setting=value"),
            ("expert_drop:kep=5", "no setting 'kep' (did you mean 'keep'?)"),
            ("expert_drop:keep=5,score=reep", "did you mean 'reap'"),
            ("expert_drop:keep=5,scope=globl", "did you mean 'global'"),
            ("expert_drop:keep=5,protect_super=maybe", "must be true or false"),
            (
                "expert_drop:keep=5,router=preserve",
                "routers whole .* which transformers cannot load; the nearest plan",
            ),
            ("expert_drop:keep=5,scope=global", "unequal layers, which transformers cannot load"),
            ("layer_drop:drop=99", "has only . layers with experts to drop"),
            ("layer_drop:drop=0", "must be at least 1"),
            (
                "layer_drop:part=attention",
                "without attention, which transformers cannot load; the nearest plan",
            ),
            ("layer_drop:part=attention,score=cosine_moe", "use score=cosine"),
            ("layer_drop:score=kll", "did you mean 'kl'"),
            ("block_drop:drop=99", "one must stay"),
            ("block_drop:drop=99,contiguous=true", "no such run of them exists"),
            ("block_drop:repair=bias", "no place"),
            ("expert_merge:keep=99", "is more than the"),
            ("expert_merge:keep=5,ratio=0.5", "not both"),
            ("expertdrop:keep=5", "did you mean 'expert_drop'"),
            ("prune", "is unknown"),
            (":keep=5", "is unknown"),
            ("use=no.such.module", "is unknown"),
        ],
    )
    def test_steps(self, press: Refused, step: str, words: str):
        said = press(step=step)
        assert words in said or re.search(words, said)

    def test_router_groups(self, zoo: Zoo, refused: Refused, tmp_path: Path):
        model = zoo("deepseek_v2")
        said = refused(
            "press", model, "--out", tmp_path / "out", "--step", "expert_drop:keep=7,score=aimer", model=model
        )
        assert "does not divide into 3 router groups: keep 6 or 9" in said

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            (("--target", "vlm"), "did you mean 'vllm'"),
            (("--size", "1KiB"), "cannot be reached by expert_drop alone: it leaves at least"),
            (("--size", "lots"), "lots"),
            (("--dtype", "float99"), "did you mean 'float"),
            (("--samples", "0"), "samples"),
            (("--length", "1"), "length"),
            (("--seed", "-1"), "seed"),
            (("--recipe", "no.yaml"), "no.yaml cannot be read"),
            (("--keep", "5"), "no option --keep"),
            (("--export", "gguf"), "--export is not available in this version"),
        ],
        ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
    )
    def test_options(self, press: Refused, options: tuple[str, ...], words: str):
        assert words in press(*options)

    def test_nothing_asked(self, model: Path, refused: Refused, tmp_path: Path):
        assert "nothing was asked for" in refused("press", model, "--out", tmp_path / "out", model=model)

    def test_unequal_layers_name_the_nearest_even_plan(self, press: Refused, text: Path):
        said = press("--text", text, step="expert_drop:keep=5,score=reap,scope=global")
        assert "unequal layers, which transformers cannot load" in said
        assert "scope=layer,keep=5" in said

    def test_too_little_memory(self, press: Refused, text: Path):
        words = ("--text", text, "--samples", 4, "--length", 32, "--max-memory", "10MiB")
        assert "is too little to measure" in press(*words, step=REAP)

    def test_a_plan_of_another_checkpoint(self, model: Path, zoo: Zoo, refused: Refused, tmp_path: Path):
        plan = tmp_path / "plan.json"
        assert (
            main(["plan", str(zoo("olmoe")), "--out", str(plan), "--step", "expert_drop:score=random"]) == 0
        )
        said = refused("build", model, "--plan", plan, "--out", tmp_path / "out", model=model)
        assert "was made for another checkpoint" in said

    @pytest.mark.parametrize("body", ["", "{}", "[]", '{"stages": [{}], "blueprint": ""}'])
    def test_a_plan_that_is_none(self, model: Path, refused: Refused, tmp_path: Path, body: str):
        plan = tmp_path / "plan.json"
        plan.write_text(body)
        assert "not a moespresso plan" in refused(
            "build", model, "--plan", plan, "--out", tmp_path / "out", model=model
        )

    def test_a_plan_that_keeps_too_few(self, model: Path, refused: Refused, tmp_path: Path):
        plan = tmp_path / "plan.json"
        assert main(["plan", str(model), "--out", str(plan), "--step", AIMER]) == 0
        body = json.loads(plan.read_text())
        body["stages"][0]["treatments"]["L1.experts"]["keep"] = [0, 1]
        plan.write_text(json.dumps(body))
        said = refused("build", model, "--plan", plan, "--out", tmp_path / "out", model=model)
        assert "L1 would keep 2 experts" in said

    def test_a_plan_with_unequal_layers(self, model: Path, refused: Refused, tmp_path: Path):
        plan = tmp_path / "plan.json"
        assert main(["plan", str(model), "--out", str(plan), "--step", AIMER]) == 0
        body = json.loads(plan.read_text())
        body["stages"][0]["treatments"]["L1.experts"]["keep"] = [0, 1, 2, 4]
        plan.write_text(json.dumps(body))
        said = refused("build", model, "--plan", plan, "--out", tmp_path / "out", model=model)
        assert "unequal layers (4 to 5 experts)" in said


class TestText:
    def test_none(self, press: Refused):
        assert "give --text FILE or --dataset NAME" in press(step=REAP)

    @pytest.mark.parametrize("body", ["", "   \n\n  \n"])
    def test_empty(self, press: Refused, tmp_path: Path, body: str):
        (tmp_path / "text.txt").write_text(body)
        said = press("--text", tmp_path / "text.txt", "--samples", 4, "--length", 32, step=REAP)
        assert "text.txt" in said
        assert "128 tokens" in said or "holds no text" in said

    def test_too_short_says_how_many_tokens_are_needed(self, press: Refused, text: Path):
        tokens = len(tiny_tokenizer()(text.read_text(), add_special_tokens=False)["input_ids"]) + 1
        said = press("--text", text, "--samples", 64, "--length", 128, step=REAP)
        assert f"64 samples of 128 tokens need 8,192 tokens, but there are {tokens:,}" in said
        assert f"at most {tokens // 128} samples" in said

    def test_missing(self, press: Refused, tmp_path: Path):
        assert "no.txt: no such file" in press("--text", tmp_path / "no.txt", step=REAP)

    def test_binary(self, press: Refused, tmp_path: Path):
        (tmp_path / "text.txt").write_bytes(b"\xff\xfe\0\1" * 99)
        assert "not UTF-8 text" in press("--text", tmp_path / "text.txt", step=REAP)

    def test_broken_json_lines_name_the_line(self, press: Refused, tmp_path: Path):
        (tmp_path / "text.jsonl").write_text('{"text": "good"}\n{"text": \n')
        assert "text.jsonl:2" in press("--text", tmp_path / "text.jsonl", step=REAP)

    def test_misspelt_option(self, press: Refused, text: Path):
        assert "did you mean 'weight'" in press("--text", f"{text}:wieght=2", step=REAP)

    def test_data_free_needs_none(self, model: Path, tmp_path: Path):
        assert main(["press", str(model), "--out", str(tmp_path / "out"), "--step", AIMER]) == 0


class TestOut:
    @pytest.mark.parametrize("more", [(), ("--no-resume",)])
    def test_a_foreign_folder(self, press: Refused, tmp_path: Path, more: tuple[str, ...]):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "thesis.txt").write_text("years")
        assert "not empty and not a moespresso result" in press(*more)
        assert contents(tmp_path / "out") == {"thesis.txt": b"years"}

    def test_a_file(self, press: Refused, tmp_path: Path):
        (tmp_path / "out").write_text("years")
        assert "is a file" in press()

    @pytest.mark.parametrize("place", ["", "inside", "../model/inside"])
    def test_in_the_source(self, model: Path, refused: Refused, place: str):
        said = refused("press", model, "--out", model / place, "--step", AIMER, model=model)
        assert "lies in the source folder" in said

    @pytest.mark.parametrize("verb", ["measure", "plan"])
    @pytest.mark.parametrize("name", ["config.json", "stats.json"])
    def test_measure_and_plan_in_the_source(self, model: Path, refused: Refused, verb: str, name: str):
        said = refused(verb, model, "--out", model / name, "--step", AIMER, model=model)
        assert "source folder" in said

    @pytest.mark.parametrize("verb", ["measure", "plan"])
    def test_measure_and_plan_into_a_folder(self, model: Path, refused: Refused, tmp_path: Path, verb: str):
        (tmp_path / "folder").mkdir()
        said = refused(verb, model, "--out", tmp_path / "folder", "--step", AIMER, model=model)
        assert str(tmp_path / "folder") in said

    @pytest.mark.parametrize("more", [(), ("--no-resume",)])
    def test_in_use(self, press: Refused, model: Path, tmp_path: Path, more: tuple[str, ...]):
        with claim(tmp_path / "out", model):
            (tmp_path / "out" / "model.safetensors").write_text("half a shard")
            assert "in use by another run" in press(*more)
            assert (tmp_path / "out" / "model.safetensors").exists()

    def test_below_a_file(self, refused: Refused, model: Path, tmp_path: Path):
        (tmp_path / "file").touch()
        said = refused("press", model, "--out", tmp_path / "file" / "out", "--step", AIMER, model=model)
        assert str(tmp_path / "file") in said

    def test_where_nothing_can_be_made(self, refused: Refused, model: Path):
        assert "/proc/no" in refused("press", model, "--out", "/proc/no/such", "--step", AIMER, model=model)


NORM = "model.norm.weight"  # in the last shard, and nothing measures it


class TestNotFinite:
    """Values are looked at when they are read: late, so what is finished stays."""

    @pytest.fixture(autouse=True)
    def _several_shards(self, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr(write, "_SMALLEST", 60_000)

    def run(self, model: Path, out: Path, *more: object) -> int:
        return main(["press", str(model), "--out", str(out), *map(str, more)])

    def test_in_the_last_shard(self, model: Path, refused: Refused, tmp_path: Path):
        spoil(NORM, 3, 5)(model)
        out = tmp_path / "out"
        command = ("press", model, "--out", out, "--step", AIMER)
        said = refused(*command, model=model, late=True)
        assert f"tensor {NORM} in" in said
        assert "holds 2 NaN" in said
        assert "--allow-nonfinite" in said
        assert not (out / MANIFEST).exists()
        kept = {path.name: path.stat().st_mtime_ns for path in out.glob("*.safetensors")}
        assert len(kept) >= 3
        assert self.run(model, out, "--step", AIMER, "--allow-nonfinite") == 0
        assert (
            kept.items() <= {path.name: path.stat().st_mtime_ns for path in out.glob("*.safetensors")}.items()
        )
        manifest = json.loads((out / MANIFEST).read_text())
        assert manifest["nonfinite"] == {NORM: 2}
        assert [line for line in manifest["warnings"] if NORM in line and "2 NaN" in line]
        assert "2 NaN" in (out / "README.md").read_text()

    def test_mended_and_run_again(self, model: Path, refused: Refused, tmp_path: Path, zoo: Zoo):
        """A mended source is another source: the half result of the spoilt one is not mixed into it."""
        spoil(NORM, 3)(model)
        command = ("press", model, "--out", tmp_path / "out", "--step", AIMER)
        refused(*command, model=model, late=True)
        shutil.copytree(zoo("mixtral"), model, dirs_exist_ok=True)
        assert "unfinished run with other settings" in refused(*command, model=model, late=True)
        assert self.run(model, tmp_path / "out", "--step", AIMER, "--no-resume") == 0
        assert self.run(model, tmp_path / "clean", "--step", AIMER) == 0
        assert contents(tmp_path / "out") == contents(tmp_path / "clean")

    def test_in_an_expert_that_is_scored_by_its_weights(self, model: Path, refused: Refused, tmp_path: Path):
        spoil(LAST, 1, 2, 3)(model)
        command = ("press", model, "--out", tmp_path / "out", "--step", AIMER)
        assert LAST in refused(*command, model=model, late=True)
        assert list((tmp_path / "out").glob("*.safetensors")) == []
        assert self.run(model, tmp_path / "out", "--step", AIMER, "--allow-nonfinite") == 0
        manifest = json.loads((tmp_path / "out" / MANIFEST).read_text())
        # Needed least, hence dropped: counted as warnings, but nothing of it is in the result.
        assert 7 not in manifest["plan"]["stages"][0]["treatments"]["L2.experts"]["keep"]
        assert manifest["nonfinite"] == {}
        assert [line for line in manifest["warnings"] if LAST in line and "3 NaN" in line]

    def test_while_measuring(self, model: Path, refused: Refused, text: Path, tmp_path: Path):
        spoil(LAST, 1, 2, 3)(model)
        words = ("--step", REAP, "--text", text, "--samples", 4, "--length", 32)
        said = refused("press", model, "--out", tmp_path / "out", *words, model=model, late=True)
        assert f"tensor {LAST} in" in said
        assert "--allow-nonfinite" in said
        assert not (tmp_path / "out" / MANIFEST).exists()
        assert list((tmp_path / "out" / ".moespresso").glob("sweep-*")), "layers 0 and 1 were measured"
        assert self.run(model, tmp_path / "out", *words, "--allow-nonfinite") == 0
        manifest = json.loads((tmp_path / "out" / MANIFEST).read_text())
        assert [line for line in manifest["warnings"] if LAST in line and "3 NaN" in line]

    def test_measured_by_text_and_by_weights_is_counted_once(self, model: Path, text: Path, tmp_path: Path):
        spoil(LAST, 1, 2, 3)(model)
        steps = (
            "--step",
            "expert_drop:keep=6,score=aimer",
            "--step",
            "expert_drop:keep=5,score=reap,rescore=false",
        )
        words = (*steps, "--text", text, "--samples", 4, "--length", 32, "--allow-nonfinite")
        assert self.run(model, tmp_path / "out", *words) == 0
        warnings = json.loads((tmp_path / "out" / MANIFEST).read_text())["warnings"]
        assert [line for line in warnings if LAST in line and "3 NaN" in line]
        assert not [line for line in warnings if LAST in line and "3 NaN" not in line]

    def test_outside_what_the_model_knows(self, model: Path, refused: Refused, tmp_path: Path):
        """Passed through, but looked at like the rest."""
        extra = "model.layers.3.mtp.weight"
        edit(NORM, lambda tensors: tensors.update({extra: torch.full((4,), float("inf"))}))(model)
        said = refused("press", model, "--out", tmp_path / "out", "--step", AIMER, model=model, late=True)
        assert extra in said
