"""The llm_boost YAML of MindFormers, validated key by key.

The keys are those of the files `predict_*_llm_boost.yaml` and of MindFormers' own description of its YAML
(1.3 to 1.7). A key that steers training or an accelerator is accepted and, since it does nothing here, named
once in a note; a key that MindFormers does not know either is an error.
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar, get_args

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from llm_boost.errors import ConfigError
from llm_boost.suggest import did_you_mean

MAX_YAML_BYTES = 1 << 20


class _NoEffect:
    """Marks a field whose value changes nothing here."""


T = TypeVar("T")
Idle = Annotated[T | None, _NoEffect()]


def _number(value: object) -> object:
    # YAML 1.1 reads 1e-6 (no dot) as text.
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _as_list(value: object) -> object:
    return [value] if isinstance(value, int) and not isinstance(value, bool) else value


Size = Annotated[int, Field(ge=1, le=2**31 - 1)]
TokenId = Annotated[int, Field(ge=0, le=2**31 - 1)]
TokenIds = Annotated[list[TokenId], BeforeValidator(_as_list), Field(min_length=1)]
Number = Annotated[float, BeforeValidator(_number)]
ComputeDtype = Literal["float16", "bfloat16", "float32", "fp16", "bf16", "fp32"]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, protected_namespaces=())
    idle_names: ClassVar[str] = ""  # further keys of MindFormers, of any value, none with an effect

    @model_validator(mode="before")
    @classmethod
    def _drop_idle_names(cls, data: object) -> object:
        if not isinstance(data, dict):
            return data
        idle = set(cls.idle_names.split())
        return {key: value for key, value in data.items() if key not in idle}


class _ModelConfig(_Section):
    idle_names = """
        communication_backend parallel_config parallel_decoding_params multiple_of ffn_dim_multiplier
        qkv_has_bias qkv_concat attn_proj_has_bias use_flash_attention use_paged_attention
        use_ring_attention use_rope_slice use_attn_mask_compression fine_grain_interleave fused_rms_norm
        layernorm_compute_type softmax_compute_type param_init_type residual_dtype embedding_init_type
        init_method_std min_length min_new_tokens return_dict_in_generate output_scores output_logits
        moe_config pp_interleave_num
    """
    type: Literal["LlmBoostConfig"]
    llm_backend: Literal["BuildIn"] = "BuildIn"
    boost_model_name: Literal["Llama", "Qwen"]
    batch_size: Size | None = None
    seq_length: Size | None = None
    hidden_size: Size | None = None
    num_layers: Size | None = None
    num_heads: Size | None = None
    n_kv_heads: Size | None = None
    vocab_size: Size | None = None
    intermediate_size: Size | None = None
    max_position_embedding: Size | None = None
    rms_norm_eps: Annotated[Number, Field(gt=0, lt=1)] | None = None
    theta: Annotated[Number, Field(gt=0)] | None = None
    scaling_factor: Annotated[Number, Field(gt=0)] | None = None
    extend_method: Literal["None", "PI", "NTK"] | None = None
    eos_token_id: TokenIds | None = None
    compute_dtype: ComputeDtype | None = None
    block_size: Size | None = None
    num_blocks: Size | None = None
    max_decode_length: Size | None = None
    max_length: Size | None = None
    max_new_tokens: Size | None = None
    do_sample: bool | None = None
    temperature: Annotated[Number, Field(ge=0)] | None = None
    top_k: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = None
    top_p: Annotated[Number, Field(gt=0, le=1)] | None = None
    repetition_penalty: Annotated[Number, Field(gt=0)] | None = None
    checkpoint_name_or_path: str | None = None
    bos_token_id: Idle[TokenId] = None  # the tokenizer's own begin a text; to_hf_config takes these two
    pad_token_id: Idle[TokenId] = None
    auto_map: Idle[dict[str, Any]] = None  # names Python files of the checkpoint: never imported
    rotary_dtype: Idle[ComputeDtype] = None
    ignore_token_id: Idle[int] = None
    use_past: Idle[bool] = None
    is_dynamic: Idle[bool] = None
    use_past_shard: Idle[bool] = None
    offset: Idle[Any] = None
    emb_dropout_prob: Idle[Number] = None
    parallel_optimizer: Idle[bool] = None


class _Arch(_Section):
    type: Literal["LlmBoostForCausalLM"]


class _Model(_Section):
    config: _ModelConfig = Field(alias="model_config")
    arch: _Arch | None = None


class _Tokenizer(_Section):
    type: Literal["Qwen2Tokenizer", "LlamaTokenizer"] | None = None
    vocab_file: str | None = None
    merges_file: str | None = None
    tokenizer_file: str | None = None
    unk_token: str | None = None
    bos_token: str | None = None
    eos_token: str | None = None
    pad_token: str | None = None
    chat_template: str | None = None
    additional_special_tokens: list[str] | None = None
    add_bos_token: bool | None = None
    add_eos_token: bool | None = None
    add_prefix_space: bool | None = None
    legacy: bool | None = None
    model_max_length: Idle[Size] = None


class _Processor(_Section):
    type: Idle[Literal["Qwen2Processor", "LlamaProcessor"]] = None
    return_tensors: Idle[str] = None
    tokenizer: _Tokenizer | None = None


class _Trainer(_Section):
    type: Idle[str] = None
    model_name: Idle[str] = None


class _RunnerConfig(_Section):
    idle_names = "gradient_accumulation_steps"
    epochs: Idle[int] = None
    batch_size: Idle[int] = None
    sink_mode: Idle[bool] = None
    sink_size: Idle[int] = None


class _Context(_Section):
    idle_names = """
        enable_graph_kernel graph_kernel_flags mempool_block_size memory_optimize_level memory_offload
        deterministic precompile_only enable_compile_cache compile_cache_path inter_op_parallel_num
        runtime_num_threads jit_config jit_level infer_boost reserve_class_name_in_scope
        pynative_synchronize variable_memory_max_size print_file_path env_config_path debug_level
        op_timeout exec_order aoe_tune_mode aoe_config check_bprop gpu_config support_binary
        auto_tune_mode enable_reduce_precision affinity_cpu_list disable_format_transform
    """
    mode: Idle[Literal[0, 1]] = None
    device_target: Idle[Literal["Ascend", "GPU", "CPU"]] = None
    device_id: Idle[int] = None
    ascend_config: Idle[dict[str, Any]] = None
    max_call_depth: Idle[Size] = None
    max_device_memory: Idle[str] = None
    save_graphs: Idle[Any] = None
    save_graphs_path: Idle[str] = None


class _Parallel(_Section):
    idle_names = """
        device_num global_rank gradient_fp32_sync loss_repeated_mean parameter_broadcast
        strategy_ckpt_load_file dataset_strategy auto_parallel_search_mode all_reduce_fusion_config
        pipeline_stages pipeline_config pipeline_result_broadcast grad_accumulation_step
        group_ckpt_save_file comm_fusion
    """
    parallel_mode: Idle[Literal[0, 1, 2, 3]] = None
    gradients_mean: Idle[bool] = None
    enable_alltoall: Idle[bool] = None
    full_batch: Idle[bool] = None
    search_mode: Idle[str] = None
    enable_parallel_optimizer: Idle[bool] = None
    strategy_ckpt_save_file: Idle[str] = None
    strategy_ckpt_config: Idle[dict[str, Any]] = None
    parallel_optimizer_config: Idle[dict[str, Any]] = None


class _ParallelConfig(_Section):
    idle_names = """
        expert_parallel optimizer_shard recompute ulysses_degree_in_cp context_parallel_algo
        seq_split_num mem_coeff
    """
    # The number of ranks: it counts when use_parallel is True.
    data_parallel: Size | None = None
    model_parallel: Size | None = None
    pipeline_stage: Size | None = None
    context_parallel: Size | None = None
    micro_batch_num: Idle[Size] = None
    gradient_aggregation_group: Idle[Size] = None
    vocab_emb_dp: bool | None = None  # of a strategy: the head lies whole on every rank
    use_seq_parallel: Idle[bool] = None


class _RecomputeConfig(_Section):
    recompute: Idle[Any] = None
    select_recompute: Idle[Any] = None
    parallel_optimizer_comm_recompute: Idle[bool] = None
    mp_comm_recompute: Idle[bool] = None
    recompute_slice_activation: Idle[bool] = None


class _File(_Section):
    idle_names = """
        remote_save_url load_ckpt_format load_ckpt_async remove_redundancy transform_process_num
        runner_wrapper moe_config auto_tune filepath_prefix autotune_per_step profile profile_start_step
        profile_stop_step profile_communication profile_memory profile_rank_ids profile_pipeline
        profile_level profile_output init_start_profile do_eval eval_step_interval eval_epoch_interval
        train_dataset train_dataset_task eval_dataset eval_dataset_task lr_schedule layer_scale
        layer_decay lr_scale lr_scale_factor optimizer eval_callbacks metric input_data
        predict_batch_size infer use_graceful_exit enable_mindio_ttp_save_ckpt
    """
    seed: Annotated[int, Field(ge=0, le=2**63 - 1)] | None = None
    run_mode: Literal["predict"] | None = None
    load_checkpoint: str | None = None
    src_strategy_path_or_dir: str | None = None
    auto_trans_ckpt: bool | None = None
    only_save_strategy: bool | None = None
    use_parallel: bool | None = None
    model: _Model
    processor: _Processor | None = None
    parallel_config: _ParallelConfig | None = None
    output_dir: str | None = None
    resume_training: Idle[Any] = None
    trainer: _Trainer | None = None
    context: _Context | None = None
    parallel: _Parallel | None = None
    runner_config: _RunnerConfig | None = None
    recompute_config: _RecomputeConfig | None = None
    micro_batch_interleave_num: Idle[Size] = None
    callbacks: Idle[list[Any]] = None


@dataclass(frozen=True)
class LlmBoostYaml:
    """A validated file: typed sections, and the keys that were given but change nothing here."""

    path: Path
    root: _File
    without_effect: tuple[str, ...]

    @property
    def model(self) -> _ModelConfig:
        return self.root.model.config

    @property
    def tokenizer(self) -> _Tokenizer:
        processor = self.root.processor
        return (processor and processor.tokenizer) or _Tokenizer()

    def ranks(self, use_parallel: bool | None, model_parallel: int | None) -> int:
        """Ranks of parallel_config, `model_parallel` in its place if given; 1 unless use_parallel is True."""
        sizes = self.root.parallel_config or _ParallelConfig()
        if not use_parallel:
            return 1
        others = (sizes.data_parallel, sizes.pipeline_stage, sizes.context_parallel)
        return math.prod(size or 1 for size in (model_parallel or sizes.model_parallel, *others))


def read_llm_boost_yaml(path: str | Path) -> LlmBoostYaml:
    """Reads and validates `path`; raises ConfigError with the file, the key and what is allowed."""
    path = Path(path).expanduser()
    data = _load(path)
    try:
        root = _File.model_validate(data)
    except ValidationError as error:
        raise ConfigError(_first_line(path, error)) from None
    return LlmBoostYaml(path, root, tuple(_without_effect(_File, data)))


class _Loader(yaml.SafeLoader):
    """SafeLoader (no Python objects) that refuses a key given twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if key.value in seen:
                    raise yaml.MarkedYAMLError(
                        problem=f"key {key.value!r} is given twice", problem_mark=key.start_mark
                    )
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def _load(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_YAML_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"{path}: cannot read the YAML file: {error.strerror}") from None
    if len(raw) > MAX_YAML_BYTES:
        raise ConfigError(f"{path}: larger than {MAX_YAML_BYTES} bytes, which no configuration needs")
    try:
        data = yaml.load(raw, _Loader)  # a subclass of SafeLoader
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        raise ConfigError(f"{where}: not valid YAML: {error.problem}") from None
    except (yaml.YAMLError, UnicodeError, ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else " ".join(str(error).split())
        raise ConfigError(f"{path}: not valid YAML: {reason}") from None
    if not isinstance(data, dict):
        raise ConfigError(
            f"{path}: got {_short(data)}, allowed: a mapping of keys such as model, processor, context"
        )
    return data


_ALLOWED = {
    "bool_type": "True or False",
    "int_type": "an integer",
    "float_type": "a number",
    "string_type": "text",
    "list_type": "a list",
    "dict_type": "a section of keys",
    "model_type": "a section of keys",
}
_HINTS = {"model.model_config.llm_backend": " (the built-in engine; it is the only one so far)"}


def _first_line(path: Path, error: ValidationError) -> str:
    problems = error.errors(include_url=False)
    first = problems[0]
    key = ".".join(map(str, first["loc"]))
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    if first["type"] == "missing":
        return f"{path}: {key}: missing; an llm_boost YAML needs it{more}"
    if first["type"] == "extra_forbidden":
        section = _section_of(first["loc"][:-1])
        known = [field.alias or name for name, field in section.model_fields.items()]
        hint = did_you_mean(str(first["loc"][-1]), [*known, *section.idle_names.split()])
        return f"{path}: {key}: unknown key{hint}{more}"
    if first["type"] == "literal_error":
        allowed = first["ctx"]["expected"].replace("'", "")
    else:
        allowed = _ALLOWED.get(first["type"]) or first["msg"].removeprefix("Input should be ")
    return f"{path}: {key}: got {_short(first['input'])}, allowed: {allowed}{_HINTS.get(key, '')}{more}"


def _section_of(location: tuple[int | str, ...]) -> type[_Section]:
    section: type[_Section] = _File
    for key in location:
        section = _subsections(section).get(str(key), section)
    return section


def _subsections(section: type[_Section]) -> dict[str, type[_Section]]:
    found = {}
    for name, field in section.model_fields.items():
        for candidate in (field.annotation, *get_args(field.annotation)):
            if isinstance(candidate, type) and issubclass(candidate, _Section):
                found[field.alias or name] = candidate
    return found


def _without_effect(section: type[_Section], data: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """Key paths of `data` that change nothing; a section of nothing else is named once."""
    idle = set(section.idle_names.split())
    idle.update(
        n for n, f in section.model_fields.items() if any(isinstance(m, _NoEffect) for m in f.metadata)
    )
    subsections = _subsections(section)
    for key, value in data.items():
        if key in idle:
            yield prefix + key
        elif key in subsections and isinstance(value, dict):
            inside = list(_without_effect(subsections[key], value, f"{prefix}{key}."))
            if (
                inside
                and len(inside) == len(value)
                and all(path.count(".") == prefix.count(".") + 1 for path in inside)
            ):
                yield prefix + key
            else:
                yield from inside


def _short(value: object) -> str:
    return reprlib.repr(value)
