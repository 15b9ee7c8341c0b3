"""Whatever users and trainers do with stock models of a family, they can do with one whose layers differ.

Every form of difference on families of several kinds, each put to every use. What is compared with is the same model used
plainly, or what a stock model of the family does; where that does not do it either, nothing is asked.
"""

from __future__ import annotations

import copy
import inspect
import io
import json
import pickle
import shutil
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers import AutoModelForSequenceClassification, PreTrainedModel
from transformers.models.mixtral import modeling_mixtral

import families
from conftest import Zoo
from moespresso import api
from moespresso.model import is_unequal
from moespresso.runtime.widths import Ragged
from test_runtime import built, count_key, moe_layers, stacks, stock, tokens

FAMILIES = ["mixtral", "qwen3_moe", "qwen2_moe", "deepseek_v3", "olmoe", "gpt_oss", "jamba", "nemotron_h"]
FORMS = ["uneven", "narrow", "ragged", "no attention", "no mlp", "no mlp at all", "biases", "gone", "novices"]
# Experts stored as one stack, or transposed, or with biases have one width.
STACKED = {"gpt_oss"}
BALANCED = {"mixtral", "qwen3_moe", "qwen2_moe", "olmoe", "gpt_oss", "jamba"}


def differences(form: str, model: PreTrainedModel) -> dict[str, dict[str, Any]]:
    """What `per_layer_config` says in each form, of the last mixture and whatever else it takes."""
    config: Any = model.config
    first, *_, last = map(str, moe_layers(model))
    (experts,) = stacks(model.model.layers[int(last)])
    count, zero = experts.num_experts, {count_key(config): 0}
    width = "moe_intermediate_size" if hasattr(config, "moe_intermediate_size") else "intermediate_size"
    if form == "no attention" or form == "biases":
        layer = next(str(index) for index, layer in enumerate(model.model.layers) if attends(layer))
        own = {"skip": ["attention"], "num_key_value_heads": 0}
        return {layer: own} if form == "no attention" else {
            layer: own | {"skip": ["attention+bias"]}, last: {"skip": ["mlp+bias"], **zero}}  # fmt: skip
    return {
        "uneven": {last: {count_key(config): count - (getattr(config, "n_group", None) or 1)}},
        "narrow": {last: {width: 16}},
        "ragged": {last: {"expert_widths": [4 + 4 * (number % 4) for number in range(count - 1)] + [getattr(config, width)], **zero}},
        "no mlp": {last: {"skip": ["mlp"], **zero}},
        "no mlp at all": {str(index): {"skip": ["mlp"], **zero} for index in moe_layers(model)},
        "gone": {last: {"skip": ["expert.1", "expert.2"], **zero}},
        "novices": {first: {"skip": ["expert.0", "expert.3+novice"], **zero}, last: {"skip": ["expert.1+novice"], **zero}},
    }[form]  # fmt: skip


def attends(layer: nn.Module) -> bool:
    return any(type(part).__name__.endswith("Attention") for part in layer.modules())


def lively(model: PreTrainedModel) -> PreTrainedModel:
    """Novices and biases with values of their own."""
    for name, parameter in model.named_parameters():
        if name.endswith((".novices", "self_attn.bias", "mlp.bias", "mixer.bias")) and not parameter.any():
            parameter.data.normal_(generator=torch.Generator().manual_seed(1))
    return model


def made(family: str, form: str) -> PreTrainedModel:
    whole = stock(family)
    own = differences(form, whole)
    if form in ("narrow", "ragged"):
        torch.manual_seed(0)
        config = type(whole.config).from_dict(
            whole.config.to_dict() | {"per_layer_config": own, "expert_widths": []}
        )
        model = families.instantiate(config)
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.data.normal_(std=parameter.shape[-1] ** -0.5)
        return model.eval()
    if form == "uneven":
        torch.manual_seed(0)
        return families.instantiate(
            type(whole.config).from_dict(
                whole.config.to_dict() | {"per_layer_config": own, "expert_widths": []}
            )
        ).eval()
    return lively(built(whole, own))


