"""A request gets its targets, bootstrap room and bodies, for every release of an engine that differs."""

import json
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest

from dp_extproc import contract
from dp_extproc.config import HostPolicy, RankPolicy
from dp_extproc.engines.model import Kind, Role
from dp_extproc.request.path import Api
from dp_extproc.request.rejection import Reason, Rejection
from dp_extproc.scheduling.decision import Answer, Decision
from fleet_fixtures import Fleet, address_of, make_endpoint, make_facts

PREFILL, DECODE = make_facts(Role.PREFILL), make_facts(Role.DECODE)
CHAT = {"model": "any", "messages": [{"role": "user", "content": "hello"}], "stream": True}

PINNED = {**CHAT, "routed_dp_rank": 3, "disagg_prefill_dp_rank": 2}


def place(fleet: Fleet, body: dict[str, Any] | None = None, api: Api = Api.CHAT) -> Decision:
    decision = fleet.scheduler.place(api, json.dumps(body or CHAT).encode())
    assert isinstance(decision, Decision), decision
    return decision


def refuse(fleet: Fleet, body: dict[str, Any], api: Api = Api.CHAT) -> Rejection:
    refusal = fleet.scheduler.place(api, json.dumps(body).encode())
    assert isinstance(refusal, Rejection), refusal
    return refusal


