"""Both legs of a request meet, or fail as they do in SGLang: one pair of engines for each release that differs."""

from collections.abc import Iterator

import pytest

from dp_extproc.lab.testbed.engine import EngineProcess
from ipv6 import needs_ipv6
from lab.engine.pair import PROMPTS, RANKS, Pair, run_pair, text_of
from patience import wait_for

TIMED_OUT_ON_PREFILL = "timed out after 80.0s in KVPoll.Bootstrapping"
TIMED_OUT_ON_DECODE = "timed out after 80.0s in KVPoll.WaitingForInput"


@pytest.fixture(scope="module")
def newest() -> Iterator[Pair]:
    """A pair of the newest release, with DP attention."""
    with run_pair("0.5.23") as pair:
        yield pair


@pytest.fixture(scope="module")
def before_bypass() -> Iterator[Pair]:
    """Run a pair of 0.5.15: the room conflict is checked whatever the legs name."""
    with run_pair("0.5.15") as pair:
        yield pair


@pytest.fixture(scope="module")
def plain() -> Iterator[Pair]:
    """Run a pair with plain DP: independent replicas."""
    with run_pair("0.5.23", dp_attention=False) as pair:
        yield pair


@pytest.fixture(scope="module")
def old() -> Iterator[Pair]:
    """Run a pair of 0.5.9, where ranks are named as data_parallel_rank."""
    with run_pair("0.5.9") as pair:
        yield pair


def stages_of(engine: EngineProcess) -> list[str]:
    """Return the stages of the legs that an engine has received."""
    return [leg["stage"] for request in engine.requests() for leg in request["legs"]]


@pytest.mark.parametrize("path", PROMPTS)
@pytest.mark.parametrize("decode_rank", [0, 1])
@pytest.mark.parametrize("prefill_rank", [0, 3])
def test_every_pair_of_ranks_meets(newest: Pair, path: str, prefill_rank: int, decode_rank: int) -> None:
    """With ranks in both bodies and a room that agrees, each leg runs on its rank."""
    common = newest.meeting(newest.room(prefill_rank), disagg_prefill_dp_rank=prefill_rank)
    answers = newest.send(path, common, {"routed_dp_rank": prefill_rank}, {"routed_dp_rank": decode_rank})

    assert [answer.status_code for answer in answers] == [200, 200]
    prefill, decode = newest.legs()
    assert (prefill["rank"], decode["rank"]) == (prefill_rank, decode_rank)
    assert prefill["outcome"] == decode["outcome"] == "finished"
    assert [prefill["legs"][0]["output_tokens"], decode["legs"][0]["output_tokens"]] == [1, 3]


def test_prefill_answers_with_one_token_and_length_zero(newest: Pair) -> None:
    """Both legs begin with the same token."""
    prefill, decode = newest.send("/generate", newest.meeting(newest.room()))

    assert prefill.json()["meta_info"]["finish_reason"] == {"type": "length", "length": 0}
    assert prefill.json()["meta_info"]["completion_tokens"] == 1
    assert decode.json()["meta_info"]["finish_reason"] == {"type": "length", "length": 3}
    assert decode.json()["output_ids"][:1] == prefill.json()["output_ids"]


def test_without_ranks_the_room_decides_on_prefill(newest: Pair) -> None:
    """A prefill server follows rooms by default; decode finds the same rank."""
    for rank in range(RANKS):
        prefill, decode = newest.send("/generate", newest.meeting(newest.room(rank)))

        assert prefill.json()["meta_info"]["dp_rank"] == rank
        assert decode.status_code == 200


def test_room_conflict_fails_on_prefill(newest: Pair) -> None:
    """A rank that the room does not imply fails at once on prefill, and decode waits in vain."""
    room = newest.room(3)
    prefill, decode = newest.send("/generate", newest.meeting(room), {"routed_dp_rank": 1})

    assert prefill.status_code == 500
    assert f"KVTransferError(bootstrap_room={room}): follow_bootstrap_room conflict: dispatched to dp_rank 1 but " in (
        text_of(prefill)
    )
    assert text_of(prefill).startswith("Prefill bootstrap failed for request rank=1 req.rid='")
    assert prefill.json()["type"] == "500"
    assert TIMED_OUT_ON_DECODE in text_of(decode)


