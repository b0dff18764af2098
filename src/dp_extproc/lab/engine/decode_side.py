"""Do decode's half of the rendezvous: find the prefill rank, reserve KV room, request the KV cache, wait for it."""

import asyncio
import time
from collections.abc import Callable
from typing import Any, Final

import httpx

from dp_extproc.lab.engine.bootstrap_fields import metadata_buffers, reads
from dp_extproc.lab.engine.connections import Clients
from dp_extproc.lab.engine.leg import Failure, Finished
from dp_extproc.lab.engine.rendezvous import FAKE_HOST, TAKEN_AWAY, failure, room_of
from dp_extproc.lab.engine.scheduler.work import Stage
from dp_extproc.lab.engine.settings import Settings
from dp_extproc.lab.engine.ticket import Ticket

_QUERY_PAUSE: Final = 0.1
"""Seconds between two queries for the rank of a room, unscaled."""


class _HandshakeError(Exception):
    pass


class DecodeSide:
    """Hold what a decode engine has learned about prefill engines, and its rooms."""

    def __init__(
        self,
        settings: Settings,
        end: Callable[[Ticket, Finished | Failure], None],
        wake: Callable[[int], None],
        kill: Callable[[str], None],
    ) -> None:
        """Start without prefill engines.

        Args:
            settings: Options of the engine.
            end: Ends a ticket in any stage.
            wake: Makes a rank's scheduler look at its queues.
            kill: Called when the prefill engine has other options.
        """
        self._settings = settings
        self._end = end
        self._wake = wake
        self._kill = kill
        self._clients = Clients(settings.timeouts.bootstrap_answer)
        self._prefills: dict[tuple[int, str], dict[str, Any]] = {}
        """Facts that each rank has learned, by bootstrap address: every scheduler process has its own memory."""
        self._known_ranks: set[tuple[int, str, int]] = set()
        self._rooms: dict[tuple[int, int], list[Ticket]] = {}

    def arrive(self, ticket: Ticket) -> None:
        """Begin to reach a leg's prefill engine."""
        if ticket.leg.bootstrap_host == FAKE_HOST:
            ticket.work.reachable = True
            self._wake(ticket.work.dp_rank)
            return
        self._rooms.setdefault(room_of(ticket), []).append(ticket)
        ticket.task = asyncio.ensure_future(self._handshake(ticket))

    def allocated(self, ticket: Ticket) -> None:
        """Request the KV cache, now that there is room for it."""
        if ticket.leg.bootstrap_host == FAKE_HOST:
            self._arrived(ticket)
            return
        seconds = self._settings.timeouts.waiting
        loop = asyncio.get_running_loop()
        ticket.timer = loop.call_later(seconds * self._settings.time_scale, self._timed_out, ticket, seconds)
        ticket.task = asyncio.ensure_future(self._receive(ticket))

    def forget(self, ticket: Ticket) -> None:
        """Remove a leg that has ended, for any reason."""
        key = room_of(ticket)
        tickets = self._rooms.get(key, [])
        if ticket in tickets:
            tickets.remove(ticket)
            if not tickets:
                del self._rooms[key]

    async def prepare(self) -> None:
        """Prepare the clients for the first leg."""
        await self._clients.prepare()

    async def close(self) -> None:
        await self._clients.close()

    async def _handshake(self, ticket: Ticket) -> None:
        try:
            facts = await self._learn(ticket)
            rank = await self._prefill_rank(ticket, facts)
            await self._learn_rank(ticket, rank)
        except _HandshakeError as error:
            self._end(ticket, failure(ticket, self._settings, "handshake", str(error)))
        except httpx.HTTPError:
            self._end(ticket, failure(ticket, self._settings, "handshake", "Aborted by AbortReq."))
        else:
            ticket.work.reachable = True
            self._wake(ticket.work.dp_rank)

    async def _learn(self, ticket: Ticket) -> dict[str, Any]:
        """Fetch the facts of the prefill engine, unless this rank has them.

        Raises:
            _HandshakeError: It cannot be reached.
        """
        key = (ticket.work.dp_rank, self._address(ticket))
        if key in self._prefills:
            return self._prefills[key]
        timeouts = self._settings.timeouts
        for attempt in range(timeouts.bootstrap_tries):
            if attempt:
                await asyncio.sleep(timeouts.bootstrap_pause * self._settings.time_scale)
            try:
                answer = await self._route(ticket, -1)
                facts: dict[str, Any] = answer.raise_for_status().json()
            except (httpx.HTTPError, httpx.InvalidURL, ValueError):
                continue
            if not reads(self._settings.release, facts):
                continue  # decode takes it for no answer
            self._compare(facts)
            self._prefills[key] = facts
            if self._settings.release.loses_first_explicit_rank and ticket.leg.disagg_prefill_dp_rank is not None:
                raise _HandshakeError(
                    f"Prefill server with bootstrap_addr: {key[1]} is healthy before, but now it is down. Request "
                    f"(bootstrap_room: {ticket.leg.bootstrap_room}) has been marked as failed."
                )
            return facts
        raise _HandshakeError("Aborted by AbortReq.")

    def _compare(self, facts: dict[str, Any]) -> None:
        """Raise in the scheduler, as SGLang does, where the prefill engine was started with other options."""
        own, release = self._settings, self._settings.release
        size, dtype = facts.get("page_size", facts.get("prefill_page_size")), facts.get("kv_cache_dtype")
        if release.checks_page_size and size is not None and size != own.page_size:
            self._kill(
                f"RuntimeError: Page size mismatch: prefill server has page_size={size}, but decode server has "
                f"page_size={own.page_size}. Both servers must use the same --page-size value."
            )
        if release.checks_cache_dtype and dtype is not None and dtype != own.kv_cache_dtype:
            self._kill(
                f"RuntimeError: KV cache dtype mismatch: prefill server has kv_cache_dtype={dtype}, but decode server "
                f"has kv_cache_dtype={own.kv_cache_dtype}. Both servers must use the same --kv-cache-dtype value."
            )

    async def _prefill_rank(self, ticket: Ticket, facts: dict[str, Any]) -> int:
        leg, release = ticket.leg, self._settings.release
        size = int(facts.get("dp_size") or facts.get("prefill_dp_size") or 1)
        if release.routes_by_field:
            if leg.disagg_prefill_dp_rank is not None:
                return leg.disagg_prefill_dp_rank
            derivable = facts.get("follow_bootstrap_room", True) and not self._settings.force_query
            if size > 1 and not derivable:
                return await self._query_rank(ticket)
        elif leg.routed_dp_rank is not None and release.since("0.4.7"):
            return leg.routed_dp_rank  # until 0.5.9 decode takes its own data_parallel_rank for prefill's
        return (leg.bootstrap_room or 0) % size

    async def _query_rank(self, ticket: Ticket) -> int:
        room = ticket.leg.bootstrap_room
        while True:
            url = f"http://{self._address(ticket)}/query_dp_ranks"
            with self._clients.one() as client:
                answer = await client.post(url, json={"bootstrap_rooms": [room]})
            rank = answer.raise_for_status().json().get(str(room))
            if rank is not None:
                return int(rank)
            await asyncio.sleep(_QUERY_PAUSE * self._settings.time_scale)

    async def _learn_rank(self, ticket: Ticket, rank: int) -> None:
        """Fetch the address of the prefill rank, unless this rank has it.

        Raises:
            _HandshakeError: There is no such rank.
        """
        key = (ticket.work.dp_rank, self._address(ticket), rank)
        if key not in self._known_ranks:
            answer = await self._route(ticket, rank)
            if answer.status_code != 200:
                raise _HandshakeError(
                    f"Could not fetch bootstrap info for: prefill_dp_rank: {rank} prefill_cp_rank: 0 target_tp_rank: 0 "
                    "and target_pp_rank 0"
                )
            self._known_ranks.add(key)
        ticket.prefill_dp_rank = rank

    async def _route(self, ticket: Ticket, rank: int) -> httpx.Response:
        if self._settings.release.routes_by_field:
            others = -1 if rank == -1 else 0
            query = {"prefill_dp_rank": rank} | dict.fromkeys(
                ("prefill_cp_rank", "target_tp_rank", "target_pp_rank"), others
            )
        else:
            others = -1 if rank == -1 else 0
            query = {"engine_rank": others, "target_dp_group": rank, "target_pp_rank": others}
        with self._clients.one() as client:
            return await client.get(f"http://{self._address(ticket)}/route", params=query)

    async def _receive(self, ticket: Ticket) -> None:
        address, timeouts = self._address(ticket), self._settings.timeouts
        wanted = {
            "bootstrap_room": ticket.leg.bootstrap_room,
            "prefill_dp_rank": ticket.prefill_dp_rank,
            "transfer_backend": self._settings.transfer_backend,
            "metadata_buffers": metadata_buffers(self._settings.release),
        }
        try:
            with self._clients.one() as client:
                answer = await client.post(f"http://{address}/rendezvous", json=wanted, timeout=None)
            ticket.work.cached_tokens = int(answer.raise_for_status().json()["cached_tokens"])
        except httpx.HTTPError:
            # The heartbeat detects it by two misses in a row.
            await asyncio.sleep(2 * timeouts.heartbeat * self._settings.time_scale)
            text = f"Lost connection with prefill instance (bootstrap_addr: {address})"
            self._end(ticket, failure(ticket, self._settings, "transfer", text))
            for key in [key for key in self._prefills if key[1] == address]:
                del self._prefills[key]
            self._known_ranks = {key for key in self._known_ranks if key[1] != address}
        else:
            self._arrived(ticket)

    def _arrived(self, ticket: Ticket) -> None:
        number = ticket.leg.bootstrap_room
        if ticket.timer is not None:
            ticket.timer.cancel()
        if number == 0 and self._settings.release.room_zero_never_arrives and ticket.leg.bootstrap_host != FAKE_HOST:
            return  # its metadata row reads 0, which means "not arrived", for ever
        if ticket.work.stage is Stage.TRANSFER:
            ticket.work.stage, ticket.queued_at = Stage.WAITING, time.time()
        for other in list(self._rooms.get(room_of(ticket), [])):
            if other is not ticket and other.work.stage in {Stage.PREALLOC, Stage.TRANSFER}:
                self._end(other, failure(other, self._settings, "transfer", TAKEN_AWAY))
        self._wake(ticket.work.dp_rank)

    def _timed_out(self, ticket: Ticket, seconds: float) -> None:
        text = f"Request {ticket.leg.bootstrap_room} timed out after {seconds:.1f}s in KVPoll.WaitingForInput"
        self._end(ticket, failure(ticket, self._settings, "transfer", text))

    def _address(self, ticket: Ticket) -> str:
        port = ticket.leg.bootstrap_port or self._settings.bootstrap_port
        host = ticket.leg.bootstrap_host or ""
        if self._settings.release.wraps_bootstrap_hosts and ":" in host and not host.startswith("["):
            host = f"[{host}]"
        return f"{host}:{port}"
