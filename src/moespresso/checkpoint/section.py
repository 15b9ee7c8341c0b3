"""What `quantization_config` says: which layout a checkpoint is packed in, and the format of every matrix.

Every key stands in one of three tables: it is understood here, it says nothing about how values are decoded,
or it must say nothing (null, empty, false) since what it does is not read. Any other key is refused by name,
as is any value that is not understood: what would be passed over here would be gone from the result. Sources:
the config classes of compressed-tensors 0.20, and of GPTQ and AWQ in transformers 5.23 and GPTQModel.

Which group of compressed-tensors means a module is decided as its library does (`match_targets`): the
module's own name, then `re:` patterns in the order of the alphabet, then class names; a target that two
groups name is the later one's.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from reprlib import repr as short
from typing import Any, cast

from moespresso.core.errors import UserError
from moespresso.core.format import Format
from moespresso.formats import Codec, CompressedTensors, IntegerLayout, codec_named, codecs

SECTION = "quantization_config"
METHOD, KIND = "compressed-tensors", "pack-quantized"
# Stands for KIND where stock loaders would compute wrong numbers: they stop at a name that they do not know.
OWN_KIND = "moespresso-packed"
_ELSEWHERE = "give the unquantized checkpoint"

Settings = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class _Keys:
    """The keys of one table of the section: `known` are understood, `silent` say nothing about decoding,
    `unread` must be null, empty or false."""

    known: frozenset[str]
    silent: frozenset[str] = frozenset()
    unread: frozenset[str] = frozenset()

    def check(self, settings: Settings, where: str) -> None:
        for key, value in settings.items():
            if key in self.known | self.silent or _empty(value) or (key in self.unread and value is False):
                continue
            why = "is not read by this version" if key in self.unread else "is not known to this version"
            raise UserError(f"{where}{key} = {short(value)} {why}: {_ELSEWHERE}, or one packed without it")


def _keys(known: str, silent: str = "", unread: str = "") -> _Keys:
    return _Keys(*(frozenset(words.split()) for words in (known, silent, unread)))


_COMPRESSED = _keys(
    "quant_method format config_groups ignore quantization_status sparsity_config transform_config",
    "version global_compression_ratio run_compressed dequantize use_optimized_inference packed_modules_mapping",
    "kv_cache_scheme moe_sparsity_config",
)
_GROUP = _keys("targets weights format", "", "input_activations output_activations")
_WEIGHTS = _keys(
    "num_bits type symmetric strategy group_size actorder scale_dtype zp_dtype",
    "observer observer_kwargs",
    "block_structure dynamic",
)
# What GPTQ's and AWQ's tools note about how values were found, which kernels to run and what they were made with.
_MADE_BY = """
    meta quantizer damp_percent damp_auto_increment true_sequential static_groups act_group_aware mse dataset tokenizer
    model_name_or_path model_file_base_name model_seqlen batch_size pad_token_id max_input_length cache_block_outputs
    block_name_to_quantize module_name_preceding_first_block backend use_exllama disable_exllama exllama_config
    use_cuda_fp16 offload_to_disk offload_to_disk_path v2 gptaq foem hyb_act hessian hessian_chunk_size failsafe fallback
    mock_quantization parallel_packing rotation_seed gc_mode vram_strategy do_fuse fuse_max_seq_len modules_to_fuse
    inference_only nsamples seqlen uuid"""
_UNREAD = "is_marlin_format adapter rotation lora_path exllama_lora hadamard quant_lm_head"
_GPTQ = _keys(
    "quant_method method bits group_size sym desc_act checkpoint_format format dynamic lm_head pack_dtype "
    "modules_in_block_to_quantize",
    _MADE_BY,
    _UNREAD,
)
_AWQ = _keys(
    "quant_method method bits group_size zero_point sym version checkpoint_format format dynamic pack_dtype backend "
    "modules_to_not_convert",
    _MADE_BY.replace("backend", "") + " lm_head",
    _UNREAD + " desc_act",
)
_KEYS_OF = {"gptq": _GPTQ, "awq": _AWQ}
# What `dynamic` may change for single modules: only what is the same for all is read, so that the section can say it again.
_OVERRIDES = _keys("bits group_size sym desc_act", _MADE_BY, _UNREAD)
# Names in AutoAWQ's own file, and in config.json: transformers passes over the first and takes what it has by default.
AUTOAWQ = {"w_bit": "bits", "q_group_size": "group_size"}
_FLOATS = ("float16", "bfloat16", "float32")


@dataclass(frozen=True)
class ModulePatterns:
    """Names, patterns and classes, looked up without going through all names."""

    names: frozenset[str] = frozenset()
    patterns: tuple[tuple[str, re.Pattern[str]], ...] = ()

    @classmethod
    def of(cls, targets: Iterable[str], where: str) -> ModulePatterns:
        """Sort them; raises `UserError` for a pattern that is none."""
        ordered = sorted(targets)
        try:
            patterns = tuple(
                (target, re.compile(target[3:])) for target in ordered if target.startswith("re:")
            )
        except re.error as error:
            raise UserError(f"{where} has a pattern that is none ({error}): {_ELSEWHERE}") from error
        return cls(frozenset(ordered), patterns)

    def best(self, module: str) -> str | None:
        """The target that counts for a linear module: its name, then patterns, then its classes."""
        if module in self.names:
            return module
        matching = (target for target, pattern in self.patterns if pattern.match(module))
        return next(matching, next((target for target in ("Linear", "Module") if target in self.names), None))


@dataclass(frozen=True)
class Section:
    """The section, read: `own` is one that only moespresso writes, `groups` are formats by target (None: not
    quantized).

    Where its codec has read it (`by_codec`), one format is said of all that is packed.
    """

    layout: str
    place: str
    method: str
    own: bool = False
    groups: Mapping[str, Format | None] = field(default_factory=dict[str, "Format | None"])
    targets: ModulePatterns = field(default_factory=ModulePatterns)
    ignored: ModulePatterns = field(default_factory=ModulePatterns)
    raw: Settings = field(default_factory=dict[str, Any])
    by_codec: bool = False

    def format_of(self, module: str) -> Format:
        """The format of a packed module; raises `UserError` where the section says that it is not packed, or
        says nothing."""
        held = _integers(self.layout)
        if not held.one_format:
            return self._of_groups(module)
        format = cast("Format", self.groups[""])
        if self.by_codec:
            return format
        _check_choice(format.bits, held.bits, f"{self.place}: {SECTION}.bits")
        pattern, changes = _override(_dynamic(self.raw), module)
        apart = _why_unpacked(self.raw, module) or (pattern if changes is None else "")
        if apart:
            raise UserError(
                f"{self.place}: {module} is packed, but {SECTION} leaves it alone ({apart}): {_ELSEWHERE}"
            )
        if (
            changes
            and _with_changes(format, changes, f"{self.place}: {SECTION}.dynamic.{pattern}.") != format
        ):
            raise UserError(
                f"{self.place}: {SECTION}.dynamic gives {module} another format than the rest ({pattern}), which in the "
                f"layout {self.layout} is not read by this version: {_ELSEWHERE}"
            )
        return format

    def _of_groups(self, module: str) -> Format:
        ignored = self.ignored.best(module)
        if ignored is not None:
            raise UserError(
                f"{self.place}: {module} is packed, but {SECTION}.ignore leaves it alone ({ignored}): {_ELSEWHERE}"
            )
        format = self.groups.get(self.targets.best(module) or "")
        if format is None or module.rpartition(".")[2].startswith("embed"):
            raise UserError(
                f"{self.place}: {module} is packed, but no group of config.json's {SECTION} means it: {_ELSEWHERE}"
            )
        return format


def hoisted(config: Mapping[str, Any], place: str) -> dict[str, Any]:
    """The config with its section at the top, where a wrapper has it inside of `text_config`: transformers
    looks there too.

    Raises `UserError` for sections in other places, which it does not read."""
    merged = dict(config)
    for key, inner in config.items():
        if not isinstance(inner, dict) or key == SECTION:
            continue
        inner = cast("dict[str, Any]", inner)
        for name in (SECTION, "compression_config"):
            if inner.get(name) and (key, name) != ("text_config", SECTION):
                raise UserError(f"{place}: {key}.{name} of config.json is not read: {_ELSEWHERE}")
        if inner.get(SECTION):
            if merged.get(SECTION, inner[SECTION]) != inner[SECTION]:
                raise UserError(
                    f"{place}: config.json has a {SECTION} and another one in its {key}: take out the one that does not hold"
                )
            merged |= {SECTION: inner[SECTION], key: {k: v for k, v in inner.items() if k != SECTION}}
    if config.get("compression_config"):
        raise UserError(
            f"{place} is already quantized, and its config.json says so under compression_config, which transformers 5 no "
            f"longer reads: call it {SECTION}, or {_ELSEWHERE}"
        )
    return merged


def read_section(config: Mapping[str, Any], place: str) -> Section | None:
    """The section of a config, None where it has none; raises `UserError` for what is not understood, by
    name."""
    section: object = hoisted(config, place).get(SECTION)
    if not section:
        return None
    settings = cast("dict[str, Any]", section) if isinstance(section, dict) else {}
    if (read := _by_codec(settings, place)) is not None:
        return read
    layout = _layout(settings, cast("object", section), place)
    try:
        if _integers(layout).one_format:
            return _read_one_format(settings, layout, place)
        return _read_compressed_tensors(settings, place)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"{place} is already quantized, and the {SECTION} of its config.json is not understood ({error!r}): give the "
            "unquantized checkpoint"
        ) from error


def _by_codec(settings: Settings, place: str) -> Section | None:
    """The section of a layout whose codec reads it by itself, as one of a user's own file does."""
    for held in codecs():
        if not held.one_format or held.engine != settings.get("quant_method"):
            continue
        try:
            format = held.read_section(settings)
        except UserError as error:
            raise UserError(f"{place}: {SECTION}: {error}") from error
        if format is not None:
            return Section(held.layout, place, held.engine, groups={"": format}, raw=settings, by_codec=True)
    return None


