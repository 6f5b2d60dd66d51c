"""`llm-boost serve`: a model behind HTTP, with MindIE's, TGI's, OpenAI's and Triton's endpoints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from llm_boost.cli.options import note
from llm_boost.errors import ConfigError

if TYPE_CHECKING:
    from llm_boost.backends import Backend
    from llm_boost.config.run_config import Resolved
    from llm_boost.config.service_config import ServiceConfig
    from llm_boost.service.server import Running

_EXAMPLES = """\b
Examples:
  llm-boost serve smollm2-135m-instruct                   # then point any OpenAI client at http://127.0.0.1:8000/v1
  llm-boost serve path/to/model --dtype int8 --port 9000 --api_key SECRET
  llm-boost serve --config config.json                    # MindIE's, of any version
  llm-boost serve --config config.json --set ServerConfig.port=2025
Dashes do as well as underscores: --api-key.
"""


@click.command("serve", epilog=_EXAMPLES)
@click.argument("model", required=False, metavar="[MODEL]")
@click.option("--config", metavar="FILE", help="MindIE's config.json (or MIES_CONFIG_JSON_PATH).")
@click.option(
    "--set", "set_", multiple=True, metavar="PATH=VALUE", help="Change a key of config.json. Repeatable."
)
@click.option("--host", metavar="IP", help="Where to listen (default: 127.0.0.1).")
@click.option("--port", type=int, metavar="N", help="(default: 8000, or config.json's; 0: any free one).")
@click.option("--management_port", type=int, metavar="N", help="Health and control (default: the same).")
@click.option("--metrics_port", type=int, metavar="N", help="/metrics (default: the same).")
@click.option("--allow_all_interfaces", is_flag=True, help="Allow --host 0.0.0.0.")
@click.option(
    "--api_key", multiple=True, metavar="KEY", help="Keys that clients must send (LLM_BOOST_API_KEY)."
)
@click.option("--served_model_name", multiple=True, metavar="NAME", help="The model's names in the APIs.")
@click.option("--allowed_origin", multiple=True, metavar="URL", help="Web pages that may call (CORS).")
@click.option("--tgi_shapes", type=click.Choice(["mindie", "strict"]), help="Whose form TGI's answers have.")
@click.option("--ssl_certfile", metavar="FILE", help="TLS: the certificate, and its chain.")
@click.option("--ssl_keyfile", metavar="FILE", help="TLS: its key.")
@click.option("--ssl_keyfile_password", metavar="FILE", help="TLS: a file with the key's password.")
@click.option("--ssl_ca_certs", metavar="FILE", help="TLS: clients must show a certificate of this CA.")
@click.option("--ssl_crl", metavar="FILE", help="TLS: certificates that are revoked.")
@click.option("--max_running", type=click.IntRange(1), metavar="N", help="Requests in the engine at a time.")
@click.option("--max_queued", type=click.IntRange(0), metavar="N", help="Requests that wait; more get 429.")
@click.option("--max_queued_tokens", type=click.IntRange(1), metavar="N", help="Prompt tokens that wait.")
@click.option("--e2e_timeout", type=click.FloatRange(0, min_open=True), metavar="S", help="Longest request.")
@click.option("--token_timeout", type=click.FloatRange(0, min_open=True), metavar="S", help="Longest token.")
@click.option(
    "--drain_timeout", type=click.FloatRange(0), metavar="S", help="For running requests at the end."
)
@click.option(
    "--watchdog_timeout", type=click.FloatRange(1), metavar="S", help="A step this long ends the process."
)
@click.option("--max_num_seqs", type=click.IntRange(1), metavar="N", help="Sequences that run at a time.")
@click.option("--max_model_len", type=click.IntRange(2), metavar="N", help="Tokens of prompt and output.")
@click.option("--log_file", metavar="FILE", help="Structured log, besides stderr.")
@click.option("--log_prompts", is_flag=True, default=None, help="Log prompts and answers too.")
@click.option("--otlp_endpoint", metavar="URL", help="Send OpenTelemetry traces there, over HTTP.")
@click.option(
    "--log_level",
    type=click.Choice(["verbose", "debug", "info", "warning", "error", "critical", "none"]),
    help="(default: info)",
)
@click.option("--dtype", metavar="TYPE", help="float32 (fp32), bfloat16 (bf16), int8, int4, or auto.")
@click.option("--threads", type=int, metavar="N", help="Threads (default: the processor's cores).")
@click.option("--cache_dir", metavar="DIR", help="Packed and pulled models (default: ~/.cache/llm-boost).")
def serve_command(
    model: str | None, set_: tuple[str, ...], dtype: str | None, threads: int | None, cache_dir: str | None,
    max_num_seqs: int | None, max_model_len: int | None, **flags: Any,
) -> None:  # fmt: skip
    """Serve MODEL (a directory, a .gguf file, a pulled name), or what config.json names."""
    from llm_boost.config.service_config import service_config
    from llm_boost.service.server import READY_LINE, run_service

    config = service_config({**flags, "model": model, "set": _settings(set_)})
    engine = {"max_num_seqs": max_num_seqs, "max_model_len": max_model_len}
    options = {**config.engine_options, **{k: v for k, v in engine.items() if v is not None}}
    if max_num_seqs is not None:  # each sequence needs a token a step
        options["max_num_batched_tokens"] = max(max_num_seqs, options.get("max_num_batched_tokens", 512))
    run = _run_config(config, {"dtype": dtype, "threads": threads, "cache_dir": cache_dir})
    if config.mindie is not None and config.mindie.without_effect:
        note(f"warning: {config.mindie.path}: without effect here: {', '.join(config.mindie.without_effect)}")

    def load(progress: Any) -> Backend:
        from llm_boost.backends import backend_class

        kind = run.yaml.model.llm_backend if run.yaml is not None else "BuildIn"
        return backend_class(kind).load(run, options, progress)

    def ready(running: Running) -> None:
        for line in run.notes:
            note(f"note: {line}")
        for address in dict.fromkeys(running.addresses.values()):
            planes = ", ".join(name for name, url in running.addresses.items() if url == address)
            note(f"{address} ({planes})")
        click.echo(READY_LINE)

    code = run_service(config, load, ready)
    if code:
        raise click.exceptions.Exit(code)


def _settings(pairs: tuple[str, ...]) -> dict[str, Any] | None:
    settings = {}
    for pair in pairs:
        path, equals, text = pair.partition("=")
        if not equals:
            raise ConfigError(f"--set: got {pair!r}, allowed: PATH=VALUE, such as ServerConfig.port=2025")
        try:
            settings[path] = json.loads(text)
        except ValueError:
            settings[path] = text  # a word that is no JSON is text
    return settings or None


def _run_config(config: ServiceConfig, flags: dict[str, Any]) -> Resolved:
    """What to load: a model, or MindIE's folder of config.json, vocabulary, one YAML and a checkpoint."""
    from llm_boost.config.model_folder import yaml_of_folder
    from llm_boost.config.run_config import resolve

    folder = Path(config.model or "")
    yaml_config = yaml_of_folder(folder)
    if yaml_config is None:
        return resolve({**flags, "model": config.model})
    return resolve(flags, yaml_config)
