"""Stories in the form of OpenAI's /v1/completions, so that existing clients can ask for them."""

import json
import math
import time
import uuid
from collections.abc import AsyncIterator
from typing import Any

from config import UserError
from inference.live_stories import ALTERNATIVES, Event, server_sent

REASONS = {"end": "stop", "stop": "stop", "max_new_tokens": "length"}  # their words for why a story ended
# what their form has and this server has not, with the values that ask for nothing
UNSUPPORTED = {"n": 1, "best_of": 1, "echo": False, "suffix": "", "presence_penalty": 0, "frequency_penalty": 0,
               "logit_bias": {}}
ANSWER = ("stream", "stream_options", "logprobs")  # about the answer, not the story


def from_openai(values: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """A request in the form of /generate, and what it says about the answer. Raises UserError."""
    for name, neutral in UNSUPPORTED.items():
        if values.get(name, neutral) != neutral:
            raise UserError(f"{name}: not supported here; leave it out")
    answer = {"stream": False, "stream_options": {}, "logprobs": None} | {
        name: values[name] for name in ANSWER if name in values}
    count = answer["logprobs"]
    if count is not None and not (type(count) is int and 0 <= count <= ALTERNATIVES):
        raise UserError(f"logprobs: expected a whole number, at most {ALTERNATIVES}")
    if type(answer["stream"]) is not bool or not isinstance(answer["stream_options"], dict):
        raise UserError("expected true or false for stream, and an object for stream_options")
    values = {name: value for name, value in values.items() if name not in (*UNSUPPORTED, *ANSWER, "model", "user")}
    prompt = values.pop("prompt", "")
    if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], (str, list)):
        prompt = prompt[0]
    values["tokens" if isinstance(prompt, list) else "prompt"] = prompt
    if "max_tokens" in values:
        values["max_new_tokens"] = values.pop("max_tokens")
    return values, answer


def _choice(events: list[Event], logprobs: int | None) -> dict[str, Any]:
    tokens, reason = [event for event in events if "id" in event], events[-1].get("reason")
    likely = [{other["text"]: math.log(max(other["probability"], 1e-6)) for other in event["likeliest"][:logprobs]}
              for event in tokens]
    details = {"tokens": [event["text"] for event in tokens], "top_logprobs": likely,
               "token_logprobs": [event["log_probability"] for event in tokens]}
    return {"text": "".join(event["text"] for event in events), "index": 0, "finish_reason": REASONS.get(reason),
            "logprobs": None if logprobs is None else details}


async def to_openai(groups: AsyncIterator[list[Event]], answer: dict[str, Any], model: str,
                    prompt_tokens: int) -> AsyncIterator[str]:
    """The answer to a request: server-sent events, or one object once the story has ended."""
    head = {"id": f"cmpl-{uuid.uuid4().hex}", "object": "text_completion", "created": int(time.time()), "model": model}
    logprobs, everything = answer["logprobs"], []
    async for events in groups:
        everything += events
        if (reason := events[-1].get("reason")) and reason not in REASONS:
            error = {"error": {"message": f"the story was cut: {reason}", "type": "server_error"}}
            yield server_sent(error) if answer["stream"] else json.dumps(error)
            return
        if answer["stream"]:
            yield server_sent({**head, "choices": [_choice(events, logprobs)]})
    count = sum("id" in event for event in everything)
    usage = {"prompt_tokens": prompt_tokens, "completion_tokens": count, "total_tokens": prompt_tokens + count}
    if not answer["stream"]:
        yield json.dumps({**head, "choices": [_choice(everything, logprobs)], "usage": usage}, ensure_ascii=False)
        return
    if answer["stream_options"].get("include_usage"):
        yield server_sent({**head, "choices": [], "usage": usage})
    yield "data: [DONE]\n\n"
