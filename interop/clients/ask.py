# mypy: ignore-errors
"""Asks through the official Python clients; runs in an environment of its own.

It reads one case as JSON from each line of its input, and writes what the client gave as one line of JSON.
"""

import json
import os
import sys
from collections.abc import Callable
from typing import Any

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # its list of models would come from the network

import anthropic
import litellm
import openai
from langchain_anthropic import ChatAnthropic
from langchain_openai import ChatOpenAI
from llama_index.core.base.llms.types import ChatMessage
from llama_index.llms.openai_like import OpenAILike

Case = dict[str, Any]

KEY = "key"
TOKENS = 8
litellm.suppress_debug_info = True


def _openai(case: Case) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{case['base']}/v1", api_key=KEY, **_retries(case))


def _retries(case: Case, name: str = "max_retries") -> Case:
    return {} if case["retries"] else {name: 0}


def _messages(case: Case) -> list[dict[str, str]]:
    return [{"role": "user", "content": case["prompt"]}]


def openai_chat(case: Case) -> str:
    with _openai(case) as client:
        answer: Any = client.chat.completions.create(
            model=case["model"], messages=_messages(case), max_tokens=TOKENS, stream=case["stream"],
            extra_body=case["extra"],
        )  # fmt: skip
        if not case["stream"]:
            return str(answer.choices[0].message.content)
        return "".join(each.choices[0].delta.content or "" for each in answer if each.choices)


def openai_completions(case: Case) -> str:
    with _openai(case) as client:
        answer: Any = client.completions.create(
            model=case["model"], prompt=case["prompt"], max_tokens=TOKENS, stream=case["stream"],
            extra_body=case["extra"],
        )  # fmt: skip
        return "".join(each.choices[0].text for each in (answer if case["stream"] else [answer]) if each.choices)


def openai_responses(case: Case) -> str:
    with _openai(case) as client:
        answer: Any = client.responses.create(
            model=case["model"], input=case["prompt"], max_output_tokens=TOKENS, stream=case["stream"],
            extra_body=case["extra"],
        )  # fmt: skip
        if not case["stream"]:
            return str(answer.output_text)
        return "".join(event.delta for event in answer if event.type == "response.output_text.delta")


def anthropic_messages(case: Case) -> str:
    with anthropic.Anthropic(base_url=case["base"], api_key=KEY, **_retries(case)) as client:
        answer: Any = client.messages.create(
            model=case["model"], messages=_messages(case), max_tokens=TOKENS, stream=case["stream"],
            extra_body=case["extra"],
        )  # fmt: skip
        if not case["stream"]:
            return "".join(block.text for block in answer.content)
        return "".join(event.delta.text for event in answer if event.type == "content_block_delta")


def langchain_openai(case: Case) -> str:
    model: Any = ChatOpenAI(
        model=case["model"], base_url=f"{case['base']}/v1", api_key=KEY, max_tokens=TOKENS,
        extra_body=case["extra"], **_retries(case),
    )  # fmt: skip
    return _langchain(model, case)


def langchain_anthropic(case: Case) -> str:
    model: Any = ChatAnthropic(
        model=case["model"], base_url=case["base"], api_key=KEY, max_tokens=TOKENS,
        model_kwargs={"extra_body": case["extra"]}, **_retries(case),
    )  # fmt: skip
    return _langchain(model, case)


def _langchain(model: Any, case: Case) -> str:
    pieces = model.stream(case["prompt"]) if case["stream"] else [model.invoke(case["prompt"])]
    return "".join(str(piece.text) for piece in pieces)


def litellm_openai(case: Case) -> str:
    answer: Any = litellm.completion(
        model=f"openai/{case['model']}", api_base=f"{case['base']}/v1", api_key=KEY, messages=_messages(case),
        max_tokens=TOKENS, stream=case["stream"], extra_body=case["extra"], **_retries(case),
    )  # fmt: skip
    if not case["stream"]:
        return str(answer.choices[0].message.content)
    return "".join(each.choices[0].delta.content or "" for each in answer if each.choices)


def litellm_anthropic(case: Case) -> str:
    extra = case["extra"]
    answer: Any = litellm.completion(
        model=f"anthropic/{case['model']}", api_base=case["base"], api_key=KEY, messages=_messages(case),
        stream=case["stream"], **{"max_tokens": TOKENS, **extra}, **_retries(case),
    )  # fmt: skip
    if not case["stream"]:
        return str(answer.choices[0].message.content)
    return "".join(each.choices[0].delta.content or "" for each in answer if each.choices)


def llama_index(case: Case) -> str:
    model: Any = OpenAILike(
        model=case["model"], api_base=f"{case['base']}/v1", api_key=KEY, is_chat_model=True, max_tokens=TOKENS,
        context_window=1_000_000, additional_kwargs={"extra_body": case["extra"]}, **_retries(case),
    )  # fmt: skip
    messages = [ChatMessage(role="user", content=case["prompt"])]
    if not case["stream"]:
        return str(model.chat(messages).message.content)
    return "".join(piece.delta or "" for piece in model.stream_chat(messages))


CLIENTS: dict[str, Callable[[Case], str]] = {
    each.__name__: each
    for each in (
        openai_chat, openai_completions, openai_responses, anthropic_messages, langchain_openai, langchain_anthropic,
        litellm_openai, litellm_anthropic, llama_index,
    )
}  # fmt: skip


def main() -> None:
    """Ask all cases."""
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        case = json.loads(line)
        try:
            seen = {"text": CLIENTS[case["client"]](case)}
        except Exception as error:  # noqa: BLE001 - whatever a client raises is the result
            seen = {"error": type(error).__name__, "message": str(error)}
        print(json.dumps(seen), flush=True)


if __name__ == "__main__":
    main()
