"""One frozen configuration of a run: flags over environment over YAML. The model fills the rest."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from llm_boost.config.locations import cache_folder
from llm_boost.config.memory_size import parse_memory_size
from llm_boost.errors import ConfigError

if TYPE_CHECKING:
    from llm_boost.config.llm_boost_yaml import LlmBoostYaml  # a run without a YAML file does not wait for it

ENVIRONMENT = {  # variable: field
    "LLM_BOOST_MODEL": "model",
    "LLM_BOOST_DTYPE": "dtype",
    "LLM_BOOST_THREADS": "threads",
    "LLM_BOOST_SEED": "seed",
    "LLM_BOOST_CACHE": "cache_dir",
}
_DTYPE_ALIASES = {"fp32": "float32", "bf16": "bfloat16"}
_FLOAT16 = ("float16", "fp16")
Dtype = Literal["auto", "float32", "bfloat16", "int8", "int4"]


def check_dtype(origin: str, value: object) -> str:
    """The dtype's full name; for another value a ConfigError that starts with `origin`, such as `--dtype`."""
    dtype = _DTYPE_ALIASES.get(value, value) if isinstance(value, str) else value
    if dtype not in get_args(Dtype):
        hint = "; float16 overflows on Qwen2: use bfloat16" if value in _FLOAT16 else ""
        raise ConfigError(
            f"{origin}: got {value!r}, allowed: auto, float32 (fp32), bfloat16 (bf16), int8, int4{hint}"
        )
    return str(dtype)


Positive = Annotated[int, Field(ge=1, le=2**31 - 1)]


class RunConfig(BaseModel):
    """A validated run. None means: nobody said; the model's own files or the engine's default decide."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    model: str
    dtype: Dtype = "auto"
    kv_cache_dtype: Literal["auto", "float32", "int16", "int8"] = "auto"
    seq_length: Positive | None = None  # tokens of prompt and continuation that a sequence can hold
    max_decode_length: Positive | None = None  # tokens of prompt and continuation that a run stops at
    max_new_tokens: Positive | None = None  # tokens of the continuation alone; outranks max_decode_length
    batch_size: Positive | None = None
    block_size: Annotated[int, Field(ge=16, le=4096, multiple_of=16)] | None = None
    num_blocks: Positive | None = None
    kv_cache_memory: Annotated[int, Field(ge=1)] | None = None  # bytes; outranks num_blocks of a lower rank
    speculative_method: Literal["ngram", "draft_model"] | None = None
    speculative_model: str | None = None
    speculative_tokens: Annotated[int, Field(ge=1, le=32)] | None = None
    speculative_lookup_min: Annotated[int, Field(ge=1, le=32)] | None = None
    speculative_lookup_max: Annotated[int, Field(ge=1, le=32)] | None = None
    do_sample: bool | None = None
    temperature: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    top_k: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    stop: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    ignore_eos: bool = False
    seed: Annotated[int, Field(ge=0, le=2**63 - 1)] = 0
    eos_token_ids: tuple[int, ...] = ()  # of the YAML, besides the model's own
    threads: Annotated[int, Field(ge=1, le=1024)] | None = None
    cache_dir: Path
    vocab_file: Path | None = None
    merges_file: Path | None = None
    tokenizer_overrides: dict[str, Any] = Field(default_factory=dict)
    src_strategy: Path | None = None  # of a checkpoint in rank folders
    auto_trans_ckpt: bool | None = None  # whether such a checkpoint may be merged as it is read; None: yes

    def speculation(self) -> dict[str, Any] | None:
        """LLM's speculative_config; None where nothing was said of it."""
        said = {
            "method": self.speculative_method,
            "model": self.speculative_model,
            "num_speculative_tokens": self.speculative_tokens,
            "prompt_lookup_min": self.speculative_lookup_min,
            "prompt_lookup_max": self.speculative_lookup_max,
        }
        return {name: value for name, value in said.items() if value is not None} or None

    def sampling(self) -> dict[str, Any]:
        """What was said of sampling, in SamplingParams' names; greedy is temperature 0."""
        said = {
            "temperature": self.temperature,
            "top_k": self.top_k,
            "top_p": self.top_p,
            "min_p": self.min_p,
            "repetition_penalty": self.repetition_penalty,
        }
        if self.do_sample is False:
            said["temperature"] = 0.0
        return {name: value for name, value in said.items() if value is not None}


@dataclass(frozen=True)
class Resolved:
    """A run's configuration, the YAML it came from, and what the user should know, a line each."""

    config: RunConfig
    yaml: LlmBoostYaml | None = None
    notes: list[str] = field(default_factory=list)
    origins: Mapping[str, str] = field(default_factory=dict)  # how a message names each field: `--threads`


