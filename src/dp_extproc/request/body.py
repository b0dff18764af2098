"""Reads a request body once: what scheduling and rewriting need of it, or the refusal.

A body that does not pass through the service is estimated by its length.
"""

import re
from typing import Final

import msgspec

from dp_extproc.request.client_ids import ClientIds, read_client_ids
from dp_extproc.request.invalid_json import explain_invalid_json
from dp_extproc.request.lenient import as_bool, as_integer
from dp_extproc.request.members import MOST_MEMBERS, JsonObject, TooManyMembersError
from dp_extproc.request.own_faults import find_fault
from dp_extproc.request.path import Api
from dp_extproc.request.prompt import Prompt, PromptError, measure
from dp_extproc.request.prompt_parts import PromptPart, refuse_parts, wanted_of_prefill
from dp_extproc.request.rejection import Reason, Rejection
from dp_extproc.request.shapes import LARGEST_ID, SHAPES, Body, Generate, Messages, OpenAIBody
from dp_extproc.request.token_ids import find_invalid_ids

ROUTED_RANK_KEY: Final = "routed_dp_rank"
PREFILL_RANK_KEY: Final = "disagg_prefill_dp_rank"
OLD_RANK_KEY: Final = "data_parallel_rank"
"""The former key of the routed rank, deprecated in SGLang from 0.5.10 on."""
_OFF: Final = frozenset({b"null", b"false"})

MAX_BATCH: Final = 4096
"""Bounds the prompts of one request: a header contains the preamble of the prefill leg, with a request id for each."""
MAX_SAMPLES: Final = 4096
"""Bounds the answers to one prompt, at 32 times what OpenAI takes: any larger number would falsify the load."""

MOST_MARKS: Final = 2_000_000
"""Bounds the braces, brackets and quotes of a body, at as many as four megabytes of JSON have that a prompt quotes.

Every object, list and string takes a hundred bytes of memory, and time in which other requests wait. So a body of
nothing else is refused.
"""

_UNKNOWN_BYTES: Final = 4096
"""The bytes that a body of unknown length counts as: about a thousand tokens, an ordinary prompt."""
_EMPTY: Final = JsonObject(b"{}")
_EXPECTED: Final = re.compile(r"Expected `(?P<wanted>[^`]+)`, got `(?P<given>[^`]+)`")
_TYPES: Final = {
    "int": "an integer",
    "float": "a number",
    "str": "a string",
    "bool": "true or false",
    "array": "a list",
    "object": "an object",
}
"""The types that msgspec names, as JSON calls them."""
_TOO_DEEP: Final = Rejection(
    400, Reason.INVALID_JSON, "the request body is nested too deeply; send fewer lists within lists"
)

_integer: Final[msgspec.json.Decoder[int | None]] = msgspec.json.Decoder(int | None)
_decoders: Final = {api: [msgspec.json.Decoder(shape) for shape in shapes] for api, shapes in SHAPES.items()}

_PLACE: Final = re.compile(r" - at `\$\.?(?P<param>\w*)[^`]*`$")
"""The end of a message of msgspec, with the place of the wrong type."""
_OUT_OF_RANGE: Final = re.compile(r"Expected `int` [<>]= .* - at `\$\.(?P<place>[^`]*)`$")
"""The message of msgspec for a number that is out of range; only token ids have a range."""


class InferenceRequest(msgspec.Struct, frozen=True):
    """What scheduling and rewriting need of a request."""

    api: Api
    body: JsonObject
    model: str | None
    stream: bool | None
    """Whether the client asked for a stream of events; None if the body was not read."""
    prompt: Prompt
    samples: int
    """The answers to each prompt (``n``); the most of any prompt of a batch."""
    routed_rank_pin: int | None = None
    """The rank of the endpoint that answers the client, if the client asked for one."""
    prefill_rank_pin: int | None = None
    """The rank of the prefill endpoint, if the client asked for one."""
    priority: int = 0
    """Requests of greater priority are served first."""
    is_read: bool = True
    """Whether the body was read; see :func:`unread_request`."""

    @property
    def client_ids(self) -> ClientIds | None:
        """The ids that the client has given; None if it has given none."""
        return read_client_ids(self.api, self.body.values, self.prompt.batch)

    @property
    def prompt_part(self) -> PromptPart | None:
        """What the prefill leg's response has for the client's."""
        wanted = wanted_of_prefill(self.api, self.body.values)
        return None if wanted is None else wanted.part


def read_body(api: Api, text: bytes) -> InferenceRequest | Rejection:
    """Read a whole request body, of the API that the path names."""
    body = _read_object(text)
    if isinstance(body, Rejection):
        return body
    try:
        fields = _decode(api, text)
        prompt = measure(fields)
        invalid = find_invalid_ids(fields, api, body.values)
    except msgspec.ValidationError as error:
        return _wrong_type(str(error))
    except msgspec.DecodeError as error:  # in a value that was skipped before
        return explain_invalid_json(text, error)
    except RecursionError:
        return _TOO_DEEP
    except PromptError as error:
        reason = Reason.MISSING_FIELD if error.missing else Reason.WRONG_TYPE
        return Rejection(400, reason, str(error), param=error.param)
    counts = _sample_counts(fields)
    if (refusal := _refuse_values(fields, body, prompt, invalid, counts)) is not None:
        return refusal
    values = body.values
    return InferenceRequest(
        api=api,
        body=body,
        model=fields.model if isinstance(fields.model, str) else None,
        stream=as_bool(fields.stream),
        prompt=prompt,
        samples=max(counts) or 1,
        routed_rank_pin=_pin(values, ROUTED_RANK_KEY if ROUTED_RANK_KEY in values else OLD_RANK_KEY),
        prefill_rank_pin=_pin(values, PREFILL_RANK_KEY),
        priority=0 if isinstance(fields, Messages) else as_integer(fields.priority) or 0,
    )


