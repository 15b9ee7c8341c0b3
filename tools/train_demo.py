"""Makes the bundled demo models: trains, goes on from its own checkpoints, evaluates and exports.

    python tools/corpus.py --work DIR                                   # first: text and tokenizer
    python tools/train_demo.py --form mixtral --work DIR --tokens 40e6  # again: goes on where it was
    python tools/train_demo.py --form mixtral --work DIR --evaluate
    python tools/train_demo.py --form mixtral --work DIR --export

The learning rate warms up, stays, and falls linearly to nothing over the last ``--decay-tokens``; so the
end can be moved as long as the fall has not begun: stop, and start again with other ``--tokens``.  During
the fall the rows are twice as long, so that the model has seen longer contexts too.

A run may be killed at any moment: checkpoints are written beside and then renamed.  The order of the data
follows from the number of tokens seen alone, and nothing else in training is random, so a checkpoint
needs no more than weights, optimizer state and that number.
"""

import argparse
import os
import signal
import time
from pathlib import Path

# Blocks of some megabytes come and go all the time: huge pages spare most of the page faults, and a large
# cache keeps the generated kernels of every shape.  Both are read when the libraries load.
SETTINGS = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1", "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "8192"}
if not SETTINGS.items() <= os.environ.items() and __name__ == "__main__":
    import sys

    os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **SETTINGS})

import evaluate_demo as evaluation  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from demo_model import BALANCE, FORMS, TiedLoss, build, routers  # noqa: E402
from optimizer import Optimizer  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from transformers import PreTrainedModel  # noqa: E402

BLOCK = 512  # tokens that are read in a row; also the row length while the learning rate falls
BLOCKS = 16  # in a step
WARM_UP = 600_000
SEED = 1


