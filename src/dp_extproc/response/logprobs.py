"""Merging of the prompt's log probabilities, which only the prefill leg's response has, into the client's response.

A decode engine of SGLang sends none of them (output_streamer.py). On /generate with ``return_logprob`` its response has
empty lists where an aggregated engine has those of the prompt, in streams in every event. The lists of the prefill leg
are put before the lists there, as the routers of SGLang do with one of them. (Measured with 0.5.23.)

Rules that live here and nowhere else:

1. Values are never decoded and encoded again, only joined, so numbers stay as the engine wrote them.
2. Text that cannot be parsed passes unchanged, and :attr:`problem` has the reason. A response is never broken, and is
   held for no longer than until its line, or the whole of it, is complete.
"""

import re
from typing import Final, Protocol

import msgspec
from msgspec import Raw

MOST_BYTES: Final = 64 << 20
"""Bytes of a response, or of one event, that are held. A prompt of 100000 tokens with 5 alternatives each is 20 MB."""

_LOST: Final = "output_token_ids_logprobs"
"""The only member about the first token that decode lacks too: its response has null there (decode.py)."""

_Members = dict[str, Raw]
_object: Final = msgspec.json.Decoder(_Members)
_objects: Final = msgspec.json.Decoder(list[Raw])
_index: Final = msgspec.json.Decoder(int)
_UNREADABLE: Final = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)


class LegText:
    """The text of the prefill leg's response. Nothing of it is kept if it is larger than what can be merged."""

    __slots__ = ("_chunks", "_size", "is_complete")

    def __init__(self) -> None:
        self._chunks: list[bytes] = []
        self._size = 0
        self.is_complete = False
        """Whether no more of the text will come."""

    def take(self, chunk: bytes, *, end_of_stream: bool) -> None:
        """Take in a piece of the text."""
        self._size += len(chunk)
        if self._size > MOST_BYTES:
            self._chunks.clear()
        else:
            self._chunks.append(chunk)
        self.is_complete = self.is_complete or end_of_stream

    def read(self) -> bytes:
        """Give the whole text; nothing if it is not complete, or too large."""
        return b"".join(self._chunks) if self.is_complete and self._size <= MOST_BYTES else b""


PromptLogprobs = tuple[_Members, ...]
"""Log probabilities of the prompt, or of each prompt of a batch: members of ``meta_info`` by name."""


def read_prefill(response: bytes) -> PromptLogprobs | None:
    """Read the prefill leg's response to a request for log probabilities; None if it cannot be parsed."""
    try:
        found = [_object.decode(each) for each in _objects_of(response)]
        by_index = {_index.decode(each.get("index", Raw(b"%d" % place))): each for place, each in enumerate(found)}
        metas = [_object.decode(each["meta_info"]) for _, each in sorted(by_index.items())]
    except (*_UNREADABLE, KeyError):
        return None
    return tuple({key: raw for key, raw in meta.items() if _is_of_prompt(key) or key == _LOST} for meta in metas)


def _objects_of(response: bytes) -> list[Raw]:
    """Split a response into those of its prompts. Streams of prefill have one event for each prompt (prefill.py)."""
    if response.startswith(b"data:"):
        lines = (line.removeprefix(b"data:").strip() for line in response.splitlines() if line.startswith(b"data:"))
        return [Raw(line) for line in lines if line != b"[DONE]"]
    return _objects.decode(response) if response.lstrip()[:1] == b"[" else [Raw(response)]


class Merger(Protocol):
    """Takes bytes of a response, and gives bytes of the merged response."""

    problem: str | None
    """The reason why the response, or a part of it, was passed on unchanged."""

    def feed(self, data: bytes, *, end_of_stream: bool) -> bytes:
        """Take in a piece of the response, and give what can be passed on."""
        ...


class WholeMerger:
    """Merges a response that is one JSON text."""

    __slots__ = ("_held", "_most", "_prompts", "_size", "problem")

    def __init__(self, prompts: PromptLogprobs, most: int = MOST_BYTES) -> None:
        self._prompts = prompts
        self._most = most
        self._held: list[bytes] = []
        self._size = 0
        self.problem: str | None = None

    def feed(self, data: bytes, *, end_of_stream: bool) -> bytes:
        if self.problem is not None:
            return data
        self._held.append(data)
        self._size += len(data)
        if self._size > self._most:
            self.problem = "the answer is too large"
        elif not end_of_stream:
            return b""
        response = b"".join(self._held)
        self._held = []
        return response if self.problem is not None else self._merge(response)

    def _merge(self, response: bytes) -> bytes:
        try:
            if response.lstrip()[:1] != b"[":
                found = _object.decode(response)
                (prompt,) = self._prompts
                return _merge_object(found, prompt)
            responses = _objects.decode(response)
            pairs = zip(responses, self._prompts, strict=True)
            return b"[" + b",".join(_merge_object(_object.decode(each), prompt) for each, prompt in pairs) + b"]"
        except _UNREADABLE:
            self.problem = "the answer cannot be read"
        except ValueError:
            self.problem = "the legs' answers are not of the same number of prompts"
        return response


