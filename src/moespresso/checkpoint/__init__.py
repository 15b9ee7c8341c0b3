"""Bytes on disk to named tensors and back. Knows shards, not models."""

from moespresso.checkpoint.files import INDEX, SINGLE, read_json
from moespresso.checkpoint.hub import locate
from moespresso.checkpoint.index import Checkpoint, open_checkpoint
from moespresso.checkpoint.journal import Journal, claim, finish, sweep_up
from moespresso.checkpoint.manifest import MANIFEST, FileFacts, Manifest, Origin
from moespresso.checkpoint.packed import check_readable, packing_config
from moespresso.checkpoint.reader import TORCH_DTYPES, Reader, count_nonfinite
from moespresso.checkpoint.section import OWN_KIND, SECTION, hoisted
from moespresso.checkpoint.sidecar import copy_sidecar, sidecars
from moespresso.checkpoint.writer import (
    Written,
    as_bytes,
    disk_full_is_told,
    header,
    write_file,
    write_index,
    write_text,
)

__all__ = [
    "INDEX",
    "MANIFEST",
    "OWN_KIND",
    "SECTION",
    "SINGLE",
    "TORCH_DTYPES",
    "Checkpoint",
    "FileFacts",
    "Journal",
    "Manifest",
    "Origin",
    "Reader",
    "Written",
    "as_bytes",
    "check_readable",
    "claim",
    "copy_sidecar",
    "count_nonfinite",
    "disk_full_is_told",
    "finish",
    "header",
    "hoisted",
    "locate",
    "open_checkpoint",
    "packing_config",
    "read_json",
    "sidecars",
    "sweep_up",
    "write_file",
    "write_index",
    "write_text",
]