def test_explicit_rank_skips_the_conflict_check(newest: Pair) -> None:
    """From 0.5.16 on a prefill leg that names its rank may have any room."""
    common = newest.meeting(newest.room(3), disagg_prefill_dp_rank=1)
    prefill, decode = newest.send("/generate", common, {"routed_dp_rank": 1})

    assert [prefill.status_code, decode.status_code] == [200, 200]
    assert prefill.json()["meta_info"]["dp_rank"] == 1


def test_explicit_rank_does_not_skip_it_before_0_5_16(before_bypass: Pair) -> None:
    """Until 0.5.15 the room has to agree."""
    common = before_bypass.meeting(before_bypass.room(3), disagg_prefill_dp_rank=1)
    prefill, decode = before_bypass.send("/generate", common, {"routed_dp_rank": 1})

    assert "follow_bootstrap_room conflict" in text_of(prefill)
    assert decode.status_code == 500


def test_plain_dp_sees_rank_zero_in_every_replica(plain: Pair) -> None:
    """Without DP attention the check fails for rooms of all ranks but 0, and passes for any rank with such a room."""
    prefill, decode = plain.send("/generate", plain.meeting(plain.room(1)))
    assert "dispatched to dp_rank 0 but bootstrap_room" in text_of(prefill)
    assert TIMED_OUT_ON_DECODE in text_of(decode)

    prefill, decode = plain.send(
        "/generate", plain.meeting(plain.room(0)), {"routed_dp_rank": 2}, {"disagg_prefill_dp_rank": 2}
    )
    assert [prefill.status_code, decode.status_code] == [200, 200]
    assert prefill.json()["meta_info"]["dp_rank"] == 2


def test_plain_dp_works_if_both_legs_name_the_rank(plain: Pair) -> None:
    """From 0.5.16 on plain DP works with disagg_prefill_dp_rank on both legs."""
    for rank in range(RANKS):
        common = plain.meeting(plain.room(rank), disagg_prefill_dp_rank=rank)
        answers = plain.send("/generate", common, {"routed_dp_rank": rank}, {"routed_dp_rank": rank % 2})

        assert [answer.status_code for answer in answers] == [200, 200]


def test_legs_time_out_with_different_prefill_ranks(newest: Pair) -> None:
    """They wait for each other on different ranks."""
    common = newest.meeting(newest.room(1))
    explicit = {"routed_dp_rank": 1, "disagg_prefill_dp_rank": 1}
    prefill, decode = newest.send("/generate", common, explicit, {"disagg_prefill_dp_rank": 0})

    assert TIMED_OUT_ON_PREFILL in text_of(prefill)
    assert TIMED_OUT_ON_DECODE in text_of(decode)


def test_decode_fails_with_a_prefill_rank_out_of_range(newest: Pair) -> None:
    """It fails at once with SGLang's text."""
    decode = newest.post(newest.decode, "/generate", **newest.meeting(newest.room()), disagg_prefill_dp_rank=7).result()

    assert decode.status_code == 500
    assert text_of(decode).endswith(
        "Could not fetch bootstrap info for: prefill_dp_rank: 7 prefill_cp_rank: 0 target_tp_rank: 0 and "
        "target_pp_rank 0"
    )
    assert text_of(decode).startswith("Decode handshake failed for request rank=")


def test_decode_gives_up_a_dead_bootstrap_port(newest: Pair) -> None:
    """It tries fifteen times."""
    body = {**newest.meeting(newest.room()), "bootstrap_port": 1}
    decode = newest.post(newest.decode, "/generate", **body).result()

    assert decode.status_code == 500
    assert text_of(decode).endswith("Aborted by AbortReq.")


@pytest.mark.parametrize("side", ["prefill", "decode"])
def test_leg_without_its_other_leg_times_out(newest: Pair, side: str) -> None:
    """SGLang reports to no side that the other leg will never come."""
    engine = newest.prefill if side == "prefill" else newest.decode
    answer = newest.post(engine, "/generate", **newest.meeting(newest.room())).result()

    assert answer.status_code == 500
    assert (TIMED_OUT_ON_PREFILL if side == "prefill" else TIMED_OUT_ON_DECODE) in text_of(answer)


