"""The demo models' optimizer: Muon for matrices, AdamW for embedding, norms and routers.

Muon's step is the momentum with all its singular values set to about one (Newton-Schulz iteration),
which at this scale needs about half as many tokens as AdamW.  Stacked experts are one batch of matrices.

Weights are kept in float32 here; the model computes with the bfloat16 copies it will be saved as.
"""

import torch
from torch import Tensor, nn

MATRIX_RATE, VECTOR_RATE, EMBEDDING_RATE = 0.01, 0.002, 0.004
DECAY = 0.1
# Under AdamW, what the experts lose of themselves in a step at the full rate.
EXPERT_DECAY = 0.005
MOMENTUM = 0.95
BETAS = (0.9, 0.98)


def orthogonalised(matrices: Tensor) -> Tensor:
    """The nearest matrices, roughly, with all singular values one; last two dimensions."""
    x = matrices.to(torch.bfloat16)
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / (x.flatten(-2).norm(dim=-1)[..., None, None] + 1e-7)
    for _ in range(5):
        squares = x @ x.mT
        x = 3.4445 * x + (-4.7750 * squares + 2.0315 * squares @ squares) @ x
    return (x.mT if tall else x).float()


class Optimizer:
    """Steps all parameters of a model, given a rate between nothing and one."""

    def __init__(self, model: nn.Module, embedding: Tensor, adam_experts: bool = False) -> None:
        """``embedding`` is the float32 leaf used in place of the model's own tied embedding; ``adam_experts`` steps
        the experts' matrices by AdamW too."""
        self.adam_experts = adam_experts
        self.parameters = dict(model.named_parameters())
        del self.parameters["model.embed_tokens.weight"]
        self.embedding = embedding
        self.master = {name: p.detach().float().clone() for name, p in self.parameters.items()}
        self.master["embedding"] = embedding.detach()
        self.first = {name: torch.zeros_like(p) for name, p in self.master.items()}
        self.second = {n: torch.zeros_like(p) for n, p in self.master.items() if not self.is_matrix(n)}
        self.steps = 0

    def is_matrix(self, name: str) -> bool:
        if self.adam_experts and ".experts." in name:
            return False
        return self.master[name].ndim >= 2 and not name.endswith("gate.weight") and name != "embedding"

    @torch.no_grad()
    def step(self, rate: float) -> None:
        self.steps += 1
        for name, parameter in (*self.parameters.items(), ("embedding", self.embedding)):
            if parameter.grad is None:
                continue
            if self.is_matrix(name):
                self.matrix_step(name, parameter.grad.float(), rate * MATRIX_RATE)
            else:
                self.vector_step(name, parameter.grad.float(), rate)
            if name != "embedding":
                parameter.copy_(self.master[name])
            parameter.grad = None

    def matrix_step(self, name: str, grad: Tensor, rate: float) -> None:
        momentum = self.first[name].lerp_(grad, 1 - MOMENTUM)
        update = grad.lerp(momentum, MOMENTUM)
        if name.endswith("gate_up_proj"):  # two matrices on top of each other
            update = orthogonalised(update.unflatten(1, (2, -1))).flatten(1, 2)
        else:
            update = orthogonalised(update)
        scale = max(1.0, update.shape[-2] / update.shape[-1]) ** 0.5
        self.master[name].mul_(1 - rate * DECAY).sub_(update, alpha=rate * scale)

    def vector_step(self, name: str, grad: Tensor, rate: float) -> None:
        rate *= EMBEDDING_RATE if name == "embedding" else VECTOR_RATE
        first = self.first[name].lerp_(grad, 1 - BETAS[0])
        second = self.second[name].lerp_(grad.square(), 1 - BETAS[1])
        size = (second / (1 - BETAS[1] ** self.steps)).sqrt_().add_(1e-10)
        if ".experts." in name:
            self.master[name].mul_(1 - rate / VECTOR_RATE * EXPERT_DECAY)
        self.master[name].addcdiv_(first, size, value=-rate / (1 - BETAS[0] ** self.steps))

    def state_dict(self) -> dict:
        return {"master": self.master, "first": self.first, "second": self.second, "steps": self.steps}

    @torch.no_grad()
    def load_state_dict(self, state: dict) -> None:
        for kind in ("master", "first", "second"):
            for name, tensor in getattr(self, kind).items():
                tensor.copy_(state[kind][name])
        self.steps = state["steps"]
        for name, parameter in self.parameters.items():
            parameter.copy_(self.master[name])
