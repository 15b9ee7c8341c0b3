"""Faults planted in a pressed folder: each is caught, and by the check that is there for it.

A fault is planted twice where that says more: as it would happen (the digests tell), and with the digests in the manifest
put right afterwards, so that only the check that knows what the model should be can tell.
"""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from conftest import Zoo, write_model
from families import read_tensor, tensor_files
from moespresso import api
from moespresso.build import write
from moespresso.checkpoint import MANIFEST
from moespresso.checkpoint.files import INDEX
from moespresso.cli import main
from moespresso.core.errors import UserError
from moespresso.core.runtime import Runtime

FILES = "files are the ones that were written"
WHOLE = "names, shapes and experts make the whole model"
FINITE = "every value is finite"
STOCK = "stock transformers loads it and agrees"
COUNTS = "counts are those of the plan"
AGAINST = "every tensor is what the plan makes of the original"
STEP = "expert_drop:keep=5,score=aimer"

Change = Callable[[dict[str, Tensor]], None]


def expert(layer: int, number: int, matrix: str = "w1") -> str:
    return f"model.layers.{layer}.block_sparse_moe.experts.{number}.{matrix}.weight"


def failed(folder: Path, against: Path | None = None) -> set[str]:
    """Names of the checks that did not hold."""
    result = api.verify(folder, against=against)
    bad = {check["name"] for check in result["checks"] if not check["ok"]}
    assert result["ok"] == (not bad)
    assert all(check["detail"] for check in result["checks"])
    return bad


def edit(folder: Path, name: str, change: Change) -> None:
    """Rewrite the shard that holds `name`, and tell the index what is in it now."""
    path = tensor_files(folder)[name]
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})
    body = json.loads((folder / INDEX).read_text())
    kept = {key: file for key, file in body["weight_map"].items() if file != path.name}
    body["weight_map"] = kept | dict.fromkeys(tensors, path.name)
    (folder / INDEX).write_text(json.dumps(body))


