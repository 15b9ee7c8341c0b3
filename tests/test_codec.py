"""A number format is one file: NF4, whose levels are a codebook, defined here alone and taken through every verb.

NF4 (arXiv 2305.14314, appendix E): sixteen levels, the quantiles of a normal distribution, times the largest weight of a group.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import moespresso
from moespresso import api
from moespresso.build import open_view
from moespresso.core import registry
from moespresso.core.blueprint import Entry, TensorRef
from moespresso.core.errors import UserError
from moespresso.core.format import Format
from moespresso.core.method import Quantizes
from moespresso.core.plan import Plan
from moespresso.effect import price
from moespresso.formats import Codec, Parts, Shapes, check_group
from moespresso.formats import codec as registers
from moespresso.methods import OnMatrices

LEVELS = torch.tensor(
    [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
     -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
     0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0]
)  # fmt: skip


@dataclass(frozen=True)
class Numbers:
    """Places in the codebook, uint8 [N, out, in], and the largest weight of every group [N, out, G]."""

    places: Tensor
    largest: Tensor


class Nf4(Codec):
    """Two places a byte, the earlier in the lower half; one scale a group."""

    layout: ClassVar[str] = "nf4"
    kinds: ClassVar[frozenset[str]] = frozenset({"nf4"})
    parts: ClassVar[tuple[str, ...]] = ("weight_places", "weight_largest")
    scaled: ClassVar[str] = "weight_largest"
    rounds: ClassVar[bool] = True
    title: ClassVar[str] = "matrices in NF4"
    settings: ClassVar[tuple[str, ...]] = ("bits", "group_size")

    def shapes(self, format: Format, out: int, width: int, dtype: str) -> Shapes:
        return {
            "weight_places": ((out, width // 2), "U8"),
            "weight_largest": ((out, width // format.group_size), dtype),
        }

    def check(self, format: Format, shape: tuple[int, ...], name: str, beside: Iterable[int] = ()) -> None:
        check_group(shape[-1], format, name, beside)

    def encode(self, numbers: Numbers, format: Format) -> dict[str, Tensor]:
        low, high = numbers.places[..., ::2], numbers.places[..., 1::2]
        return {"weight_places": low | high << 4, "weight_largest": numbers.largest}

    def decode(self, parts: Parts, format: Format, shape: tuple[int, int]) -> Tensor:
        self.check_parts(parts, format, shape)
        pairs, largest = parts["weight_places"], parts["weight_largest"]
        places = torch.stack([pairs & 15, pairs >> 4], -1).flatten(-2)
        levels = LEVELS[places.long()].to(largest.dtype)
        return levels * largest.repeat_interleave(format.group_size, -1)

    def nearest(self, weights: Tensor, format: Format, dtype: torch.dtype) -> Numbers:
        return nf4(weights, format, dtype)

    def size(
        self, parts: Mapping[str, TensorRef], format: Format, read: Callable[[TensorRef], list[int]]
    ) -> tuple[int, int]:
        out, half = parts["weight_places"].shape
        return out, 2 * half

    def words(self, format: Format, ranks: str) -> str:
        return f"NF4, groups of {format.group_size}"


def nf4(weights: Tensor, format: Format, dtype: torch.dtype) -> Numbers:
    """The nearest level of every weight [N, out, in]."""
    grouped = weights.float().unflatten(-1, (-1, format.group_size))
    largest = grouped.abs().amax(-1).to(dtype)
    levels = LEVELS * largest.float().unsqueeze(-1)
    places = (grouped.unsqueeze(-1) - levels.unsqueeze(-2)).abs().argmin(-1)
    return Numbers(places.flatten(-2).to(torch.uint8), largest)


@dataclass(frozen=True, slots=True, kw_only=True)
class Nf4Step(OnMatrices, Quantizes):
    """Settings of one rounding to NF4.

    group_size: inputs that share a scale.
    """

    kind: ClassVar[str] = "nf4"
    group_size: int = 16

    @property
    def kinds(self) -> frozenset[str]:
        return frozenset({"nf4"})

    def form(self, chosen: list[Entry]) -> Callable[[Entry, int | None], Format]:
        return lambda entry, layer: Format("nf4", bits=4, group_size=self.group_size)

    def quantize(self, weights: Tensor, format: Format, dtype: torch.dtype) -> Numbers:
        return nf4(weights, format, dtype)


@pytest.fixture(scope="module", autouse=True)
def _registered() -> Iterator[None]:
    """Known to moespresso while this file runs."""
    registers(Nf4)
    registry.method(Nf4Step)
    yield
    registry._METHODS.pop("nf4")
    importlib.import_module("moespresso.formats.codec")._CODECS.pop("nf4")


@pytest.fixture(scope="module")
def pressed(source: Path, tmp_path_factory: pytest.TempPathFactory, _registered: None) -> Path:
    out = tmp_path_factory.mktemp("nf4") / "out"
    api.press(source, out=out, steps=["nf4:parts=experts+attention"], target="plugin")
    return out


def packed_names(view: Any) -> set[str]:
    return {piece.name for piece in view.pieces if piece.ref.packed is not None}


def test_it_is_pressed_as_the_formula_says(source: Path, pressed: Path):
    before, after = load_file(source / "model.safetensors"), load_file(pressed / "model.safetensors")
    name = "model.layers.1.self_attn.k_proj"
    weights = before[f"{name}.weight"].float()
    places, largest = after[f"{name}.weight_places"], after[f"{name}.weight_largest"]
    for row, column in ((0, 0), (3, 17), (5, 63)):
        byte = int(places[row, column // 2])
        level = LEVELS[byte >> 4 if column % 2 else byte & 15]
        group = weights[row, column // 16 * 16 : column // 16 * 16 + 16]
        assert float(largest[row, column // 16]) == float(group.abs().max().to(largest.dtype))
        distances = (LEVELS * float(group.abs().max()) - weights[row, column]).abs()
        assert abs(float(level) - float(LEVELS[distances.argmin()])) < 1e-6


def test_it_is_verified_byte_for_byte(source: Path, pressed: Path):
    verdict = api.verify(pressed, against=source)
    assert verdict["ok"], verdict
    assert any("nf4" in check["detail"] for check in verdict["checks"])


def test_it_is_loaded_decoded(source: Path, pressed: Path):
    model = moespresso.load(pressed, dtype="float32")
    state, view = model.state_dict(), open_view(pressed)
    name = "model.layers.0.self_attn.q_proj.weight"
    wanted = load_file(source / "model.safetensors")[name].float()
    assert name in packed_names(view)
    # Half the widest gap between levels is 0.15 of the largest weight.
    assert float((state[name] - wanted).abs().max()) <= 0.153 * float(wanted.abs().max())
    assert not torch.equal(state[name], wanted)


def test_it_is_priced_by_its_parts(source: Path, pressed: Path):
    plan = Plan.from_json(json.dumps(json.loads((pressed / "moespresso.json").read_text())["plan"]))
    stored = sum(tensor.nbytes for tensor in load_file(pressed / "model.safetensors").values())
    assert price(plan, open_view(source).source).bytes == stored
    assert "NF4, groups of 16" in " ".join(api.inspect(pressed)["notes"])


def test_it_is_pressed_on_and_keeps_its_format(pressed: Path, tmp_path: Path, text: Path):
    api.press(
        pressed, out=tmp_path / "out", steps=["expert_merge:keep=4"], texts=[text], samples=4, length=16,
        target="plugin",
    )  # fmt: skip
    view = open_view(tmp_path / "out")
    assert {piece.ref.packed.format.kind for piece in view.pieces if piece.ref.packed} == {"nf4"}
    assert api.verify(tmp_path / "out", against=pressed)["ok"]


def test_stock_engines_and_other_layouts_are_refused(source: Path, pressed: Path, tmp_path: Path):
    with pytest.raises(UserError, match=r"stores matrices in NF4, which transformers does not read"):
        api.press(source, out=tmp_path / "out", steps=["nf4"])
    with pytest.raises(UserError, match="gptq stores integers"):
        api.export(pressed, to="gptq", out=tmp_path / "gptq")
    api.export(pressed, to="plain", out=tmp_path / "plain")
    assert not packed_names(open_view(tmp_path / "plain"))


def test_what_cannot_be_stored_is_refused_before_any_work(source: Path, tmp_path: Path):
    with pytest.raises(
        UserError, match=r"has (64|96) inputs, which groups of 24 do not divide: use group_size=32"
    ):
        api.press(source, out=tmp_path / "out", steps=["nf4:group_size=24"], target="plugin")
    with pytest.raises(UserError, match=r"prunes .* after a step that rounds weights: put the rounding last"):
        api.press(source, out=tmp_path / "out", steps=["nf4", "magnitude"], target="plugin")


def test_a_damaged_part_is_refused(pressed: Path, tmp_path: Path):
    tensors = load_file(pressed / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight_largest"
    copied = tmp_path / "model"
    copied.mkdir()
    for file in pressed.iterdir():
        if file.is_file() and file.name not in ("model.safetensors", "moespresso.json"):
            (copied / file.name).write_bytes(file.read_bytes())
    save_file(tensors | {name: tensors[name][:, :-1].contiguous()}, copied / "model.safetensors")
    with pytest.raises(UserError, match=r"weight_largest is .* as its format says"):
        open_view(copied)
