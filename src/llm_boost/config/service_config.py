"""One frozen configuration of the service: flags over environment over MindIE's config.json over defaults."""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from llm_boost.errors import ConfigError

if TYPE_CHECKING:
    from llm_boost.config.mindie_config import MindieConfig, ServerSection

DEFAULT_PORT = 8000  # of a service without a config.json; MindIE's are 1025 to 1027
MAX_API_KEY_LENGTH = 512

TgiShapes = Literal["mindie", "strict"]
Truncation = Literal["refuse", "keep_first", "keep_last"]


@dataclass(frozen=True)
class TlsFiles:
    """A plane's certificate; clients must show one of their own where `ca_files` are given."""

    cert: Path
    key: Path
    key_password: Path | None = None
    ca_files: tuple[Path, ...] = ()
    crl_files: tuple[Path, ...] = ()


@dataclass(frozen=True)
class Plane:
    """Where one group of endpoints listens; planes of equal address share a server. Port 0: any free one."""

    host: str
    port: int
    tls: TlsFiles | None = None


@dataclass(frozen=True)
class LogSettings:
    level: str = "info"  # verbose, debug, info, warning, error, critical, none
    path: Path | None = None  # None: stderr alone
    max_bytes: int = 20 << 20  # of a file; 0: no limit
    files: int = 20  # kept, the current one among them
    prompts: bool = False  # whether prompts and answers may be logged


@dataclass(frozen=True)
class Limits:
    """What is refused, and what is ended."""

    max_running: int = 1000  # requests given to the engine at the same time
    max_queued: int = 2000  # requests that wait for one of these places; more get 429
    max_queued_tokens: int = 1_000_000  # prompt tokens of those that wait
    max_body_bytes: int = 40 << 20
    max_json_depth: int = 64
    max_n: int = 128
    token_timeout: float = 600.0  # seconds without a new token
    e2e_timeout: float = 600.0  # seconds of a whole request
    read_timeout: float = 60.0  # seconds for a request's headers, and for its body
    write_timeout: float = 60.0  # seconds that a client may not read
    drain_timeout: float = 90.0  # seconds that running requests have when the service is told to stop
    watchdog_timeout: float = 300.0  # seconds of one step after which the engine counts as stuck


@dataclass(frozen=True)
class ServiceConfig:
    """All that the service needs to know besides the model's own configuration."""

    served_names: tuple[str, ...]
    business: Plane
    management: Plane
    metrics: Plane
    limits: Limits = Limits()
    log: LogSettings = LogSettings()
    api_keys: tuple[str, ...] = field(default=(), repr=False)
    allowed_origins: tuple[str, ...] = ()
    tgi_shapes: TgiShapes = "mindie"
    mindie_errors: bool = False  # MindIE's error bodies on the OpenAI endpoints, instead of OpenAI's
    full_text: bool = False  # MindIE's fullTextEnabled: streamed events hold all text so far
    max_input_tokens: int | None = None  # None: what the model holds
    max_output_tokens: int | None = None  # MindIE's maxIterTimes
    truncation: Truncation = "refuse"
    engine_options: Mapping[str, Any] = field(default_factory=dict)
    model: str | None = None
    mindie: MindieConfig | None = None
    otlp_endpoint: str | None = None  # where traces go

    @property
    def name(self) -> str:
        return self.served_names[0]


def service_config(flags: Mapping[str, Any], environ: Mapping[str, str] = os.environ) -> ServiceConfig:
    """Merges flags (None: not given), environment and config.json.

    `flags` takes model, config (a path), set (JSON paths to values), host, port, management_port,
    metrics_port, served_model_name, api_key, allowed_origin, tgi_shapes, log_file, log_level, log_prompts,
    otlp_endpoint, ssl_certfile, ssl_keyfile, ssl_keyfile_password, ssl_ca_certs, ssl_crl,
    allow_all_interfaces, and the names of Limits. Raises ConfigError.
    """
    given = {name: value for name, value in flags.items() if value not in (None, ())}
    file = given.pop("config", None) or (None if "model" in given else environ.get("MIES_CONFIG_JSON_PATH"))
    if file is not None:
        from llm_boost.config.mindie_config import read_mindie_config

        base = _from_mindie(read_mindie_config(file, given.pop("set", None)), environ)
    elif "set" in given:
        raise ConfigError("--set: changes keys of a config.json: give one with --config")
    elif "model" in given:
        base = _plain(given)
    else:
        raise ConfigError("no model: give one (a directory, a .gguf file, a pulled name) or --config FILE")
    return _with_flags(base, given, environ)


