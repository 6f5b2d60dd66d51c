"""MindIE's config.json, of every version: RC1 to 2.x and 3.

Every key of every version is accepted. A value out of MindIE's range is an error with the key's JSON path;
keys that change nothing here, unknown ones among them, are listed once (`without_effect`).
"""

from __future__ import annotations

import ipaddress
import json
import reprlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from llm_boost.errors import ConfigError

MAX_CONFIG_BYTES = 10 << 20


class _NoEffect:
    """Marks a key whose value changes nothing here."""


def _address(value: str) -> str:
    ipaddress.ip_address(value)
    return value


def _plugins(value: str) -> str:
    if value and not isinstance(_json(value), dict):
        raise ValueError("a JSON object as text, or an empty text")
    return value


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _not_zero(value: int) -> int:
    if value != -1 and value <= 0:
        raise ValueError("-1 (automatic) or a size in GB above 0")
    return value


def _truncation(value: object) -> Literal["refuse", "keep_first", "keep_last"]:
    if isinstance(value, (bool, int)) and value in (False, True, -1):
        if value is True or value == -1:
            return "keep_first"
        return "keep_last" if value == 1 else "refuse"
    raise ValueError("false or 0 (longer is an error), true or -1 (keep the first), 1 (keep the last)")


def _whole(value: object) -> object:
    return int(value) if isinstance(value, float) and value.is_integer() else value


Int = Annotated[int, BeforeValidator(_whole)]
Size = Annotated[Int, Field(ge=0, le=2**31 - 1)]
Port = Annotated[Int, Field(ge=1024, le=65535)]
Address = Annotated[str, AfterValidator(_address)]
RelativePath = Annotated[str, Field(min_length=1, max_length=4096)]
FileNames = Annotated[list[RelativePath], Field(max_length=3)]
PolicyType = Literal[0, 2]  # first come, first served; by priority
Milliseconds = Annotated[Int, Field(ge=0, le=1000)]
# Keys that have no effect here.
IdleInt = Annotated[Int, _NoEffect()]
IdleBool = Annotated[bool, _NoEffect()]
IdleText = Annotated[str, _NoEffect()]
IdleAny = Annotated[Any, _NoEffect()]


class Section(BaseModel):
    model_config = ConfigDict(extra="allow", frozen=True, strict=True, protected_namespaces=())


class LogSection(Section):
    logLevel: Literal["Verbose", "Debug", "Info", "Warning", "Warn", "Error", "Critical", "None"] = "Info"
    logFileSize: Annotated[Int, Field(ge=0, le=500)] = 20  # MB of a file
    logFileNum: Annotated[Int, Field(ge=0, le=64)] = 20  # files kept
    logPath: RelativePath = "logs/mindservice.log"
    dynamicLogLevel: IdleText = ""
    dynamicLogLevelValidHours: Annotated[IdleInt, Field(ge=1, le=168)] = 2
    dynamicLogLevelValidTime: IdleText = ""


class HealthCheckSection(Section):
    npuUsageThreshold: Annotated[IdleInt, Field(ge=0, le=100)] = 0


