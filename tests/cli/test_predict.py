"""`llm-boost predict` on a fake LLM: what each flag does, what is printed, and what is refused."""

from __future__ import annotations

import json
import stat
from pathlib import Path

import pytest

from llm_boost import SamplingParams

CONFIGS = Path(__file__).parents[2] / "configs"
QWEN = CONFIGS / "predict_qwen2_7b_instruct_llm_boost.yaml"
ALPHABET = "abcdefghijklmnopqrstuvwxyz"


def test_a_prompt_streams_its_continuation_and_figures_follow(run, llm):
    code, out, err = run("predict", "--model", "m", "Hello")
    assert (code, out) == (0, ALPHABET + "\n")
    assert err == (
        "llm-boost: 6 prompt tokens, 26 new tokens, first token after 500 ms, 25.0 tokens/s, "
        "model 123 MB (bfloat16), KV cache 65536 tokens (1.51 GB), 2 threads, avx2\n"
    )


def test_the_original_command_lines(run, llm, tmp_path):
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / name).touch()
    flags = ["--vocab_file", tmp_path / "vocab.json", "--merges_file", tmp_path / "merges.txt"]
    text = "帮我制定一份去上海的旅游攻略"
    for config_flag in ("--config_path", "--config"):
        code, out, _ = run(
            "predict", "--predict_data", text, config_flag, QWEN, "--load_checkpoint", "model_dir", *flags,
            "--use_parallel", "False", "--batch_size", 4,
        )  # fmt: skip
        assert code == 0
        assert out == f"{text}{ALPHABET}\n" * 4
        config = llm.resolved[-1].config
        assert (config.model, config.seq_length, config.vocab_file) == (
            "model_dir",
            8192,
            tmp_path / "vocab.json",
        )
        prompts, params = llm.batches[-1]
        assert len(prompts) == 4
        assert params[0] == SamplingParams(
            temperature=0.0, top_k=20, top_p=0.8, repetition_penalty=1.05,
            stop_token_ids=(151645, 151643), max_tokens=512 - len(prompts[0]),
        )  # fmt: skip
    assert (tmp_path / "results.txt").read_text() == f"{text}{ALPHABET}\n" * 4
    assert stat.S_IMODE((tmp_path / "results.txt").stat().st_mode) == 0o600


def test_dashes_and_any_case_of_booleans(run, llm):
    code, _, _ = run("predict", "--load-checkpoint", "m", "--predict-data", "x", "--use-parallel", "FALSE")
    assert code == 0


def test_results_are_one_line_each(run, llm, tmp_path):
    llm.reply = "a\nb\\n\r"
    code, out, _ = run("predict", "--model", "m", "--save_file", "out.txt", "x", "y")
    assert (code, out) == (0, "a\nb\\n\r\n" * 2)
    assert (tmp_path / "out.txt").read_bytes() == b"a\\nb\\\\n\\r\n" * 2


def test_nothing_is_written_without_the_old_flags(run, llm, tmp_path):
    assert run("predict", "--model", "m", "x")[0] == 0
    assert list(tmp_path.iterdir()) == []


def test_sampling_flags_reach_the_engine(run, llm):
    run(
        "predict", "--model", "m", "--temperature", "0.5", "--top_k", "7", "--top_p", "0.9", "--min_p", "0.1",
        "--repetition_penalty", "1.1", "--max_new_tokens", "3", "--stop", "b", "--stop", "c", "--seed", "4",
        "x",
    )  # fmt: skip
    assert llm.batches[0][1][0] == SamplingParams(
        temperature=0.5, top_k=7, top_p=0.9, min_p=0.1, repetition_penalty=1.1, max_tokens=3, stop=("b", "c"),
    )  # fmt: skip
    assert llm.resolved[0].config.seed == 4


@pytest.mark.parametrize(
    ("defaults", "flags", "expected"),
    [
        ({}, [], {"temperature": 0.0}),
        ({}, ["--do_sample", "True"], {"temperature": 1.0}),
        ({}, ["--top_k", "4"], {"temperature": 1.0, "top_k": 4}),
        ({"temperature": 0.7, "top_p": 0.8}, [], {"temperature": 0.7, "top_p": 0.8}),
        ({"temperature": 0.7, "top_p": 0.8}, ["--top_p", "0.5"], {"temperature": 0.7, "top_p": 0.5}),
        ({"temperature": 0.7, "top_k": 9}, ["--do_sample", "false"], {"temperature": 0.0, "top_k": 9}),
        ({"temperature": 0.7}, ["--temperature", "0"], {"temperature": 0.0}),
    ],
)
def test_sampling_precedence(run, llm, defaults, flags, expected):
    llm.defaults = SamplingParams(**defaults)
    assert run("predict", "--model", "m", *flags, "x")[0] == 0
    assert llm.batches[0][1][0] == SamplingParams(max_tokens=256, **expected)


