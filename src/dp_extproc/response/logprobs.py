"""Log probabilities of the prompt, which only the prefill leg's answer has, put into the client's.

A decode server of SGLang sends none of them (output_streamer.py): on /generate with ``return_logprob`` its answer has
empty lists where a single server's has those of the prompt, in streams in every event. What the prefill leg tells is
put before what is there, as the routers of SGLang do with one of the lists. (Measured with 0.5.23.)

Rules that live here and nowhere else:

- Values are never read or written anew, only put together: numbers stay as the engine wrote them.
- What cannot be understood goes through as it is, and :attr:`problem` says so. An answer is never broken or held back
  for longer than until its line, or it, is complete.
"""

import re
from typing import Final, Protocol

import msgspec
from msgspec import Raw, Struct

MOST_BYTES: Final = 64 << 20
"""Of an answer, or of one event, that is held. A prompt of 100000 tokens with 5 alternatives each is 20 MB."""

_LOST: Final = "output_token_ids_logprobs"
"""Also in prefill's answer only, but of the first token instead of the prompt: decode has null for it (decode.py)."""

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


class PromptLogprobs(Struct, frozen=True):
    """What the prefill leg tells of each prompt: members of ``meta_info`` by name."""

    prompts: tuple[_Members, ...]
    """One, or as many as the batch has."""


def read_prefill(answer: bytes) -> PromptLogprobs | None:
    """Read the prefill leg's answer to a request for log probabilities, also a streamed one.

    Returns:
        None if it cannot be read.
    """
    try:
        found = [_object.decode(each) for each in _objects_of(answer)]
        by_index = {_index.decode(each.get("index", Raw(b"%d" % place))): each for place, each in enumerate(found)}
        metas = [_object.decode(each["meta_info"]) for _, each in sorted(by_index.items())]
    except (*_UNREADABLE, KeyError):
        return None
    return PromptLogprobs(
        tuple({key: raw for key, raw in meta.items() if _is_of_prompt(key) or key == _LOST} for meta in metas)
    )


class Merger(Protocol):
    """Bytes of an answer in, bytes of the merged answer out."""

    problem: str | None
    """Why the answer, or a part of it, was passed on as it was."""

    def feed(self, data: bytes, *, end_of_stream: bool) -> bytes:
        """Take in what has come, and give what can go on."""
        ...


class WholeMerger:
    """Merges an answer that is one JSON text."""

    __slots__ = ("_held", "_known", "_most", "_size", "problem")

    def __init__(self, known: PromptLogprobs, most: int = MOST_BYTES) -> None:
        self._known = known
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
        answer = b"".join(self._held)
        self._held = []
        return answer if self.problem is not None else self._merge(answer)

    def _merge(self, answer: bytes) -> bytes:
        try:
            if answer.lstrip()[:1] != b"[":
                found = _object.decode(answer)
                (known,) = self._known.prompts
                return _merge_object(found, known)
            several = _objects.decode(answer)
            pairs = zip(several, self._known.prompts, strict=True)
            return b"[" + b",".join(_merge_object(_object.decode(each), known) for each, known in pairs) + b"]"
        except _UNREADABLE:
            self.problem = "the answer cannot be read"
        except ValueError:
            self.problem = "the legs' answers are not of the same number of prompts"
        return answer


_MAY_MERGE: Final = re.compile(rb"^data:[ \t\r\f\v]*\{", re.MULTILINE)
"""Where a line begins that may have log probabilities: JSON behind the field's name."""


class StreamMerger:
    """Merges an answer that is a stream of events, line by line."""

    __slots__ = ("_known", "_line", "_most", "_passing", "_size", "problem")

    def __init__(self, known: PromptLogprobs, most: int = MOST_BYTES) -> None:
        self._known = known
        self._most = most
        self._line: list[bytes] = []
        self._size = 0
        self._passing = False  # the rest of a line that was too long
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
            merged = _merge_object(event, self._known.prompts[index])
        except _UNREADABLE:
            self.problem = "an event cannot be read"
            return line
        except IndexError:
            self.problem = "an event is of a prompt that prefill has not told of"
            return line
        return name + colon + b" " + merged + (b"\r" if data.endswith(b"\r") else b"")


def _objects_of(answer: bytes) -> list[Raw]:
    """Take an answer apart into those for single prompts. Prefill's streams have one event for each (prefill.py)."""
    if answer.startswith(b"data:"):
        lines = (line.removeprefix(b"data:").strip() for line in answer.splitlines() if line.startswith(b"data:"))
        return [Raw(line) for line in lines if line != b"[DONE]"]
    return _objects.decode(answer) if answer.lstrip()[:1] == b"[" else [Raw(answer)]


class NoMerger:
    """Passes an answer on as it is."""

    __slots__ = ("problem",)

    def __init__(self, problem: str) -> None:
        self.problem: str | None = problem

    def feed(self, data: bytes, *, end_of_stream: bool) -> bytes:  # noqa: ARG002 - as the others
        return data


def make_merger(prefill: bytes, *, streaming: bool) -> Merger:
    """Make what the client's answer goes through.

    Args:
        prefill: The prefill leg's answer.
        streaming: Whether the client's is a stream of events.
    """
    known = read_prefill(prefill)
    if known is None:
        return NoMerger("the prefill leg's answer did not come in time, or cannot be read")
    return StreamMerger(known) if streaming else WholeMerger(known)


def _merge_object(answer: _Members, known: _Members) -> bytes:
    """Merge the answer for one prompt.

    Raises:
        msgspec.DecodeError: Its ``meta_info`` is no object.
    """
    if "meta_info" in answer:
        meta = _object.decode(answer["meta_info"])
        merged = {key: _put_before(value, meta.get(key)) for key, value in known.items() if _is_of_prompt(key)}
        if (first := known.get(_LOST)) is not None and (rest := meta.get(_LOST)) is not None:
            merged[_LOST] = _mend(first, rest)
        answer["meta_info"] = Raw(msgspec.json.encode(meta | merged))
    return msgspec.json.encode(answer)


def _put_before(first: Raw, second: Raw | None) -> Raw:
    """Put two lists together. Of anything else the first counts: in decode's answer it is null or missing."""
    head, tail = bytes(first).strip(), bytes(second or b"").strip()
    if not (head.startswith(b"[") and tail.startswith(b"[")):
        return first if head != b"null" or second is None else second
    parts = [part for part in (head[1:-1].strip(), tail[1:-1].strip()) if part]
    return Raw(b"[" + b",".join(parts) + b"]")


def _mend(first: Raw, rest: Raw) -> Raw:
    """Fill in what decode lacks of the first token, which prefill has made."""
    head, tail = bytes(first).strip(), bytes(rest).strip()
    if head.startswith(b"[") and tail.startswith(b"[null"):
        return Raw(b"[" + head[1:-1] + tail.removeprefix(b"[null"))
    return rest


def _is_of_prompt(key: str) -> bool:
    """Tell whether a member is about the prompt: input_token_logprobs, input_top_logprobs, also in their flat form."""
    return key.startswith("input_") and "logprobs" in key
