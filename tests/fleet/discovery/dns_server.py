"""A small DNS server over UDP and TCP, on one free port of 127.0.0.1."""

import socketserver
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Final

import dns.exception
import dns.flags
import dns.message
import dns.rcode
import dns.rdatatype
import dns.rrset

from dp_extproc.lab.testbed.ports import free_port

UDP_BYTES: Final = 512
"""Largest answer over UDP to a client without EDNS (RFC 1035)."""


class Silence(Exception):  # noqa: N818 - no error
    """The server does not answer."""


@dataclass
class DnsServer:
    """Answers from a zone that a test changes at any time."""

    port: int = 0
    ttl: int = 60
    additional: int = 0
    """Most targets of SRV records whose addresses are put into the answer as additional records."""
    fault: str = ""
    """``silent``, ``garbage``, or a response code such as ``SERVFAIL``; for all names, or for those in ``faulty``."""
    faulty: str = ""
    """Names with this part have the fault; the empty text is in all of them."""
    queries: list[tuple[str, str, str]] = field(default_factory=list)
    """Transport, name and type of each query."""
    _zone: dict[tuple[str, str], tuple[int | None, list[str]]] = field(default_factory=dict)

    def set(self, name: str, kind: str, *values: str, ttl: int | None = None) -> None:
        """Replace the records of a name and type. A name without values exists, and has none of that type."""
        self._zone[f"{name}.", kind] = (ttl, list(values))

    def remove(self, name: str) -> None:
        """Remove all records of a name, so that it does not exist."""
        self._zone = {key: value for key, value in self._zone.items() if key[0] != f"{name}."}

    def reply(self, wire: bytes, transport: str) -> bytes:
        """Answer a query, or raise :class:`Silence`."""
        query = dns.message.from_wire(wire)
        (question,) = query.question
        name, kind = question.name.to_text().lower(), dns.rdatatype.to_text(question.rdtype)
        self.queries.append((transport, name.removesuffix("."), kind))
        answer = dns.message.make_response(query)
        answer.flags |= dns.flags.RA
        if not (self.fault and self.faulty in name):
            self._answer(answer, name, kind)
        elif self.fault == "silent":
            raise Silence
        elif self.fault == "garbage":
            return wire[:2] + b"\xff" * 20
        else:
            answer.set_rcode(dns.rcode.from_text(self.fault))
        if transport == "udp":
            _truncate(answer)
        return answer.to_wire()

    def _answer(self, answer: dns.message.Message, name: str, kind: str) -> None:
        while (alias := self._records(name, "CNAME")) is not None:
            answer.answer.append(alias)
            name = alias[0].target.to_text()
        if not any(each == name for each, _ in self._zone):
            answer.set_rcode(dns.rcode.NXDOMAIN)
        if (found := self._records(name, kind)) is not None:
            answer.answer.append(found)
        if found is not None and kind == "SRV":
            targets = list(dict.fromkeys(record.target.to_text() for record in found))[: self.additional]
            given = [self._records(each, kind) for each in targets for kind in ("A", "AAAA")]
            answer.additional += [each for each in given if each is not None]

    def _records(self, name: str, kind: str) -> dns.rrset.RRset | None:
        ttl, values = self._zone.get((name, kind), (None, []))
        return dns.rrset.from_text(name, self.ttl if ttl is None else ttl, "IN", kind, *values) if values else None


class _UdpServer(socketserver.ThreadingUDPServer):
    daemon_threads = True


class _TcpServer(socketserver.ThreadingTCPServer):
    allow_reuse_address = True
    daemon_threads = True


def _truncate(answer: dns.message.Message) -> None:
    """Leave records out until the answer fits in a packet. As of real servers, the rest is a valid message."""
    while len(answer.to_wire()) > UDP_BYTES:
        answer.flags |= dns.flags.TC
        answer.additional = []
        last = answer.answer.pop()
        if rest := list(last)[: len(last) // 2]:
            answer.answer.append(dns.rrset.from_rdata_list(last.name, last.ttl, rest))


@contextmanager
def dns_server(port: int = 0) -> Iterator[DnsServer]:
    """Run a DNS server on this port, or on a free one."""
    zone = DnsServer(port or free_port())

    class Udp(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            wire, sock = self.request
            try:
                sock.sendto(zone.reply(wire, "udp"), self.client_address)
            except Silence:
                return

    class Tcp(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            while len(length := self.rfile.read(2)) == 2:
                try:
                    answer = zone.reply(self.rfile.read(int.from_bytes(length, "big")), "tcp")
                except Silence:
                    return
                self.wfile.write(len(answer).to_bytes(2, "big") + answer)

    servers = (_UdpServer(("127.0.0.1", zone.port), Udp), _TcpServer(("127.0.0.1", zone.port), Tcp))
    threads = [threading.Thread(target=each.serve_forever, args=(0.02,)) for each in servers]
    for thread in threads:
        thread.start()
    try:
        yield zone
    finally:
        for each in servers:
            each.shutdown()
            each.server_close()
        for thread in threads:
            thread.join()
