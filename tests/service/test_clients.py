"""Heavy clients and fuzzing: `pip install "llm-boost[clients]"`, then `make test TESTS="-m clients"`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from live_service import Live

pytestmark = pytest.mark.clients


def test_litellm(live: Live) -> None:
    litellm = pytest.importorskip("litellm")
    how = {
        "model": "openai/qwen2",
        "api_base": f"{live.url}/v1",
        "api_key": "none",
        "messages": [{"role": "user", "content": "hello"}],
        "max_tokens": 8,
        "temperature": 0,
    }
    whole = litellm.completion(**how).choices[0].message.content
    parts = [chunk.choices[0].delta.content or "" for chunk in litellm.completion(stream=True, **how)]
    assert "".join(parts) == whole != ""


def test_schemathesis(live: Live, tmp_path: Path) -> None:
    """No answer 5xx, none that the OpenAPI document does not declare."""
    pytest.importorskip("schemathesis")
    checks = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"
    command = [
        str(Path(sys.executable).with_name("schemathesis")), "run", f"{live.url}/openapi.json",
        "--checks", checks, "--phases", "coverage,fuzzing", "--max-examples", "25",
        "--exclude-path", "/stopService", "--request-timeout", "30", "--seed", "1",
        "--suppress-health-check", "all",
    ]  # fmt: skip
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=900)
    assert result.returncode == 0, result.stdout[-6000:]