def test_room_zero_never_arrives(newest: Pair) -> None:
    """Prefill finishes, but decode takes a metadata row of 0 for one that has not arrived."""
    rid = "room-zero"
    decode = newest.post(newest.decode, "/generate", **newest.meeting(0), rid=rid)
    prefill = newest.post(newest.prefill, "/generate", **newest.meeting(0)).result()
    assert prefill.status_code == 200
    alone = newest.post(newest.decode, "/generate", **newest.meeting(newest.room())).result()

    assert TIMED_OUT_ON_DECODE in text_of(alone)  # others give up meanwhile; this one does not even do that
    stages = [leg["stage"] for request in newest.decode.requests() for leg in request["legs"] if leg["rid"] == rid]
    assert stages == ["transfer"]
    newest.client.post(f"{newest.decode.url}/abort_request", json={"rid": rid})
    assert decode.result().json()["meta_info"]["finish_reason"]["type"] == "abort"


def test_room_used_twice_breaks_one_request(newest: Pair) -> None:
    """The first one that is done takes the room away from the other."""
    common = newest.meeting(newest.room())
    prefills = [newest.post(newest.prefill, "/generate", **common) for _ in range(2)]
    wait_for(lambda: sum(request["outcome"] == "running" for request in newest.prefill.requests()) == 2)
    decodes = [newest.post(newest.decode, "/generate", **common, routed_dp_rank=rank) for rank in (0, 1)]
    outcomes = [answer.result().status_code for answer in decodes]

    assert sorted(outcomes) == [200, 500]
    assert 500 in [answer.result().status_code for answer in prefills]


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_several_samples_fail(newest: Pair, path: str) -> None:
    """All samples of a prompt share its room, so n > 1 fails."""
    prefill, decode = newest.send(path, newest.meeting(newest.room(), n=2))

    assert [prefill.status_code, decode.status_code] == [500, 500]


def test_batch_needs_a_list_of_rooms(newest: Pair) -> None:
    """A single room is counted up, which collides with an explicit rank."""
    batch = {"prompt": ["a", "b"], "routed_dp_rank": 1}
    rooms = [newest.room(1), newest.room(1)]
    prefill, decode = newest.send("/v1/completions", newest.meeting(rooms), batch, batch)
    assert [prefill.status_code, decode.status_code] == [200, 200]
    assert [choice["index"] for choice in decode.json()["choices"]] == [0, 1]

    prefill, decode = newest.send("/v1/completions", newest.meeting(newest.room(1)), batch, batch)
    assert "follow_bootstrap_room conflict" in text_of(prefill)
    assert decode.status_code == 500


def test_short_list_of_rooms_is_a_500(newest: Pair) -> None:
    """It is an IndexError, a 500 without JSON."""
    body = newest.meeting([newest.room()], prompt=["a", "b"])
    answer = newest.post(newest.prefill, "/v1/completions", **body).result()

    assert answer.status_code == 500


def test_fake_bootstrap_host_serves_one_side(newest: Pair) -> None:
    """2.2.2.2 is SGLang's way to try one side alone."""
    for engine in (newest.prefill, newest.decode):
        answer = newest.post(engine, "/generate", bootstrap_host="2.2.2.2", bootstrap_room=newest.room()).result()

        assert answer.status_code == 200


@needs_ipv6
@pytest.mark.parametrize(
    ("version", "written", "meets"),
    [
        pytest.param("0.5.9", "[::1]", True, id="0.5.9 with brackets"),
        pytest.param("0.5.9", "::1", False, id="0.5.9 without"),
        pytest.param("0.5.10", "[::1]", True, id="0.5.10 with brackets"),
        pytest.param("0.5.10", "::1", True, id="0.5.10 without"),
        pytest.param("0.5.23", "[::1]", True, id="0.5.23 with brackets"),
        pytest.param("0.5.23", "::1", True, id="0.5.23 without"),
    ],
)
def test_ipv6_bootstrap_host_needs_brackets_by_release(version: str, written: str, meets: bool) -> None:
    """Until 0.5.9 decode dials the host as it is, with colon and port behind it; later releases take both forms."""
    with run_pair(version, host="::1") as pair:
        prefill, decode = pair.send("/generate", pair.meeting(pair.room(), bootstrap_host=written))

        assert (prefill.status_code, decode.status_code) == ((200, 200) if meets else (500, 500))
        if not meets:
            assert "Decode handshake failed" in text_of(decode)