class ServerSection(Section):
    ipAddress: Address = "127.0.0.1"
    managementIpAddress: Address | None = None
    port: Port = 1025
    managementPort: Port | None = None
    metricsPort: Port | None = None
    allowAllZeroIpListening: bool = False
    maxLinkNum: Annotated[Int, Field(ge=1, le=4096)] = 1000
    httpsEnabled: bool = True
    fullTextEnabled: bool = False
    tlsCaPath: RelativePath = "security/ca/"
    tlsCaFile: FileNames = Field(default=["ca.pem"])
    tlsCert: RelativePath = "security/certs/server.pem"
    tlsPk: RelativePath = "security/keys/server.key.pem"
    tlsPkPwd: str = "security/pass/key_pwd.txt"
    tlsCrl: str | None = None
    tlsCrlPath: str | None = None
    tlsCrlFiles: FileNames | None = None
    managementTlsCaFile: FileNames = Field(default=["management_ca.pem"])
    managementTlsCert: RelativePath = "security/certs/management/server.pem"
    managementTlsPk: RelativePath = "security/keys/management/server.key.pem"
    managementTlsPkPwd: str = "security/pass/management/key_pwd.txt"
    managementTlsCrl: str | None = None
    managementTlsCrlPath: str | None = None
    managementTlsCrlFiles: FileNames | None = None
    metricsTlsCaFile: FileNames = Field(default=["metrics_ca.pem"])
    metricsTlsCert: RelativePath = "security/certs/metrics/server.pem"
    metricsTlsPk: RelativePath = "security/keys/metrics/server.key.pem"
    metricsTlsPkPwd: str = "security/pass/metrics/key_pwd.txt"
    metricsTlsCrlPath: str | None = None
    metricsTlsCrlFiles: FileNames | None = None
    inferMode: Literal["standard"] = "standard"
    openAiSupport: IdleText = "vllm"
    tokenTimeout: Annotated[Int, Field(ge=1, le=3600)] = 600
    e2eTimeout: Annotated[Int, Field(ge=1, le=65535)] = 600
    maxRequestLength: Annotated[Int, Field(ge=1, le=100)] = 40  # MB
    maxJsonDepth: Annotated[Int, Field(ge=10, le=100)] = 10
    HealthCheckConfig: HealthCheckSection | None = None
    kmcKsfMaster: IdleText = ""
    kmcKsfStandby: IdleText = ""
    pdInterNodeTLSEnabled: IdleBool = False
    pdCommunicationPort: IdleInt = 1121
    interCommTLSEnabled: IdleBool = True
    interCommPort: IdleInt = 1121
    interCommTlsCaPath: IdleAny = None
    interCommTlsCaFiles: IdleAny = None
    interCommTlsCaFile: IdleAny = None
    interCommTlsCert: IdleAny = None
    interCommPk: IdleAny = None
    interCommPkPwd: IdleAny = None
    interCommTlsCrl: IdleAny = None
    interCommTlsCrlPath: IdleAny = None
    interCommTlsCrlFiles: IdleAny = None
    interNodeTlsCaFile: IdleAny = None
    interNodeTlsCert: IdleAny = None
    interNodeTlsPk: IdleAny = None
    interNodeTlsPkPwd: IdleAny = None
    interNodeKmcKsfMaster: IdleAny = None
    interNodeKmcKsfStandby: IdleAny = None
    distDPServerEnabled: IdleBool = False


class LoraModule(Section):
    name: str
    path: str
    baseModelName: str = ""


class ModelEntry(Section):
    modelInstanceType: Literal["Standard"] = "Standard"
    modelName: Annotated[
        str, Field(pattern=r"^[A-Za-z0-9]([A-Za-z0-9_.\-]*[A-Za-z0-9])?$", max_length=256)
    ] = "llama_65b"
    modelWeightPath: Annotated[str, Field(min_length=1, max_length=4096)]
    worldSize: Annotated[IdleInt, Field(ge=1, le=1_048_576)] = 1
    cpuMemSize: Annotated[Int, Field(ge=0, le=65536), _NoEffect()] = 0
    npuMemSize: Annotated[Int, Field(ge=-1, le=65536), AfterValidator(_not_zero)] = -1  # GB; -1: automatic
    backendType: Literal["atb", "ms", "torch", "cpu"] = "ms"
    trustRemoteCode: IdleBool = False
    plugin_params: Annotated[str, AfterValidator(_plugins)] = ""