class Stream:
    """Training blocks in an order that follows from the number of tokens seen; another order each pass."""

    def __init__(self, path: Path) -> None:
        self.tokens = np.memmap(path, dtype=np.uint16, mode="r")
        self.per_pass = (len(self.tokens) - BLOCK - 1) // BLOCK
        self.current: tuple[int, np.ndarray, int] = (-1, np.empty(0), 0)

    def block(self, number: int) -> np.ndarray:
        turn, place = divmod(number, self.per_pass)
        if self.current[0] != turn:
            rng = np.random.default_rng(SEED + turn)
            self.current = (turn, rng.permutation(self.per_pass), int(rng.integers(BLOCK)))
        start = int(self.current[1][place]) * BLOCK + self.current[2]
        return self.tokens[start : start + BLOCK + 1]

    def batch(self, seen: int, length: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets for the step after ``seen`` tokens, in rows of ``length``."""
        first = seen // BLOCK
        blocks = np.stack([self.block(first + i) for i in range(BLOCKS)]).astype(np.int64)
        inputs, targets = torch.from_numpy(blocks[:, :-1].copy()), torch.from_numpy(blocks[:, 1:].copy())
        return inputs.view(-1, length), targets.view(-1, length)


class Trainer:
    """A model in training and everything a checkpoint holds."""

    def __init__(
        self,
        form: str,
        work: Path,
        device: str,
        balance: float = BALANCE,
        start: Path | None = None,
        adam_experts: bool = False,
    ) -> None:
        """``start`` is an exported model to begin with, where there is no checkpoint yet."""
        torch.manual_seed(SEED)
        self.form, self.folder, self.device, self.balance = form, work / form, device, balance
        self.folder.mkdir(parents=True, exist_ok=True)
        self.stream = Stream(work / "train.bin")
        self.tokenizer = evaluation.tokenizer_of(work)
        model = build(form, len(self.tokenizer), start=start).to(device)
        self.embedding = model.get_input_embeddings().weight.detach().clone().requires_grad_()
        self.model = model.to(torch.bfloat16)
        self.model.get_input_embeddings().weight.requires_grad_(False)
        self.optimizer = Optimizer(self.model, self.embedding, adam_experts)
        self.routers: list[tuple[Tensor, Tensor]] = []
        for router in routers(self.model):
            router.register_forward_hook(
                lambda module, inputs, output: self.routers.append((output[0], output[2]))
            )
        self.seen = 0
        self.history: list[dict] = []
        path = self.folder / "checkpoint.pt"
        if path.exists():
            self.load(path)

    def load(self, path: Path) -> None:
        state = torch.load(path, map_location=self.device, weights_only=True)
        self.optimizer.load_state_dict(state["optimizer"])
        self.seen, self.history = state["seen"], state["history"]
        self.sync()

    def save(self) -> None:
        state = {"optimizer": self.optimizer.state_dict(), "seen": self.seen, "history": self.history}
        temporary = self.folder / "checkpoint.tmp"
        torch.save(state, temporary)
        os.replace(temporary, self.folder / "checkpoint.pt")

    @torch.no_grad()
    def sync(self) -> PreTrainedModel:
        """The model as it would be saved: the embedding too in bfloat16."""
        self.model.get_input_embeddings().weight.copy_(self.embedding)
        return self.model

    def step(self, rate: float, length: int) -> tuple[float, float]:
        inputs, targets = (t.to(self.device) for t in self.stream.batch(self.seen, length))
        self.routers.clear()
        embedded = nn.functional.embedding(inputs, self.embedding).to(torch.bfloat16)
        hidden = self.model.model(inputs_embeds=embedded, use_cache=False).last_hidden_state
        loss = TiedLoss.apply(hidden.flatten(0, 1), self.embedding, targets.flatten())
        balances = [imbalance(logits, index) for logits, index in self.routers]
        balance = torch.stack(balances).mean() if balances else loss.new_zeros(())
        (loss + self.balance * balance).backward()
        self.optimizer.step(rate)
        self.seen += inputs.numel()
        return loss.item(), balance.item()


def imbalance(logits: Tensor, index: Tensor) -> Tensor:
    """One when all experts get equally much, more when not (the usual load-balancing loss)."""
    experts = logits.shape[-1]
    share = torch.bincount(index.flatten(), minlength=experts) / index.numel()
    return experts * (share * logits.float().softmax(-1).mean(0)).sum()


def rate_at(seen: int, total: int, decay: int) -> float:
    return min(1.0, (seen + 1) / WARM_UP, max(0.0, (total - seen) / decay))


def train(trainer: Trainer, total: int, decay: int, minutes: float) -> None:
    stopping = False

    def stop(*_: object) -> None:
        nonlocal stopping
        stopping = True

    signal.signal(signal.SIGTERM, stop)
    saved = evaluated = time.monotonic()
    started, first = time.monotonic(), trainer.seen
    average = None
    while trainer.seen < total and not stopping:
        falling = trainer.seen >= total - decay
        loss, balance = trainer.step(rate_at(trainer.seen, total, decay), BLOCK if falling else BLOCK // 2)
        average = loss if average is None else 0.98 * average + 0.02 * loss
        step, now = trainer.optimizer.steps, time.monotonic()
        if step % 50 == 0:
            speed = (trainer.seen - first) / (now - started)
            print(
                f"{trainer.seen:>11,} tokens  loss {average:.3f}  balance {balance:.2f}  {speed:,.0f}/s",
                flush=True,
            )
        if now - saved > 120:
            trainer.save()
            saved = now
        if now - evaluated > 60 * minutes:
            record(trainer)
            evaluated = time.monotonic()
    record(trainer)
    trainer.save()


def record(trainer: Trainer) -> None:
    """Evaluate on a part of the held-out text, and put that into the curve."""
    figures = evaluation.perplexities(trainer.sync(), trainer.tokenizer, quick=True)
    recalled = evaluation.recall(trainer.model, trainer.tokenizer, quick=True)
    trainer.history.append({"tokens": trainer.seen, "perplexity": figures, "recall": recalled})
    words = "  ".join(f"{name} {value:.2f}" for name, value in (figures | recalled).items())
    print(f"{trainer.seen:>11,} tokens  {words}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--form", choices=FORMS, required=True)
    parser.add_argument("--work", type=Path, required=True, help="folder that tools/corpus.py filled")
    parser.add_argument("--tokens", type=float, default=40e6, help="tokens to train on in all")
    parser.add_argument(
        "--decay-tokens", type=float, help="tokens over which the rate falls (default: a quarter)"
    )
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=6, help="between evaluations")
    parser.add_argument("--balance", type=float, default=BALANCE, help="weight of the load-balancing loss")
    parser.add_argument(
        "--start", type=Path, help="exported model to begin with (its optimizer starts afresh)"
    )
    parser.add_argument("--adam-experts", action="store_true", help="step the experts by AdamW, not Muon")
    parser.add_argument("--evaluate", action="store_true", help="only measure the last checkpoint")
    parser.add_argument(
        "--export", action="store_true", help="only write the last checkpoint as a model folder"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    trainer = Trainer(
        arguments.form,
        arguments.work,
        arguments.device,
        arguments.balance,
        arguments.start,
        arguments.adam_experts,
    )
    if arguments.evaluate:
        evaluation.report(trainer.sync(), trainer.tokenizer, trainer.seen)
    elif arguments.export:
        evaluation.export(trainer.sync(), arguments.form, arguments.work)
    else:
        total = int(arguments.tokens)
        train(trainer, total, int(arguments.decay_tokens or total // 4), arguments.minutes)


if __name__ == "__main__":
    main()
