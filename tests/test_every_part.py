"""Every step that treats matrices really does to each part that it takes what its settings say, and nothing to the others.

What is written is decoded to a plain checkpoint, tensor by tensor, and held against the source: a step that says a part is
treated and leaves it whole would pass every other check, since a folder with weights of the original is a good folder.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import Tensor

import families
from conftest import Zoo
from moespresso import api
from moespresso.build import open_view
from moespresso.core.errors import UserError
from moespresso.core.method import MATRIX_PARTS, Treats
from moespresso.core.plan import Plan
from moespresso.core.registry import methods
from moespresso.effect import validated

BITS, GONE = 3, 0.75
# What a step is told here, and what shows that it was done: levels in a row, zeros in a matrix, or its rank.
STEPS = {
    "rtn": (f"bits={BITS},group_size=0,symmetric=false", "bits"),
    "hqq": (f"bits={BITS},group_size=0,symmetric=false", "bits"),
    "gptq": (f"bits={BITS},group_size=0,symmetric=false", "bits"),
    "awq": (f"bits={BITS},group_size=0,symmetric=false,inner=false,inputs=false", "bits"),
    "autoround": (f"bits={BITS},group_size=0,symmetric=false,iterations=3", "bits"),
    "magnitude": (f"sparsity={GONE}", "zeros"),
    "wanda": (f"sparsity={GONE}", "zeros"),
    "sparsegpt": (f"sparsity={GONE}", "zeros"),
    "low_rank": ("ratio=0.5", "rank"),
}
PACKS = ("magnitude", "wanda", "sparsegpt")


def treats() -> dict[str, tuple[str, ...]]:
    """The parts that each registered step can treat."""
    fields = {kind: {each.name for each in dataclasses.fields(cls)} for kind, cls in methods().items()}
    return {
        kind: cls.able
        for kind, cls in methods().items()
        if issubclass(cls, Treats) and "parts" in fields[kind]
    }


def cases() -> list[tuple[str, str]]:
    """Every step with all of its parts at once, and one with each of them alone."""
    alone = [("magnitude", part) for part in MATRIX_PARTS]
    return [*((kind, "+".join(able)) for kind, able in treats().items()), *alone]


def test_every_step_that_treats_parts_is_here():
    assert treats().keys() == STEPS.keys()
    assert {part for able in treats().values() for part in able} == set(MATRIX_PARTS)


def pressed(model: Path, step: str, text: Path, out: Path) -> Path:
    """What a step leaves of a model, as a plain checkpoint."""
    api.press(model, out=out, steps=[step], texts=[text], samples=4, length=24, target="plugin")
    if not open_view(out).formats:
        return out
    api.export(out, to="plain", out=out.with_name("plain"))
    return out.with_name("plain")


def check(how: str, was: Tensor, now: Tensor) -> None:
    """Whether a matrix has become what the step was told to make of it."""
    rows, columns = was.shape
    assert not torch.equal(was.float(), now.float())
    if how == "zeros":
        gone = (now == 0).float().mean().item()
        assert abs(gone - GONE) <= 1 / columns, f"{gone:.3f} are zero"
        return
    if how == "bits":
        assert max(len(row.unique()) for row in now) <= 2**BITS
        return
    rank = max(1, int(0.5 * rows * columns / (rows + columns)))
    values = torch.linalg.svdvals(now.double())
    assert rank == min(rows, columns) or values[rank] < 0.02 * values[0]


@pytest.mark.parametrize(("kind", "parts"), cases())
@pytest.mark.few(2)
def test_a_part_that_is_named_is_treated(kind: str, parts: str, zoo: Zoo, text: Path, tmp_path: Path):
    _held(zoo("deepseek_v3"), kind, parts, "", text, tmp_path)


@pytest.mark.parametrize(
    ("kind", "parts"),
    [
        ("magnitude", "head"),
        ("wanda", "experts+attention"),
        ("sparsegpt", "shared"),
        ("magnitude", "experts+attention+head"),
    ],
)
@pytest.mark.few(1)
def test_so_is_one_that_is_stored_with_a_mask(kind: str, parts: str, zoo: Zoo, text: Path, tmp_path: Path):
    _held(zoo("qwen2_moe"), kind, parts, ",pack=true", text, tmp_path)


def test_a_plan_by_hand_names_parts_that_its_step_takes(zoo: Zoo, tmp_path: Path):
    """A step on text is shown layers alone: a head that it was said to treat would stay as it was."""
    api.plan(zoo("mixtral"), steps=["magnitude:parts=head"], out=tmp_path / "plan.json")
    body = (tmp_path / "plan.json").read_text()
    source = open_view(zoo("mixtral")).source
    validated(Plan.from_json(body), source)
    with pytest.raises(UserError, match="by wanda, which treats experts, shared, attention or dense"):
        validated(
            Plan.from_json(
                body.replace('"magnitude"', '"wanda"').replace('"parts": "head"', '"parts": "experts"')
            ),
            source,
            steps=True,
        )


def _held(model: Path, kind: str, parts: str, more: str, text: Path, tmp: Path) -> None:
    settings, how = STEPS[kind]
    made = pressed(model, f"{kind}:parts={parts},{settings}{more}", text, tmp / "out")
    assert "head" not in parts or api.verify(tmp / "out", against=model)["ok"]
    treated: dict[str, int] = dict.fromkeys(parts.split("+"), 0)
    entries = open_view(model).source.entries
    for entry in entries:
        was = families.read_tensor(model, entry.ref.name)
        now = families.read_tensor(made, entry.ref.name)
        part = entry.unit.part
        if (
            part in treated
            and was.ndim == 2
            and entry.ref.name.endswith(".weight")
            and len(was) > 1
            and entry.in_graph
        ):
            check(how, was, now)
            treated[part] += 1
        else:
            assert torch.equal(was, now), entry.ref.name
    assert all(treated.values()), treated