def _plain(given: Mapping[str, Any]) -> ServiceConfig:
    plane = Plane("127.0.0.1", DEFAULT_PORT)
    name = Path(given["model"]).name.removesuffix(".gguf") or "model"
    return ServiceConfig((name,), plane, plane, plane, model=given["model"])


def _with_flags(base: ServiceConfig, given: Mapping[str, Any], environ: Mapping[str, str]) -> ServiceConfig:
    business, management, metrics = _planes(base, given)
    keys = given.get("api_key") or tuple(filter(None, environ.get("LLM_BOOST_API_KEY", "").split(",")))
    for key in keys:
        if not (key.isascii() and key.isprintable() and 1 <= len(key.strip()) <= MAX_API_KEY_LENGTH):
            raise ConfigError(f"--api_key: allowed: 1 to {MAX_API_KEY_LENGTH} printable ASCII characters")
    limits: dict[str, Any] = {f.name: given[f.name] for f in fields(Limits) if f.name in given}
    log: dict[str, Any] = {
        "path": Path(given["log_file"]) if "log_file" in given else base.log.path,
        "level": given.get("log_level", base.log.level),
        "prompts": given.get("log_prompts", base.log.prompts),
    }
    names = given.get("served_model_name") or base.served_names
    return replace(
        base,
        served_names=tuple(names),
        business=business,
        management=management,
        metrics=metrics,
        limits=replace(base.limits, **limits),
        log=replace(base.log, **log),
        api_keys=tuple(keys),
        allowed_origins=tuple(given.get("allowed_origin", base.allowed_origins)),
        tgi_shapes=given.get("tgi_shapes", base.tgi_shapes),
        model=given.get("model", base.model),
        otlp_endpoint=given.get("otlp_endpoint", environ.get("OTEL_EXPORTER_OTLP_ENDPOINT") or None),
    )


def _planes(base: ServiceConfig, given: Mapping[str, Any]) -> tuple[Plane, Plane, Plane]:
    """The addresses; a flag for the business plane moves the others along where they shared its address."""
    tls = _tls_flags(given)
    business = Plane(
        given.get("host", base.business.host), given.get("port", base.business.port), tls or base.business.tls
    )

    def beside(plane: Plane, flag: str) -> Plane:
        shared = plane == base.business
        if shared and flag not in given:
            return business
        return Plane(
            given.get("host", plane.host) if shared else plane.host,
            given.get(flag, business.port if shared else plane.port),
            business.tls if shared else plane.tls,
        )

    planes = business, beside(base.management, "management_port"), beside(base.metrics, "metrics_port")
    for plane in planes:
        if not 0 <= plane.port <= 65535:
            raise ConfigError(f"--port: got {plane.port}, allowed: 0 (any free one) to 65535")
        _check_address(plane.host, given.get("allow_all_interfaces", False) or base.mindie is not None)
    return planes


def _check_address(host: str, allowed: bool) -> None:
    if host == "localhost":
        return
    try:
        unspecified = ipaddress.ip_address(host).is_unspecified
    except ValueError:
        raise ConfigError(f"--host: got {host!r}, allowed: an IP address, such as 127.0.0.1") from None
    if unspecified and not allowed:
        raise ConfigError(
            f"--host: got {host}, which listens on every network of this machine; "
            "add --allow_all_interfaces, and better --api_key too"
        )


def _tls_flags(given: Mapping[str, Any]) -> TlsFiles | None:
    cert, key = given.get("ssl_certfile"), given.get("ssl_keyfile")
    if (cert is None) != (key is None):
        raise ConfigError("--ssl_certfile and --ssl_keyfile: one needs the other")
    if cert is None or key is None:
        return None
    password = given.get("ssl_keyfile_password")
    ca, crl = given.get("ssl_ca_certs"), given.get("ssl_crl")
    return TlsFiles(
        Path(cert),
        Path(key),
        Path(password) if password else None,
        (Path(ca),) if ca else (),
        (Path(crl),) if crl else (),
    )