class _Setting(NamedTuple):
    value: Any
    origin: (
        str  # how a message names it: `--top_p`, `LLM_BOOST_THREADS`, `file.yaml: model.model_config.top_p`
    )
    rank: int  # 2 flag, 1 environment, 0 file


def resolve(
    flags: Mapping[str, Any],
    yaml_config: LlmBoostYaml | None = None,
    environ: Mapping[str, str] = os.environ,
) -> Resolved:
    """Merges flags (None: not given), environment and YAML, in this order of precedence, and validates them.

    `flags` takes RunConfig's field names, besides load_checkpoint (another name of model) and those that ask
    for ranks: use_parallel, device_num, device_id, only_save_strategy. Raises ConfigError.
    """
    flags = {name: value for name, value in flags.items() if value is not None}
    notes: list[str] = []
    _refuse_more_than_one_rank(flags, yaml_config)
    settings = _yaml_settings(yaml_config, notes) if yaml_config else {}
    for variable, name in ENVIRONMENT.items():
        if environ.get(variable):
            settings[name] = _Setting(environ[variable], variable, 1)
    settings |= {name: _Setting(value, f"--{name}", 2) for name, value in _own_flags(flags).items()}
    _let_flags_choose_sampling(settings, notes)
    _bound_lengths(settings, notes)
    _size_cache(settings)
    settings.setdefault("cache_dir", _Setting(cache_folder(None, {}), "the default cache folder", 0))
    settings["cache_dir"] = settings["cache_dir"]._replace(
        value=Path(settings["cache_dir"].value).expanduser()
    )
    if "model" not in settings:
        raise ConfigError(
            "no model: give --model (a directory, a .gguf file, a pulled name) or load_checkpoint in the YAML"
        )
    if "dtype" in settings:
        dtype = settings["dtype"]
        settings["dtype"] = dtype._replace(value=check_dtype(dtype.origin, dtype.value))
    for name in ("vocab_file", "merges_file"):
        if name in settings:
            settings[name] = settings[name]._replace(value=_existing(settings[name], name))
    try:
        config = RunConfig(**{name: setting.value for name, setting in settings.items()})
    except ValidationError as error:
        raise ConfigError(_first_line(error, settings)) from None
    if yaml_config and yaml_config.without_effect:
        notes.append(f"{yaml_config.path}: without effect here: {', '.join(yaml_config.without_effect)}")
    return Resolved(config, yaml_config, notes, {name: s.origin for name, s in settings.items()})


def _own_flags(flags: Mapping[str, Any]) -> dict[str, Any]:
    own = {name: value for name, value in flags.items() if name not in _RANK_FLAGS}
    load_checkpoint = own.pop("load_checkpoint", None)
    if load_checkpoint is not None and own.setdefault("model", load_checkpoint) != load_checkpoint:
        raise ConfigError(
            f"--model {own['model']!r} and --load_checkpoint {load_checkpoint!r} differ: give one"
        )
    return own


def _yaml_settings(yaml_config: LlmBoostYaml, notes: list[str]) -> dict[str, _Setting]:
    root, model, tokenizer = yaml_config.root, yaml_config.model, yaml_config.tokenizer
    found: dict[str, _Setting] = {}

    def take(name: str, value: Any, key: str) -> None:
        if value is not None and value != "":
            found[name] = _Setting(value, f"{yaml_config.path}: {key}", 0)

    for name in (
        "batch_size", "seq_length", "max_decode_length", "max_new_tokens", "block_size", "num_blocks",
        "do_sample", "temperature", "top_k", "top_p", "repetition_penalty",
    ):  # fmt: skip
        take(name, getattr(model, name), f"model.model_config.{name}")
    take(
        "max_decode_length", model.max_length, "model.model_config.max_length"
    )  # outranks it in MindFormers too
    take("eos_token_ids", model.eos_token_id, "model.model_config.eos_token_id")
    take("seed", root.seed, "seed")
    take("model", model.checkpoint_name_or_path, "model.model_config.checkpoint_name_or_path")
    take("model", root.load_checkpoint, "load_checkpoint")
    take("src_strategy", root.src_strategy_path_or_dir, "src_strategy_path_or_dir")
    take("auto_trans_ckpt", root.auto_trans_ckpt, "auto_trans_ckpt")
    take("dtype", model.compute_dtype, "model.model_config.compute_dtype")
    if model.compute_dtype in _FLOAT16:
        found["dtype"] = found["dtype"]._replace(value="bfloat16")
        notes.append(
            f"{yaml_config.path}: model.model_config.compute_dtype: {model.compute_dtype} runs as bfloat16 "
            "(float16 overflows on Qwen2)"
        )
    files = {"tokenizer_file": "vocab_file", "vocab_file": "vocab_file", "merges_file": "merges_file"}
    for key, name in files.items():
        value = getattr(tokenizer, key)
        if value and not value.startswith("/path/"):  # the shipped files' placeholder
            take(name, value, f"processor.tokenizer.{key}")
    overrides = tokenizer.model_dump(exclude_none=True, exclude={*files, "model_max_length"})
    take("tokenizer_overrides", overrides or None, "processor.tokenizer")
    return found


