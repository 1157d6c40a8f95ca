"""Packets between client and service on one machine, and the files that come with them."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator

import pytest

from gradwire_proto.local_wire import (
    MOST_FILES,
    PACKET_BYTES,
    PacketError,
    aligned,
    close_files,
    peer_user,
    receive_packet,
    send_packet,
    service_of,
)
from gradwire_proto.v1 import local_pb2 as pb


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    ends = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    for end in ends:
        end.settimeout(5)
    yield ends
    for end in ends:
        end.close()


def download(name: str) -> pb.LocalRequest:
    return pb.LocalRequest(download=pb.LocalDownload(name=name))


def test_packet_arrives_with_its_files(pair):
    file = os.memfd_create("test")
    os.write(file, b"shared")
    send_packet(pair[0], download("downloads/a"), [file, file])
    os.close(file)
    message, files = receive_packet(pair[1], pb.LocalRequest)
    assert message == download("downloads/a")
    assert [os.pread(each, 10, 0) for each in files] == [b"shared"] * 2
    assert not any(os.get_inheritable(each) for each in files)
    close_files(files)


def test_packet_that_is_too_big_is_not_sent(pair):
    with pytest.raises(PacketError):
        send_packet(pair[0], download("x" * PACKET_BYTES))
    file = os.memfd_create("test")
    with pytest.raises(PacketError):
        send_packet(pair[0], download("x"), [file] * (MOST_FILES + 1))
    os.close(file)
    pair[1].settimeout(0.05)
    with pytest.raises(TimeoutError):
        receive_packet(pair[1], pb.LocalRequest)


def test_packets_of_others_are_refused_and_their_files_closed(pair):
    file = os.memfd_create("test")
    before = len(os.listdir("/proc/self/fd"))
    for packet, files in ((b"\xff\xff", 1), (b"\n" * (PACKET_BYTES + 1), 0), (b"", MOST_FILES + 4)):
        socket.send_fds(pair[0], [packet or b"\x12\x00"], [file] * files)
        with pytest.raises(PacketError):
            receive_packet(pair[1], pb.LocalRequest)
    assert len(os.listdir("/proc/self/fd")) == before
    os.close(file)


def test_peer_that_has_left_is_the_end(pair):
    pair[0].close()
    with pytest.raises(EOFError):
        receive_packet(pair[1], pb.LocalRequest)
    with pytest.raises(BrokenPipeError):
        send_packet(pair[1], download("x"))


def test_peer_is_known_by_the_kernel(pair):
    assert peer_user(pair[0]) == os.geteuid()


def test_tensors_lie_at_multiples_of_64_bytes():
    assert aligned([1, 0, 64, 65, 3]) == ([0, 64, 64, 128, 256], 320)
    assert aligned([]) == ([], 0)


def test_service_is_named_by_the_path_of_its_socket():
    assert service_of("/tmp/x/clients-ab12.sock") == "clients-ab12"
