"""The engine's own file at a chosen place: a folder that loads at once, with nothing left to pack."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from llm_boost.checkpoint.packed import PackedEntry, PackKey, write_packed
from llm_boost.checkpoint.packed_checkpoint import WEIGHTS, PackedCheckpoint
from llm_boost.checkpoint.whole_file import Progress, whole_folder
from llm_boost.convert.huggingface import write_files
from llm_boost.convert.source import Source
from llm_boost.models import decoder
from llm_boost.models.packing import LAYOUT_VERSION, pack_entries, plan_entries

DTYPES = ("float32", "bfloat16", "int8", "int4")


def write(
    folder: Path,
    source: Source,
    dtype: str,
    threads: int,
    files: Mapping[str, bytes],
    progress: Progress | None = None,
) -> int:
    """Packs the source in `dtype` (of DTYPES) into `folder`, which takes its name at the end."""
    checkpoint = source.checkpoint
    specs = list(decoder.weights(source.model))
    planned = plan_entries(checkpoint, specs, dtype)
    key = PackKey(checkpoint.path, checkpoint.fingerprint(), dtype, LAYOUT_VERSION)
    total = sum(entry.nbytes for entry in planned)
    with whole_folder(folder, total) as temporary:
        write_files(temporary, files)
        entries: Callable[[], Iterator[PackedEntry]] = lambda: pack_entries(checkpoint, specs, dtype, threads)  # noqa: E731
        kept = [
            info
            for name, info in checkpoint.tensors.items()
            if name != "lm_head.weight" or not source.model.tie_word_embeddings
        ]
        write_packed(temporary / WEIGHTS, key, entries, planned, kept, progress)
        PackedCheckpoint(temporary).packed(planned, LAYOUT_VERSION)
    return total
