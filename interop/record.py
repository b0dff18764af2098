"""Record both legs' responses to requests for log probabilities as files, for tests without SGLang."""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

import httpx

from interop.servers import RealEngine

ROOM: Final = 7_000_000_000_000
PROMPT: Final = "Say yes."


def _requests() -> Iterator[tuple[str, dict[str, Any]]]:
    sampling = {"temperature": 0, "max_new_tokens": 4, "ignore_eos": True}
    everything = {
        "return_logprob": True, "logprob_start_len": 0, "top_logprobs_num": 2, "token_ids_logprob": [10, 20],
        "return_text_in_logprobs": False, "sampling_params": sampling,
    }  # fmt: skip
    for stream in (False, True):
        kind = "stream" if stream else "whole"
        yield f"{kind}", {"text": PROMPT, "stream": stream, **everything}
        yield f"{kind}-batch", {"text": [PROMPT, "No."], "stream": stream, **everything}
        yield (
            f"{kind}-answer-only",
            {"text": PROMPT, "stream": stream, "return_logprob": True, "sampling_params": sampling},
        )


def record_logprobs(client: httpx.Client, prefill: RealEngine, decode: RealEngine, folder: Path) -> None:
    """Send both legs directly, as the service would, and write each response."""
    folder.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(1) as pool:
        for number, (name, body) in enumerate(_requests()):
            room = ROOM + 10 * number  # even, so that the next one is free for the second prompt of a batch
            meeting = {
                "bootstrap_host": "127.0.0.1",
                "bootstrap_port": prefill.bootstrap_port,
                "bootstrap_room": [room, room + 2] if isinstance(body["text"], list) else room,
                "routed_dp_rank": 0,
                "disagg_prefill_dp_rank": 0,
            }
            later = pool.submit(client.post, f"{prefill.url}/generate", json={**body, **meeting, "stream": False})
            answer = client.post(f"{decode.url}/generate", json={**body, **meeting})
            legs = {"prefill": later.result().text, "decode": answer.text}
            (folder / f"{name}.json").write_text(json.dumps({"request": body, **legs}, indent=1, ensure_ascii=False))
