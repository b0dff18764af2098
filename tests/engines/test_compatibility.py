"""Settings by which a prefill and a decode engine cannot be paired."""

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dp_extproc.engines.compatibility import PairingKey, difference, differences, pairing_key
from dp_extproc.engines.model import Mode, PairTerms
from dp_extproc.engines.sglang.server_info import read_server_info
from engines.test_capabilities import facts

RECORDED = Path(__file__).parent / "recorded"


def side(mode: Mode, terms: PairTerms, version: str | None = "0.5.23", group: str | None = None) -> PairingKey:
    return pairing_key(replace(facts(version, mode), terms=terms), group)


def code(prefill: PairTerms, decode: PairTerms, version: str | None = "0.5.23") -> str | None:
    found = difference(side(Mode.PREFILL, prefill, version), side(Mode.DECODE, decode, version))
    return None if found is None else found.code


def page(number: int | None) -> PairTerms:
    return PairTerms(page_size=number)


def dtype(name: str | None) -> PairTerms:
    return PairTerms(kv_cache_dtype=name)


def backend(name: str | None) -> PairTerms:
    return PairTerms(transfer_backend=name)


def model(path: str, name: str | None = None) -> PairTerms:
    return PairTerms(model_path=path, served_name=name)


@pytest.mark.parametrize(
    ("prefill", "decode", "version", "expected"),
    [
        pytest.param(page(1), page(1), "0.5.23", None, id="page: the same"),
        pytest.param(page(1), page(2), "0.5.23", "page_size_differs", id="page: another"),
        pytest.param(page(64), page(1), "0.5.5", "page_size_differs", id="page: another, before it was compared"),
        pytest.param(page(1), page(None), "0.5.23", None, id="page: not told"),
        pytest.param(dtype("auto"), dtype("auto"), "0.5.23", None, id="type: auto"),
        pytest.param(dtype("bf16"), dtype("fp8_e4m3"), "0.5.23", "kv_cache_dtype_differs", id="type: another"),
        pytest.param(dtype("bf16"), dtype("fp8_e4m3"), "0.5.9", "kv_cache_dtype_differs", id="type: another, old"),
        pytest.param(dtype("bf16"), dtype("bfloat16"), "0.5.23", "kv_cache_dtype_differs", id="type: names compared"),
        pytest.param(dtype("bf16"), dtype("bfloat16"), "0.5.9", None, id="type: names not compared"),
        pytest.param(dtype("auto"), dtype("fp8_e4m3"), "0.5.23", None, id="type: auto may be fp8"),
        pytest.param(dtype("fp8_e4m3"), dtype("auto"), None, None, id="type: auto may be fp8, unknown release"),
        pytest.param(dtype("auto"), dtype("bf16"), "0.5.23", "kv_cache_dtype_differs", id="type: auto is never bf16"),
        pytest.param(dtype("fp8_e5m2"), dtype("auto"), None, "kv_cache_dtype_differs", id="type: nor fp8_e5m2"),
        pytest.param(dtype("auto"), dtype("bf16"), "0.5.9", None, id="type: auto may be anything before 0.5.10"),
        pytest.param(dtype(None), dtype("bf16"), "0.5.23", None, id="type: not told"),
        pytest.param(
            backend("mooncake"),
            backend("nixl"),
            "0.5.23",
            "disaggregation_transfer_backend_differs",
            id="backend: another",
        ),
        pytest.param(backend("mooncake_tcp"), backend("mooncake"), "0.5.16", None, id="backend: told as the other"),
        pytest.param(backend(None), backend("nixl"), "0.5.23", None, id="backend: not told"),
        pytest.param(model("/a/one", "one"), model("/a/two", "two"), "0.5.23", "model_differs", id="model: another"),
        pytest.param(model("/a/one", "p"), model("/b/One/", "d"), "0.5.23", None, id="model: a name for each role"),
        pytest.param(model("/a/fp8", "m"), model("/b/fp4", "m"), "0.5.23", None, id="model: weights of two kinds"),
        pytest.param(model("/mnt/model"), model("org/name"), "0.5.23", None, id="model: names not given"),
        pytest.param(model("/mnt/model", "m"), model("org/name"), "0.5.23", None, id="model: one name not given"),
        pytest.param(
            model("/hub/models--org--name/snapshots/0a1b", "p"),
            model("org/name", "d"),
            "0.5.23",
            None,
            id="model: a snapshot of it",
        ),
        pytest.param(PairTerms(), PairTerms(), None, None, id="nothing told"),
    ],
)
def test_a_difference_is_found_where_the_pair_would_fail(
    prefill: PairTerms, decode: PairTerms, version: str | None, expected: str | None
) -> None:
    """A setting that one engine does not report, or that may be equal, is no difference: such a pair may work."""
    assert code(prefill, decode, version) == expected