class DeploySection(Section):
    maxSeqLen: Annotated[Int, Field(ge=1, le=2**31 - 1)] = 2560
    maxInputTokenLen: Annotated[Int, Field(ge=1, le=4_194_304)] = 2048
    truncation: Annotated[Any, AfterValidator(_truncation)] = "refuse"
    speculationGamma: Annotated[Int, Field(ge=0), _NoEffect()] = 0
    maxLoras: IdleInt = 0
    maxLoraRank: IdleInt = 0
    LoraModules: Annotated[list[LoraModule], Field(max_length=0)] = Field(default=[])
    ModelConfig: Annotated[list[ModelEntry], Field(min_length=1, max_length=1)]


class ScheduleSection(Section):
    templateType: Literal["Standard", "Mix"] = "Standard"
    templateName: Literal["Standard_LLM"] = "Standard_LLM"
    cacheBlockSize: Annotated[Int, Field(ge=16, le=128, multiple_of=16)] = 128
    maxPrefillBatchSize: Annotated[Int, Field(ge=0, le=819_200)] = 50
    maxPrefillTokens: Annotated[Int, Field(ge=1, le=4_194_304)] = 8192
    prefillTimeMsPerReq: Milliseconds = 150
    prefillPolicyType: PolicyType = 0
    decodeTimeMsPerReq: Milliseconds = 50
    decodePolicyType: PolicyType = 0
    maxBatchSize: Annotated[Int, Field(ge=1, le=819_200)] = 200
    maxIterTimes: Annotated[Int, Field(ge=1, le=2**31 - 1)] = 512
    maxPreemptCount: Annotated[Int, Field(ge=0, le=819_200)] = 0
    supportSelectBatch: bool = False
    maxQueueDelayMicroseconds: Annotated[Int, Field(ge=500, le=1_000_000)] = 5000
    maxFirstTokenWaitTime: Annotated[Int, Field(ge=0, le=3_600_000)] = 2500
    maxN: Annotated[Int, Field(ge=1, le=8192)] = 128
    stageSelectPolicy: Annotated[Int, Field(ge=0, le=2)] = 0
    policyType: Annotated[Literal[0, 4, 5, 6, 7], _NoEffect()] = 0
    dynamicBatchSizeEnable: IdleBool = False
    prefillExpectedTime: Annotated[IdleInt, Field(ge=1, le=10_000)] = 1500
    decodeExpectedTime: Annotated[IdleInt, Field(ge=1, le=10_000)] = 50
    prefillChunkSize: IdleInt = 0
    maxNumPartialPrefills: IdleInt = 64
    maxLongPartialPrefills: IdleInt = 8
    longPrefillTokenThreshold: IdleInt = 1024
    splitType: IdleAny = False
    splitStartType: IdleAny = False
    splitChunkTokens: IdleInt = 512
    splitStartBatchSize: IdleInt = 16
    bufferResponseEnabled: IdleBool = False
    distributedEnable: IdleBool = False
    enableSplit: IdleAny = False
    enablePrefixCache: IdleAny = False


class BackendSection(Section):
    backendName: Annotated[str, Field(pattern=r"^[a-z]([a-z_]*[a-z])?$", max_length=50)] = (
        "mindieservice_llm_engine"
    )
    modelInstanceNumber: Annotated[IdleInt, Field(ge=1, le=10)] = 1
    npuDeviceIds: Annotated[list[list[Int]], _NoEffect()] = Field(default=[])
    tokenizerProcessNumber: Annotated[IdleInt, Field(ge=1, le=32)] = 8
    multiNodesInferEnabled: Literal[False] = False
    multiNodesInferPort: IdleInt = 1120
    interNodeTLSEnabled: IdleBool = True
    interNodeTlsCaPath: IdleAny = None
    interNodeTlsCaFiles: IdleAny = None
    interNodeTlsCaFile: IdleAny = None
    interNodeTlsCert: IdleAny = None
    interNodeTlsPk: IdleAny = None
    interNodeTlsPkPwd: IdleAny = None
    interNodeTlsCrl: IdleAny = None
    interNodeTlsCrlPath: IdleAny = None
    interNodeTlsCrlFiles: IdleAny = None
    interNodeKmcKsfMaster: IdleAny = None
    interNodeKmcKsfStandby: IdleAny = None
    kvPoolConfig: IdleAny = None
    ModelDeployConfig: DeploySection
    ScheduleConfig: ScheduleSection = ScheduleSection()