def test_decode_loses_a_dead_prefill_server() -> None:
    """Its rooms fail once the heartbeat has missed it twice."""
    with run_pair("0.5.23", "--timeout-waiting", "100000") as pair:
        decode = pair.post(pair.decode, "/generate", **pair.meeting(pair.room()))
        wait_for(lambda: "transfer" in stages_of(pair.decode))
        pair.prefill.stop()

        assert decode.result().status_code == 500
        assert "Lost connection with prefill instance (bootstrap_addr: 127.0.0.1:" in text_of(decode.result())


def test_decode_aborts_prefill_when_it_gives_up(newest: Pair) -> None:
    """Abort goes from decode to prefill, not the other way round."""
    common = newest.meeting(newest.room())
    long = {"text": "x" * 4_000_000}
    prefill = newest.post(newest.prefill, "/generate", **{**common, **long})
    decode = newest.post(newest.decode, "/generate", **{**common, **long}, rid="gives-up")
    wait_for(lambda: "running" in stages_of(newest.prefill))
    newest.client.post(f"{newest.decode.url}/abort_request", json={"rid": "gives-up"})

    assert "Prefill transfer failed" in text_of(prefill.result())
    assert decode.result().json()["meta_info"]["finish_reason"]["type"] == "abort"


def test_first_explicit_rank_fails_once_in_0_5_10() -> None:
    """The first request of a decode rank and a prefill engine with disagg_prefill_dp_rank is lost, later ones not."""
    with run_pair("0.5.10") as pair:
        statuses = []
        for _ in range(2):
            common = pair.meeting(pair.room(1), routed_dp_rank=1)
            prefill, decode = pair.send("/generate", common, {}, {"disagg_prefill_dp_rank": 1})
            statuses.append((prefill.status_code, decode.status_code))
            if decode.status_code == 500:
                assert "is healthy before, but now it is down" in text_of(decode)

        assert statuses == [(500, 500), (200, 200)]


def test_old_decode_takes_its_own_rank_for_prefills(old: Pair) -> None:
    """Until 0.5.9 decode's data_parallel_rank is the prefill rank; new fields are not read."""
    common = old.meeting(old.room(1), routed_dp_rank=99, disagg_prefill_dp_rank=99)
    prefill, decode = old.send("/generate", common)
    assert [prefill.status_code, decode.status_code] == [200, 200]
    assert prefill.json()["meta_info"]["dp_rank"] == 1

    prefill, decode = old.send("/generate", old.meeting(old.room(1)), {}, {"data_parallel_rank": 0})
    assert TIMED_OUT_ON_PREFILL in text_of(prefill)
    assert TIMED_OUT_ON_DECODE in text_of(decode)


def test_oldest_releases_decide_both_ranks_by_the_room() -> None:
    """Until 0.5.7 decode follows rooms as well."""
    with run_pair("0.5.5") as pair:
        for rank in range(RANKS):
            prefill, decode = pair.send("/generate", pair.meeting(pair.room(rank)))

            assert prefill.json()["meta_info"]["dp_rank"] == rank
            assert decode.json()["meta_info"]["dp_rank"] == rank % 2


def test_prefill_registers_rooms_that_it_does_not_follow() -> None:
    """With round robin on prefill decode queries where a room is."""
    with run_pair("0.5.23", "--load-balance-method", "round_robin") as pair:
        ranks = []
        for _ in range(RANKS):
            prefill, decode = pair.send("/generate", pair.meeting(pair.room()))
            assert decode.status_code == 200
            ranks.append(prefill.json()["meta_info"]["dp_rank"])

        assert ranks == [0, 1, 2, 3]
