"""Models with packed matrices that transformers decoded, saved as what they are by then: plain.

transformers 5.23 stacks the experts that it decodes and knows no way back ("Undefined Operation
encountered!"), so that such a model could be trained and not be saved. Where no expert is packed it saves,
but after the first forward, which decodes, plain weights under a config that calls them quantized, beside
scales and shapes that nothing reads. `install` puts that right at the moment of saving: what is still packed
is decoded too, the quantizer and its section of the config go, and the weights are written under the names
that they have in a plain checkpoint. It also helps a model that was there before `import moespresso`. Left to
transformers are plain models, those of other quantizers, and those with no packed expert that quantize
activations too, which a plain checkpoint would not.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from functools import wraps
from typing import Any

from transformers.core_model_loading import WeightConverter
from transformers.modeling_utils import PreTrainedModel
from transformers.quantizers.quantizer_compressed_tensors import CompressedTensorsHfQuantizer

# Marks our method.
_DONE = "_moespresso_plain"


def install() -> None:
    """Teach transformers to save models whose experts it decoded; called again, it does nothing."""
    if not hasattr(PreTrainedModel.save_pretrained, _DONE):
        PreTrainedModel.save_pretrained = _saving(PreTrainedModel.save_pretrained)


def _saving(original: Callable[..., None]) -> Callable[..., None]:
    @wraps(original)
    def save_pretrained(self: PreTrainedModel, *args: Any, **kwargs: Any) -> None:
        # Of a model with adapters only these are written.
        if getattr(self, "_hf_peft_config_loaded", False) or _quantizer(self) is None:
            original(self, *args, **kwargs)
            return
        warnings.warn(
            f"the packed matrices of this {type(self).__name__} were decoded when it was loaded: it is saved as a plain checkpoint, "
            "without quantization_config; press it with moespresso to pack it again",
            stacklevel=2,
        )
        become_plain(self)
        bound = inspect.signature(original).bind(self, *args, **kwargs)
        # It may hold packed parts; transformers does not look at it for packed models either.
        bound.arguments["state_dict"] = None
        original(*bound.args, **bound.kwargs)

    save_pretrained.__dict__[_DONE] = True
    return save_pretrained


def become_plain(model: PreTrainedModel) -> None:
    """Decode what is still packed, and take away whatever says that the model is quantized."""
    quantizer = _quantizer(model)
    if hasattr(model, "ct_decompress_hook"):  # waits for the first forward
        quantizer.compressor.decompress_model(model)
    from compressed_tensors.quantization import QuantizationMetadata

    for module in model.modules():
        if hasattr(module, "quantization_scheme"):
            QuantizationMetadata.clear_quantization(module)
        if isinstance(module, PreTrainedModel):  # some families compute in another order where this stands
            module.config.__dict__.pop("_is_quantized", None)
    quantizer.remove_quantization_config(model)
    parts: dict[str, list[str]] = quantizer.serialized_names
    suffixes = tuple(f".{name}" for names in parts.values() for name in names if name not in parts)
    model.__dict__["_weight_conversions"] = [
        plain for conversion in _conversions(model) if (plain := _as_plain(conversion, suffixes))
    ]


def _quantizer(model: PreTrainedModel) -> Any:
    """What decodes, or decoded, the model's packed matrices; None where it has none, or computes with them as
    they are."""
    decoding = [op for conversion in _conversions(model) for op in _decoding(conversion)]
    if decoding:
        return decoding[0].hf_quantizer
    quantizer = getattr(model, "hf_quantizer", None)
    if not isinstance(quantizer, CompressedTensorsHfQuantizer) or quantizer.use_fp8_kernel:
        return None
    compressor: Any = quantizer.compressor
    asked = compressor.quantization_config
    if asked is None or any(scheme.input_activations for scheme in asked.config_groups.values()):
        return None  # sparse at most, or more than its weights
    return quantizer


def _conversions(model: PreTrainedModel) -> list[Any]:
    """How the names of what was loaded were changed."""
    return getattr(model, "_weight_conversions", None) or []


def _decoding(conversion: Any) -> list[Any]:
    """The operations of a conversion that decode, which have no way back."""
    return [
        op
        for op in getattr(conversion, "operations", ())
        if type(op).__name__ == "CompressedTensorsDequantize"
    ]


def _as_plain(conversion: Any, suffixes: tuple[str, ...]) -> Any:
    """The conversion that a plain checkpoint is loaded with; None for one that does nothing but decode."""
    if not _decoding(conversion):
        return conversion
    assert isinstance(conversion, WeightConverter)
    left = [op for op in conversion.operations if op not in _decoding(conversion)]
    sources = [source for source in conversion._original_source_patterns if not source.endswith(suffixes)]
    return conversion.copy(sources, conversion._original_target_patterns, operations=left) if left else None