def _layout(settings: Settings, section: object, place: str) -> str:
    method, kind = settings.get("quant_method"), settings.get("format")
    if method is None and settings.keys() & {"bits", *AUTOAWQ}:
        raise UserError(
            f'{place}: the {SECTION} of config.json lacks its quant_method: add "quant_method": "gptq" where the tensors have a g_idx, '
            'else "quant_method": "awq"'
        )
    if (method, kind) in ((METHOD, KIND), (METHOD, OWN_KIND)):
        return CompressedTensors.layout
    kinds = [settings.get(key) for key in ("checkpoint_format", "version", "format")]
    if method in _FIRST and {str(name).lower() for name in kinds if name} <= {_FIRST[method]}:
        if settings.get("backend") != "llm-awq":
            return str(method)
        kinds = ["llm-awq"]
    words = " ".join(str(word) for word in (method, *dict.fromkeys(kinds)) if word)
    cure = (
        "give the checkpoint that it was made from, since its tool only packs others"
        if method == "bitsandbytes"
        else "give the unquantized one"
    )
    raise UserError(
        f"{place} is already quantized ({words or section}), and of such checkpoints this version reads {METHOD} {KIND}, "
        f"gptq, awq (gemm) and fp8 by blocks only: {cure}"
    )


# The one variant of each method that is read.
_FIRST = {"gptq": "gptq", "awq": "gemm"}


