"""The console entry: help, exit codes, one-line errors."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from llm_boost.cli import main as cli_main


def spawn(*args, **options):
    return subprocess.run(
        [sys.executable, *args], capture_output=True, text=True, env={**os.environ, **options}, timeout=60
    )


def test_help_without_arguments(run):
    for args in ([], ["--help"], ["-h"]):
        code, out, _ = run(*args)
        assert code == 0
        assert "predict" in out
        assert "doctor" in out


@pytest.mark.parametrize(
    "verb", ["predict", "pull", "eval", "bench", "bench latency", "bench kernels", "doctor"]
)
def test_every_verbs_help_has_examples(run, verb):
    code, out, _ = run(*verb.split(), "--help")
    assert code == 0
    assert f"llm-boost {verb} " in out.split("Examples:")[1]


@pytest.mark.parametrize(
    "args",
    [
        ["--help"],
        ["predict", "--help"],
        ["pull", "--help"],
        ["eval", "--help"],
        ["bench", "latency", "--help"],
    ],
)
def test_help_imports_nothing_heavy(args):
    heavy = (
        "importlib.metadata",
        "numpy",
        "pydantic",
        "yaml",
        "rich",
        "tokenizers",
        "jinja2",
        "llm_boost._native",
        "llm_boost.engine.llm",
    )
    code = f"""
import sys
from llm_boost.cli.main import main
code = main({args!r})
loaded = [name for name in {heavy!r} if name in sys.modules]
sys.exit(f"loaded: {{loaded}}" if loaded else code)
"""
    ran = spawn("-c", code)
    assert ran.returncode == 0, ran.stderr


def test_version(run):
    code, out, _ = run("--version")
    assert code == 0
    assert out.startswith("llm-boost ")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (
            ["predit"],
            "no verb 'predit'; did you mean 'predict'? (verbs: predict, ",
        ),
        (["--verbose"], "No such option '--verbose'"),
        (["eval"], "Missing option '--file'"),
        (["pull"], "give a name: smollm2-135m-instruct"),
    ],
)
def test_usage_errors(run, args, message):
    code, out, err = run(*args)
    assert (code, out) == (2, "")
    assert err.startswith("llm-boost: error: ")
    assert err.count("\n") == 1
    assert message in err


def test_an_unexpected_exception(run, llm, monkeypatch):
    def fail(resolved):
        raise RuntimeError("boom\nsecond line")

    monkeypatch.setattr("llm_boost.cli.predict.build_llm", fail)
    code, _, err = run("predict", "--model", "m", "x")
    assert code == 1
    assert err == (
        "llm-boost: error: RuntimeError: boom second line (run again with --debug for the traceback)\n"
    )


@pytest.mark.parametrize("where", [0, 1, 2])
def test_debug_shows_the_traceback_wherever_it_stands(run, where):
    args = ["predict", "x"]
    args.insert(where, "--debug")
    code, _, err = run(*args)
    assert code == 2
    assert "Traceback" in err
    assert err.splitlines()[-1].startswith("llm-boost: error: no model")


def test_debug_behind_two_dashes_is_a_prompt(run, llm):
    assert run("predict", "--model", "m", "--", "--debug")[0] == 0
    assert "".join(map(chr, llm.batches[0][0][0][1:])) == "--debug"


def test_an_interrupt(run, llm, monkeypatch):
    def interrupt(resolved):
        raise KeyboardInterrupt

    monkeypatch.setattr("llm_boost.cli.predict.build_llm", interrupt)
    assert run("predict", "--model", "m", "x")[0] == 130


def test_a_reader_that_leaves_gets_no_complaint(tmp_path):
    code = "import sys; from llm_boost.cli.main import main; sys.exit(main(['predict', '--help']))"
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as closed:
        ran = subprocess.run([sys.executable, "-c", code], stdout=closed, stderr=subprocess.PIPE, timeout=60)
    assert ran.stderr == b""
    assert ran.returncode == 1


def test_a_missing_model_through_the_real_entry(tmp_path):
    code = "import sys; from llm_boost.cli.main import main; sys.exit(main(sys.argv[1:]))"
    ran = spawn("-c", code, "predict", "--model", str(tmp_path / "absent"), "x")
    assert ran.returncode == 2
    assert ran.stdout == ""
    assert ran.stderr == f"llm-boost: error: {tmp_path}/absent: no such model directory or file\n"


def test_the_tables_names_are_real():
    # doctor is checked by its own tests
    for verb in ("predict", "pull", "eval"):
        command = cli_main.cli.get_command(None, verb)
        assert command.name == verb
