"""The streaming engine against stock transformers, family by family (levers A, B and C of docs/architecture.md).

The references of `families.py` share no code with the product: checkpoints of non-default shapes, the stock model in
memory, and Expert Drop cut into that model by hand.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

import families
from moespresso import api
from moespresso.build import Tensors, View
from moespresso.checkpoint import open_checkpoint
from moespresso.core.plan import Plan, Stage, Treatment
from moespresso.core.unit import Unit
from moespresso.data import Source
from moespresso.effect import price, validated
from moespresso.effect.rewrite import kept_by_layer
from moespresso.model import MetaModel, observing, read_blueprint, start
from moespresso.model.experts import experts_forward
from moespresso.stream import SweepOptions, sweep

FAMILIES = list(families.FAMILIES)
TOLERANCE = 2e-5
Zoo = Callable[[str], Path]


def view_of(folder: Path) -> View:
    checkpoint = open_checkpoint(folder)
    blueprint = read_blueprint(checkpoint)
    return View(checkpoint, blueprint, Plan(blueprint.digest))


def meta_of(view: View, reader: Tensors, dtype: torch.dtype = torch.float32) -> MetaModel:
    return view.meta_model(reader, dtype, torch.device("cpu"))


def streamed_logits(view: View, ids: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    mask = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask
    with Tensors(view.checkpoint.folder) as reader:
        meta = meta_of(view, reader)
        hidden = sweep(meta, ids, mask)
        with meta.outer(), torch.inference_mode():
            return meta.logits(hidden.flatten(0, 1)).view(*ids.shape, -1)


def quarter_dropped(view: View, seed: int = 3) -> Plan:
    """A plan that drops about a quarter of the experts at random, as the router's groups and floor allow."""
    generator = torch.Generator().manual_seed(seed)
    treatments = {}
    for layer in view.source.moe_layers:
        size = layer.experts // layer.groups
        each = max(size - max(1, round(size / 4)), -(-layer.floor // layer.groups))
        kept = [
            group * size + int(expert)
            for group in range(layer.groups)
            for expert in torch.randperm(size, generator=generator)[:each]
        ]
        treatments[Unit(layer.index, "experts")] = Treatment(keep=tuple(sorted(kept)))
    return validated(Plan(view.source.digest, (Stage({"kind": "expert_drop"}, treatments),)), view.source)


def close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    assert float((found - wanted).abs().max()) <= TOLERANCE * max(1.0, float(wanted.abs().max()))


def written(view: View, plan: Plan, out: Path) -> Path:
    path = out.with_suffix(".plan.json")
    plan.save(path)
    api.build(view.checkpoint.folder, plan=path, out=out)
    return out


def tensors(folder: Path) -> dict[str, tuple[str, tuple[int, ...], str]]:
    """Name -> dtype, shape and digest of the bytes, read by safetensors itself."""
    found = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118
                tensor = file.get_tensor(name)
                raw = tensor.contiguous().view(torch.uint8).numpy().tobytes()
                found[name] = (str(tensor.dtype), tuple(tensor.shape), hashlib.sha256(raw).hexdigest())
    return found


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.few(5)
def test_streamed_logits_are_the_models(zoo: Zoo, family: str) -> None:
    reference = families.reference(zoo(family))
    ids = families.random_ids(reference.config, 3, 17, 0)
    close(streamed_logits(view_of(zoo(family)), ids), families.logits_of(reference, ids))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.few(3)
def test_padding_on_the_right_changes_no_real_token(zoo: Zoo, family: str) -> None:
    view = view_of(zoo(family))
    ids = torch.randint(view.source.vocab, (2, 12), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[1, 7:] = False
    close(streamed_logits(view, ids, mask)[1, :7], streamed_logits(view, ids[1:, :7])[0])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.few(4)
def test_an_empty_plan_writes_the_same_bytes(zoo: Zoo, tmp_path: Path, family: str) -> None:
    view = view_of(zoo(family))
    out = written(view, view.plan, tmp_path / "out")
    assert tensors(out) == tensors(zoo(family))
    assert view.config == {k: v for k, v in view.checkpoint.config.items() if k != "auto_map"}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.few(3)
def test_a_quarter_of_the_experts_dropped_is_the_model_cut_by_hand(
    zoo: Zoo, tmp_path: Path, family: str
) -> None:
    view = view_of(zoo(family))
    plan = quarter_dropped(view)
    out = written(view, plan, tmp_path / "out")
    # `reference` asserts that stock from_pretrained misses, ignores and reshapes nothing.
    loaded = families.reference(out)
    kept = {layer: list(experts) for layer, experts in kept_by_layer(plan, view.source).items()}
    ids = families.random_ids(loaded.config, 3, 17, 0)
    wanted = families.logits_of(families.cut_by_hand(families.reference(zoo(family)), kept), ids)
    close(families.logits_of(loaded, ids), wanted)
    close(streamed_logits(view_of(out), ids), wanted)
    close(streamed_logits(replace(view, plan=plan), ids), wanted)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.few(4)
def test_priced_bytes_are_the_bytes_written(zoo: Zoo, tmp_path: Path, family: str) -> None:
    view = view_of(zoo(family))
    plan = quarter_dropped(view)
    out = written(view, plan, tmp_path / "out")
    assert price(plan, view.source) == view_of(out).blueprint.cost()
    assert price(plan, view.source).bytes == sum(ref.nbytes for ref in open_checkpoint(out).tensors.values())


@pytest.mark.parametrize("family", FAMILIES)
def test_a_layers_state_goes_back_to_the_names_and_values_on_disk(zoo: Zoo, family: str) -> None:
    """Reversal, with another layer loaded between load and reversal (the loader forgets the mapping it did not use)."""
    view = view_of(zoo(family))
    with Tensors(view.checkpoint.folder) as reader:
        meta = meta_of(view, reader)
        for layer in view.source.moe_layers:
            with meta.layer(layer.index):
                state = {name: tensor.clone() for name, tensor in meta.layer_state(layer.index).items()}
            dense = [spec.index for spec in view.source.layers if not spec.experts]
            with meta.layer(dense[0] if dense else 0):
                pass
            on_disk = {entry.ref.name: entry.ref for entry in view.source.by_layer[layer.index]}
            back = meta.to_disk(state)
            assert back.keys() == on_disk.keys()
            for name, tensor in back.items():
                assert torch.equal(tensor.float(), reader.reader.tensor(on_disk[name]).float()), name


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "gpt_oss"])
def test_precision_follows_stock_loading_in_bfloat16(zoo: Zoo, family: str) -> None:
    """Tensors that must stay float32 (correction biases) do, or routing would change."""
    reference = families.reference(zoo(family), dtype=torch.bfloat16)
    view = view_of(zoo(family))
    with Tensors(view.checkpoint.folder) as reader:
        meta = meta_of(view, reader, torch.bfloat16)
        for index in range(len(meta.layers)):
            with meta.layer(index):
                loaded = meta.layer_state(index)
            for name, tensor in loaded.items():
                stock = reference.state_dict()[name]
                assert tensor.dtype == stock.dtype, name
                assert torch.equal(tensor, stock), name


def test_hidden_states_may_wait_on_disk(zoo: Zoo, tmp_path: Path) -> None:
    view = view_of(zoo("qwen3_moe"))
    ids = torch.randint(view.source.vocab, (300, 20), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids, dtype=torch.bool)
    with Tensors(view.checkpoint.folder) as reader:
        in_memory = sweep(meta_of(view, reader), ids, mask)
        on_disk = sweep(meta_of(view, reader), ids, mask, options=SweepOptions(spill=tmp_path))
    assert torch.equal(in_memory, on_disk)
    assert not list(tmp_path.iterdir())


def test_one_mask_serves_all_batches_of_a_shape(zoo: Zoo) -> None:
    view = view_of(zoo("gpt_oss"))
    ids = torch.randint(view.source.vocab, (4, 10))
    with Tensors(view.checkpoint.folder) as reader, torch.inference_mode():
        meta = meta_of(view, reader)
        with meta.outer():
            batches = start(meta.base, meta.layers_name, list(ids.split(2)), [None, None])
        first, second = (batch.kwargs["position_embeddings"][0] for batch in batches)
        assert first.data_ptr() == second.data_ptr()


def test_rebuilt_weights_carry_on_to_the_next_layer(zoo: Zoo) -> None:
    """`carry="rebuilt"`: what a visitor returns is in place before the batches go on."""
    view = view_of(zoo("mixtral"))
    ids = torch.randint(view.source.vocab, (2, 9))
    mask = torch.ones_like(ids, dtype=torch.bool)

    def silence(layer, taps):
        return {"mlp.experts.down_proj": torch.zeros_like(layer.module.mlp.experts.down_proj)}

    reference = families.reference(zoo("mixtral"))
    for layer in reference.model.layers:
        layer.mlp.experts.down_proj.data.zero_()
    with Tensors(view.checkpoint.folder) as reader:
        hidden = sweep(meta_of(view, reader), ids, mask, silence, SweepOptions("rebuilt"))
    with torch.inference_mode():
        close(hidden, reference.model(ids, use_cache=False).last_hidden_state)


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.few(5)
def test_batches_that_wait_at_the_experts_go_on_as_if_run_again(
    zoo: Zoo, tmp_path: Path, family: str, whole: bool
) -> None:
    """What lies before the experts runs once (states that wait on disk leave no room to hold batches there: twice), unless
    something else than the experts was changed."""
    view = view_of(zoo(family))
    ids = torch.randint(view.source.vocab, (3, 9), generator=torch.Generator().manual_seed(5))
    mask = torch.ones_like(ids, dtype=torch.bool)
    asked: list[int] = []

    def halve(layer, taps):
        if layer.experts is None:
            return None
        layer.router.register_forward_pre_hook(lambda *_: asked.append(layer.spec.index))
        assert len(taps.fed({})) == len(taps.inputs)
        changed = {id(layer.experts.down_proj)} | ({*map(id, layer.router.parameters())} if whole else set())
        return {name: tensor / 2 for name, tensor in layer.module.named_parameters() if id(tensor) in changed}

    with Tensors(view.checkpoint.folder) as reader:
        held = sweep(meta_of(view, reader), ids, mask, halve, SweepOptions("rebuilt"))
        times = len(asked)
        again = sweep(meta_of(view, reader), ids, mask, halve, SweepOptions("rebuilt", spill=tmp_path))
    assert torch.equal(held, again)
    assert times == len(view.source.moe_layers) * (1 + whole)
    assert len(asked) - times == 2 * len(view.source.moe_layers)


def test_tensors_outside_the_graph_pass_through_and_are_named(zoo: Zoo, tmp_path: Path) -> None:
    """What no class knows, and a piece of a prediction layer, which is counted by itself."""
    from safetensors.torch import load_file, save_file

    source = tmp_path / "source"
    families.write_checkpoint("deepseek_v3", source, shards=1)
    stored = load_file(source / "model.safetensors")
    extra = {
        "model.vision.patch.weight": torch.ones(20, 48),
        "model.layers.4.eh_proj.weight": torch.ones(8, 8),
    }
    save_file(stored | extra, source / "model.safetensors", {"format": "pt"})
    report = api.press(source, out=tmp_path / "out", steps=["expert_drop:ratio=0.25,score=aimer"])
    assert extra.keys() <= tensors(tmp_path / "out").keys()
    assert any("1 tensors outside the language model" in note for note in report.notes)
    assert api.verify(tmp_path / "out", against=source)["ok"]


def test_press_measures_text_and_its_result_verifies(zoo: Zoo, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    report = api.press(zoo("deepseek_v2"), out=out, texts=[text], samples=8, length=32,
                       steps=["expert_drop:ratio=0.25,score=reap,renormalise=compensate"])  # fmt: skip
    assert report.after.bytes < report.before.bytes
    assert api.verify(out, against=zoo("deepseek_v2"))["ok"]
    figures = api.evaluate(out, against=zoo("deepseek_v2"), texts=[Source(str(text))], length=32, limit=4)
    assert figures["kl"]["mean"] > 0


def test_who_observes_experts_last_sees_them_and_the_one_before_again_afterwards():
    experts, seen = torch.nn.Identity(), list[str]()
    experts.num_experts = 0  # pyright: ignore[reportAttributeAccessIssue]
    inputs = torch.ones(2, 4), torch.zeros(2, 1, dtype=torch.long), torch.ones(2, 1)

    def answer(name: str) -> Callable[..., Tensor]:
        def before(*_: Tensor) -> Tensor:
            seen.append(name)
            return torch.full((2, 4), 7.0)

        return before

    def after(*_: Tensor) -> None:
        seen.append("answers")

    with observing(experts, before=answer("outer")):
        with observing(experts, after=after):
            assert float(experts_forward(experts, *inputs).sum()) == 0
        with observing(experts, before=answer("inner")):
            assert float(experts_forward(experts, *inputs).mean()) == 7
        experts_forward(experts, *inputs)
    experts_forward(experts, *inputs)
    assert seen == ["answers", "inner", "outer"]