# compressed-tensors


def _read_compressed_tensors(settings: Settings, place: str) -> Section:
    where = f"{place}: {SECTION}."
    _COMPRESSED.check(settings, where)
    _check_choice(
        settings.get("quantization_status"), (None, "compressed", "frozen"), where + "quantization_status"
    )
    sparsity, transforms = (
        cast("Settings", settings.get(key) or {}) for key in ("sparsity_config", "transform_config")
    )
    _check_choice(
        sparsity.get("format") if sparsity else None, (None, "dense"), where + "sparsity_config.format"
    )
    _keys("", "", "config_groups").check(transforms, where + "transform_config.")
    own_kind = settings["format"] == OWN_KIND
    groups: dict[str, Format | None] = {}
    for name, group in settings["config_groups"].items():
        targets, format = _group(name, group, f"{where}config_groups.{name}.")
        groups |= dict.fromkeys(targets, format)
    targets = ModulePatterns.of(groups, where + "config_groups")
    ignored = ModulePatterns.of(settings.get("ignore") or (), where + "ignore")
    return Section(CompressedTensors.layout, place, METHOD, own_kind, groups, targets, ignored, settings)


def _group(name: str, group: Any, where: str) -> tuple[list[str], Format | None]:
    if isinstance(group, list):  # the name of a preset, and what it is for
        preset = re.fullmatch(r"W([2-8])A16|W4A16(_ASYM)", name.upper())
        if preset is None:
            raise UserError(f"{where[:-1]} is a preset that is not read by this version: {_ELSEWHERE}")
        return cast("list[str]", group), Format(
            "integer", _bits(preset[1] or 4, where), 128, symmetric=preset[2] is None
        )
    _GROUP.check(group, where)
    _check_choice(group.get("format"), (None, KIND, OWN_KIND), where + "format")
    weights = group.get("weights")
    return list(group["targets"]), None if weights is None else _weights(weights, where + "weights.")