def legs(decision: Decision) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the bodies of the prefill and the decode leg, the former made the way Envoy makes it."""
    headers = dict(decision.headers)
    assert decision.body is not None
    rest = decision.body[int(headers[contract.PREFIX_LENGTH]) :]
    return json.loads(headers[contract.PREFILL_PREFIX] + rest), json.loads(decision.body)


def test_bodies_of_both_legs_have_their_routing_fields() -> None:
    """Each leg has its rank, id and way of streaming, and both have one bootstrap room; the rest is unchanged."""
    fleet = Fleet(prefills=[PREFILL], decodes=[make_facts(Role.DECODE, ranks=8)])
    fleet.sample(make_endpoint(Role.PREFILL), [9, 9, 9, 1])
    fleet.sample(make_endpoint(Role.DECODE), [9, 9, 9, 9, 9, 1, 9, 9])
    decision = place(fleet, {**CHAT, "stream_options": {"include_usage": True}, "max_tokens": 5})
    prefill, decode = legs(decision)
    room = decode["bootstrap_room"]
    request_id = decode["rid"].removesuffix("d")
    shared = {
        "disagg_prefill_dp_rank": 3,
        "bootstrap_host": "10.0.0.1",
        "bootstrap_port": 8998,
        "bootstrap_room": room,
        "model": "any",
        "messages": CHAT["messages"],
        "max_tokens": 5,
    }

    assert prefill == {"routed_dp_rank": 3, "rid": f"{request_id}p", "stream": False, **shared}
    assert decode == {
        "routed_dp_rank": 5,
        "rid": f"{request_id}d",
        "stream": True,
        "stream_options": {"include_usage": True},
        **shared,
    }
    assert room % 4 == 3


def test_decision_has_headers_and_metadata() -> None:
    """Headers have both endpoints, the preamble of the prefill leg and the owner; the access log gets the pick."""
    fleet = Fleet(prefills=[PREFILL], decodes=[DECODE])
    fleet.sample(make_endpoint(Role.PREFILL), [9, 1, 9, 9])
    fleet.sample(make_endpoint(Role.DECODE), [9, 9, 1, 9])
    decision = place(fleet)
    headers = dict(decision.headers)

    assert headers[contract.PREFILL_HOST].decode() == address_of(make_endpoint(Role.PREFILL))
    assert headers[contract.DECODE_HOST].decode() == address_of(make_endpoint(Role.DECODE))
    assert headers[contract.OWNER] == b"127.0.0.1:9002"
    assert decision.in_flight is not None
    assert decision.in_flight.leg == headers[contract.LEG].decode()
    assert decision.metadata == {
        "model": "any",
        "pool": "*",
        "prefill_host": "10.0.0.1:31001",
        "prefill_rank": 1,
        "decode_host": "10.0.0.1:32001",
        "decode_rank": 2,
    }


@pytest.mark.parametrize("rank", list(RankPolicy))
@pytest.mark.parametrize("host", list(HostPolicy))
def test_every_combination_of_policies_places_a_request(host: HostPolicy, rank: RankPolicy) -> None:
    """The end of the request ends all of its reservations."""
    fleet = Fleet(prefills=[PREFILL] * 2, decodes=[DECODE] * 2, policy={"host": host.value, "dp_rank": rank.value})
    decisions = [place(fleet) for _ in range(20)]
    hosts = [fleet.endpoint(role, number) for role in (Role.PREFILL, Role.DECODE) for number in (1, 2)]
    in_flight = sum(each.requests for each in hosts)
    for decision in decisions:
        assert decision.in_flight is not None
        decision.in_flight.end(fleet.clock())

    assert in_flight == pytest.approx(40)
    assert [each.requests for each in hosts] == [0, 0, 0, 0]
    assert all(("decode_rank" in decision.metadata) == (rank is not RankPolicy.NONE) for decision in decisions)


def test_requests_spread_evenly_by_tokens() -> None:
    """Requests of one size fill all ranks of all endpoints alike, before any sample has one of them."""
    fleet = Fleet(prefills=[PREFILL] * 2, decodes=[DECODE] * 2)
    for _ in range(80):
        place(fleet)

    for role in (Role.PREFILL, Role.DECODE):
        picks = [rank.picks for number in (1, 2) for rank in fleet.endpoint(role, number).ranks]
        assert set(picks) <= {9, 10, 11}  # the very first one runs at once and weighs less


def test_long_prompt_is_balanced_by_short_ones() -> None:
    """A long prompt on one rank is balanced by many short ones on the other ranks."""
    fleet = Fleet(prefills=[PREFILL], decodes=[DECODE], policy={"affinity": {"prefixes": False}})
    place(fleet, {**CHAT, "messages": [{"role": "user", "content": "x" * 40_000}]})
    for _ in range(300):
        place(fleet, {**CHAT, "messages": [{"role": "user", "content": "x" * 400}]})
    tokens = [rank.tokens for rank in fleet.endpoint(Role.PREFILL).ranks]

    assert max(tokens) - min(tokens) <= 100
    picks = sorted(rank.picks for rank in fleet.endpoint(Role.PREFILL).ranks)
    assert picks[0] < 0.7 * picks[1]


def test_rooms_and_ids_never_repeat() -> None:
    """Every attempt has its own bootstrap room and ids, and every room leads to the rank."""
    fleet = Fleet(prefills=[PREFILL], decodes=[DECODE])
    bodies = [legs(place(fleet)) for _ in range(200)]
    rooms = [decode["bootstrap_room"] for _, decode in bodies]
    ids = [body["rid"] for pair in bodies for body in pair]

    assert len(set(rooms)) == 200
    assert len(set(ids)) == 400
    assert all(decode["bootstrap_room"] % 4 == prefill["routed_dp_rank"] for prefill, decode in bodies)


def test_batch_gets_a_room_and_an_id_for_each_prompt() -> None:
    """All rooms lead to the one prefill rank. No id is the start of another, as engines abort by the start of an id."""
    fleet = Fleet(prefills=[PREFILL], decodes=[DECODE])
    prefill, decode = legs(place(fleet, {"model": "any", "prompt": ["a"] * 12}, Api.COMPLETIONS))
    rooms = decode["bootstrap_room"]

    assert prefill["bootstrap_room"] == rooms
    assert len(set(rooms)) == 12
    assert {room % 4 for room in rooms} == {prefill["routed_dp_rank"]}
    assert len({*prefill["rid"], *decode["rid"]}) == 24
    ids = [*prefill["rid"], *decode["rid"]]
    assert not [(a, b) for a in ids for b in ids if a is not b and b.startswith(a)]


@pytest.mark.parametrize(
    ("version", "prefill_fields", "decode_fields"),
    [
        pytest.param((0, 5, 7), set(), set(), id="0.5.7"),
        pytest.param((0, 5, 9), set(), set(), id="0.5.9"),
        pytest.param((0, 5, 10), {"routed_dp_rank"}, {"routed_dp_rank"}, id="0.5.10"),
        pytest.param(
            (0, 5, 11),
            {"routed_dp_rank", "disagg_prefill_dp_rank"},
            {"routed_dp_rank", "disagg_prefill_dp_rank"},
            id="0.5.11",
        ),
        pytest.param(
            (0, 5, 23),
            {"routed_dp_rank", "disagg_prefill_dp_rank"},
            {"routed_dp_rank", "disagg_prefill_dp_rank"},
            id="0.5.23",
        ),
    ],
)
def test_rank_fields_follow_the_release(
    version: tuple[int, int, int], prefill_fields: set[str], decode_fields: set[str]
) -> None:
    """Each release gets the rank fields that it takes; the bootstrap room leads to the prefill rank in all of them."""
    fleet = Fleet(prefills=[make_facts(Role.PREFILL, version)], decodes=[make_facts(Role.DECODE, version)])
    for _ in range(20):
        decision = place(fleet)
        prefill, decode = legs(decision)

        fields = {"routed_dp_rank", "disagg_prefill_dp_rank", "data_parallel_rank"}
        assert prefill.keys() & fields == prefill_fields
        assert decode.keys() & fields == decode_fields
        assert decode["bootstrap_room"] % 4 == decision.metadata["prefill_rank"]
        if version == (0, 5, 7):  # both follow the room
            assert decode["bootstrap_room"] % 4 == decision.metadata["decode_rank"]
        if version == (0, 5, 9):  # decode goes by its own round robin
            assert "decode_rank" not in decision.metadata


def test_room_leads_to_both_ranks_where_it_alone_decides() -> None:
    """Before 0.5.8 both engines follow the room; the decode rank is the least loaded of those that it can lead to."""
    old = (0, 5, 7)
    fleet = Fleet(prefills=[make_facts(Role.PREFILL, old, 4)], decodes=[make_facts(Role.DECODE, old, 6)])
    fleet.sample(make_endpoint(Role.PREFILL), [9, 1, 9, 9])
    fleet.sample(make_endpoint(Role.DECODE), [1, 900, 1, 500, 1, 700])
    decision = place(fleet)
    room = json.loads(decision.body or b"")["bootstrap_room"]

    assert decision.metadata["decode_rank"] == 3
    assert (room % 4, room % 6) == (1, 3)


def test_plain_dp_prefill_of_old_releases_uses_rank_0() -> None:
    """From 0.5.11 to 0.5.15 every other rank of a plain-DP prefill engine fails its requests."""
    facts = make_facts(Role.PREFILL, (0, 5, 13), dp_attention=False)
    fleet = Fleet(prefills=[facts], decodes=[DECODE])

    assert {place(fleet).metadata["prefill_rank"] for _ in range(20)} == {0}


class TestRankOfTheEngine:
    """``dp_rank: none`` leaves the ranks to the engines."""

    def test_no_rank_is_in_the_bodies(self) -> None:
        """The room alone decides on prefill; that rank is known all the same, and decode needs it."""
        fleet = Fleet(prefills=[PREFILL], decodes=[DECODE], policy={"dp_rank": "none"})
        seen: Counter[int | str] = Counter()
        for _ in range(200):
            decision = place(fleet)
            prefill, decode = legs(decision)
            assert "routed_dp_rank" not in prefill
            assert "routed_dp_rank" not in decode
            assert prefill["disagg_prefill_dp_rank"] == decode["disagg_prefill_dp_rank"]
            assert decode["bootstrap_room"] % 4 == decode["disagg_prefill_dp_rank"]
            assert "decode_rank" not in decision.metadata
            seen[decision.metadata["prefill_rank"]] += 1

        assert sorted(seen) == [0, 1, 2, 3]

    def test_prefill_engine_that_balances_itself_gets_no_rank(self) -> None:
        """A round-robin prefill engine registers its own pick, which a rank in the body would contradict."""
        facts = make_facts(Role.PREFILL, method="round_robin")
        fleet = Fleet(prefills=[facts], decodes=[DECODE], policy={"dp_rank": "none"})
        prefill, decode = legs(place(fleet))

        assert not {"routed_dp_rank", "disagg_prefill_dp_rank"} & (prefill.keys() | decode.keys())

    def test_batch_stays_on_one_prefill_rank(self) -> None:
        """The whole body has one prefill rank, so all of its rooms lead to the same."""
        fleet = Fleet(prefills=[PREFILL], decodes=[DECODE], policy={"dp_rank": "none"})
        _, decode = legs(place(fleet, {"prompt": ["a"] * 9}, Api.COMPLETIONS))

        assert {room % 4 for room in decode["bootstrap_room"]} == {decode["disagg_prefill_dp_rank"]}


class TestClientRanks:
    """A rank that a client asks for is a pin only where the operator allows it."""

    def _fleet(self, policy: str) -> Fleet:
        fleet = Fleet(prefills=[PREFILL], decodes=[DECODE], policy={"client_dp_rank": policy})
        fleet.sample(make_endpoint(Role.PREFILL), [0, 9, 9, 9])
        fleet.sample(make_endpoint(Role.DECODE), [0, 9, 9, 9])
        return fleet

    @pytest.mark.parametrize(
        ("policy", "body", "ranks"),
        [
            pytest.param("replace", PINNED, (0, 0), id="replaced by default"),
            pytest.param("honour", PINNED, (2, 3), id="honoured"),
            pytest.param("honour", {**CHAT, "data_parallel_rank": 2}, (0, 2), id="old name"),
            pytest.param("honour", {**CHAT, "routed_dp_rank": 4}, (0, 0), id="out of range"),
            pytest.param("honour", {**CHAT, "routed_dp_rank": -1}, (0, 0), id="negative"),
            pytest.param("honour", {**CHAT, "routed_dp_rank": "3"}, (0, 0), id="not a number"),
            pytest.param("honour", {**CHAT, "routed_dp_rank": None}, (0, 0), id="null"),
        ],
    )
    def test_rank_of_a_client_is_honoured_if_allowed(
        self, policy: str, body: dict[str, Any], ranks: tuple[int, int]
    ) -> None:
        """A pin in range is obeyed on both legs and in the room; any other is replaced."""
        prefill, decode = legs(place(self._fleet(policy), body))

        assert (prefill["routed_dp_rank"], decode["routed_dp_rank"]) == ranks
        assert decode["disagg_prefill_dp_rank"] == ranks[0]
        assert decode["bootstrap_room"] % 4 == ranks[0]
        assert not {"data_parallel_rank"} & (prefill.keys() | decode.keys())

    def test_pin_picks_among_the_endpoints_that_have_the_rank(self) -> None:
        """A rank that only the larger endpoint has is picked there, whatever its load."""
        fleet = Fleet(
            prefills=[make_facts(Role.PREFILL, ranks=2), make_facts(Role.PREFILL, ranks=8)],
            decodes=[DECODE],
            policy={"client_dp_rank": "honour"},
        )
        fleet.sample(make_endpoint(Role.PREFILL, 2), [900] * 8)
        decision = place(fleet, {**CHAT, "disagg_prefill_dp_rank": 6})

        assert decision.metadata["prefill_host"] == "10.0.0.2:31002"
        assert decision.metadata["prefill_rank"] == 6


class TestAggregated:
    """An aggregated pool has one target for each request, and no mirror."""

    def test_aggregated_body_gets_only_the_rank(self) -> None:
        """Streaming, ids and all else stay; routing fields of the client go."""
        fleet = Fleet(workers=[make_facts(Role.WORKER)])
        fleet.sample(make_endpoint(Role.WORKER), [9, 9, 1, 9])
        decision = place(fleet, {**CHAT, "rid": "mine", "bootstrap_room": 7, "routed_dp_rank": 0})

        assert json.loads(decision.body or b"") == {"routed_dp_rank": 2, **CHAT, "rid": "mine"}
        assert decision.headers == ((contract.DECODE_HOST, b"10.0.0.1:33001"),)
        assert decision.metadata["decode_rank"] == 2

    @pytest.mark.parametrize(
        ("version", "api", "key"),
        [
            pytest.param((0, 5, 23), Api.GENERATE, "routed_dp_rank", id="0.5.23 generate"),
            pytest.param((0, 5, 9), Api.GENERATE, "data_parallel_rank", id="0.5.9 generate"),
            pytest.param((0, 5, 9), Api.CHAT, "data_parallel_rank", id="0.5.9 chat"),
            pytest.param((0, 5, 6), Api.CHAT, None, id="0.5.6 chat takes none"),
        ],
    )
    def test_aggregated_rank_follows_the_release(
        self, version: tuple[int, int, int], api: Api, key: str | None
    ) -> None:
        """Old releases have another name for the rank, or take none on a path; then the engine picks it."""
        fleet = Fleet(workers=[make_facts(Role.WORKER, version)])
        sent = {"text": "a"} if api is Api.GENERATE else CHAT
        body = json.loads(place(fleet, sent, api).body or b"")

        assert body.keys() - sent.keys() == ({key} if key else set())

    def test_several_samples_are_allowed_on_aggregated_endpoints(self) -> None:
        """N > 1 fails only between two engines."""
        fleet = Fleet(workers=[make_facts(Role.WORKER)])

        assert json.loads(place(fleet, {**CHAT, "n": 4}).body or b"")["n"] == 4


class TestRefusals:
    """A request that cannot be placed is refused with a reason, and leaves no reservation."""

    @pytest.mark.parametrize(
        ("api", "body", "param"),
        [
            pytest.param(Api.CHAT, {**CHAT, "n": 2}, "n", id="n of chat"),
            pytest.param(Api.GENERATE, {"text": "a", "sampling_params": {"n": 3}}, "n", id="n of generate"),
            pytest.param(
                Api.GENERATE, {"text": ["a", "b"], "sampling_params": [{}, {"n": 2}]}, "n", id="n within a batch"
            ),
            pytest.param(
                Api.RESPONSES,
                {"input": "a", "previous_response_id": "r"},
                "previous_response_id",
                id="previous response",
            ),
            pytest.param(Api.RESPONSES, {"input": "a", "background": True}, "background", id="background"),
        ],
    )
    def test_request_that_needs_one_engine_is_refused(self, api: Api, body: dict[str, Any], param: str) -> None:
        """These work on one engine only; a clear 400 is better than a hang."""
        fleet = Fleet(prefills=[PREFILL], decodes=[DECODE])
        refusal = refuse(fleet, body, api)

        assert (refusal.status, refusal.reason, refusal.param) == (400, Reason.UNSUPPORTED_VALUE, param)
        assert fleet.endpoint(Role.PREFILL).tokens == fleet.endpoint(Role.DECODE).tokens == 0

    def test_request_is_refused_before_any_engine_is_reached(self) -> None:
        """The client gets a time to try again."""
        fleet = Fleet(prefills=[PREFILL], decodes=[DECODE])
        fleet.load._by_role.clear()
        refusal = refuse(fleet, CHAT)

        assert (refusal.status, refusal.reason) == (503, Reason.NO_ENDPOINTS)
        assert ("retry-after", "1") in refusal.headers

    @pytest.mark.parametrize(
        ("version", "api", "served"),
        [
            pytest.param((0, 5, 19), Api.RESPONSES, False, id="responses on 0.5.19"),
            pytest.param((0, 5, 20), Api.RESPONSES, True, id="responses on 0.5.20"),
            pytest.param((0, 5, 21), Api.MESSAGES, False, id="messages on 0.5.21"),
            pytest.param((0, 5, 22), Api.MESSAGES, True, id="messages on 0.5.22"),
        ],
    )
    def test_path_that_would_end_an_old_engine_is_refused(
        self, version: tuple[int, int, int], api: Api, served: bool
    ) -> None:
        """A path whose handler drops the bootstrap room would end the process of a prefill engine."""
        fleet = Fleet(prefills=[make_facts(Role.PREFILL, version)], decodes=[make_facts(Role.DECODE, version)])
        outcome = fleet.scheduler.place(api, json.dumps({**CHAT, "input": "a"}).encode())

        if served:
            assert isinstance(outcome, Decision)
        else:
            assert isinstance(outcome, Rejection)
            assert (outcome.status, outcome.reason) == (400, Reason.ENGINE_TOO_OLD)
            assert ".".join(map(str, version)) in outcome.message

    def test_new_path_goes_to_the_new_engines_of_a_mixed_pool(self) -> None:
        """During an upgrade the path works on the engines that have it."""
        old, new = make_facts(Role.PREFILL, (0, 5, 19)), make_facts(Role.PREFILL)
        fleet = Fleet(prefills=[old, new], decodes=[DECODE])

        hosts = {place(fleet, {"input": "a"}, Api.RESPONSES).metadata["prefill_host"] for _ in range(20)}
        assert hosts == {"10.0.0.2:31002"}


class TestLookups:
    """Lookups are requests without a body."""

    def test_lookup_goes_to_any_decode_endpoint(self) -> None:
        """Such a request has no mirror and no reservations."""
        fleet = Fleet(prefills=[PREFILL], decodes=[DECODE] * 2)
        decisions = [fleet.scheduler.look_up() for _ in range(40)]

        assert all(isinstance(decision, Decision) and decision.in_flight is None for decision in decisions)
        hosts = {decision.headers for decision in decisions if isinstance(decision, Decision)}
        assert hosts == {((contract.DECODE_HOST, b"10.0.0.1:32001"),), ((contract.DECODE_HOST, b"10.0.0.2:32002"),)}

    def test_models_of_a_wildcard_pool_are_those_of_its_engines(self) -> None:
        """The wildcard is no model; what the engines report is."""
        answer = Fleet(prefills=[PREFILL], decodes=[DECODE]).scheduler.models("/v1/models")

        assert isinstance(answer, Answer)
        assert [card["id"] for card in json.loads(answer.body)["data"]] == ["served"]

    @pytest.mark.parametrize(("kind", "owner"), [(Kind.SGLANG, "sglang"), (Kind.VLLM, "vllm")])
    def test_owner_of_a_model_is_the_kind_of_its_engines(self, kind: Kind, owner: str) -> None:
        """Clients get the owner that the engines of the pool themselves report."""
        fleet = Fleet(workers=[replace(make_facts(Role.WORKER), kind=kind, served_model="m")])
        answer = fleet.scheduler.models("/v1/models/m")

        assert isinstance(answer, Answer)
        assert json.loads(answer.body)["owned_by"] == owner

    def test_model_with_an_escaped_slash_is_found(self) -> None:
        """Client libraries escape the slash of org/name, and no engine gets the path, so it is decoded here."""
        fleet = Fleet(workers=[replace(make_facts(Role.WORKER), served_model="org/name")])
        answer = fleet.scheduler.models("/v1/models/org%2Fname")

        assert isinstance(answer, Answer)
        assert json.loads(answer.body)["id"] == "org/name"

    def test_one_model_can_be_looked_up(self) -> None:
        """An unknown model is a 404 with the known ones."""
        scheduler = Fleet(prefills=[PREFILL], decodes=[DECODE]).scheduler
        known, unknown = scheduler.models("/v1/models/served?x=1"), scheduler.models("/v1/models/other")

        assert isinstance(known, Answer)
        assert json.loads(known.body)["id"] == "served"
        assert isinstance(unknown, Rejection)
        assert unknown.status == 404
        assert "served" in unknown.message


def test_token_of_a_leg_does_not_follow_from_ids() -> None:
    """SGLang returns request ids to clients; the token is drawn elsewhere, and anew for each attempt."""
    fleet = Fleet(prefills=[make_facts(Role.PREFILL)], decodes=[make_facts(Role.DECODE)])
    decisions = [fleet.scheduler.place(Api.GENERATE, b'{"text":"x"}') for _ in range(2)]
    placed = [each for each in decisions if isinstance(each, Decision)]
    tokens = [dict(each.headers)[contract.LEG] for each in placed]

    assert tokens == [b"token-1", b"token-2"]
    for token, each in zip(tokens, placed, strict=True):
        assert each.body is not None
        assert token not in each.body
        assert token not in dict(each.headers)[contract.PREFILL_PREFIX]