def _existing(setting: _Setting, name: str) -> Path:
    path = Path(setting.value).expanduser()
    if not path.exists():
        raise ConfigError(f"{setting.origin}: got {setting.value!r}: The {name} should exist.")
    return path


_RANK_FLAGS = ("use_parallel", "device_num", "device_id", "only_save_strategy")


def _refuse_more_than_one_rank(flags: Mapping[str, Any], yaml_config: LlmBoostYaml | None) -> None:
    one_rank = "this version runs on one rank"
    if flags.get("device_num", 1) != 1:
        raise ConfigError(f"--device_num: got {flags['device_num']}, allowed: 1; {one_rank}")
    if flags.get("device_id", -1) not in (-1, 0):
        raise ConfigError(
            f"--device_id: got {flags['device_id']}, allowed: 0 (the processor), or -1 for the same"
        )
    if flags.get("only_save_strategy"):
        raise ConfigError(
            "--only_save_strategy: got True, allowed: False; llm-boost predict and strategy save strategies"
        )
    if yaml_config is None:
        return
    root, path = yaml_config.root, yaml_config.path
    if root.only_save_strategy and "only_save_strategy" not in flags:
        raise ConfigError(
            f"{path}: only_save_strategy: got True, allowed: False; "
            "llm-boost predict and strategy save strategies"
        )
    ranks = yaml_config.ranks(flags.get("use_parallel", root.use_parallel), flags.get("device_num"))
    if ranks > 1:
        raise ConfigError(
            f"{path}: parallel_config: got {ranks} ranks with use_parallel True, allowed: 1; {one_rank}"
        )


def _let_flags_choose_sampling(settings: dict[str, _Setting], notes: list[str]) -> None:
    """A sampling flag outranks a file's `do_sample: False`: who asks for --top_k 20 wants sampling.

    Temperature 0 is greedy wherever it stands; do_sample at a higher rank than the temperature beats it.
    """
    do_sample = settings.get("do_sample")
    asked = [s for n in ("temperature", "top_k", "top_p", "min_p") if (s := settings.get(n)) and s.rank == 2]
    if not asked:
        return
    if do_sample is not None and do_sample.rank == 2:
        if do_sample.value is False:
            notes.append(f"--do_sample False is greedy: {', '.join(s.origin for s in asked)} without effect")
        return
    temperature = settings.get("temperature")
    greedy = temperature is not None and temperature.rank == 2 and temperature.value == 0
    settings["do_sample"] = _Setting(not greedy, asked[0].origin, 2)


def _bound_lengths(settings: dict[str, _Setting], notes: list[str]) -> None:
    length, total, new = (settings.get(n) for n in ("seq_length", "max_decode_length", "max_new_tokens"))
    if total is not None and new is not None and total.rank > new.rank:
        del settings["max_new_tokens"]  # a file's; the flag outranks it
    if (
        length is None
        or total is None
        or not isinstance(length.value, int)
        or not isinstance(total.value, int)
    ):
        return
    if total.value <= length.value:
        return
    if length.rank == total.rank == 2:
        raise ConfigError(
            f"--max_decode_length {total.value} and --seq_length {length.value}: "
            "The max_decode_length must be less than or equal to seq_length."
        )
    notes.append(f"{total.origin} {total.value} is clamped to {length.value} ({length.origin})")
    settings["max_decode_length"] = total._replace(value=length.value)


def _size_cache(settings: dict[str, _Setting]) -> None:
    """The KV cache has a size in memory or in blocks; the file's gives way to the flag."""
    memory, blocks = settings.get("kv_cache_memory"), settings.get("num_blocks")
    if memory is None:
        return
    size = parse_memory_size(memory.origin, memory.value)
    settings["kv_cache_memory"] = memory._replace(value=size)
    if blocks is not None and blocks.rank < memory.rank:
        del settings["num_blocks"]


def _first_line(error: ValidationError, settings: Mapping[str, _Setting]) -> str:
    problem = error.errors(include_url=False)[0]
    name = str(problem["loc"][0])
    origin = settings[name].origin if name in settings else name
    allowed = _ALLOWED.get(problem["type"]) or problem["msg"].removeprefix("Input should be ")
    return f"{origin}: got {problem['input']!r}, allowed: {allowed}"


_ALLOWED = {
    "string_too_short": "text, not empty",
    "int_parsing": "an integer",
    "int_from_float": "an integer",
}