def parallel(pp: int | None = None, tp: int | None = None) -> PairTerms:
    return PairTerms(pp_size=pp, attn_tp_size=tp)


@pytest.mark.parametrize(
    ("prefill", "decode", "expected"),
    [
        pytest.param(parallel(pp=2), parallel(pp=2), None, id="stages: the same"),
        pytest.param(parallel(pp=4), parallel(pp=1), None, id="stages: decode has one"),
        pytest.param(parallel(pp=1), parallel(pp=2), "pp_size_differs", id="stages: decode has more"),
        pytest.param(parallel(pp=4), parallel(pp=2), "pp_size_differs", id="stages: decode has fewer"),
        pytest.param(parallel(pp=None), parallel(pp=2), None, id="stages: not told"),
        pytest.param(parallel(tp=8), parallel(tp=2), None, id="shards: a multiple"),
        pytest.param(parallel(tp=2), parallel(tp=8), None, id="shards: a multiple on decode"),
        pytest.param(parallel(tp=6), parallel(tp=4), "attn_tp_size_differs", id="shards: no multiple"),
    ],
)
def test_parts_of_the_model_differ_where_decode_fetches_from_the_wrong_ranks(
    prefill: PairTerms, decode: PairTerms, expected: str | None
) -> None:
    """``_resolve_rank_mapping`` asserts the stages, and divides the shards without a check."""
    assert code(prefill, decode) == expected


@pytest.mark.parametrize(
    ("info", "expected"),
    [
        pytest.param({"tp_size": 8, "pp_size": 2}, (2, 8), id="no DP attention"),
        pytest.param({"tp_size": 8, "dp_size": 4}, (None, 8), id="plain DP"),
        pytest.param({"tp_size": 8, "dp_size": 4, "enable_dp_attention": True}, (None, 2), id="DP attention"),
        pytest.param(
            {"tp_size": 8, "attn_dp_size": 4, "enable_dp_attention": True}, (None, 2), id="DP attention from 0.5.22 on"
        ),
        pytest.param({"tp_size": 8, "attn_cp_size": 2}, (None, 4), id="context parallelism"),
        pytest.param({"tp_size": "8", "pp_size": -1}, (None, None), id="malformed"),
        pytest.param({"tp_size": 7, "attn_cp_size": 2}, (None, None), id="impossible"),
    ],
)
def test_parallel_sizes_are_those_of_one_rank(info: dict[str, object], expected: tuple[int | None, int | None]) -> None:
    """As ``derive_attn_tp_size`` computes them."""
    terms = reported(**info)

    assert (terms.pp_size, terms.attn_tp_size) == expected


@pytest.mark.parametrize(
    ("prefill", "decode", "expected"),
    [
        pytest.param("0.5.9", "0.5.23", False, id="other names of parameters"),
        pytest.param("0.5.23", "0.5.9", False, id="other names of parameters, the reverse"),
        pytest.param("0.5.10", "0.5.23", True, id="decode has defaults for new fields"),
        pytest.param("0.5.15", "0.5.16", True, id="decode is one range ahead"),
        pytest.param("0.5.16", "0.5.15", False, id="decode refuses fields of a later prefill"),
        pytest.param("0.5.20", "0.5.16", True, id="no new field in this range"),
        pytest.param("0.5.21", "0.5.20", True, id="a new field that is left out unless it is in use"),
        *(
            pytest.param(new, old, False, id=f"{new} added fields")
            for old, new in pairwise(("0.5.21", "0.5.22", "0.5.23"))
        ),
        pytest.param("0.5.5", "0.5.9", False, id="decode expects one more buffer"),
        pytest.param("0.5.9", "0.5.5", True, id="prefill has one more buffer than is asked for"),
        pytest.param("0.5.2", "0.5.3", False, id="other order of buffers"),
        pytest.param("0.5.3", "0.5.2", False, id="other order of buffers, the reverse"),
        pytest.param("0.4.9", "0.5.1", False, id="other names of fields"),
        pytest.param("0.5.24", "0.5.23", True, id="a later release may work"),
        pytest.param(None, "0.5.9", True, id="an unknown release may be any"),
    ],
)
def test_releases_differ_where_decode_does_not_understand_prefill(
    prefill: str | None, decode: str | None, expected: bool
) -> None:
    """Read off the sources of the releases; see the head of ``engines/sglang/protocol.py``."""
    found = difference(side(Mode.PREFILL, PairTerms(), prefill), side(Mode.DECODE, PairTerms(), decode))

    assert (found is None) is expected
    assert found is None or (found.code, found.prefill, found.decode) == ("release_differs", prefill, decode)


