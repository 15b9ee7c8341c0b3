"""What a step on text answers for a layer, put in the place of the layer's parameters, so that batches go
on through it."""

from __future__ import annotations

from torch import Tensor

from moespresso.core.errors import UserError
from moespresso.core.layer import Layer
from moespresso.formats import codec_of
from moespresso.methods import LayerContext, LayerResult


def placed(layer: Layer, result: LayerResult, context: LayerContext) -> dict[str, Tensor]:
    """The layer's parameters as they will be loaded, by their names in it."""
    plain = {name: tensor.to(context.dtypes[name]) for name, tensor in result.weights.items()}
    decoded = {
        name: codec_of(context.formats[name]).values(numbers, context.formats[name])
        for name, numbers in result.numbers.items()
        if name not in plain and name in context.formats
    }
    experts = {name: plain.pop(name, decoded.pop(name, None)) for name in ("up", "down")}
    parameters = dict(result.replaced)
    if (up := experts["up"]) is not None and (down := experts["down"]) is not None:
        prefix = next(name for name, module in layer.module.named_modules() if module is layer.experts)
        name = "gate_up_proj" if getattr(layer.experts, "has_gate", True) else "up_proj"
        parameters |= {f"{prefix}.{name}": up, f"{prefix}.down_proj": down}
    parameters |= {f"{name}.weight": weights[0] for name, weights in decoded.items()}
    parameters |= {f"{name}.weight": tensor for name, tensor in plain.items()}
    return {name: tensor.to(layer.module.get_parameter(name)) for name, tensor in parameters.items()}


def check_finite(result: LayerResult, layer: int) -> None:
    """Raise `UserError` where an answer has values that are not finite."""
    broken = [name for name, tensor in result.weights.items() if not bool(tensor.isfinite().all())]
    if broken:
        raise UserError(
            f"L{layer}.{broken[0]}: fitting it gave values that are not finite: give more text, or a larger damping"
        )