class MindieFile(Section):
    Version: str = "1.0.0"
    EnableDynamicAdjustTimeoutConfig: bool = False
    LogConfig: LogSection = LogSection()
    ServerConfig: ServerSection = ServerSection()
    BackendConfig: BackendSection


@dataclass(frozen=True)
class MindieConfig:
    """A validated config.json, and the keys in it that change nothing here."""

    path: Path
    root: MindieFile
    without_effect: tuple[str, ...]

    @property
    def server(self) -> ServerSection:
        return self.root.ServerConfig

    @property
    def deploy(self) -> DeploySection:
        return self.root.BackendConfig.ModelDeployConfig

    @property
    def model(self) -> ModelEntry:
        return self.deploy.ModelConfig[0]

    @property
    def schedule(self) -> ScheduleSection:
        return self.root.BackendConfig.ScheduleConfig


def read_mindie_config(path: str | Path, overrides: Mapping[str, Any] | None = None) -> MindieConfig:
    """Reads and validates a config.json; `overrides` maps JSON paths to values that take a key's place.

    Raises:
        ConfigError: the file, the JSON path, the value and what is allowed.
    """
    path = Path(path).expanduser()
    data = _load(path)
    for key, value in (overrides or {}).items():
        _put(data, key, value)
    try:
        root = MindieFile.model_validate(data)
    except ValidationError as error:
        raise ConfigError(f"{path}: {_first_problem(error)}") from None
    config = MindieConfig(path, root, (*_without_effect(root), *_without_effect_as_set(root)))
    _check_together(config)
    return config


def _load(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_CONFIG_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"{path}: cannot read config.json: {error.strerror}") from None
    if len(raw) > MAX_CONFIG_BYTES:
        raise ConfigError(f"{path}: larger than {MAX_CONFIG_BYTES >> 20} MB, the limit of MindIE too")
    try:
        data = json.loads(raw, object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else " ".join(str(error).split())
        raise ConfigError(f"{path}: not valid JSON: {reason}") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: got {reprlib.repr(data)}, allowed: an object with ServerConfig, ...")
    return data


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"key {twice!r} is given twice")
    return found


def _put(data: dict[str, Any], key: str, value: Any) -> None:
    """`BackendConfig.ModelDeployConfig.ModelConfig[0].modelName`; a bare name is looked for everywhere."""
    *way, last = key.replace("[", ".").replace("]", "").split(".")
    place: Any = data
    try:
        for step in way:
            place = place[int(step)] if isinstance(place, list) else place.setdefault(step, {})
        place[int(last) if isinstance(place, list) else last] = value
    except (AttributeError, IndexError, TypeError, ValueError):
        raise ConfigError(f"--set {key}: there is no such place in the file") from None


_ALLOWED = {
    "bool_type": "true or false",
    "int_type": "an integer",
    "string_type": "text",
    "list_type": "a list",
    "model_type": "an object",
}
_HINTS = {
    "ServerConfig.inferMode": "; prefill and decode run in one process here",
    "BackendConfig.multiNodesInferEnabled": "; this service runs on one host",
    "LoraModules": "; this engine has no LoRA adapters yet",
    "modelInstanceType": "; a mock without a model is not served",
}


def _first_problem(error: ValidationError) -> str:
    problems = error.errors(include_url=False)
    first = problems[0]
    key = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in _json_path(first["loc"]))
    key = key.removeprefix(".")
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    if first["type"] == "missing":
        return f"{key}: missing{more}"
    allowed = _ALLOWED.get(first["type"]) or first["msg"].removeprefix("Input should be ").removeprefix(
        "Value error, "
    )
    if first["type"] == "literal_error":
        allowed = first["ctx"]["expected"].replace("'", "")
    hint = _HINTS.get(key) or _HINTS.get(key.rpartition(".")[2], "")
    return f"{key}: got {reprlib.repr(first['input'])}, allowed: {allowed}{hint}{more}"


