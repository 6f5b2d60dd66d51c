"""`llm-boost chat` on a fake LLM: the conversation, its commands, Ctrl-C, and a pipe."""

from __future__ import annotations

import io
import json
import signal

import pytest

from llm_boost import SamplingParams

ALPHABET = "abcdefghijklmnopqrstuvwxyz"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def chat(run, llm, monkeypatch):
    """Runs a chat on lines: from a pipe, or as a person types them."""

    def chat(*lines, terminal=False, flags=()):
        typed = iter(lines)

        def read(prompt):
            line = next(typed, None)
            if line is None:
                raise EOFError
            if line is KeyboardInterrupt:
                raise KeyboardInterrupt
            return line

        text = "" if terminal else "".join(f"{line}\n" for line in lines)
        monkeypatch.setattr("sys.stdin", (Terminal if terminal else io.StringIO)(text))
        monkeypatch.setattr("builtins.input", read)
        return run("chat", "m", *flags)

    return chat


def prompts(llm):
    return ["".join(map(chr, ids)) for (ids,), _ in llm.batches]


def test_a_pipe_gives_an_answer_a_line_and_nothing_else(chat, llm):
    assert chat("Hello", "", "Again") == (0, f"{ALPHABET}\n{ALPHABET}\n", "")
    assert prompts(llm) == [
        "<user>Hello<assistant>",
        f"<user>Hello<assistant>{ALPHABET}<user>Again<assistant>",
    ]


def test_flags_reach_the_model(chat, llm):
    flags = ("--system", "Be brief", "--temperature", 0.5, "--top_k", 3, "--max_new_tokens", 4, "--seed", 9)
    code, out, _ = chat("Hi", flags=flags)
    assert (code, out) == (0, "abcd\n")
    assert prompts(llm) == ["<system>Be brief<user>Hi<assistant>"]
    assert llm.batches[0][1] == [SamplingParams(temperature=0.5, top_k=3, max_tokens=4)]
    assert llm.resolved[0].config.seed == 9


def test_commands(chat, llm, tmp_path):
    code, out, err = chat(
        "One", "/system Be kind", "Two", "/save talk.jsonl", "/reset", "/system", "Three", "/stats", "/help",
        "//etc", "/save talk.jsonl", "/system -", "/exit", "never read", terminal=True,
    )  # fmt: skip
    assert code == 0
    assert out.count(ALPHABET) == 4
    assert prompts(llm) == [
        "<user>One<assistant>",
        f"<system>Be kind<user>One<assistant>{ALPHABET}<user>Two<assistant>",
        "<system>Be kind<user>Three<assistant>",
        f"<system>Be kind<user>Three<assistant>{ALPHABET}<user>/etc<assistant>",
    ]
    for line in (
        "llm-boost: bfloat16, context of 1024 tokens; /help lists the commands",
        "llm-boost: system message: Be kind",
        "llm-boost: saved 2 exchanges to talk.jsonl",
        "llm-boost: the conversation is forgotten",
        "37 prompt tokens (0 of them cached), 26 new tokens, first token after 500 ms, 25.0 tokens/s, "
        "context 63 of 1024 tokens (6 %)",
        "  /reset   forget the conversation; the system message stays",
        "llm-boost: system message: none",
    ):
        assert line in err
    saved = json.loads((tmp_path / "talk.jsonl").read_text())  # a file of its own may be written again
    assert [message["content"] for message in saved["messages"]] == [
        "Be kind",
        "Three",
        ALPHABET,
        "/etc",
        ALPHABET,
    ]


def test_what_save_writes_predict_reads(chat, run, llm):
    chat("One", "/save talk.jsonl")
    code, _, _ = run("predict", "--model", "m", "--predict_file", "talk.jsonl")
    assert code == 0
    assert prompts(llm)[-1] == f"<user>One<assistant>{ALPHABET}<assistant>"