def test_lengths(run, llm):
    def max_tokens(*flags):
        assert run("predict", "--model", "m", *flags, "x" * 9)[0] == 0
        return llm.batches[-1][1][0].max_tokens

    assert max_tokens() == 256
    assert max_tokens("--max_decode_length", 30) == 20
    assert max_tokens("--max_decode_length", 30, "--max_new_tokens", 5) == 5
    assert max_tokens("--max_decode_length", 30, "--seq_length", 40) == 20


def test_several_prompts_run_in_batches(run, llm):
    code, out, _ = run("predict", "--model", "m", "--batch_size", 2, "--max_new_tokens", 1, "x", "y", "z")
    assert (code, out) == (0, "a\n" * 3)
    assert [len(prompts) for prompts, _ in llm.batches] == [2, 1]


def test_several_prompts_run_at_once_without_a_batch_size(run, llm):
    run("predict", "--model", "m", "--predict_data", "x", "--predict_data", "y")
    assert [len(prompts) for prompts, _ in llm.batches] == [2]


def test_stream_and_no_stream(run, llm):
    for flag in ("--stream", "--no-stream"):
        code, out, _ = run("predict", "--model", "m", flag, "--predict_data", "x", "--predict_data", "y")
        assert (code, out) == (0, f"x{ALPHABET}\ny{ALPHABET}\n")
    assert [len(prompts) for prompts, _ in llm.batches] == [1, 1, 2]


def test_chat(run, llm):
    code, out, _ = run("predict", "--model", "m", "--chat", "--system", "Be brief", "--predict_data", "Hi")
    assert (code, out) == (0, ALPHABET + "\n")
    text = "".join(map(chr, llm.batches[0][0][0]))
    assert text == "<system>Be brief<user>Hi<assistant>"


def test_json_is_all_of_stdout(run, llm):
    code, out, err = run("predict", "--model", "m", "--json", "--max_new_tokens", 2, "你好", "y")
    assert code == 0
    first, second = map(json.loads, out.splitlines())
    assert first == {
        "index": 0, "prompt": "你好", "text": "ab", "token_ids": [97, 98], "finish_reason": "length",
        "prompt_tokens": 3, "new_tokens": 2,
    }  # fmt: skip
    assert (second["index"], second["prompt"]) == (1, "y")
    assert "tokens/s" in err


def test_a_text_file_of_prompts(run, llm, tmp_path):
    (tmp_path / "prompts.txt").write_text("one\r\n\n  two\n")
    assert run("predict", "--model", "m", "--predict_file", "prompts.txt")[0] == 0
    assert ["".join(map(chr, ids[1:])) for ids in llm.batches[0][0]] == ["one", "  two"]


def test_a_jsonl_file_of_prompts(run, llm, tmp_path):
    lines = [
        {"prompt": "one", "temperature": 0.5, "max_new_tokens": 3, "seed": 1, "stop": ["x"]},
        {"messages": [{"role": "user", "content": "two"}], "ignore_eos": True},
    ]
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, lines)))
    code, out, _ = run(
        "predict", "--model", "m", "--predict_file", "prompts.jsonl", "--json", "--max_new_tokens", 30
    )
    assert code == 0
    assert json.loads(out.splitlines()[1])["messages"] == lines[1]["messages"]
    prompts, params = llm.batches[0]
    assert "".join(map(chr, prompts[1])) == "<user>two<assistant>"
    assert params[0] == SamplingParams(temperature=0.5, max_tokens=3, seed=1, stop=("x",))
    assert params[1] == SamplingParams(temperature=0.0, max_tokens=30, ignore_eos=True)


def test_end_tokens_of_the_file_do_not_stop_where_ignored(run, llm):
    run("predict", "--config", QWEN, "--model", "m", "--ignore_eos", "x")
    assert llm.batches[0][1][0].stop_token_ids == ()
    assert llm.batches[0][1][0].ignore_eos