_MAY_MERGE: Final = re.compile(rb"^data:[ \t\r\f\v]*\{", re.MULTILINE)
"""The start of a line that may have log probabilities: JSON behind the name of the field."""


class StreamMerger:
    """Merges a response that is a stream of server-sent events, line by line."""

    __slots__ = ("_line", "_most", "_passing", "_prompts", "_size", "problem")

    def __init__(self, prompts: PromptLogprobs, most: int = MOST_BYTES) -> None:
        self._prompts = prompts
        self._most = most
        self._line: list[bytes] = []
        self._size = 0
        self._passing = False
        """Whether the rest of a line passes, because it was too long."""
        self.problem: str | None = None

    def feed(self, data: bytes, *, end_of_stream: bool) -> bytes:
        merged: list[bytes] = []
        rest, line_feed, more = data.partition(b"\n")
        if line_feed:
            merged.append(self._end(rest) + b"\n")
            # Line by line, a MiB of empty lines would block the event loop for most of a second.
            at = 0
            for found in _MAY_MERGE.finditer(more):
                end = more.find(b"\n", found.start())
                if end < 0:
                    break
                merged += (more[at : found.start()], self._merge(more[found.start() : end]), b"\n")
                at = end + 1
            passed = more.rfind(b"\n") + 1
            merged.append(more[at:passed])
            rest = more[passed:]
        if end_of_stream:
            merged.append(self._end(rest))
        elif self._passing:
            merged.append(rest)
        elif rest:
            self._line.append(rest)
            self._size += len(rest)
            if self._size > self._most:
                self.problem, self._passing = "an event is too large", True
                merged.append(self._take())
        return b"".join(merged)

    def _take(self) -> bytes:
        held = b"".join(self._line)
        self._line, self._size = [], 0
        return held

    def _end(self, part: bytes) -> bytes:
        """Complete a line."""
        if self._passing:
            self._passing = False
            return part
        return self._merge(self._take() + part)

    def _merge(self, line: bytes) -> bytes:
        name, colon, data = line.partition(b":")
        if name != b"data" or not data.lstrip().startswith(b"{"):  # [DONE], the empty line behind each event
            return line
        try:
            event = _object.decode(data)
            if "meta_info" not in event:  # an error
                return line
            index = _index.decode(event["index"]) if "index" in event else 0  # only events of batches have it
            merged = _merge_object(event, self._prompts[index])
        except _UNREADABLE:
            self.problem = "an event cannot be read"
            return line
        except IndexError:
            self.problem = "an event is of a prompt that prefill has not told of"
            return line
        return name + colon + b" " + merged + (b"\r" if data.endswith(b"\r") else b"")


def make_merger(prefill: bytes, *, streaming: bool) -> Merger:
    """Make the merger for a response.

    Args:
        prefill: The prefill leg's response.
        streaming: Whether the client's response is a stream of server-sent events.
    """
    prompts = read_prefill(prefill)
    if prompts is not None:
        return StreamMerger(prompts) if streaming else WholeMerger(prompts)
    merger = WholeMerger(())
    merger.problem = "the prefill leg's answer did not come in time, or cannot be read"  # so it passes everything
    return merger


def _merge_object(response: _Members, prompt: _Members) -> bytes:
    """Merge the response to one prompt.

    Raises:
        msgspec.DecodeError: The ``meta_info`` of the response is no object.
    """
    if "meta_info" in response:
        meta = _object.decode(response["meta_info"])
        merged = {key: _put_before(value, meta.get(key)) for key, value in prompt.items() if _is_of_prompt(key)}
        if (first := prompt.get(_LOST)) is not None and (rest := meta.get(_LOST)) is not None:
            merged[_LOST] = _fill_first_token(first, rest)
        response["meta_info"] = Raw(msgspec.json.encode(meta | merged))
    return msgspec.json.encode(response)


def _put_before(first: Raw, second: Raw | None) -> Raw:
    """Join two lists. Of other values the first one counts, because decode has null or nothing there."""
    head, tail = bytes(first).strip(), bytes(second or b"").strip()
    if not (head.startswith(b"[") and tail.startswith(b"[")):
        return first if head != b"null" or second is None else second
    parts = [part for part in (head[1:-1].strip(), tail[1:-1].strip()) if part]
    return Raw(b"[" + b",".join(parts) + b"]")


def _fill_first_token(first: Raw, rest: Raw) -> Raw:
    """Put in the first token's value, which prefill has computed and decode lacks."""
    head, tail = bytes(first).strip(), bytes(rest).strip()
    if head.startswith(b"[") and tail.startswith(b"[null"):
        return Raw(b"[" + head[1:-1] + tail.removeprefix(b"[null"))
    return rest


def _is_of_prompt(key: str) -> bool:
    """Return whether a member is of the prompt: input_token_logprobs, input_top_logprobs, also in the flat form."""
    return key.startswith("input_") and "logprobs" in key