def set_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def reseal(folder: Path) -> None:
    """Put the manifest's sizes and digests right, as a careful forger would."""
    manifest = json.loads((folder / MANIFEST).read_text())
    for name in manifest["files"]:
        content = (folder / name).read_bytes()
        manifest["files"][name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (folder / MANIFEST).write_text(json.dumps(manifest))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def press(source: Path, out: Path, **runtime: bool) -> Path:
    """Press into several shards."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(write, "_SMALLEST", 60_000)
        api.press(source, out=out, steps=[STEP], runtime=Runtime(**runtime))
    return out


@pytest.fixture(scope="module")
def source(zoo: Zoo) -> Path:
    return zoo("mixtral")


@pytest.fixture(scope="module")
def pressed(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return press(source, tmp_path_factory.mktemp("verify") / "pressed")


@pytest.fixture
def folder(pressed: Path, tmp_path: Path) -> Path:
    """A copy to plant a fault in."""
    return Path(shutil.copytree(pressed, tmp_path / "copy"))


class TestGood:
    def test_a_pressed_folder_holds_and_is_not_touched(self, pressed: Path, source: Path):
        before = contents(pressed)
        result = api.verify(pressed, against=source)
        assert [check["name"] for check in result["checks"]] == [FILES, WHOLE, FINITE, STOCK, COUNTS, AGAINST]
        assert result["ok"]
        assert contents(pressed) == before

    @pytest.mark.parametrize("family", ["qwen2_moe", "deepseek_v3", "gpt_oss", "granitemoe"])
    @pytest.mark.few(2)
    def test_other_families_hold(self, family: str, zoo: Zoo, tmp_path: Path):
        api.press(zoo(family), out=tmp_path / "out", steps=["expert_drop:ratio=0.25,score=random"])
        assert failed(tmp_path / "out", zoo(family)) == set()

    def test_the_readers_own_notes_do_no_harm(self, folder: Path):
        (folder / "notes.txt").write_text("it runs")
        assert failed(folder) == set()

    def test_an_allowed_nan_is_expected_where_it_was_allowed(self, tmp_path: Path):
        """In an expert that is kept under another number, since the manifest must know it by its new one."""
        model = write_model("mixtral", tmp_path / "model")
        clean = press(model, tmp_path / "clean")
        plan = json.loads((clean / MANIFEST).read_text())["plan"]["stages"][0]["treatments"]
        # Norms are not scored, so a NaN there changes no decision; experts are, so the last shard's norm is taken too.
        moved = next(
            (int(unit[1]), old, new)
            for unit, treatment in plan.items()
            for new, old in enumerate(treatment["keep"])
            if old != new
        )
        api.plan(model, out=tmp_path / "plan.json", steps=[STEP])
        wanted = expert(*moved[:2], "w3")

        def spoil(tensors: dict[str, Tensor]) -> None:
            tensors[wanted].view(-1)[5] = float("nan")

        edit(model, wanted, spoil)
        plan_path = tmp_path / "plan.json"
        body = json.loads(plan_path.read_text())
        body["blueprint"] = api.inspect(model)["digest"]
        plan_path.write_text(json.dumps(body))
        api.build(model, plan=plan_path, out=tmp_path / "out", runtime=Runtime(allow_nonfinite=True))
        out_name = expert(moved[0], moved[2], "w3")
        assert int(read_tensor(tmp_path / "out", out_name).isnan().sum()) == 1
        assert failed(tmp_path / "out", model) == set()


class TestPlanted:
    def test_a_flipped_bit(self, folder: Path, source: Path):
        name = expert(1, 3)
        path = tensor_files(folder)[name]
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
        assert failed(folder) == {FILES}
        reseal(folder)
        assert failed(folder) == set()
        assert failed(folder, source) == {AGAINST}

    @pytest.mark.parametrize("name", ["tokenizer.json", "generation_config.json", "README.md", "config.json"])
    def test_a_changed_small_file(self, folder: Path, name: str):
        (folder / name).write_bytes((folder / name).read_bytes() + b"\n")
        assert failed(folder) == {FILES}

    @pytest.mark.parametrize("name", ["tokenizer.json", "README.md"])
    def test_a_missing_small_file(self, folder: Path, name: str):
        (folder / name).unlink()
        assert failed(folder) == {FILES}

    @pytest.mark.parametrize("damage", ["delete", "truncate", "empty"])
    def test_a_lost_shard(self, folder: Path, damage: str):
        path = tensor_files(folder)[expert(2, 0)]
        if damage == "delete":
            path.unlink()
        else:
            path.write_bytes(b"" if damage == "empty" else path.read_bytes()[:-7])
        assert failed(folder) == {FILES, WHOLE}

    @pytest.mark.parametrize("name", ["config.json", INDEX])
    def test_a_lost_key_file(self, folder: Path, name: str):
        (folder / name).unlink()
        assert failed(folder) == {FILES, WHOLE}

    def test_a_renamed_expert(self, folder: Path):
        """Stock transformers would initialise the missing one at random, with no more than a warning."""

        def rename(tensors: dict[str, Tensor]) -> None:
            tensors[expert(1, 9)] = tensors.pop(expert(1, 4))

        edit(folder, expert(1, 4), rename)
        reseal(folder)
        assert failed(folder) == {WHOLE}

    def test_a_missing_tensor(self, folder: Path):
        edit(folder, expert(1, 4), lambda tensors: tensors.pop(expert(1, 4)))
        reseal(folder)
        assert failed(folder) == {WHOLE}

    @pytest.mark.parametrize("count", [4, 6, 8])
    def test_a_wrong_count_in_the_config(self, folder: Path, count: int):
        set_config(folder, num_local_experts=count)
        assert failed(folder) == {FILES, WHOLE}
        reseal(folder)
        assert failed(folder) == {WHOLE}

    @pytest.mark.parametrize(
        "change", [{"num_experts_per_tok": 2}, {"rms_norm_eps": 0.1}, {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}], ids=str
    )  # fmt: skip
    def test_a_config_that_is_not_the_originals(self, folder: Path, source: Path, change: dict[str, object]):
        set_config(folder, **change)
        assert failed(folder) == {FILES}
        reseal(folder)
        assert failed(folder, source)

    def test_a_nan(self, folder: Path, source: Path):
        def spoil(tensors: dict[str, Tensor]) -> None:
            tensors[expert(0, 2)].view(-1)[7] = float("nan")

        edit(folder, expert(0, 2), spoil)
        reseal(folder)
        found = failed(folder, source)
        assert {FINITE, AGAINST} <= found <= {FINITE, AGAINST, STOCK}

    def test_a_nan_that_nobody_uses(self, folder: Path):
        """A row of the embedding that the trial tokens miss would not show in the logits."""

        def spoil(tensors: dict[str, Tensor]) -> None:
            tensors["model.embed_tokens.weight"][0, 0] = -float("inf")

        edit(folder, "model.embed_tokens.weight", spoil)
        reseal(folder)
        assert FINITE in failed(folder)

    @pytest.mark.parametrize(
        "name", ["model.safetensors", "model-00009-of-00009.safetensors", "adapter_config.json"]
    )
    def test_a_stray_file_that_might_be_loaded(self, folder: Path, name: str):
        """With an extra model.safetensors the index is not even looked at: that file is the model then, as for transformers."""
        if name.endswith(".json"):
            (folder / name).write_text("{}")
        else:
            save_file({"x": torch.zeros(1)}, folder / name)
        loaded = name != "model-00009-of-00009.safetensors"
        assert failed(folder) == ({FILES, WHOLE} if loaded else {FILES})

    def test_two_experts_swapped(self, folder: Path, source: Path):
        """Every name, shape and value is there: only the original can tell."""
        one, two = expert(0, 1), expert(0, 3)
        first, second = read_tensor(folder, one).clone(), read_tensor(folder, two).clone()
        edit(folder, one, lambda tensors: tensors.update({one: second}))
        edit(folder, two, lambda tensors: tensors.update({two: first}))
        assert FILES in failed(folder)
        reseal(folder)
        assert failed(folder) == set()
        assert failed(folder, source) == {AGAINST}

    def test_a_router_row_of_a_dropped_expert(self, folder: Path, source: Path):
        name = "model.layers.0.block_sparse_moe.gate.weight"
        edit(folder, name, lambda tensors: tensors.update({name: tensors[name].roll(1, 0)}))
        reseal(folder)
        assert failed(folder, source) == {AGAINST}

    def test_another_precision(self, folder: Path, source: Path):
        name = "model.norm.weight"
        edit(folder, name, lambda tensors: tensors.update({name: tensors[name].bfloat16()}))
        reseal(folder)
        assert failed(folder, source) == {AGAINST}

    def test_counts_that_are_not_the_plans(self, folder: Path):
        manifest = json.loads((folder / MANIFEST).read_text())
        manifest["layers"][1]["experts"] = 6
        (folder / MANIFEST).write_text(json.dumps(manifest))
        assert failed(folder) == {COUNTS}


class TestRefused:
    def test_a_folder_that_is_not_ours(self, source: Path):
        with pytest.raises(UserError, match="is not a finished moespresso result"):
            api.verify(source)

    @pytest.mark.parametrize("body", ["", "{", "[]", "{}", '{"files": 3}', '{"files": {}}'])
    def test_a_broken_manifest(self, folder: Path, body: str):
        (folder / MANIFEST).write_text(body)
        with pytest.raises(UserError, match=MANIFEST):
            api.verify(folder)

    def test_the_wrong_original(self, folder: Path, tmp_path: Path):
        other = write_model("mixtral", tmp_path / "other", seed=1)
        assert failed(folder, other) == {AGAINST}

    def test_an_original_of_another_family(self, folder: Path, zoo: Zoo):
        assert failed(folder, zoo("olmoe")) == {AGAINST}


class TestCommandLine:
    def test_exit_code_0(self, pressed: Path, source: Path, capsys: pytest.CaptureFixture[str]):
        assert main(["verify", str(pressed), "--against", str(source), "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["ok"] is True

    def test_exit_code_3_names_the_checks(self, folder: Path, capsys: pytest.CaptureFixture[str]):
        (folder / "README.md").unlink()
        assert main(["verify", str(folder), "--json"]) == 3
        said = capsys.readouterr()
        assert json.loads(said.out)["ok"] is False
        assert FILES in said.err
        assert "Traceback" not in said.err

    def test_exit_code_2_where_there_is_nothing_to_verify(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ):
        assert main(["verify", str(tmp_path)]) == 2
        assert "Traceback" not in capsys.readouterr().err