def test_a_person_is_told_of_a_mistake_and_goes_on(chat, llm, tmp_path):
    (tmp_path / "mine.txt").write_text("precious")
    mistakes = ("/sistem x", "/save", "/save mine.txt", "/save no/such/dir", "y" * 2000)
    code, out, err = chat(*mistakes, "Hello", terminal=True)
    assert (code, out) == (0, f"{ALPHABET}\n\n")
    for message in (
        "no command /sistem; did you mean '/system'? (/help lists them)",
        "/save: needs the name of a file",
        "mine.txt: exists already; choose another name",
        "no/such/dir: cannot be written: No such file or directory",
        "the message has 2017 tokens, allowed at most 767",
    ):
        assert f"llm-boost: {message}\n" in err
    assert (tmp_path / "mine.txt").read_text() == "precious"
    assert prompts(llm) == ["<user>Hello<assistant>"]


def test_a_mistake_in_a_pipe_ends_it(chat):
    code, out, err = chat("Hello", "/sistem", "never read")
    assert (code, out) == (2, f"{ALPHABET}\n")
    assert err.startswith("llm-boost: error: no command /sistem")


def test_a_line_may_go_on_in_the_next(chat, llm):
    chat("first\\", "second\\", "third", "last\\")
    assert prompts(llm)[0] == "<user>first\nsecond\nthird<assistant>"
    assert prompts(llm)[1].endswith("<user>last<assistant>")


def test_when_the_context_is_full_the_oldest_exchanges_are_left_out(chat, llm):
    llm.max_model_len = 200
    questions = [f"question {number}" for number in range(6)]
    code, _, err = chat(*questions, "/save all.jsonl", flags=("--system", "S"))
    assert code == 0
    assert all(len(prompt) <= 199 - 50 for prompt in prompts(llm))  # a quarter is left for the answer
    assert prompts(llm)[-1].startswith("<system>S<user>question 3<assistant>")
    assert prompts(llm)[-1].endswith("<user>question 5<assistant>")
    assert "the context is full: the model no longer sees the first 3 of 5 exchanges" in err
    with open("all.jsonl") as file:
        assert len(json.load(file)["messages"]) == 1 + 2 * 6


@pytest.fixture
def ctrl_c():
    """Ctrl-C counts, though the tests may run in a background shell, which ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("ctrl_c")
def test_ctrl_c_stops_the_answer_and_not_the_program(chat, llm, monkeypatch):
    stream = type(llm)._stream
    closed = []

    def interrupted_stream(self, asked, params):
        try:
            for count, output in enumerate(stream(self, asked, params)):
                if count == 3 and len(llm.batches) == 1:
                    signal.raise_signal(signal.SIGINT)
                yield output
        finally:
            closed.append(len(llm.batches))

    monkeypatch.setattr(type(llm), "_stream", interrupted_stream)
    before = signal.getsignal(signal.SIGINT)
    code, out, err = chat("One", KeyboardInterrupt, "Two", terminal=True)
    assert (code, out) == (0, f"abcd\n\n{ALPHABET}\n\n")
    assert "llm-boost: stopped\n" in err
    assert "llm-boost: /exit or Ctrl-D leaves\n" in err
    assert prompts(llm)[1] == "<user>One<assistant>abcd<user>Two<assistant>"
    assert closed == [1, 2], "an answer that is stopped is aborted before the next one begins"
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.usefixtures("ctrl_c")
def test_ctrl_c_ends_a_pipe(chat, llm, monkeypatch):
    def interrupt(self, asked, params):
        signal.raise_signal(signal.SIGINT)
        yield from ()

    monkeypatch.setattr(type(llm), "_stream", interrupt)
    assert chat("One", "Two")[0] == 130


def test_a_model_without_a_template_is_refused(chat, llm):
    llm.tokenizer.chat_template = None
    code, _, err = chat("Hello")
    assert code == 2
    assert "no chat template" in err


def test_the_model_is_named_once(run, llm):
    code, _, err = run("chat", "m", "--model", "n")
    assert code == 2
    assert "--model: the model is given twice" in err
