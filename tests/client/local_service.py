"""A service on this machine as far as its socket goes: it answers what a test says."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from gradwire_proto.local_wire import close_files, new_socket, receive_packet, send_packet
from gradwire_proto.v1 import local_pb2 as pb

Answer = Callable[[pb.LocalRequest, list[int]], tuple[pb.LocalReply, list[int]] | None]

REFUSED = pb.LocalReply(refusal=pb.LocalRefusal(reason="NO", message="no"))


class LocalService:
    """A socket that answers what `answer` says; None hangs up. `requests`: those that came besides hellos,
    whose tokens are `tokens`.
    """

    def __init__(self, folder: Path, says: str = "clients-a") -> None:
        self.path = str(folder / "clients-a.sock")
        self.answer: Answer = lambda request, files: (REFUSED, [])
        self.requests: list[pb.LocalRequest] = []
        self.connections = 0
        self.tokens: list[str] = []
        self._peers: list[socket.socket] = []
        self._welcome = pb.LocalReply(welcome=pb.LocalWelcome(service=says))
        self._listener = new_socket()
        self._listener.bind(self.path)
        self._listener.listen()
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def hang_up(self) -> None:
        """End all connections."""
        for peer in self._peers:
            peer.shutdown(socket.SHUT_RDWR)

    def _accept(self) -> None:
        while True:
            try:
                peer, _ = self._listener.accept()
            except OSError:
                return
            self.connections += 1
            self._peers.append(peer)
            threading.Thread(target=self._serve, args=(peer,), daemon=True).start()

    def _serve(self, peer: socket.socket) -> None:
        with peer:
            while True:
                try:
                    request, files = receive_packet(peer, pb.LocalRequest)
                except (EOFError, OSError):
                    return
                if request.WhichOneof("kind") == "hello":
                    self.tokens.append(request.hello.token)
                    send_packet(peer, self._welcome)
                    continue
                self.requests.append(request)
                answer = self.answer(request, files)
                close_files(files)
                if answer is None:
                    return
                with suppress(OSError):  # It may have left meanwhile.
                    send_packet(peer, *answer)
