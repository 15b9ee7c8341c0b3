"""The names of a checkpoint, both ways: the one file that stands on inner functions of transformers.

On disk an expert is `block_sparse_moe.experts.3.w1.weight`; in memory it is rows of
`mlp.experts.gate_up_proj`. The library knows the way for every family (`WeightConverter`s), and this file
asks it: `Names.in_memory` renames a key, `Names.load` loads the tensors of one layer into a model on `meta`
(plain stacks of experts are filled in place, everything else goes through the library's loader),
`Names.to_disk` turns a layer's state back. `stock_dtype` asks it what a model is loaded in. Pinned to
transformers 5.23; the family tests fail loudly when a release moves any of this.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    PrefixChange,
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    dot_natural_key,
    rename_source_key,
    revert_weight_conversion,
)
from transformers.modeling_utils import (
    LoadStateDictConfig,
    _get_dtype,  # pyright: ignore[reportPrivateUsage]
)
from transformers.utils import logging as transformers_logging

from moespresso.core.errors import UserError
from moespresso.runtime import stacked, widened

transformers_logging.disable_progress_bar()

# Rows and columns of what stands for an expert's matrix: as many rows as show a half, and whether halves are interleaved.
_ROWS, _COLUMNS = 4, 3


@dataclass(frozen=True, slots=True)
class Slice:
    """One expert's matrix on disk, as rows of its stack in memory: a `share` of the expert's rows from the
    `first` on, both as parts of one."""

    name: str
    expert: int
    first: Fraction
    share: Fraction


class Names:
    """Both directions for one model (its parameters may all be on `meta`)."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self.family = str(model.config.model_type)
        # Annotated as the loader wants it: every entry is one of these two.
        self._loading: list[Any] = get_model_conversion_mapping(model)
        # The loader overwrites the model's mapping with what the last call happened to use, so ours is kept here.
        self._saving: Any = get_model_conversion_mapping(model, add_legacy=False)
        self._renamings = [entry for entry in self._loading if isinstance(entry, WeightRenaming)]
        self._converters = [entry for entry in self._loading if isinstance(entry, WeightConverter)]
        self.state: dict[str, Tensor] = dict(model.state_dict())

    def in_memory(self, key: str) -> tuple[str, str | None]:
        """Name in memory of an on-disk key, and the converter's source pattern that matched (None: only
        renamed)."""
        name, pattern = rename_source_key(
            key, self._renamings, self._converters, self._model.base_model_prefix, self.state
        )
        if name not in self.state and key in self.state:
            return key, None
        return name, pattern

    def is_linear(self, key: str) -> bool:
        """Whether a key is the weight of a linear layer of the model, in whose place loaders put one that is
        packed. A router may be a class of its own instead."""
        module, _, _ = self.in_memory(key)[0].rpartition(".")
        return isinstance(self._model.get_submodule(module), nn.Linear)

    def only_stacks(self, pattern: str) -> bool:
        """Whether the converter behind a source pattern stacks experts and joins gate and up, and nothing
        else."""
        operations = self._converter(pattern).operations
        return [(type(operation), getattr(operation, "dim", None)) for operation in operations] in (
            [(MergeModulelist, 0)],
            [(MergeModulelist, 0), (Concatenate, 1)],
        )

    def only_lays_end_to_end(self, pattern: str) -> bool:
        """Whether the converter behind a source pattern lays its sources end to end along the first axis, and
        nothing else."""
        operations = self._converter(pattern).operations
        return [(type(operation), getattr(operation, "dim", None)) for operation in operations] == [
            (Concatenate, 0)
        ]

    def made_with(self, name: str, pattern: str) -> list[str]:
        """The other parameters that the converter behind a source pattern makes of what becomes `name`, where
        it makes several of one."""
        first, *others = self._converter(pattern).target_patterns
        return [name.replace(first, other) for other in others]

    def waits_for_packed(self, pattern: str) -> bool:
        """Whether the library gives the converter behind a source pattern packed parts only, where a
        checkpoint has any (a stack of experts apart, which is what that is made for)."""
        return self.of_weights(pattern) and not self.only_stacks(pattern)

    def of_weights(self, pattern: str) -> bool:
        """Whether the converter behind a source pattern takes whole weights, before which the library
        unpacks."""
        return all(source.endswith(".weight") for source in self._converter(pattern).source_patterns)

    def order(self, key: str, pattern: str) -> tuple[int, Any]:
        """The place of an on-disk key among all that the converter behind its source pattern takes."""
        return self._converter(pattern).source_patterns.index(pattern), dot_natural_key(key)

    def _converter(self, pattern: str) -> WeightConverter:
        return next(entry for entry in self._converters if pattern in entry.source_patterns)

    def load(self, tensors: Mapping[str, Any], dtype: torch.dtype, device: torch.device) -> None:
        """Load `tensors` (on-disk name to anything that answers `[...]`) into the model's modules.

        Raises `UserError` when a tensor's shape is not the one the config asks for.
        """
        stacked: dict[str, dict[str, list[str]]] = {}
        rest: dict[str, Any] = {}
        for key, tensor in tensors.items():
            name, pattern = self.in_memory(key)
            if pattern is not None and self.only_stacks(pattern):
                stacked.setdefault(name, {}).setdefault(pattern, []).append(key)
            else:
                rest[key] = tensor
        self._load_by_library(rest, dtype, device)
        for name, keys in stacked.items():
            self._fill(name, keys, tensors, device)

    def _fill(
        self, name: str, keys: dict[str, list[str]], tensors: Mapping[str, Any], device: torch.device
    ) -> None:
        """Copy experts straight to their place in the stack; the library would hold every one of them
        twice."""
        wanted = self.state[name]
        stack = torch.empty(wanted.shape, dtype=wanted.dtype, device=device)
        patterns = [
            pattern for pattern in self._converter(next(iter(keys))).source_patterns if pattern in keys
        ]
        for place, pattern in enumerate(patterns):
            slots = stack.chunk(len(patterns), dim=1)[place]
            for slot, key in zip(slots, sorted(keys[pattern], key=dot_natural_key), strict=True):
                tensor = tensors[key][...]
                if tensor.shape == slot.shape:
                    slot.copy_(tensor)
                else:  # narrower than the widest of its layer
                    slot.copy_(widened(tensor, slot.shape))
        module, _, parameter = name.rpartition(".")
        self._model.get_submodule(module)._parameters[parameter] = nn.Parameter(stack, requires_grad=False)

    def _load_by_library(self, tensors: Mapping[str, Any], dtype: torch.dtype, device: torch.device) -> None:
        settings = LoadStateDictConfig(
            weight_mapping=self._loading,
            device_map={"": device},
            dtype=dtype,
            # Without the plan, tensors that must stay float32 are rounded and routing changes.
            dtype_plan=self._model._get_dtype_plan(dtype),  # pyright: ignore[reportPrivateUsage]
        )
        with stacked():
            info, _ = convert_and_load_state_dict_in_model(self._model, dict(tensors), settings)
        if info.conversion_errors:
            name, error = next(iter(info.conversion_errors.items()))
            raise _conversion_error(name, [line for line in str(error).splitlines() if line.strip()])
        for name, shape, wanted in info.mismatched_keys:
            raise UserError(
                f"{name} has shape {list(shape)} in the files, the config asks for {list(wanted)}"
            )

    def to_disk(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """On-disk names and per-expert tensors of (part of) an in-memory state."""
        self._model._weight_conversions = self._saving
        return revert_weight_conversion(self._model, dict(state))

    def own_layout(self) -> tuple[dict[str, str], dict[str, list[Slice]]]:
        """How the library would write the model: the new name of every parameter that is written as it is,
        and of every stack [E, out, in] that is written expert by expert the matrices on disk. Prefixes of
        wrappers are left alone, which it knows from loading only.

        Found by what it makes of small stacks of counted numbers. A stack whose matrices are no runs of rows
        is left out.
        """
        probes = {
            name: torch.arange(tensor.shape[0] * _ROWS * _COLUMNS).view(-1, _ROWS, _COLUMNS)
            for name, tensor in self.state.items()
            if tensor.dim() == 3 and "experts." in name
        }
        saving: Any = [entry for entry in self._saving if not isinstance(entry, PrefixChange)]
        self._model._weight_conversions = saving
        written = revert_weight_conversion(self._model, {**self.state, **probes})
        before = {id(tensor): name for name, tensor in self.state.items()}
        renamed = {before[id(tensor)]: name for name, tensor in written.items() if id(tensor) in before}
        slices: dict[str, list[Slice]] = {}
        for disk, tensor in written.items():
            name, pattern = self.in_memory(disk)
            if name in probes and pattern is not None and self.only_stacks(pattern):
                slices.setdefault(name, []).append(_run_of_rows(disk, tensor))
        shares = {name: sum(part.share for part in parts) for name, parts in slices.items()}
        return renamed, {
            name: parts for name, parts in slices.items() if shares[name] == probes[name].shape[0]
        }


def stock_dtype(config: PreTrainedConfig, files: Sequence[str], metadata: Mapping[str, Any]) -> Any:
    """What the library loads a model in that no dtype was asked for: the config's, else that of its index,
    else of the first floats, by name, of the first file. Raises `AttributeError` where the index names
    something that torch does not have."""
    return _get_dtype("auto", list(files), config, dict(metadata), None, weights_only=True)[1]


def _run_of_rows(name: str, tensor: Tensor) -> Slice:
    """Where in the counted stack a matrix was; with a share of nothing where it is no run of rows."""
    first = int(tensor.flatten()[0])
    run = torch.equal(tensor.flatten(), first + torch.arange(tensor.numel()))
    expert, row = divmod(first // _COLUMNS, _ROWS)
    share = len(tensor) if run and tensor.shape[-1] == _COLUMNS else 0
    return Slice(name, expert, Fraction(row, _ROWS), Fraction(share, _ROWS))


def _conversion_error(name: str, traceback: list[str]) -> Exception:
    """What the library tells as a traceback in text, as the error it was."""
    last = (traceback or ["unknown"])[-1].strip()
    if any("allocate memory" in line or "MemoryError" in line for line in traceback):
        return MemoryError(last)
    return UserError(f"tensors of {name} cannot be put together ({last})")