def _weights(settings: Settings, where: str) -> Format:
    """The format that a group gives to weights; what is not said is what the library takes for it."""
    codec = next((each for each in codecs() if each.own and settings.get("type") in each.kinds), None)
    if codec is not None:
        return _own_weights(settings, codec, where)
    _WEIGHTS.check(settings, where)
    _check_choice(str(settings.get("type", "int")).lower(), ("int",), where + "type")
    size = settings.get("group_size")
    default = "tensor" if size is None else "channel" if size == -1 else "group"
    strategy = str(settings.get("strategy") or default).lower()
    _check_choice(strategy, ("group", "channel"), where + "strategy")
    group_size = size if type(size) is int and size > 0 else 0
    if (strategy == "group") != bool(group_size):
        raise UserError(f"{where}group_size = {size} does not go with the strategy {strategy}: {_ELSEWHERE}")
    _check_choice(settings.get("zp_dtype"), (None, "torch.int8", "int8"), where + "zp_dtype")
    _check_choice(
        settings.get("scale_dtype"),
        (None, *_FLOATS, *(f"torch.{each}" for each in _FLOATS)),
        where + "scale_dtype",
    )
    order = settings.get("actorder") or None
    order = order.lower() if isinstance(order, str) else order
    _check_choice(order, (None, True, "weight", "static", "group", "dynamic"), where + "actorder")
    symmetric = settings.get("symmetric", True)
    _check_choice(symmetric, (True, False), where + "symmetric")
    ordered = strategy == "group" and order in (True, "group", "dynamic")
    bits = _bits(settings.get("num_bits", 8), where + "num_bits")
    return Format("integer", bits, group_size, symmetric, ordered=ordered)


def _own_weights(settings: Settings, codec: Codec, where: str) -> Format:
    """The format of a codec that only moespresso reads, as it says it itself."""
    _keys(" ".join(("type", *codec.settings))).check(settings, where)
    plain = Format()
    return Format(
        settings["type"], **{name: type(getattr(plain, name))(settings[name]) for name in codec.settings}
    )


# GPTQ and AWQ