# Every form of the first family, and of the others every third or so, so that each form meets several kinds of family.
CASES = [(family, form) for place, family in enumerate(FAMILIES) for number, form in enumerate(FORMS)
         if (family == FAMILIES[0] or (place + number) % 4 == 0) and (form != "ragged" or family not in STACKED)]  # fmt: skip


@pytest.fixture(scope="module", params=CASES, ids=lambda case: " ".join(case))
def case(request: pytest.FixtureRequest) -> tuple[str, str, PreTrainedModel]:
    family, form = request.param
    return family, form, made(family, form)


@pytest.fixture
def model(case: tuple[str, str, PreTrainedModel]) -> Iterator[PreTrainedModel]:
    """A copy of its own for every use."""
    return copy.deepcopy(case[2])


@pytest.fixture
def ids(case: tuple[str, str, PreTrainedModel]) -> Tensor:
    return families.random_ids(case[2].config, 2, 13)


def close(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=2e-4, atol=2e-4)


@cache
def unable(family: str, **options: Any) -> str:
    """What a stock model of the family says to options of `generate`; nothing if it can."""
    whole = stock(family)
    assisted = {"assistant_model": stock(family)} if options.pop("assisted", False) else {}
    try:
        tokens(whole, families.random_ids(whole.config, 1, 13), **options, **assisted)
    except Exception as error:  # whatever a family's cache cannot do
        return f"stock: {error}"
    return ""


def grads(model: PreTrainedModel) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


# Training


def balance(logits: tuple[Tensor, ...], top_k: int, mask: Tensor) -> Tensor:
    """The loss of equation (4) to (6) of arXiv 2101.03961, for layers of one number of experts at a time."""
    total = torch.zeros(())
    for count in {each.shape[1] for each in logits}:
        rows = torch.cat([each[mask.bool().flatten()] for each in logits if each.shape[1] == count])
        probabilities = rows.float().softmax(-1)
        chosen = nn.functional.one_hot(probabilities.topk(top_k).indices, count).sum(1).float()
        share = sum(each.shape[1] == count for each in logits) / len(logits)
        total = total + share * count * (chosen.mean(0) * probabilities.mean(0)).sum()
    return total


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.few(8)
def test_losses_and_gradients(case: Any, model: Any, ids: Tensor, masked: bool):
    family = case[0]
    mask = torch.ones_like(ids)
    if masked:
        mask[0, :4] = 0
    asked = {"attention_mask": mask} if masked else {}
    plain = model(ids, labels=ids, **asked).loss
    if family not in BALANCED:
        plain.backward()
    else:
        out = model(ids, labels=ids, output_router_logits=True, **asked)
        mixtures = [experts for layer in model.model.layers for experts in stacks(layer)]
        assert len(out.router_logits) == len(mixtures)
        wanted = balance(out.router_logits, model.config.num_experts_per_tok, mask)
        close(out.aux_loss, wanted)
        close(out.loss, plain + model.config.router_aux_loss_coef * wanted)
        model.config.output_router_logits = True
        close(model(ids, labels=ids, **asked).loss, out.loss)
        out.loss.backward()
    found = grads(model)
    assert all(grad.isfinite().all() for grad in found.values())
    trained = [name for name, p in model.named_parameters() if ".experts." in name and p.requires_grad]
    assert all(name in found for name in trained)
    assert all(found[name].any() for name in trained if not name.endswith("novices"))


@pytest.mark.few(6)
def test_gradient_checkpointing(model: Any, ids: Tensor):
    model.train()
    wanted = model(ids, labels=ids).loss
    wanted.backward()
    expected = grads(model)
    for reentrant in (False, True):
        model.zero_grad()
        model.activation_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
        loss = model(ids, labels=ids, use_cache=False).loss
        loss.backward()
        close(loss, wanted)
        found = grads(model)
        assert found.keys() == expected.keys()
        for name, grad in found.items():
            close(grad, expected[name])