def test_a_difference_names_both_values_and_the_remedy() -> None:
    """It is read by operators, and by clients of refused requests."""
    (found,) = differences(
        [side(Mode.PREFILL, page(1)), side(Mode.PREFILL, page(1))],
        [side(Mode.DECODE, page(2)), side(Mode.DECODE, page(2)), side(Mode.DECODE, page(1))],
    )

    assert str(found) == "page_size is 1 on prefill and 2 on decode"
    assert "Page size mismatch" in found.effect
    assert found.remedy == "start both with the same --page-size"


@pytest.mark.parametrize(
    ("prefill", "decode", "expected"),
    [
        pytest.param(None, None, "page_size_differs", id="no groups"),
        pytest.param("v1", None, "page_size_differs", id="one without a group"),
        pytest.param("v1", "v1", "page_size_differs", id="one group"),
        pytest.param("v1", "v2", "group_differs", id="two groups"),
    ],
)
def test_groups_differ_before_settings_and_an_equal_group_excuses_none(
    prefill: str | None, decode: str | None, expected: str
) -> None:
    """A label is no proof that two engines work together."""
    found = difference(side(Mode.PREFILL, page(1), group=prefill), side(Mode.DECODE, page(2), group=decode))
    equal = difference(side(Mode.PREFILL, page(1), group=prefill), side(Mode.DECODE, page(1), group=decode))

    assert found is not None
    assert found.code == expected
    assert (equal is None) == (expected == "page_size_differs")


def test_a_recorded_pair_has_no_difference() -> None:
    """These engines moved KV caches to each other; all their settings are read."""
    prefill, decode = (
        read_server_info((RECORDED / "pd_dpattn" / f"{side}_server_info.json").read_bytes())
        for side in ("prefill", "decode")
    )

    assert difference(pairing_key(prefill), pairing_key(decode)) is None
    assert (prefill.terms.page_size, prefill.terms.kv_cache_dtype) == (1, "auto")
    assert (prefill.terms.transfer_backend, prefill.terms.served_name) == ("mooncake", "tiny")


def reported(**info: object) -> PairTerms:
    return read_server_info(json.dumps({"dp_size": 1, "disaggregation_mode": "decode", **info}).encode()).terms


@pytest.mark.parametrize(
    "size", [0, -1, 1.0, True, "1", None, [], {"a": 1}, 10**400, 2**40], ids=lambda size: repr(size)[:12]
)
def test_a_malformed_page_size_is_left_out(size: object) -> None:
    """The rest of the page counts."""
    assert reported(page_size=size) == PairTerms()


@pytest.mark.parametrize("name", [7, "", None, ["auto"], "x" * 5000, "bf16\nERROR"], ids=lambda name: repr(name)[:12])
def test_a_malformed_name_is_left_out(name: object) -> None:
    """The rest of the page counts."""
    assert reported(kv_cache_dtype=name, disaggregation_transfer_backend=name) == PairTerms()


def test_page_size_is_left_out_with_hisparse() -> None:
    """The engine uses pages of another size than it reports, and SGLang does not compare them (0.5.10 to 0.5.12)."""
    assert reported(page_size=64, enable_hisparse=True).page_size is None


def test_a_model_without_a_name_goes_by_its_path() -> None:
    """SGLang reports the path as the name then."""
    assert reported(model_path="org/name", served_model_name="org/name").served_name is None
    assert reported(model_path="org/name", served_model_name="mine").served_name == "mine"


terms = st.builds(
    PairTerms,
    page_size=st.sampled_from([None, 1, 64]),
    kv_cache_dtype=st.sampled_from([None, "auto", "bf16", "bfloat16", "fp8_e4m3"]),
    transfer_backend=st.sampled_from([None, "mooncake", "mooncake_tcp", "nixl"]),
    model_path=st.sampled_from([None, "/a/one", "/b/one", "/a/two"]),
    served_name=st.sampled_from([None, "one", "two"]),
)


@given(terms, terms, st.sampled_from([None, "0.5.5", "0.5.9", "0.5.10", "0.5.23"]))
def test_differences_are_symmetric(one: PairTerms, other: PairTerms, version: str | None) -> None:
    """Engines with equal settings have none."""
    assert code(one, other, version) == code(other, one, version)
    assert code(one, one, version) is None
    assert code(one, PairTerms(), version) is None