def _read_one_format(settings: Settings, layout: str, place: str) -> Section:
    where = f"{place}: {SECTION}."
    foreign = next((key for key in AUTOAWQ if key in settings), None)
    if foreign is not None:
        raise UserError(
            f"{where}{foreign} is AutoAWQ's own name, which transformers does not know: call it {AUTOAWQ[foreign]}"
        )
    _KEYS_OF[layout].check(settings, where)
    _check_choice(settings.get("pack_dtype"), (None, "int32", "torch.int32"), where + "pack_dtype")
    _check_choice(settings.get("method"), (None, layout), where + "method")
    changes = {
        key: settings[key]
        for key in ("bits", "group_size", "sym", "desc_act")
        if settings.get(key) is not None
    }
    default_bits = 0
    if "zero_point" in _KEYS_OF[layout].known:
        changes.pop("desc_act", None)
        changes["sym"] = not settings["zero_point"] if settings.get("zero_point") is not None else False
        default_bits = 4
    format = _with_changes(Format("integer", default_bits, 128), changes, where)
    for pattern in _dynamic(settings):
        ModulePatterns.of(
            [f"re:{pattern[2:] if pattern[:2] in ('-:', '+:') else pattern}"], where + "dynamic"
        )
    return Section(layout, place, layout, groups={"": format}, raw=settings)


def _with_changes(format: Format, changes: Settings, where: str) -> Format:
    """The format with what is said for all modules, or for some of them."""
    _OVERRIDES.check(changes, where)
    size, symmetric = changes.get("group_size", format.group_size or -1), changes.get("sym", format.symmetric)
    ordered, bits = changes.get("desc_act", format.ordered), changes.get("bits", format.bits)
    _check_choice(symmetric, (True, False), where + "sym")
    _check_choice(ordered, (True, False), where + "desc_act")
    if type(size) is not int or not (size == -1 or size > 0):
        raise UserError(f"{where}group_size = {short(size)} is no size of groups: {_ELSEWHERE}")
    return replace(
        format, bits=bits, group_size=max(size, 0), symmetric=symmetric, ordered=ordered and size > 0
    )


def _dynamic(settings: Settings) -> Mapping[str, Settings | None]:
    return cast("Mapping[str, Settings | None]", settings.get("dynamic") or {})


def _override(dynamic: Mapping[str, Settings | None], module: str) -> tuple[str, Settings | None]:
    """The first pattern of GPTQModel's `dynamic` that a module matches, with what it changes (None: left
    alone)."""
    for pattern, changes in dynamic.items():
        if pattern.startswith("-:"):
            if re.match(pattern[2:], module):
                return pattern, None
        elif re.match(pattern.removeprefix("+:"), module):
            return pattern, changes or {}
    return "", {}


def _why_unpacked(settings: Settings, module: str) -> str:
    """Why the section's lists mean that a module is not packed, or nothing. Each is known in one of the two
    methods alone; of the head only GPTQ's says anything."""
    for name in settings.get("modules_to_not_convert") or ():
        if f".{name}." in f".{module}.":
            return f"modules_to_not_convert has {name}"
    inside = settings.get("modules_in_block_to_quantize")
    if inside:
        flat = [name for row in inside for name in ([row] if isinstance(row, str) else row)]
        if not any(module.endswith(name) for name in flat):
            return "modules_in_block_to_quantize does not have it"
    if (
        "lm_head" in _KEYS_OF[settings["quant_method"]].known
        and module == "lm_head"
        and settings.get("lm_head") is False
    ):
        return "lm_head is false"
    return ""


def _integers(layout: str) -> IntegerLayout:
    return cast("IntegerLayout", codec_named(layout))


def _check_choice(value: Any, choices: tuple[Any, ...], where: str) -> None:
    if not any(value is choice or (type(value) is type(choice) and value == choice) for choice in choices):
        read = ", ".join(str(choice) for choice in choices if choice is not None)
        raise UserError(f"{where} = {short(value)} is not read by this version ({read} is): {_ELSEWHERE}")


def _bits(value: Any, where: str) -> int:
    bits = int(value)
    _check_choice(bits, CompressedTensors.bits, where)
    return bits


def _empty(value: Any) -> bool:
    return value is None or value in ({}, [], "")