def _from_mindie(config: MindieConfig, environ: Mapping[str, str]) -> ServiceConfig:
    server, deploy, schedule = config.server, config.deploy, config.schedule
    base = _install_folder(config.path, environ)
    address = environ.get("MIES_CONTAINER_IP") or server.ipAddress
    management = environ.get("MIES_CONTAINER_MANAGEMENT_IP") or server.managementIpAddress or address
    management_port = server.managementPort or server.port
    longest = config.root.EnableDynamicAdjustTimeoutConfig
    log = config.root.LogConfig
    return ServiceConfig(
        served_names=(config.model.modelName,),
        business=Plane(address, server.port, _tls(server, base, "")),
        management=Plane(
            management, management_port, _tls(server, base, "management" if management != address else "")
        ),
        metrics=Plane(
            management,
            server.metricsPort or management_port,
            _tls(server, base, _metrics_files(server, management != address)),
        ),
        limits=Limits(
            max_running=server.maxLinkNum,
            max_queued=2 * server.maxLinkNum,
            max_body_bytes=server.maxRequestLength << 20,
            max_json_depth=server.maxJsonDepth,
            max_n=min(schedule.maxN, schedule.maxBatchSize),
            token_timeout=3600.0 if longest else server.tokenTimeout,
            e2e_timeout=65535.0 if longest else server.e2eTimeout,
            write_timeout=600.0,
        ),
        log=LogSettings(
            level="warning" if log.logLevel == "Warn" else log.logLevel.lower(),
            path=base / log.logPath,
            max_bytes=log.logFileSize << 20,
            files=log.logFileNum,
        ),
        mindie_errors=True,
        full_text=server.fullTextEnabled,
        max_input_tokens=min(deploy.maxInputTokenLen, max(deploy.maxSeqLen - 1, 1)),
        max_output_tokens=schedule.maxIterTimes,
        truncation=deploy.truncation,
        engine_options=_engine_options(config),
        model=str(base / config.model.modelWeightPath),
        mindie=config,
    )


def _engine_options(config: MindieConfig) -> dict[str, Any]:
    from llm_boost.config.mindie_config import known_plugins

    schedule = config.schedule
    options: dict[str, Any] = {
        "max_model_len_at_most": config.deploy.maxSeqLen,
        "max_num_seqs": schedule.maxBatchSize,
        "max_num_batched_tokens": max(schedule.maxBatchSize, 512),  # a token a step for each sequence
        "block_size": schedule.cacheBlockSize,
        "template_type": schedule.templateType,
        "max_prefill_batch_size": schedule.maxPrefillBatchSize,
        "max_prefill_tokens": schedule.maxPrefillTokens,
        "max_iter_times": schedule.maxIterTimes,
        "max_first_token_wait_time": schedule.maxFirstTokenWaitTime,
        "max_preempt_count": schedule.maxPreemptCount,
        "support_select_batch": schedule.supportSelectBatch or schedule.stageSelectPolicy == 1,
        "prefill_time_ms_per_req": schedule.prefillTimeMsPerReq,
        "decode_time_ms_per_req": schedule.decodeTimeMsPerReq,
        "max_queue_delay_microseconds": schedule.maxQueueDelayMicroseconds,
        "prefill_policy_type": schedule.prefillPolicyType,
        "decode_policy_type": schedule.decodePolicyType,
    }
    if known_plugins(config.model.plugin_params):
        options["plugin_params"] = config.model.plugin_params
    if config.model.npuMemSize > 0:
        options["kv_cache_memory_at_most"] = config.model.npuMemSize << 30
    return options


def _install_folder(path: Path, environ: Mapping[str, str]) -> Path:
    """What relative paths start from: MindIE's installation, whose `conf` folder holds config.json."""
    for variable in ("MIES_INSTALL_PATH", "MINDIE_LLM_HOME_PATH"):
        if environ.get(variable):
            return Path(environ[variable])
    folder = path.absolute().parent
    return folder.parent if folder.name == "conf" else folder


def _metrics_files(server: ServerSection, apart: bool) -> str:
    """Older files have no metricsTls keys: the metrics plane then shares the management plane's."""
    own = any(name.startswith("metricsTls") for name in server.model_fields_set)
    return "metrics" if own else "management" if apart else ""


def _tls(server: ServerSection, base: Path, prefix: str) -> TlsFiles | None:
    if not server.httpsEnabled:
        return None

    def value(name: str) -> Any:
        return getattr(server, prefix + name[0].upper() + name[1:] if prefix else name, None)

    single, folder, names = value("tlsCrl"), value("tlsCrlPath"), value("tlsCrlFiles")
    crls = [Path(folder or "") / name for name in names or ()] or ([Path(single)] if single else [])
    password = base / value("tlsPkPwd")
    return TlsFiles(
        cert=base / value("tlsCert"),
        key=base / value("tlsPk"),
        key_password=password if password.is_file() else None,
        ca_files=tuple(base / server.tlsCaPath / name for name in value("tlsCaFile")),
        crl_files=tuple(path for path in (base / crl for crl in crls) if path.exists()),
    )
