"""Answers of TGI's endpoints, in MindIE's form and in TGI's own."""

from __future__ import annotations

from typing import Any, Literal

from llm_boost.engine.outputs import CompletionOutput, RequestOutput
from llm_boost.service.choices import News
from llm_boost.service.endpoint import Call
from llm_boost.service.service import Ask
from llm_boost.service.tgi_models import TgiParameters


class Shapes:
    """What differs between TGI and MindIE: a list of ids, null for logprobs, and what details hold."""

    def __init__(self, call: Call, ask: Ask, given: TgiParameters) -> None:
        self._strict = call.service.config.tgi_shapes == "strict"
        self._full_text = call.service.config.full_text
        self._tokenizer = call.service.backend.tokenizer
        self._seed, self._given = ask.sampling["seed"], given
        self._index = 0

    def full(self, inputs: str, text: str) -> str:
        if not self._given.return_full_text:
            return text
        return inputs + text if self._strict else f"{inputs} {text}"

    def details(self, output: RequestOutput) -> dict[str, Any]:
        completion = output.outputs[0]
        prefill = []
        if self._given.decoder_input_details:
            prefill = [self._prefill_token(token) for token in output.prompt_token_ids]
        return {
            **({} if self._strict else {"prompt_tokens": len(output.prompt_token_ids)}),
            "finish_reason": finish_reason(completion),
            "generated_tokens": len(completion.token_ids),
            "prefill": prefill,
            "seed": self._seed,
            "tokens": [self._token(completion, i) for i in range(len(completion.token_ids))],
            **self._top_tokens(completion),
        }

    def events(self, output: RequestOutput, news: News, inputs: str) -> list[dict[str, Any]]:
        completion = news.completion
        ending: dict[str, Any] = {"generated_text": None, "details": None}
        if news.ends:
            ending["generated_text"] = self.full(inputs, completion.text)
            if self._strict or self._given.details:
                ending["details"] = self._ending_details(output)
        if not self._strict:
            text = completion.text if self._full_text else news.text
            return [
                {"token": {"id": news.token_ids, "text": text, "logprob": None, "special": None}, **ending}
            ]
        return self._strict_events(news, ending)

    def _strict_events(self, news: News, ending: dict[str, Any]) -> list[dict[str, Any]]:
        """One token an event; the text goes with the last of those that came together."""
        completion = news.completion
        first = len(completion.token_ids) - len(news.token_ids)
        events = []
        for position in range(first, len(completion.token_ids)):
            self._index += 1
            is_last = position == len(completion.token_ids) - 1
            token = {**self._token(completion, position), "text": news.text if is_last else ""}
            events.append(
                {
                    "index": self._index,
                    "token": token,
                    **self._top_tokens(completion, position),
                    **(ending if is_last else {"generated_text": None, "details": None}),
                }
            )
        return events

    def _ending_details(self, output: RequestOutput) -> dict[str, Any]:
        completion, size = output.outputs[0], len(output.prompt_token_ids)
        return {
            ("input_length" if self._strict else "prompt_tokens"): size,
            "finish_reason": finish_reason(completion),
            "generated_tokens": len(completion.token_ids),
            "seed": self._seed,
        }

    def _prefill_token(self, token: int) -> dict[str, Any]:
        if not self._strict:
            return {"id": token, "logprob": None, "special": None, "text": None}
        return {"id": token, "text": self._text(token), "logprob": None}

    def _token(self, completion: CompletionOutput, position: int) -> dict[str, Any]:
        token = completion.token_ids[position]
        if not self._strict:
            return {"id": token, "logprob": None, "special": None, "text": None}
        entry = completion.logprobs[position] if completion.logprobs else {}
        logprob = entry[token].logprob if token in entry else 0.0
        return {
            "id": token,
            "text": self._text(token),
            "logprob": logprob,
            "special": self._tokenizer.decode([token]) == "" != self._text(token),
        }

    def _top_tokens(self, completion: CompletionOutput, position: int | None = None) -> dict[str, Any]:
        if not self._strict or not self._given.top_n_tokens or not completion.logprobs:
            return {"top_tokens": []} if self._strict and position is not None else {}
        entries = completion.logprobs if position is None else completion.logprobs[position : position + 1]
        count = self._given.top_n_tokens
        tops = [
            [
                {"id": token, "text": p.decoded_token, "logprob": p.logprob, "special": False}
                for token, p in sorted(entry.items(), key=lambda item: item[1].rank)[:count]
            ]
            for entry in entries
        ]
        return {"top_tokens": tops if position is None else tops[0]}

    def _text(self, token: int) -> str:
        return self._tokenizer.decode([token], skip_special_tokens=False)


def finish_reason(completion: CompletionOutput) -> Literal["eos_token", "stop_sequence", "length"]:
    """TGI's names, which MindIE's other endpoints use too."""
    if completion.finish_reason == "length":
        return "length"
    if completion.finish_reason == "stop" and completion.stop_reason is None:
        return "eos_token"
    return "stop_sequence"
