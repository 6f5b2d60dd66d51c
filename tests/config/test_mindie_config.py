"""MindIE's config.json: every version's keys, wrong values with their JSON path, what has no effect."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llm_boost.config.mindie_config import read_mindie_config
from llm_boost.config.service_config import service_config
from llm_boost.errors import ConfigError

RC3: dict[str, Any] = {
    "Version": "1.0.0",
    "LogConfig": {"logLevel": "Info", "logFileSize": 20, "logFileNum": 20, "logPath": "logs/mindservice.log"},
    "ServerConfig": {
        "ipAddress": "127.0.0.1", "managementIpAddress": "127.0.0.2", "port": 1025, "managementPort": 1026,
        "metricsPort": 1027, "maxLinkNum": 1000, "httpsEnabled": False, "fullTextEnabled": False,
        "tlsCaPath": "security/ca/", "tlsCaFile": ["ca.pem"], "tlsCert": "security/certs/server.pem",
        "tlsPk": "security/keys/server.key.pem", "tlsPkPwd": "security/pass/key_pwd.txt",
        "tlsCrl": "security/certs/server_crl.pem", "managementTlsCaFile": ["management_ca.pem"],
        "kmcKsfMaster": "tools/pmt/master/ksfa", "inferMode": "standard", "pdInterNodeTLSEnabled": False,
        "pdCommunicationPort": 1121, "interNodeTlsCaFile": "security/grpc/ca/ca.pem",
    },
    "BackendConfig": {
        "backendName": "mindieservice_llm_engine", "modelInstanceNumber": 1, "npuDeviceIds": [[0]],
        "tokenizerProcessNumber": 8, "multiNodesInferEnabled": False, "multiNodesInferPort": 1120,
        "interNodeTLSEnabled": True, "interNodeTlsCrl": "security/grpc/certs/server_crl.pem",
        "ModelDeployConfig": {
            "maxSeqLen": 2560, "maxInputTokenLen": 2048, "truncation": False,
            "ModelConfig": [
                {
                    "modelInstanceType": "Standard", "modelName": "qwen2_7b",
                    "modelWeightPath": "/mf_model/qwen2_7b", "worldSize": 1, "cpuMemSize": 16,
                    "npuMemSize": 16, "backendType": "ms",
                }
            ],
        },
        "ScheduleConfig": {
            "templateType": "Standard", "templateName": "Standard_LLM", "cacheBlockSize": 128,
            "maxPrefillBatchSize": 50, "maxPrefillTokens": 8192, "prefillTimeMsPerReq": 150,
            "prefillPolicyType": 0, "decodeTimeMsPerReq": 50, "decodePolicyType": 0, "maxBatchSize": 200,
            "maxIterTimes": 512, "maxPreemptCount": 0, "supportSelectBatch": False,
            "maxQueueDelayMicroseconds": 5000,
        },
    },
}  # fmt: skip
SCHEDULE = "BackendConfig.ScheduleConfig."
DEPLOY = "BackendConfig.ModelDeployConfig."
MODEL = DEPLOY + "ModelConfig[0]."


@pytest.fixture
def rc3(tmp_path: Path) -> Path:
    path = tmp_path / "conf" / "config.json"
    path.parent.mkdir()
    path.write_text(json.dumps(RC3))
    return path


def test_the_seeds_file_means_what_it_says(rc3: Path) -> None:
    config = service_config({"config": str(rc3)}, {})
    assert (config.business.host, config.business.port, config.business.tls) == ("127.0.0.1", 1025, None)
    assert (config.management.host, config.management.port) == ("127.0.0.2", 1026)
    assert (config.metrics.host, config.metrics.port) == ("127.0.0.2", 1027)
    assert config.served_names == ("qwen2_7b",)
    assert config.model == "/mf_model/qwen2_7b"
    assert (config.limits.max_running, config.limits.max_queued) == (1000, 2000)
    assert (config.max_input_tokens, config.max_output_tokens, config.truncation) == (2048, 512, "refuse")
    assert config.engine_options["max_num_seqs"] == 200
    assert config.engine_options["block_size"] == 128
    assert config.engine_options["kv_cache_memory_at_most"] == 16 << 30
    assert config.engine_options["template_type"] == "Standard"
    assert config.log.path == rc3.parent.parent / "logs/mindservice.log"


def test_the_variable_and_the_flags(rc3: Path) -> None:
    environ = {"MIES_CONFIG_JSON_PATH": str(rc3), "MIES_CONTAINER_IP": "127.0.0.9"}
    config = service_config({"port": 2025}, environ)
    assert (config.business.host, config.business.port) == ("127.0.0.9", 2025)
    assert service_config({"model": "m"}, environ).mindie is None  # a model on the command line comes first
    changed = service_config({"config": str(rc3), "set": {MODEL + "modelName": "other"}}, {})
    assert changed.name == "other"


def test_what_has_no_effect_is_listed_once(rc3: Path) -> None:
    plugins = MODEL + "plugin_params"
    config = read_mindie_config(rc3, {"ServerConfig.brandNew": 1, plugins: '{"plugin_type":"mtp"}'})
    listed = config.without_effect
    assert len(listed) == len(set(listed))
    for key in ("ServerConfig.kmcKsfMaster", "ServerConfig.brandNew", MODEL + "worldSize", plugins):
        assert key in listed
    for key in ("ServerConfig.port", SCHEDULE + "maxBatchSize", "LogConfig.logLevel", "ServerConfig.tlsCrl"):
        assert key not in listed


def test_plugins_that_guess_tokens_reach_the_engine(rc3: Path) -> None:
    for params in ('{"plugin_type":"la","level":6}', '{"plugin_type":"memory_decoding"}'):
        config = service_config({"config": str(rc3), "set": {MODEL + "plugin_params": params}}, {})
        assert config.engine_options["plugin_params"] == params
        assert MODEL + "plugin_params" not in config.mindie.without_effect
    unknown = service_config(
        {"config": str(rc3), "set": {MODEL + "plugin_params": '{"plugin_type":"mtp"}'}}, {}
    )
    assert "plugin_params" not in unknown.engine_options


def test_keys_of_later_versions(rc3: Path) -> None:
    later = {
        "ServerConfig.allowAllZeroIpListening": True, "ServerConfig.openAiSupport": "vllm",
        "ServerConfig.tokenTimeout": 60, "ServerConfig.e2eTimeout": 60, "ServerConfig.maxRequestLength": 1,
        "ServerConfig.tlsCrlPath": "security/certs/", "ServerConfig.tlsCrlFiles": ["server_crl.pem"],
        "ServerConfig.HealthCheckConfig": {"npuUsageThreshold": 10}, "ServerConfig.maxJsonDepth": 20,
        "ServerConfig.ipAddress": "0.0.0.0", DEPLOY + "truncation": -1, SCHEDULE + "maxFirstTokenWaitTime": 5,
        SCHEDULE + "stageSelectPolicy": 1, "EnableDynamicAdjustTimeoutConfig": False,
        "LogConfig.dynamicLogLevel": "", "BackendConfig.kvPoolConfig": {"backend": ""},
    }  # fmt: skip
    config = service_config({"config": str(rc3), "set": later}, {})
    assert config.truncation == "keep_first"
    assert config.limits.max_body_bytes == 1 << 20
    assert (config.limits.token_timeout, config.limits.e2e_timeout) == (60, 60)
    assert config.engine_options["support_select_batch"] is True
    assert config.limits.max_json_depth == 20


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("ServerConfig.port", 80, "greater than or equal to 1024"),
        ("ServerConfig.port", "1025", "an integer"),
        ("ServerConfig.ipAddress", "0.0.0.0", "allowAllZeroIpListening"),
        ("ServerConfig.ipAddress", "localhost", "IPv4 or IPv6"),
        ("ServerConfig.maxLinkNum", 0, "1"),
        ("ServerConfig.httpsEnabled", "no", "true or false"),
        ("ServerConfig.inferMode", "dmi", "standard; prefill and decode run in one process here"),
        ("ServerConfig.maxJsonDepth", 5, "10"),
        ("BackendConfig.npuDeviceIds", [[0, 0]], "no device twice"),
        ("BackendConfig.multiNodesInferEnabled", True, "one host"),
        ("BackendConfig.backendName", "Other Name", "pattern"),
        (DEPLOY + "truncation", 3, "keep the first"),
        (DEPLOY + "maxSeqLen", 0, "1"),
        (DEPLOY + "ModelConfig", [], "at least 1"),
        (MODEL + "modelName", "-x", "pattern"),
        (MODEL + "npuMemSize", 0, "-1 (automatic)"),
        (MODEL + "modelInstanceType", "StandardMock", "Standard"),
        (MODEL + "plugin_params", "{", "JSON"),
        (SCHEDULE + "cacheBlockSize", 100, "multiple of 16"),
        (SCHEDULE + "templateType", "Other", "Standard or Mix"),
        (SCHEDULE + "prefillPolicyType", 9, "0 or 2"),
        (SCHEDULE + "maxPrefillBatchSize", 201, "maxBatchSize (200)"),
        (SCHEDULE + "maxPreemptCount", 201, "maxBatchSize (200)"),
        (SCHEDULE + "maxIterTimes", 2561, "maxSeqLen (2560)"),
        (SCHEDULE + "maxQueueDelayMicroseconds", 10, "500"),
        ("LogConfig.logFileSize", 501, "500"),
        ("LogConfig", 3, "an object"),
    ],
)
def test_a_wrong_value_is_named_by_its_path(rc3: Path, key: str, value: object, says: str) -> None:
    with pytest.raises(ConfigError) as raised:
        read_mindie_config(rc3, {key: value})
    message = str(raised.value)
    assert message.startswith(f"{rc3}: {key}: ")
    assert says in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "not valid JSON"),
        ("[1]", "allowed: an object"),
        ("[" * 100_000, "nested too deeply"),
        ('{"BackendConfig": 1, "BackendConfig": 2}', "'BackendConfig' is given twice"),
        ("{}", "BackendConfig: missing"),
    ],
)
def test_a_file_that_is_none(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=says):
        read_mindie_config(path)
    with pytest.raises(ConfigError, match="cannot read"):
        read_mindie_config(tmp_path / "none.json")


def test_tls_files_of_each_plane(rc3: Path) -> None:
    config = service_config({"config": str(rc3), "set": {"ServerConfig.httpsEnabled": True}}, {})
    base = rc3.parent.parent
    assert config.business.tls is not None
    assert config.business.tls.cert == base / "security/certs/server.pem"
    assert config.business.tls.ca_files == (base / "security/ca/ca.pem",)
    assert config.management.tls is not None
    assert config.management.tls.key == base / "security/keys/management/server.key.pem"
    assert config.metrics.tls == config.management.tls


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ({}, "no model"),
        ({"model": "m", "set": {"a": 1}}, "--config"),
        ({"model": "m", "host": "0.0.0.0"}, "--allow_all_interfaces"),
        ({"model": "m", "host": "example.org"}, "an IP address"),
        ({"model": "m", "port": 70000}, "65535"),
        ({"model": "m", "ssl_certfile": "c"}, "one needs the other"),
        ({"model": "m", "api_key": ("a\nb",)}, "printable ASCII"),
    ],
)
def test_flags_out_of_range(flags: dict, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        service_config(flags, {})