def _refuse_values(
    fields: Body, body: JsonObject, prompt: Prompt, invalid_ids: str | None, counts: list[int]
) -> Rejection | None:
    """Refuse values that would fail or end an engine, or falsify its load."""
    if invalid_ids is not None:
        return _invalid_ids(invalid_ids, invalid_ids)
    if isinstance(fields, Generate) and (fault := find_fault(fields, body.values)) is not None:
        return Rejection(400, Reason.WRONG_TYPE, f"{fault.message}; the engine would fail at it", param=fault.param)
    if prompt.batch is not None and prompt.batch > MAX_BATCH:
        return _unsupported(f"a batch of {prompt.batch} prompts is too large; send at most {MAX_BATCH} in one request")
    for count in counts:
        if not 0 <= count <= MAX_SAMPLES:
            return _unsupported(f"n={str(count)[:20]} is not valid; ask for 1 to {MAX_SAMPLES} answers", "n")
    return None


def unread_request(api: Api, length: int | None) -> InferenceRequest:
    """Estimate a request whose body does not pass through the service.

    Its length in bytes, by ``content-length`` if that is known, counts as prompt.
    """
    prompt = Prompt(_UNKNOWN_BYTES if length is None else length, 0, None)
    return InferenceRequest(api=api, body=_EMPTY, model=None, stream=None, prompt=prompt, samples=1, is_read=False)


def refuse_disaggregated(request: InferenceRequest, *, sees_answer: bool = True) -> Rejection | None:
    """Refuse what cannot be done when prefill and decode run on different engines, with the way around it.

    *sees_answer* is whether the body of the response passes through the service, and can be changed.
    """
    if request.samples > 1:
        # Every version clones one bootstrap room for all samples (tokenizer_manager.py): hangs or wrong answers.
        message = f"n={request.samples} does not work with prefill/decode disaggregation; send separate requests"
        return _unsupported(message, "n")
    if (refusal := refuse_parts(request.api, request.body.values, sees_answer=sees_answer)) is not None:
        return refusal
    if request.api is Api.RESPONSES:
        values = request.body.values
        for param, remedy in (
            ("previous_response_id", "send the conversation in input"),  # only the engine that answered has it stored
            ("background", "leave it out or send false"),  # prefill would answer before it has run
        ):
            if param in values and bytes(values[param]) not in _OFF:
                return _unsupported(f"{param} does not work with prefill/decode disaggregation; {remedy}", param)
    return None


def _unsupported(message: str, param: str | None = None) -> Rejection:
    return Rejection(400, Reason.UNSUPPORTED_VALUE, message, param)


def _read_object(text: bytes) -> JsonObject | Rejection:
    if not text or text.isspace():
        return Rejection(400, Reason.EMPTY_BODY, "the request body is empty; send a JSON object")
    if len(text) > MOST_MARKS and sum(map(text.count, (b"{", b"[", b'"'))) > MOST_MARKS:
        most = f"the request body has more than {MOST_MARKS} braces, brackets and quotes"
        return _unsupported(f"{most}; send fewer objects, lists and strings")
    try:
        return JsonObject(text)
    except msgspec.ValidationError:
        return Rejection(400, Reason.NOT_AN_OBJECT, 'the request body must be a JSON object, such as {"model": ...}')
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        return explain_invalid_json(text, error)
    except RecursionError:
        return _TOO_DEEP
    except TooManyMembersError:
        return _unsupported(f"the request body has more than {MOST_MEMBERS} members; send those that are known")


def _decode(api: Api, text: bytes) -> Body:
    """Read the fields by the first shape that fits, or report why the last one does not."""
    first, *others = _decoders[api]
    try:
        return first.decode(text)
    except msgspec.ValidationError:
        for decoder in others:
            return decoder.decode(text)
        raise


def _invalid_ids(place: str, param: str) -> Rejection:
    return _unsupported(f"{place} is not valid: token ids are whole numbers from 0 to {LARGEST_ID}", param)


def _wrong_type(problem: str) -> Rejection:
    if (outside := _OUT_OF_RANGE.match(problem)) is not None:
        place = outside["place"]
        return _invalid_ids(place, place.partition("[")[0])
    found = _PLACE.search(problem)
    param = found["param"] if found else ""
    message = f"{param or 'the body'} has a wrong type: {_in_words(_PLACE.sub('', problem))}"
    return Rejection(400, Reason.WRONG_TYPE, message, param=param or None)


def _in_words(problem: str) -> str:
    """Return a problem of msgspec, such as "Expected `int | null`, got `str`", without the names of types in Python."""
    if (found := _EXPECTED.fullmatch(problem)) is None:
        return f"{problem[:1].lower()}{problem[1:]}"
    wanted, given = (
        " or ".join(_TYPES.get(name, name) for name in found[group].split(" | ")) for group in ("wanted", "given")
    )
    return f"it must be {wanted}, not {given}"


def _sample_counts(fields: Body) -> list[int]:
    """Return the number of answers of each prompt that has one. SGLang reads 0 as 1."""
    if isinstance(fields, Generate):
        return [1, *(as_integer(each.n) or 1 for each in fields.samplings)]
    count = as_integer(fields.n) if isinstance(fields, OpenAIBody) else None
    return [1 if count is None else count]


def _pin(values: dict[str, msgspec.Raw], param: str) -> int | None:
    """Read the rank that a client asked for. One that is no integer is ignored, like one that is out of range."""
    raw = values.get(param)
    if raw is None:
        return None
    try:
        return _integer.decode(raw)
    except msgspec.DecodeError:
        return None
