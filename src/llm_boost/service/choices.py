"""What is new in each output of a stream, and several streams as one."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Iterator, Sequence
from dataclasses import dataclass, field

from llm_boost.engine.outputs import CompletionOutput, Logprob, RequestOutput


@dataclass
class News:
    """What a completion has gained since it was last looked at."""

    index: int
    text: str
    token_ids: list[int]
    logprobs: list[dict[int, Logprob]]
    completion: CompletionOutput
    ends: bool  # it is finished, and has not been said to be before


@dataclass
class Follower:
    """Follows the completions of one request."""

    _tokens: dict[int, int] = field(default_factory=dict)
    _ended: set[int] = field(default_factory=set)

    def news(self, output: RequestOutput) -> Iterator[News]:
        """Of each completion that has any."""
        for completion in output.outputs:
            index = completion.index
            if index in self._ended:
                continue
            seen = self._tokens.get(index, 0)
            ends = completion.finish_reason is not None
            if len(completion.token_ids) == seen and not completion.delta and not ends:
                continue
            self._tokens[index] = len(completion.token_ids)
            if ends:
                self._ended.add(index)
            yield News(
                index=index,
                text=completion.delta,
                token_ids=completion.token_ids[seen:],
                logprobs=(completion.logprobs or [])[seen:],
                completion=completion,
                ends=ends,
            )


async def merged(
    streams: Sequence[AsyncGenerator[RequestOutput, None]],
) -> AsyncGenerator[tuple[int, RequestOutput], None]:
    """(stream's number, output) of all of them as they come. The first fault ends them all."""
    if len(streams) == 1:
        async with contextlib.aclosing(streams[0]) as stream:
            async for output in stream:
                yield 0, output
        return
    # One output of each stream at a time: a slow reader holds no more than that.
    pending = {asyncio.ensure_future(anext(stream, None)): i for i, stream in enumerate(streams)}
    try:
        while pending:
            done, _ = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                number = pending.pop(task)
                following = task.result()
                if following is not None:
                    yield number, following
                    pending[asyncio.ensure_future(anext(streams[number], None))] = number
    finally:
        for task in pending:
            task.cancel()
        await asyncio.gather(*pending, return_exceptions=True)
        for stream in streams:
            await stream.aclose()
