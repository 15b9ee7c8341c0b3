"""What a demo model knows: held-out perplexity by domain, facts recalled, experts used; and its export."""

import json
import math
import shutil
from collections import defaultdict
from pathlib import Path

import torch
from corpus import BUNDLED, END
from demo_model import routers
from sources import DOMAINS
from torch import Tensor, nn
from transformers import AutoTokenizer, GenerationConfig, PreTrainedModel, PreTrainedTokenizerFast

LENGTH = 512


def tokenizer_of(work: Path) -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(work / "tokenizer")


def heldout_rows(tokenizer: PreTrainedTokenizerFast, domain: str) -> Tensor:
    """A domain's held-out text in rows of ``LENGTH`` + 1 tokens, each document after an end-of-text token."""
    path = BUNDLED / "text/heldout" / f"{domain}.jsonl"
    ids: list[int] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        ids += tokenizer(END + json.loads(line)["text"], verbose=False)["input_ids"]
    rows = (len(ids) - 1) // LENGTH
    return torch.stack([torch.tensor(ids[i * LENGTH : (i + 1) * LENGTH + 1]) for i in range(rows)])


@torch.no_grad()
def perplexities(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, quick: bool = False
) -> dict[str, float]:
    """Per token, by domain and over all of them; ``quick`` reads a quarter."""
    figures, losses = {}, []
    for domain in DOMAINS:
        rows = heldout_rows(tokenizer, domain)[:: 4 if quick else 1].to(model.device)
        own = [
            nn.functional.cross_entropy(
                model(input_ids=part[:, :-1]).logits.float().mT, part[:, 1:], reduction="none"
            )
            for part in rows.split(8)
        ]
        losses.append(torch.cat(own).flatten())
        figures[domain] = math.exp(losses[-1].mean())
    return figures | {"all": math.exp(torch.cat(losses).mean())}


@torch.no_grad()
def continuations(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, pairs: list[tuple[str, str]]
) -> list[bool]:
    """For (prompt, object) pairs: whether every token of the object is the model's first choice."""
    right = []
    for start in range(0, len(pairs), 64):
        batch = pairs[start : start + 64]
        prompts = [tokenizer(END + prompt)["input_ids"] for prompt, _ in batch]
        answers = [tokenizer(" " + answer + ".")["input_ids"] for _, answer in batch]
        width = max(len(p) + len(a) for p, a in zip(prompts, answers, strict=True))
        # Padding comes last and attention looks back only, so it changes nothing.
        ids = torch.zeros(len(batch), width, dtype=torch.long)
        for row, prompt, answer in zip(ids, prompts, answers, strict=True):
            row[: len(prompt) + len(answer)] = torch.tensor(prompt + answer)
        chosen = model(input_ids=ids.to(model.device)).logits.argmax(-1).cpu()
        for row, prompt, answer in zip(chosen, prompts, answers, strict=True):
            right.append(row[len(prompt) - 1 : len(prompt) + len(answer) - 1].tolist() == answer)
    return right


def recall(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, quick: bool = False
) -> dict[str, float]:
    """The share of facts recalled, by frequency, over trained wordings; and over the withheld one."""
    facts = json.loads((BUNDLED / "facts.json").read_text(encoding="utf-8"))[:: 4 if quick else 1]
    asked = [(f, place, prompt) for f in facts for place, prompt in enumerate(f["prompts"])]
    right = continuations(model, tokenizer, [(prompt, f["object"]) for f, _, prompt in asked])
    outcomes: dict[str, list[bool]] = defaultdict(list)
    for (fact, place, _), good in zip(asked, right, strict=True):
        kind = " withheld" if place == fact["withheld"] else ""
        outcomes[fact["frequency"] + kind].append(good)
    return {name: sum(results) / len(results) for name, results in sorted(outcomes.items())}


@torch.no_grad()
def usage(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> dict[str, list[list[float]]]:
    """By domain and layer, the share of the routed tokens each expert gets."""
    counts: list[Tensor] = []

    def count(router: nn.Module, inputs: object, output: tuple[Tensor, Tensor, Tensor]) -> None:
        logits, _, index = output
        counts.append(torch.bincount(index.flatten(), minlength=logits.shape[-1]))

    hooks = [router.register_forward_hook(count) for router in routers(model)]
    shares: dict[str, list[list[float]]] = {}
    for domain in DOMAINS:
        counts.clear()
        model(input_ids=heldout_rows(tokenizer, domain)[:, :-1].to(model.device))
        shares[domain] = [(one / one.sum()).tolist() for one in counts]
    for hook in hooks:
        hook.remove()
    return shares


def report(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, seen: int) -> None:
    """Print everything, and the inequality of the experts' use."""
    print(f"{seen:,} tokens seen")
    for name, value in perplexities(model, tokenizer).items():
        print(f"  perplexity {name:8} {value:7.2f}")
    for name, value in recall(model, tokenizer).items():
        print(f"  recall {name:16} {value:.3f}")
    shares = usage(model, tokenizer)
    for layer, by_domain in enumerate(zip(*shares.values(), strict=True)):
        part = torch.tensor(by_domain)
        mean = part.mean(0)
        idle = int((mean * len(mean) < 0.1).sum())
        print(
            f"  routed layer {layer}: an expert's share {mean.min():.4f} to {mean.max():.4f}, {idle} nearly idle; "
            f"most preferred by one domain {(part / mean.clamp_min(1e-9)).max():.1f} times its mean"
        )


def export(model: PreTrainedModel, form: str, work: Path) -> None:
    """Write the folder that the package bundles, the whole of it or nothing."""
    target = BUNDLED / form
    temporary = target.with_name(f".{form}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    model.set_attn_implementation("sdpa")
    model.set_experts_implementation("eager")
    model.generation_config = GenerationConfig.from_model_config(model.config)
    model.save_pretrained(temporary)
    (temporary / "model.safetensors").chmod(0o644)
    for path in (work / "tokenizer").iterdir():
        shutil.copy(path, temporary / path.name)
    shutil.rmtree(target, ignore_errors=True)
    temporary.rename(target)
    print(f"{target.name}: {sum(p.stat().st_size for p in target.iterdir()) / 1e6:.1f} MB")