class Low(nn.Module):
    """W + B A over the last two axes, as adapters have it."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        *rest, rows, columns = weight.shape
        self.a = nn.Parameter(torch.randn(*rest, 2, columns) * 0.1)
        self.b = nn.Parameter(torch.zeros(*rest, rows, 2))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.b @ self.a


@pytest.mark.few(5)
def test_adapters_on_experts_learn_and_are_merged(model: Any, ids: Tensor, tmp_path: Path):
    before = families.logits_of(model, ids)
    model.requires_grad_(False)
    adapted = [
        (module, name)
        for module in stacks(model)
        for name, p in list(module.named_parameters(recurse=False))
        if p.dim() > 1
    ]
    if not adapted:
        pytest.skip("no experts are left")
    for module, name in adapted:
        parametrize.register_parametrization(module, name, Low(getattr(module, name)))
    close(families.logits_of(model, ids), before)
    learned = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learned, lr=3e-2)
    losses = []
    for _ in range(4):
        loss = model(ids, labels=ids).loss
        losses.append(float(loss.detach()))
        loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in learned)
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]
    wanted = families.logits_of(model, ids)
    for module, name in adapted:
        parametrize.remove_parametrizations(module, name)
    close(families.logits_of(model, ids), wanted)
    model.save_pretrained(tmp_path)
    families.same_model(families.reference(tmp_path), model, ids)


@pytest.mark.parametrize("form", ["uneven", "no mlp at all"])
def test_a_config_that_always_asks_for_router_logits(form: str, zoo: Zoo, text: Path, tmp_path: Path):
    source = Path(shutil.copytree(zoo("qwen2_moe"), tmp_path / "source"))
    said = json.loads((source / "config.json").read_text()) | {"output_router_logits": True}
    (source / "config.json").write_text(json.dumps(said))
    step = "expert_drop:ratio=0.25,scope=global" if form == "uneven" else "layer_drop:drop=3"
    api.press(source, out=tmp_path / "out", steps=[step], target="plugin", texts=[text], samples=8, length=24)
    found = api.verify(tmp_path / "out", against=source)
    assert found["ok"], found
    model: Any = families.reference(tmp_path / "out")
    assert is_unequal(json.loads((tmp_path / "out" / "config.json").read_text()))
    ids = families.random_ids(model.config, 2, 13)
    out = model(ids, labels=ids)
    close(out.aux_loss, balance(out.router_logits, model.config.num_experts_per_tok, torch.ones_like(ids)))
    out.loss.backward()


def test_stock_models_of_the_family_have_the_loss_they_had():
    ids = families.random_ids(families.build("mixtral").config, 2, 13)
    mask = torch.ones_like(ids)
    mask[1, 9:] = 0
    function = inspect.unwrap(modeling_mixtral.load_balancing_loss_func)
    made("mixtral", "uneven")
    logits = families.build("mixtral")(ids, output_router_logits=True).router_logits
    for asked in ((8, 3), (8, 3, mask)):
        assert torch.equal(
            modeling_mixtral.load_balancing_loss_func(logits, *asked), function(logits, *asked)
        )
    assert modeling_mixtral.load_balancing_loss_func(None) == 0


# Looking inside


@pytest.mark.few(12)
def test_hidden_states_and_attentions(model: Any, ids: Tensor):
    asked = {"output_hidden_states": True, "output_attentions": True}
    model.set_attn_implementation("eager")
    out = model(ids, **asked)
    assert len(out.hidden_states) == model.config.num_hidden_layers + 1
    assert all(state.shape == (*ids.shape, model.config.hidden_size) for state in out.hidden_states)
    assert len(out.attentions) == sum(map(attends, model.model.layers))
    close(out.logits, families.logits_of(model, ids))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.few(16)
def test_padding(model: Any, ids: Tensor, side: str):
    short, pad = ids[:1, :9], torch.zeros(1, 4, dtype=ids.dtype)
    padded = torch.cat([pad, short] if side == "left" else [short, pad], 1)
    mask = torch.ones_like(padded)
    where = slice(4, None) if side == "left" else slice(None, 9)
    mask[:, : 4 if side == "left" else None] = 0
    mask[:, where] = 1
    alone = model(short).logits
    close(
        model(padded, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits[:, where],
        alone,
    )


@pytest.mark.few(10)
def test_embeddings_instead_of_tokens(model: Any, ids: Tensor):
    close(model(inputs_embeds=model.get_input_embeddings()(ids)).logits, model(ids).logits)


@pytest.mark.parametrize("function", ["eager", "batched_mm", "grouped_mm"])
@pytest.mark.few(10)
def test_every_function_of_experts(model: Any, ids: Tensor, function: str):
    wanted = families.logits_of(model, ids)
    model.set_experts_implementation(function)
    close(families.logits_of(model, ids), wanted)


# Generating


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.few(4)
def test_kinds_of_cache(case: Any, model: Any, ids: Tensor, kind: str):
    if reason := unable(case[0], cache_implementation=kind):
        pytest.skip(reason)
    assert tokens(model, ids, cache_implementation=kind) == tokens(model, ids, use_cache=False)


@pytest.mark.few(3)
def test_ways_to_generate(case: Any, model: Any, ids: Tensor):
    greedy = tokens(model, ids)
    assert greedy == tokens(model, ids, use_cache=False)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    assert tokens(model, ids, attention_mask=mask) == tokens(model, ids, attention_mask=mask, use_cache=False)
    assert tokens(model, ids, num_beams=3) == tokens(model, ids, num_beams=3, use_cache=False)
    drawn = [(torch.manual_seed(3), tokens(model, ids, do_sample=True, top_k=20))[1] for _ in range(2)]
    assert drawn[0] == drawn[1]
    if not unable(case[0], prompt_lookup_num_tokens=3):
        assert tokens(model, ids[:1], prompt_lookup_num_tokens=3) == greedy[:1]
    if not unable(case[0], assisted=True):
        assert tokens(model, ids[:1], assistant_model=copy.deepcopy(model)) == greedy[:1]


# Keeping


@pytest.mark.parametrize("options", [{"max_shard_size": "20KB"}, {"save_original_format": False}], ids=str)
@pytest.mark.few(4)
def test_saved_and_loaded_again(model: Any, ids: Tensor, tmp_path: Path, options: dict[str, Any]):
    model.save_pretrained(tmp_path / "0", **options)
    again = families.reference(tmp_path / "0")
    families.same_model(again, model, ids)
    assert json.loads((tmp_path / "0" / "config.json").read_text())["architectures"][0].startswith(
        "Moespresso"
    )
    again.to(torch.bfloat16).save_pretrained(tmp_path / "1")
    third = families.reference(tmp_path / "1")
    assert families.logits_of(third, ids).isfinite().all()
    for (name, old), new in zip(model.state_dict().items(), third.state_dict().values(), strict=True):
        torch.testing.assert_close(new.float(), old.to(torch.bfloat16).float(), msg=name)


@pytest.mark.few(8)
def test_copied_pickled_and_saved_whole(model: Any, ids: Tensor):
    wanted = families.logits_of(model, ids)
    stored = io.BytesIO()
    torch.save(model, stored)
    stored.seek(0)
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(stored, weights_only=False)]
    for each in copies:
        assert torch.equal(families.logits_of(each, ids), wanted)
        assert [type(part) for part in each.modules()] == [type(part) for part in model.modules()]


@pytest.mark.few(8)
def test_state_dicts_fit_and_vocabularies_grow(case: Any, model: Any, ids: Tensor):
    other = made(case[0], case[1])
    assert not any(other.load_state_dict(model.state_dict()))
    families.same_model(other, model, ids)
    model.resize_token_embeddings(112)
    close(model(ids).logits[..., :96], other(ids).logits)


@pytest.mark.few(6)
def test_other_heads_load_it(case: Any, model: Any, ids: Tensor, tmp_path: Path):
    try:
        AutoModelForSequenceClassification.from_config(stock(case[0]).config)
    except ValueError:
        pytest.skip("the family has no such head")
    model.save_pretrained(tmp_path)
    scored: Any = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=2)
    close(scored.model(ids).last_hidden_state, model.model(ids).last_hidden_state)
    scored(ids, labels=torch.tensor([0, 1])).loss.backward()


def test_experts_of_different_widths_are_stored_one_by_one(tmp_path: Path):
    model: Any = made("qwen3_moe", "ragged")
    (mixture,) = [module for module in model.modules() if isinstance(module, Ragged)]
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    shapes = [tuple(stored[f"model.layers.3.mlp.experts.{number}.{name}_proj.weight"].shape)
              for number in range(8) for name in ("gate", "up", "down")]  # fmt: skip
    assert shapes == [shape for width in mixture.widths for shape in ((width, 48), (width, 48), (48, width))]
