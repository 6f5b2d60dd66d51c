"""A model packed by round-to-nearest or by GPTQ, as a folder that loads at once."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llm_boost.checkpoint.packed import Bytes, PackedEntry, PackKey, PlannedEntry, write_packed
from llm_boost.checkpoint.packed_checkpoint import WEIGHTS, PackedCheckpoint
from llm_boost.checkpoint.whole_file import check_free_space, disk_errors
from llm_boost.convert.huggingface import write_files
from llm_boost.convert.settings import settings_files
from llm_boost.convert.source import Source, main_dtype
from llm_boost.models import decoder
from llm_boost.models.packing import LAYOUT_VERSION, pack_entries, plan_entries
from llm_boost.models.weights import Matrix, WeightSpec
from llm_boost.quantize.calibration import HELD_OUT, Tokens
from llm_boost.quantize.calibrator import Calibrator, Events, Resume
from llm_boost.quantize.work_folder import WorkFolder

Progress = Callable[[int, int], None]  # weights done, weights in all
Report = Callable[[Path, Tokens], Mapping[str, Any]]  # what the new model, and the held-out text, tell

METHODS = ("gptq", "rtn")
DTYPES = ("int4", "int8")
REPORT = "quantization.json"


@dataclass(frozen=True)
class Options:
    """`method` is of METHODS, `dtype` of DTYPES; `calibration` names the text.

    `num_samples` sequences of `context` tokens are calibrated on; `damping` is that of `gptq.Rounder`. Both
    are for gptq alone.
    """

    dtype: str = "int4"
    method: str = "gptq"
    calibration: str = ""
    num_samples: int = 32
    context: int = 512
    damping: float = 0.01


def quantize(
    source: Source,
    output: Path,
    options: Options,
    tokens: Callable[[], Tokens],
    *,
    threads: int,
    resume: bool = False,
    report: Report | None = None,
    progress: Progress | None = None,
) -> Mapping[str, Any]:
    """Writes `source` in packed form to the folder `output`; returns what is known of it, plain JSON.

    `tokens` gives the calibration text (`calibration.sequences`) and is called when it is needed. Interrupted
    work is kept in `OUTPUT.unfinished`, by layer; the folder takes its name when it is whole.

    Raises:
        ConfigError: `output` is in use, or cannot be resumed. CheckpointError: the source is damaged, or the
            disk is full.
    """
    checkpoint = source.checkpoint
    specs = list(decoder.weights(source.model))
    planned = plan_entries(checkpoint, specs, options.dtype)
    key = PackKey(checkpoint.path, checkpoint.fingerprint(), options.dtype, LAYOUT_VERSION)
    total = sum(entry.nbytes for entry in planned)
    with disk_errors(output, 2 * total):
        check_free_space(output.parent, 2 * total)  # the matrices, and the file that they end in
    job = {**asdict(options), "source": str(checkpoint.path.resolve()), "fingerprint": key.fingerprint}
    work = WorkFolder(output, {**job, "layout": key.layout}, resume)
    calibrated = options.method == "gptq"
    text = work.tokens()
    if text is None and (calibrated or report):
        text = tokens()
    work.begin(text)
    if calibrated and text is not None:
        _calibrate(source, specs, options, text[:-HELD_OUT], work, threads, progress)

    def entries() -> Iterator[PackedEntry]:
        if calibrated:
            return _entries(source, specs, planned, work, options.dtype, threads)
        return pack_entries(checkpoint, specs, options.dtype, threads)

    tied = source.model.tie_word_embeddings
    kept = [info for info in checkpoint.tensors.values() if not tied or info.name != "lm_head.weight"]
    write_packed(work.path / WEIGHTS, key, entries, planned, kept)
    write_files(work.path, settings_files(source, main_dtype(source)))
    PackedCheckpoint(work.path).packed(planned, LAYOUT_VERSION)
    measured = report(work.path, text[-HELD_OUT:]) if report and text is not None else {}
    known = {**job, "bytes": total, **measured}
    write_files(work.path, {REPORT: (json.dumps(known, indent=2) + "\n").encode()})
    work.finish()
    return known


def _calibrate(
    source: Source,
    specs: list[WeightSpec],
    options: Options,
    text: Tokens,
    work: WorkFolder,
    threads: int,
    progress: Progress | None,
) -> None:
    """Rounds every matrix into the work folder, from where an earlier run ended."""
    resume, done = work.layer() or (None, [])
    shapes = source.checkpoint.tensors
    sizes = {
        spec.name: sum(int(np.prod(shapes[part].shape)) for part in spec.parts)
        for spec in specs
        if isinstance(spec, Matrix)
    }
    total, rounded = sum(size for name, size in sizes.items() if name not in done), 0

    def packed(name: str, data: Bytes) -> None:
        work.keep_matrix(name, data)
        done.append(name)

    def layer(at: Resume) -> None:
        work.keep_layer(at, done)

    def advance(weights: int) -> None:
        nonlocal rounded
        rounded = min(rounded + weights, total)  # padding counts for nothing
        if progress:
            progress(rounded, total)

    calibrator = Calibrator(
        source.checkpoint,
        source.model,
        {spec.name: spec for spec in specs},
        np.ascontiguousarray(text),
        options.dtype,
        Events(packed, layer, advance),
        damping=options.damping,
        threads=threads,
        resume=resume,
    )
    decoder.build(calibrator, source.model)


def _entries(
    source: Source,
    specs: list[WeightSpec],
    planned: list[PlannedEntry],
    work: WorkFolder,
    dtype: str,
    threads: int,
) -> Iterator[PackedEntry]:
    """Matrices from the work folder; tables and vectors as the packer makes them."""
    for spec, entry in zip(specs, planned, strict=True):
        if isinstance(spec, Matrix):
            yield PackedEntry(entry.name, work.matrix(spec.name), entry.meta)
        else:
            yield from pack_entries(source.checkpoint, [spec], dtype, threads)
