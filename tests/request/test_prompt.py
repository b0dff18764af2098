"""The size of a prompt is measured in every form that the APIs take."""

import json
from typing import Any

import pytest

from dp_extproc.estimators.token_ratio import TokenRatio
from dp_extproc.request.body import InferenceRequest, read_body
from dp_extproc.request.media import MEDIA_TOKENS
from dp_extproc.request.path import Api
from dp_extproc.request.prompt import Prompt


def read(api: Api, body: dict[str, Any]) -> InferenceRequest:
    request = read_body(api, json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode())
    assert isinstance(request, InferenceRequest), request
    return request


BASE64 = "iVBORw0KGgo" * 20_000
IMAGE_URL = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{BASE64}"}}
ANTHROPIC_IMAGE = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": BASE64}}
TEXT = {"type": "text", "text": "abcd"}
CALLS = [{"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}]
CALLS_LENGTH = len(json.dumps(CALLS, separators=(",", ":")))
TOOLS = [{"type": "function", "name": "f", "parameters": {}}]
TOOLS_LENGTH = len(json.dumps(TOOLS, separators=(",", ":")))


def user(content: Any, **more: Any) -> dict[str, Any]:
    return {"role": "user", "content": content, **more}


C, G, H, M, R = Api.COMPLETIONS, Api.GENERATE, Api.CHAT, Api.MESSAGES, Api.RESPONSES
FORMS: dict[str, tuple[Api, dict[str, Any], Prompt]] = {
    "generate-text": (G, {"text": "abcde"}, Prompt(5, 0, None)),
    "generate-empty-text": (G, {"text": ""}, Prompt(0, 0, None)),
    "generate-texts": (G, {"text": ["abc", "de"]}, Prompt(5, 0, 2)),
    "generate-list-of-one-text": (G, {"text": ["abc"]}, Prompt(3, 0, 1)),
    "generate-ids": (G, {"input_ids": [1, 2, 3]}, Prompt(0, 3, None)),
    "generate-batch-of-ids": (G, {"input_ids": [[1, 2, 3], [4], []]}, Prompt(0, 4, 3)),
    "generate-list-of-one-id-list": (G, {"input_ids": [[1, 2]]}, Prompt(0, 2, 1)),
    "generate-embeds": (G, {"input_embeds": [[0.5, 1], [0.5, 1], [2, 3]]}, Prompt(0, 3, None)),
    "generate-batch-of-embeds": (G, {"input_embeds": [[[0.5, 1]], [[1, 2], [3, 4]]]}, Prompt(0, 3, 2)),
    "generate-text-and-ids": (G, {"text": "x" * 100, "input_ids": [7, 8]}, Prompt(0, 2, None)),
    "generate-images": (
        G, {"text": "x", "image_data": ["https://a/b.png"] * 2}, Prompt(1, 2 * MEDIA_TOKENS, None, has_media=True)
    ),
    "generate-images-of-a-batch": (
        G, {"text": ["x", "y"], "image_data": [["https://a/b.png"], None]}, Prompt(2, MEDIA_TOKENS, 2, has_media=True)
    ),
    "generate-null-text-and-ids": (G, {"text": None, "input_ids": [7]}, Prompt(0, 1, None)),
    "completions-text": (C, {"prompt": "abcde"}, Prompt(5, 0, None)),
    "completions-texts": (C, {"prompt": ["a", "b", "c"]}, Prompt(3, 0, 3)),
    "completions-ids": (C, {"prompt": [1, 2]}, Prompt(0, 2, None)),
    "completions-batch-of-ids": (C, {"prompt": [[1, 2], [3]]}, Prompt(0, 3, 2)),
    "bytes-not-characters": (C, {"prompt": "é漢🦊"}, Prompt(2 + 3 + 4, 0, None)),
    "chat-text": (H, {"messages": [user("abc"), user("de")]}, Prompt(5, 0, None)),
    "chat-no-messages": (H, {"messages": []}, Prompt(0, 0, None)),
    "chat-parts": (H, {"messages": [user([TEXT, TEXT])]}, Prompt(8, 0, None)),
    "chat-image-by-data": (H, {"messages": [user([TEXT, IMAGE_URL])]}, Prompt(4, MEDIA_TOKENS, None, has_media=True)),
    "chat-audio": (
        H,
        {"messages": [user([{"type": "input_audio", "input_audio": {"data": BASE64, "format": "wav"}}, TEXT])]},
        Prompt(4, 257, None, has_media=True),
    ),
    "chat-tool-calls": (
        H,
        {"messages": [{"role": "assistant", "content": None, "tool_calls": CALLS}, user("ab")]},
        Prompt(CALLS_LENGTH + 2, 0, None),
    ),
    "chat-reasoning": (H, {"messages": [user("ab", reasoning_content="cde")]}, Prompt(5, 0, None)),
    "chat-tools": (H, {"messages": [user("ab")], "tools": TOOLS}, Prompt(2 + TOOLS_LENGTH, 0, None)),
    "chat-content-of-unknown-form": (
        H,
        {"messages": [user({"a": ["bcd", 1, None]})]},
        Prompt(len("user") + len("bcd"), 0, None),
    ),
    "chat-image-beside-an-unknown-form": (
        H,
        {"messages": [{"content": {"a": "bc"}}, {"content": [IMAGE_URL]}]},
        Prompt(len("bc") + len("image_url"), 0, None),
    ),
    "chat-image-data-beside-an-unknown-form": (
        H,
        {"messages": [{"content": {"a": "bc"}}, {"content": [{"source": {"data": BASE64}}]}]},
        Prompt(len("bc"), 0, None),
    ),
    "messages-text": (M, {"messages": [user("abc")], "max_tokens": 1}, Prompt(3, 0, None)),
    "messages-system-text": (M, {"system": "12345", "messages": [user("abc")]}, Prompt(8, 0, None)),
    "messages-system-blocks": (M, {"system": [TEXT, TEXT], "messages": [user("abc")]}, Prompt(11, 0, None)),
    "messages-image": (M, {"messages": [user([ANTHROPIC_IMAGE, TEXT])]}, Prompt(4, MEDIA_TOKENS, None, has_media=True)),
    "messages-tool-use": (
        M,
        {"messages": [user([{"type": "tool_use", "id": "t", "name": "f", "input": {"a": 1}}])]},
        Prompt(len('{"a":1}'), 0, None),
    ),
    "messages-tool-result-text": (
        M,
        {"messages": [user([{"type": "tool_result", "tool_use_id": "t", "content": "abc"}])]},
        Prompt(len('"abc"'), 0, None),
    ),
    "messages-tool-result-with-a-picture": (
        M,
        {"messages": [user([{"type": "tool_result", "tool_use_id": "t", "content": [TEXT, ANTHROPIC_IMAGE]}])]},
        Prompt(4, MEDIA_TOKENS, None, has_media=True),
    ),
    "messages-tool-result-of-unknown-form": (
        M,
        {"messages": [user([{"type": "tool_result", "tool_use_id": "t", "content": [5, 6]}])]},
        Prompt(len("[5,6]"), 0, None),
    ),
    "messages-thinking": (M, {"messages": [user([{"type": "thinking", "thinking": "abc"}])]}, Prompt(3, 0, None)),
    "responses-text": (R, {"input": "abc"}, Prompt(3, 0, None)),
    "responses-instructions": (R, {"input": "abc", "instructions": "de"}, Prompt(5, 0, None)),
    "responses-items": (
        R,
        {"input": [user("abc"), user([{"type": "input_text", "text": "de"}])]},
        Prompt(5, 0, None),
    ),
    "responses-image": (
        R,
        {"input": [user([{"type": "input_image", "image_url": f"data:image/png;base64,{BASE64}"}])]},
        Prompt(0, MEDIA_TOKENS, None, has_media=True),
    ),
    "responses-call-and-its-output": (
        R,
        {"input": [
            {"type": "function_call", "call_id": "c", "name": "f", "arguments": '{"a":1}'},
            {"type": "function_call_output", "call_id": "c", "output": "abc"},
        ]},
        Prompt(len('{"a":1}') + len('"abc"'), 0, None),
    ),
    "responses-output-with-a-picture": (
        R,
        {"input": [
            {
                "type": "function_call_output",
                "call_id": "c",
                "output": [{"type": "input_image", "image_url": f"data:image/png;base64,{BASE64}"}],
            },
        ]},
        Prompt(0, MEDIA_TOKENS, None, has_media=True),
    ),
}  # fmt: skip


@pytest.mark.parametrize(("api", "body", "prompt"), FORMS.values(), ids=FORMS)
def test_prompt_is_measured(api: Api, body: dict[str, Any], prompt: Prompt) -> None:
    """Texts count in UTF-8 bytes, token ids one by one, media by a fixed count; lists of prompts have their number."""
    assert read(api, body).prompt == prompt


SANE = {
    # text, least and most tokens that usual byte-pair tokenizers make of it
    "english": ("The quick brown fox jumps over the lazy dog. " * 100, 700, 1500),
    "chinese": ("人工智能正在改变世界。" * 200, 1100, 2300),
    "japanese": ("人工知能は世界を変えています。" * 200, 1400, 3100),
    "code": ("for (int i = 0; i < n; ++i) { sum += a[i]; }\n" * 100, 900, 2600),
    "emoji": ("🦊🐍🚀" * 200, 500, 1900),
}


@pytest.mark.parametrize(("text", "least", "most"), SANE.values(), ids=SANE)
def test_first_estimate_is_of_the_right_magnitude(text: str, least: int, most: int) -> None:
    """No script counts as many times more or fewer tokens than it has."""
    estimate = TokenRatio().estimate(read(Api.CHAT, {"messages": [user(text)]}).prompt)
    assert least <= estimate <= most


def test_token_ids_are_counted_exactly() -> None:
    """A prompt of token ids has exactly as many tokens."""
    assert TokenRatio().estimate(read(Api.GENERATE, {"input_ids": list(range(12_345))}).prompt) == 12_345
