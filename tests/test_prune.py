"""Weight pruning as a step: exactly so many zeros, in exactly that pattern, in files that load anywhere."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import moespresso
from conftest import Zoo, write_wide
from driver import Driver
from moespresso import api
from moespresso.build import Tensors, open_view
from moespresso.core.errors import UserError
from moespresso.core.registry import opened, parse_step
from moespresso.effect import price
from moespresso.run import Recipe
from test_depth_steps import plan_of
from test_resume import KILLED, Press, contents, same
from test_slim import disk, disk_of, press, proven

FAMILIES = ["mixtral", "qwen3_moe", "deepseek_v2", "olmoe", "glm4_moe", "ernie4_5_moe"]
STEPS = ["magnitude", "wanda", "wanda:variant=true,gate=true", "sparsegpt", "sparsegpt:weighting=gate2"]
PATTERNS = ["magnitude:sparsity=2:4", "wanda:sparsity=2:4", "sparsegpt:sparsity=2:4", "wanda:sparsity=1:4"]


def experts(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor.float() for name, tensor in disk_of(folder).items() if ".experts." in name}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("step", STEPS)
@pytest.mark.few(2)
def test_half_of_every_matrix_goes_and_nothing_else_changes(
    family: str, step: str, zoo: Zoo, text: Path, tmp_path: Path
):
    out = press(zoo(family), tmp_path / "out", step, text=None if step == "magnitude" else text)
    assert "logits within" in proven(out, zoo(family))["stock transformers loads it and agrees"]
    before = disk_of(zoo(family))
    for name, tensor in experts(out).items():
        whole = tensor.shape[0] * round(tensor.shape[1] / 2)
        assert int((tensor != 0).sum()) == whole
        if "sparsegpt" not in step:  # what stays is what was
            assert bool(((tensor == 0) | (tensor == before[name].float())).all())
    for name, tensor in disk_of(out).items():
        if ".experts." not in name:
            assert torch.equal(tensor, before[name]), name
    assert price(plan_of(out), open_view(zoo(family)).source).bytes == sum(
        t.nbytes for t in disk(out).values()
    )


@pytest.mark.parametrize("step", PATTERNS)
def test_patterns_are_kept_to_the_weight(step: str, zoo: Zoo, text: Path, tmp_path: Path):
    out = press(zoo("mixtral"), tmp_path / "out", step, text=text)
    stay = int(step[-3])
    for tensor in experts(out).values():
        assert set((tensor.unflatten(1, (-1, 4)) != 0).sum(2).unique().tolist()) == {stay}


@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize("sparsity", ["0.5", "2:4"])
@pytest.mark.few(1)
def test_pruned_and_rounded_in_one_pass(bits: int, sparsity: str, source: Path, text: Path, tmp_path: Path):
    out = press(
        source, tmp_path / "out", f"sparsegpt:sparsity={sparsity},bits={bits},group_size=32", text=text
    )
    proven(out, source)
    view = open_view(out)
    with Tensors(out) as reader:
        for piece in view.pieces:
            if piece.unit.part == "experts":
                values = reader.whole(piece).float()
                assert float((values == 0).float().mean()) >= 0.5
    assert {packed.bits for packed in view.formats.values()} == {bits}


@pytest.mark.parametrize(
    "steps",
    [
        ["expert_drop:keep=6", "wanda"],
        ["wanda", "expert_drop:keep=6,renormalise=compensate"],
        ["channel_prune:width=64", "sparsegpt:sparsity=2:4"],
        ["expert_merge:ratio=0.25", "magnitude"],
        ["magnitude", "rtn:group_size=32"],
        ["wanda", "gptq:group_size=32"],
        ["magnitude:sparsity=0.25", "magnitude:sparsity=0.75"],
        ["wanda:sparsity=0.25", "magnitude:sparsity=0.75"],
        ["magnitude", "block_drop"],
    ],
)
@pytest.mark.few(1)
def test_before_and_after_other_steps(steps: list[str], text: Path, tmp_path: Path):
    source = write_wide(tmp_path / "source")
    out = press(source, tmp_path / "out", *steps, text=text)
    proven(out, source)
    if steps[-1].endswith("0.75"):
        assert all(int((t != 0).sum()) == t.shape[0] * round(t.shape[1] / 4) for t in experts(out).values())


def test_zeros_are_not_filled_again_without_a_word(text: Path, tmp_path: Path):
    source = write_wide(tmp_path / "source")
    with pytest.raises(
        UserError, match="prunes single weights, which would no longer be zero: put that step last"
    ):
        press(source, tmp_path / "out", "magnitude", "channel_prune:width=64", text=text)


def test_a_packed_folder_is_pruned_and_packed_again(packed: Path, text: Path, tmp_path: Path):
    for step in ("magnitude", "wanda"):
        proven(press(packed, tmp_path / step, step, text=text), packed)


def test_other_parts_go_only_where_asked(zoo: Zoo, text: Path, tmp_path: Path):
    out = press(
        zoo("deepseek_v2"), tmp_path / "out", "wanda:parts=experts+shared+dense,exclude=L2.*", text=text
    )
    proven(out, zoo("deepseek_v2"))
    before = disk_of(zoo("deepseek_v2"))
    for name, tensor in disk_of(out).items():
        meant = (
            any(word in name for word in (".experts.", "shared", "layers.0.mlp")) and "layers.2." not in name
        )
        assert bool((tensor == 0).float().mean() >= 0.45) == meant, name
        assert meant or torch.equal(tensor, before[name])


def test_later_layers_see_what_the_pruned_ones_before_let_through(zoo: Zoo, text: Path, tmp_path: Path):
    found = [experts(press(zoo("mixtral"), tmp_path / str(on), f"wanda:sequential={on}", text=text))
             for on in ("true", "false")]  # fmt: skip
    equal = {name: torch.equal(tensor, found[1][name]) for name, tensor in found[0].items()}
    assert all(same for name, same in equal.items() if "layers.0." in name)
    assert not all(equal.values())


def test_nothing_to_prune_changes_no_weight(zoo: Zoo, text: Path, tmp_path: Path):
    for step in ("magnitude", "wanda", "sparsegpt"):
        out = press(zoo("mixtral"), tmp_path / step, f"{step}:sparsity=0", text=text)
        before = disk_of(zoo("mixtral"))
        assert all(torch.equal(tensor, before[name]) for name, tensor in disk_of(out).items())


def test_experts_without_a_token_go_by_their_weights_and_are_named(zoo: Zoo, tmp_path: Path):
    few = tmp_path / "few.txt"
    few.write_text("red green blue")
    for step in ("wanda", "sparsegpt", "sparsegpt:bits=4,group_size=0"):
        out = tmp_path / step.replace(":", "-")
        report = api.press(zoo("mixtral"), out=out, steps=[step], texts=[few], samples=1, length=8)
        assert any("without any were treated by magnitude" in note for note in report.notes)
        proven(out, zoo("mixtral"))


@pytest.mark.parametrize(
    ("step", "reason"),
    [
        ("wanda:sparsity=1", "sparsity '1' is neither a share"),
        ("wanda:sparsity=-0.5", "sparsity '-0.5' is neither a share"),
        ("magnitude:sparsity=nan", "sparsity 'nan' is neither a share"),
        ("magnitude:sparsity=half", "sparsity 'half' is neither a share"),
        ("wanda:sparsity=0:4", "of every M weights 1 to M stay"),
        ("wanda:sparsity=5:4", "of every M weights 1 to M stay"),
        ("wanda:sparsity=3:7", "which groups of 7 do not divide: use another pattern, such as 2:4"),
        ("sparsegpt:sparsity=3:7,bits=4,group_size=8", "which groups of 7 do not divide"),
        ("wanda:sparsity=2:4,variant=true", "variant=true shares out a plain sparsity"),
        ("wanda:parts=head", "not head: use magnitude"),
        ("wanda:parts=router", "parts='router' is unknown"),
        ("sparsegpt:damping=-1", "damping must not be negative"),
        ("sparsegpt:bits=5", "bits=5 must be 2, 3, 4 or 8"),
    ],
)
def test_wishes_that_cannot_be(step: str, reason: str, zoo: Zoo, text: Path, tmp_path: Path):
    with pytest.raises(UserError, match=reason):
        press(zoo("mixtral"), tmp_path / "out", step, text=text)
    assert not (tmp_path / "out").exists()


def test_pruning_after_rounding_and_merging_after_pruning_are_refused(
    source: Path, text: Path, tmp_path: Path
):
    for steps, reason in ((["rtn:group_size=32", "wanda"], "put the rounding last"),
                          (["gptq:group_size=32", "channel_prune:width=64"], "put the rounding last"),
                          (["wanda", "expert_merge:ratio=0.25"], "put that step last")):  # fmt: skip
        with pytest.raises(UserError, match=reason):
            press(source, tmp_path / "out", *steps, text=text)
    for step in ("rtn:group_size=32", "magnitude", "gptq:group_size=32"):
        for first in ("wanda:pack=true", "low_rank:ratio=0.25"):
            with pytest.raises(
                UserError, match="after a step that stores matrices with a mask or as factors"
            ):
                press(source, tmp_path / "out", first, step, text=text, target="plugin")
    with pytest.raises(UserError, match="take as many bytes"):
        press(source, tmp_path / "out", "magnitude", size="50%")


@pytest.mark.parametrize("line", ["end rename slim-00001.safetensors", "end remember 2"])
@pytest.mark.breadth
def test_killed_and_taken_up(line: str, driver: Driver, zoo: Zoo, text: Path, tmp_path: Path):
    whole = Press(driver, zoo("mixtral"), text, tmp_path / "whole")
    assert whole("sparsegpt").code == 0
    again = Press(driver, zoo("mixtral"), text, tmp_path / "out")
    assert again("sparsegpt", kill=line).code == KILLED
    assert again("sparsegpt").code == 0
    assert same(contents(again.out), contents(whole.out))


# Stored with a mask

PACKED = ["magnitude:pack=true", "wanda:pack=true,sparsity=2:4", "sparsegpt:pack=true,sparsity=0.75"]


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v2", "ernie4_5_moe"])
@pytest.mark.parametrize("step", PACKED)
@pytest.mark.few(1)
def test_a_mask_and_what_stays_are_the_same_matrices_in_fewer_bytes(
    family: str, step: str, zoo: Zoo, text: Path, tmp_path: Path
):
    plain = press(zoo(family), tmp_path / "plain", step.replace("pack=true", "pack=false"), text=text)
    out = press(zoo(family), tmp_path / "out", step, text=text, target="plugin")
    proven(out, zoo(family))
    tensors = disk(out)
    assert price(plan_of(out), open_view(zoo(family)).source).bytes == sum(t.nbytes for t in tensors.values())
    assert sum(t.nbytes for t in tensors.values()) < sum(t.nbytes for t in disk(plain).values())
    with Tensors(out) as reader:
        for piece in open_view(out).pieces:
            assert torch.equal(reader.whole(piece), disk(plain)[piece.name]), piece.name
    loaded, dense = moespresso.load(out), moespresso.load(plain)
    for mine, other in zip(loaded.state_dict().values(), dense.state_dict().values(), strict=True):
        torch.testing.assert_close(
            mine.float(), other.float(), rtol=2**-8, atol=0
        )  # dtypes of loading may differ
    with pytest.raises(UserError, match=r"transformers does not read.*pack=false"):
        press(zoo(family), tmp_path / "stock", step, text=text)
    with pytest.raises(UserError, match="stores integers"):
        api.export(out, out=tmp_path / "gptq", to="gptq")


@pytest.mark.parametrize(
    "step",
    ["expert_drop:keep=6", "block_drop", "channel_prune:width=64", "rtn:group_size=32", "gptq:group_size=32",
     "expert_merge:ratio=0.25", "magnitude:sparsity=0.75,pack=true", "expert_drop:keep=6,renormalise=compensate"],
)  # fmt: skip
@pytest.mark.few(1)
def test_a_masked_folder_goes_on(step: str, text: Path, tmp_path: Path):
    source = write_wide(tmp_path / "source", "deepseek_v2", moe_intermediate_size=96)
    masked = press(source, tmp_path / "masked", "wanda:pack=true", text=text, target="plugin")
    out = press(masked, tmp_path / "out", step, text=text, target="plugin")
    proven(out, masked)


@pytest.mark.breadth
def test_a_byte_budget_finds_the_share(zoo: Zoo, tmp_path: Path):
    whole = open_view(zoo("mixtral")).source.cost().bytes
    out = press(
        zoo("mixtral"), tmp_path / "out", "magnitude:pack=true", size=round(whole * 0.8), target="plugin"
    )
    assert whole * 0.78 < sum(tensor.nbytes for tensor in disk(out).values()) <= whole * 0.8


def test_a_damaged_mask_is_told(zoo: Zoo, tmp_path: Path):
    out = press(zoo("mixtral"), tmp_path / "out", "magnitude:pack=true", target="plugin")
    tensors = disk(out)
    name = next(name for name in tensors if name.endswith("weight_mask"))
    tensors[name][0, 0] ^= 1
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    assert not api.verify(out, against=zoo("mixtral"))["ok"]
    with pytest.raises(UserError, match="weight_mask marks"):
        moespresso.load(out)


# Products of two


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v2", "qwen3_moe"])
@pytest.mark.few(1)
def test_products_are_stored_as_their_factors(family: str, zoo: Zoo, text: Path, tmp_path: Path):
    out = press(zoo(family), tmp_path / "out", "low_rank:ratio=0.25", text=text, target="plugin")
    proven(out, zoo(family))
    tensors, before = disk(out), disk_of(zoo(family))
    assert price(plan_of(out), open_view(zoo(family)).source).bytes == sum(t.nbytes for t in tensors.values())
    names = [name for name in before if ".experts." in name]
    stored = sum(t.nbytes for name, t in tensors.items() if ".experts." in name)
    assert stored <= 0.75 * sum(before[name].nbytes for name in names)
    state = moespresso.load(out).state_dict()
    assert all(bool(tensor.isfinite().all()) for tensor in state.values())
    with Tensors(out) as reader:
        for piece in open_view(out).pieces:
            if piece.name in names:
                left, right = (
                    tensors[piece.name.replace("weight", part)] for part in ("weight_left", "weight_right")
                )
                torch.testing.assert_close(
                    reader.whole(piece).float(), left.float() @ right.float(), rtol=2**-7, atol=1e-3
                )
    for step in ("expert_drop:keep=6,renormalise=compensate", "magnitude"):
        proven(press(out, tmp_path / step[:9], step, text=text, target="plugin"), out)


def test_products_are_for_our_own_loader(zoo: Zoo, text: Path, tmp_path: Path):
    with pytest.raises(
        UserError, match=r"products as their factors.*nearest plan that it can is channel_prune"
    ):
        press(zoo("mixtral"), tmp_path / "out", "low_rank", text=text)


@pytest.mark.parametrize("ratio", [0, 1, -0.5])
def test_a_ratio_of_low_rank_is_a_share(ratio: float, zoo: Zoo, text: Path, tmp_path: Path):
    with pytest.raises(UserError, match="must lie between 0 and 1"):
        press(zoo("mixtral"), tmp_path / "out", f"low_rank:ratio={ratio}", text=text)


def test_other_decompositions_are_unknown(zoo: Zoo, text: Path, tmp_path: Path):
    with pytest.raises(UserError, match="method='qr' is unknown"):
        press(zoo("mixtral"), tmp_path / "out", "low_rank:ratio=0.25,method=qr", text=text)


def test_modegpt_is_short_for_its_two_steps(
    zoo: Zoo, text: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    two = "channel_prune:ratio=0.3,score=leverage,refit=expert", "attention_rank:ratio=0.3"
    long = press(zoo("mixtral"), tmp_path / "long", *two, text=text, target="plugin")
    with caplog.at_level("INFO", "moespresso"):
        short = press(
            zoo("mixtral"),
            tmp_path / "short",
            "low_rank:method=modegpt,ratio=0.3",
            text=text,
            target="plugin",
        )
    assert (
        f"step 1, low_rank:ratio=0.3,method=modegpt, stands for {' and then '.join(two)} (give those to set more)"
        in caplog.messages
    )
    assert plan_of(short) == plan_of(long)
    one, other = disk(short), disk(long)
    assert one.keys() == other.keys()
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())
    proven(short, zoo("mixtral"))


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ("parts=attention", "step 2: .* to choose, give its two steps, channel_prune:.* and attention_rank"),
        ("exclude=L0.*", "to choose, give its two steps"),
        ("bases=2", "bases=2 is a setting of method=shared_basis"),
        ("ratio=1", "must lie between 0 and 1"),
    ],
)
def test_what_modegpt_cannot_be_told(settings: str, reason: str):
    with pytest.raises(UserError, match=reason):
        Recipe().with_options(steps=["expert_drop", f"low_rank:method=modegpt,{settings}"])


def test_a_step_that_is_short_for_others_does_nothing_by_itself(zoo: Zoo):
    step = parse_step("low_rank:method=modegpt,damping=0.1,sequential=false")
    assert [(each.kind, each.ratio, each.damping, each.sequential) for each in opened(step)] == [
        ("channel_prune", 0.25, 0.1, False), ("attention_rank", 0.25, 0.1, False)]  # fmt: skip
    with pytest.raises(UserError, match="short for channel_prune"):
        step.check(open_view(zoo("mixtral")).source)
    assert not step.kinds