def _json_path(location: tuple[int | str, ...]) -> Iterator[int | str]:
    """A location without pydantic's own words for the members of a union."""
    for part in location:
        if isinstance(part, int) or part.isidentifier():
            if part in ("bool", "int", "float", "str"):
                return
            yield part


def _without_effect(section: Section, prefix: str = "") -> Iterator[str]:
    fields = type(section).model_fields
    for name in [*fields, *(section.model_extra or ())]:
        if name not in section.model_fields_set:
            continue
        field = fields.get(name)
        value = getattr(section, name)
        if field is None or any(isinstance(mark, _NoEffect) for mark in field.metadata):
            yield prefix + name
        elif isinstance(value, Section):
            yield from _without_effect(value, f"{prefix}{name}.")
        elif isinstance(value, list):
            for index, item in enumerate(value):
                if isinstance(item, Section):
                    yield from _without_effect(item, f"{prefix}{name}[{index}].")


def _without_effect_as_set(root: MindieFile) -> Iterator[str]:
    """Keys of which some values do something here, and those that were given do not."""
    entry = root.BackendConfig.ModelDeployConfig.ModelConfig[0]
    if not known_plugins(entry.plugin_params):
        yield "BackendConfig.ModelDeployConfig.ModelConfig[0].plugin_params"
    if root.BackendConfig.ScheduleConfig.stageSelectPolicy == 2:
        yield "BackendConfig.ScheduleConfig.stageSelectPolicy"


def known_plugins(plugin_params: str) -> bool:
    """Whether the engine has all plugins that are named; mtp, for one, needs a model with such a head."""
    named = str((_json(plugin_params) or {}).get("plugin_type", "prefix_cache")).split(",")
    return {name.strip() for name in named} <= {"prefix_cache", "splitfuse", "la", "memory_decoding"}


def _check_together(config: MindieConfig) -> None:
    """What MindIE demands of two keys at a time."""
    server, deploy, schedule = config.server, config.deploy, config.schedule
    devices = config.root.BackendConfig.npuDeviceIds
    where = f"{config.path}: "
    for key, address in (
        ("ipAddress", server.ipAddress),
        ("managementIpAddress", server.managementIpAddress),
    ):
        if address in ("0.0.0.0", "::") and not server.allowAllZeroIpListening:
            raise ConfigError(
                f"{where}ServerConfig.{key}: got {address!r}, allowed only with ServerConfig."
                "allowAllZeroIpListening true: it listens on every network of this machine"
            )
    if len({device for ids in devices for device in ids}) < sum(map(len, devices)):
        raise ConfigError(f"{where}BackendConfig.npuDeviceIds: got {devices}, allowed: no device twice")
    if schedule.maxPrefillBatchSize > schedule.maxBatchSize:
        raise ConfigError(
            f"{where}BackendConfig.ScheduleConfig.maxPrefillBatchSize: got {schedule.maxPrefillBatchSize}, "
            f"allowed: 0 to maxBatchSize ({schedule.maxBatchSize})"
        )
    if schedule.maxPreemptCount > schedule.maxBatchSize:
        raise ConfigError(
            f"{where}BackendConfig.ScheduleConfig.maxPreemptCount: got {schedule.maxPreemptCount}, "
            f"allowed: 0 to maxBatchSize ({schedule.maxBatchSize})"
        )
    if schedule.maxIterTimes > deploy.maxSeqLen:
        raise ConfigError(
            f"{where}BackendConfig.ScheduleConfig.maxIterTimes: got {schedule.maxIterTimes}, "
            f"allowed: 1 to maxSeqLen ({deploy.maxSeqLen})"
        )
