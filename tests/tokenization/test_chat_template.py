"""Chat templates: rendered as transformers does it, and never trusted."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from tokenizer_goldens import golden

from llm_boost.errors import RequestError, TokenizerError
from llm_boost.tokenization import Tokenizer

CHATS = golden("chats.json")
USER = {"role": "user", "content": "hi"}


@pytest.mark.parametrize("chat", CHATS, ids=range(len(CHATS)))
def test_equal_to_transformers(llama: Tokenizer, chat: dict[str, Any]) -> None:
    assert llama.apply_chat_template(**chat["options"], chat_template=chat["template"]) == chat["text"]


def test_default_and_named_templates(llama: Tokenizer) -> None:
    named = _with_templates(llama, {"default": "plain", "tool_use": "tools", "rag": "{{ documents }}"})
    assert named.chat_template == "plain"
    assert named.apply_chat_template([USER]) == "plain"
    assert named.apply_chat_template([USER], tools=[{"type": "function"}]) == "tools"
    assert named.apply_chat_template([USER], chat_template="rag", documents=[1]) == "[1]"


def test_no_template_is_the_requests_fault(llama: Tokenizer) -> None:
    assert llama.chat_template is None
    with pytest.raises(RequestError, match=r"tokenizer\.model has none; give one"):
        llama.apply_chat_template([USER])
    with pytest.raises(RequestError, match="no default one; choose one of rag, tool_use"):
        _with_templates(llama, {"tool_use": "a", "rag": "b"}).apply_chat_template([USER])


def test_bos_is_never_doubled(llama: Tokenizer) -> None:
    ids = llama.encode_chat([USER], chat_template="{{ bos_token }}{{ messages[0].content }}")
    assert ids == llama.encode("hi")
    assert ids.count(llama.bos_token_id) == 1


def test_refusal_is_the_requests_fault(llama: Tokenizer) -> None:
    with pytest.raises(RequestError, match=r"^messages: refused by the chat template: no way$"):
        llama.apply_chat_template([USER], chat_template="{{ raise_exception('no\n way') }}")


@pytest.mark.parametrize("message", ["text", None, [USER]])
def test_messages_must_be_objects(llama: Tokenizer, message: Any) -> None:
    with pytest.raises(RequestError, match=r"messages\[1\]: .* must be an object with a role"):
        llama.apply_chat_template([USER, message], chat_template="")


def test_only_plain_data_goes_in(llama: Tokenizer) -> None:
    with pytest.raises(RequestError, match="only plain JSON data"):
        llama.apply_chat_template([{"role": "user", "content": object()}], chat_template="")


@pytest.mark.parametrize(
    "template",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{{ 9 ** (9 ** 9) }}",  # one expression that holds the interpreter for hours
    ],
)
def test_endless_templates_end(llama: Tokenizer, template: str) -> None:
    threads = threading.active_count()
    start = time.perf_counter()
    with pytest.raises(TokenizerError, match=r"did not end within 2 s|needs more than 512 MiB"):
        llama.apply_chat_template([USER], chat_template=template)
    assert time.perf_counter() - start < 5  # two seconds, and a loaded machine
    assert threading.active_count() == threads
    assert llama.apply_chat_template([USER], chat_template="next") == "next"


@pytest.mark.parametrize(
    "template",
    [
        "{{ 'a' * 10 ** 10 }}",
        "{% set n=namespace(s='a') %}{% for i in range(50) %}{% set n.s = n.s ~ n.s %}{% endfor %}{{ n.s }}",
        "{{ '%1000000000000d' % 1 }}",
        "{{ 'x'.ljust(10 ** 11) }}",
        "{{ (range(99999) | list) * 99999 }}",
        "{% for i in range(99999) %}{{ 'abcdefgh' * 999 }}{% endfor %}",
    ],
)
def test_huge_texts_are_refused(llama: Tokenizer, template: str) -> None:
    limits = r"needs more than 512 MiB|grows beyond the limit|did not end within 2 s|OverflowError"
    with pytest.raises(TokenizerError, match=limits):
        llama.apply_chat_template([USER], chat_template=template)


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{{ (''|attr('__class__')).mro() }}",
        "{{ '{0.__class__.__mro__}'.format('') | upper }}",
        "{{ raise_exception.__globals__.sys.modules }}",
        "{{ (messages | map(attribute='__class__') | list)[0].mro() }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update(role='x') }}",
        "{% include '/etc/passwd' %}",
        "{% import 'os' as os %}",
    ],
)
def test_attacks_fail(llama: Tokenizer, template: str) -> None:
    with pytest.raises(TokenizerError, match=r"chat template: (SecurityError|UndefinedError|TypeError)"):
        llama.apply_chat_template([USER], chat_template=template)


def test_no_files_beyond_the_sandbox() -> None:
    """Even code that got out of jinja's sandbox could open nothing: the process has no descriptors left."""
    from llm_boost.tokenization import chat_template

    code = (
        "import runpy, sys; sys.path.insert(0, ''); "
        f"worker = runpy.run_path({chat_template.__file__.replace('chat_template', 'chat_worker')!r}); "
        "worker['lock_down'](); open('/etc/hostname')"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "OSError: [Errno 24]" in ended.stderr


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("a\n{% if %}", "chat template: line 2: Expected an expression"),
        ("{{ 1 / 0 }}", "chat template: ZeroDivisionError"),
        ("{{ messages[7].content }}", "chat template: UndefinedError"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "chat template: RecursionError"),
        ("{{ nothing | unknown }}", "chat template: line 1: No filter named"),
    ],
)
def test_faulty_templates(llama: Tokenizer, template: str, message: str) -> None:
    with pytest.raises(TokenizerError, match=message) as caught:
        llama.apply_chat_template([USER], chat_template=template)
    assert "\n" not in str(caught.value)


def test_many_threads(llama: Tokenizer) -> None:
    """One process serves them all, and every one gets its own answer."""
    answers: dict[int, str] = {}

    def ask(number: int) -> None:
        content = str(number) * 1000
        answers[number] = llama.apply_chat_template(
            [{"role": "user", "content": content}], chat_template="{{ messages[0].content }}"
        )

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == {number: str(number) * 1000 for number in range(20)}


def test_interruption_does_not_leave_an_answer_behind(llama: Tokenizer) -> None:
    loop = "{% for a in range(9999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    previous = signal.signal(signal.SIGALRM, signal.default_int_handler)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.3)
        with pytest.raises(KeyboardInterrupt):
            llama.apply_chat_template([USER], chat_template=loop)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
    assert llama.apply_chat_template([USER], chat_template="next") == "next"


def test_the_process_does_not_outlive_its_parent() -> None:
    code = (
        "import os, signal; from llm_boost.tokenization import chat_template as c; "
        "c.render_chat('x', {}, 'y'); print(c._worker._process.pid, flush=True); "
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    worker = Path("/proc") / ended.stdout.strip()
    deadline = time.monotonic() + 10
    while worker.exists() and "chat_worker" in (worker / "cmdline").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_large_chats_pass(llama: Tokenizer) -> None:
    content = "漢字 and text\n" * 100_000
    rendered = llama.apply_chat_template(
        [{"role": "user", "content": content}], chat_template="{{ messages[0].content }}"
    )
    assert rendered == content


def _with_templates(tokenizer: Tokenizer, named: dict[str, str]) -> Tokenizer:
    from llm_boost.tokenization.tokenizer import ChatTemplates, SpecialTokens

    return Tokenizer(
        tokenizer._backend, SpecialTokens(), source="x.json", chat_templates=ChatTemplates(named, "x.json")
    )