def test_measure_throughput(run, llm):
    code, out, err = run(
        "predict", "--model", "m", "--measure_throughput", "True", "--max_new_tokens", 9, "--json"
    )
    rows = [json.loads(line) for line in out.splitlines()]
    assert code == 0
    assert [(row["batch_size"], row["prompt_tokens"]) for row in rows] == [
        (1, 256),
        (1, 512),
        (4, 256),
        (4, 512),
    ]
    assert rows[2] == {
        "batch_size": 4, "prompt_tokens": 256, "new_tokens": 9, "prefill_tokens_per_second": 2048.0,
        "decode_tokens_per_second": 32.0, "generate_tokens_per_second": 24.0, "seconds": 1.5,
    }  # fmt: skip
    assert "batch 1, prompt 1024: left out, seq_length is 1024" in err
    ids, params = llm.batches[-1]
    assert all(1 <= token < 300 for prompt in ids for token in prompt)
    assert params[0].ignore_eos
    assert "prefill 2048.0 tokens/s" in run("predict", "--model", "m", "--measure_throughput", "true")[1]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--model", "m"], "no prompt: give one, or --predict_data TEXT, or --predict_file FILE"),
        (["--model", "m", ""], "prompt 1 is empty; give some text"),
        (["--model", "m", "x", "--predict_data", ""], "prompt 1 is empty"),
        (["x"], "no model: give --model"),
        (["--model", "m", "--top_p", "2", "x"], "--top_p: got 2.0, allowed: less than or equal to 1"),
        (
            ["--model", "m", "--top_k", "many", "x"],
            "Invalid value for '--top_k': 'many' is not a valid integer",
        ),
        (
            ["--model", "m", "--temperature", "500", "x"],
            "prompt 1: temperature: got 500.0, allowed a number from 0",
        ),
        (["--model", "m", "--do_sample", "yes", "x"], "'--do_sample': got 'yes', allowed: True or False"),
        (["--model", "m", "--device_num", "2", "x"], "--device_num: got 2, allowed: 1"),
        (
            ["--model", "m", "--only_save_strategy", "True", "--use_parallel", "True", "x"],
            "--device_num: missing; give the number of ranks",
        ),
        (["--config", QWEN, "--model", "m", "--use_parallel", "True", "x"], "parallel_config: got 2 ranks"),
        (["--config", "absent.yaml", "x"], "absent.yaml: cannot read the YAML file"),
        (["--config", QWEN, "x"], "no model: give --model"),
        (["--model", "m", "--predict_file", "absent"], "absent: cannot read the prompt file: No such file"),
        (["--model", "m", "--system", "s", "x"], "--system: needs --chat"),
        (["--model", "m", "--stream", "--json", "x"], "--stream and --json: give one"),
        (["--model", "m", "--stream", "--batch_size", "2", "x"], "--stream: shows one sequence at a time"),
        (
            ["--model", "m", "--save_file", "/nowhere/out", "x"],
            "--save_file: cannot write /nowhere/out: No such file",
        ),
        (["--model", "m", "--max_decode_length", "3", "xyz"], "prompt 1: 4 tokens, and max_decode_length"),
        (
            ["--model", "m", "x" * 2000],
            "prompt 1: 2001 tokens, and seq_length (prompt and continuation) is 1024",
        ),
        (
            ["--model", "m", "--measure_throughput", "True", "x"],
            "--measure_throughput True runs random tokens",
        ),
        (["--model", "m", "--max_new_tokenz", "3", "x"], "No such option '--max-new-tokenz'"),
        (
            ["--model", "m", "--vocab_file", "absent", "x"],
            "--vocab_file: got 'absent': The vocab_file should exist.",
        ),
    ],
)
def test_wrong_input_ends_in_one_line_and_exit_code_2(run, llm, args, message):
    code, out, err = run("predict", *args)
    assert code == 2
    assert out == ""
    line = err.splitlines()[-1]
    assert line.startswith("llm-boost: error: ")
    assert message in line
    assert llm.batches == []


def test_a_misspelt_flag_names_the_nearest(run, llm):
    assert "--max-new-tokens" in run("predict", "--model", "m", "--max_new_tokenz", "3", "x")[2]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "prompts.jsonl:2: not valid JSON"),
        ("[1]", "prompts.jsonl:2: got '[1]', allowed: an object"),
        ("{}", 'prompts.jsonl:2: allowed: either "prompt" or "messages"'),
        ('{"prompt": 3}', "prompts.jsonl:2: prompt: got 3, allowed: text"),
        ('{"prompt": ""}', "prompts.jsonl:2 is empty"),
        (
            '{"prompt": "x", "temprature": 1}',
            "prompts.jsonl:2: unknown key 'temprature'; did you mean 'temperature'?",
        ),
        ('{"prompt": "x", "top_p": 7}', "prompts.jsonl:2: top_p: got 7, allowed a number above 0"),
        ('{"prompt": "x", "max_new_tokens": 0}', "prompts.jsonl:2: max_new_tokens: got 0"),
        ('{"messages": []}', "prompts.jsonl:2: messages: allowed: a list, not empty"),
        ('{"messages": [{"content": "x"}]}', 'allowed: an object with "role" and "content"'),
        ("[" * 100_000, "prompts.jsonl:2: not valid JSON"),
    ],
)
def test_a_wrong_line_of_a_prompt_file(run, llm, tmp_path, line, message):
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "fine"}\n' + line)
    code, _, err = run("predict", "--model", "m", "--predict_file", "prompts.jsonl")
    assert code == 2
    assert message in err


def test_an_engine_that_fails_ends_in_exit_code_1(run, llm):
    generate = llm.generate

    def broken(prompts, params):
        outputs = generate(prompts, params)
        outputs[0].error = "logits are not finite"
        return outputs

    llm.generate = broken
    code, _, err = run("predict", "--model", "m", "--no-stream", "x")
    assert code == 1
    assert err == "llm-boost: error: prompt 1: logits are not finite\n"
