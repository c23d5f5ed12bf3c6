"""TLS to a broker: certificates are always checked, and what is wrong with one is a sentence.

`TlsSocket` exists because two threads of a connection read and write at the same time, which a plain `ssl.SSLSocket`
does not allow: OpenSSL's state of one connection may be used by one thread at a time, and a lock held during a
blocking `recv` would stop every `sendall`. Here the lock covers only the work on memory, never the network.
"""

from __future__ import annotations

import socket
import ssl
import threading

from .broker_address import Tls
from .errors import VMwrapperError

RECORD = 65536  # bytes read from the network at once

# OpenSSL's X509_V_ERR_… numbers and what they mean to a person.
_NOT_YET_VALID, _EXPIRED, _SELF_SIGNED, _SELF_SIGNED_CHAIN, _NO_ISSUER, _NAME, _ADDRESS = 9, 10, 18, 19, 20, 62, 64

_UNKNOWN = "shows a certificate of an unknown authority; give that authority's certificate as the CA"


class TlsError(VMwrapperError):
    """TLS could not be agreed on; the sentence is the rest of "the broker at … "."""


class TlsSocket:
    """The client's end of a TLS connection that one thread reads while others write."""

    def __init__(self, connected: socket.socket, tls: Tls, host: str) -> None:
        """Takes a connected socket with a timeout and does the handshake; TlsError says why not."""
        self._socket = connected
        self._name = tls.server_name or host
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = tls.context().wrap_bio(self._incoming, self._outgoing, server_hostname=self._name)
        self._lock = threading.Lock()  # the TLS state and both memories
        self._writing = threading.Lock()  # the order of records on the network; taken before the other
        self._handshake()

    def _handshake(self) -> None:
        try:
            while True:
                try:
                    self._tls.do_handshake()
                except ssl.SSLWantReadError:
                    self._flush()
                    if not self._fill():
                        raise ConnectionResetError from None
                else:
                    self._flush()
                    return
        except ssl.SSLError as error:
            # The alert that says why, so that the broker's own log is right too.
            try:
                self._flush()
            except OSError:
                pass
            raise TlsError(self._sentence(error)) from None
        except (socket.timeout, TimeoutError):  # Python 3.9 keeps them apart
            raise TlsError("did not answer in TLS in time; is this its port without TLS?") from None
        except ConnectionError:
            raise TlsError("broke the connection instead of agreeing on TLS; is this its port without TLS?") from None

    def _sentence(self, error: ssl.SSLError) -> str:
        if not isinstance(error, ssl.SSLCertVerificationError):
            reason = error.reason or str(error)
            if reason in ("WRONG_VERSION_NUMBER", "HTTP_REQUEST", "PACKET_LENGTH_TOO_LONG", "RECORD_LAYER_FAILURE"):
                return "does not answer in TLS; is this its port without TLS?"
            return f"does not agree on TLS: {reason.replace('_', ' ').lower()}"
        if error.verify_code in (_NAME, _ADDRESS):
            return (
                f"shows a certificate that is not for {self._name}; "
                "set server_name to the name in the certificate, if it is the right broker"
            )
        return {
            _EXPIRED: "shows a certificate that has expired; renew it, or set this machine's clock",
            _NOT_YET_VALID: "shows a certificate that is not valid yet; set this machine's clock",
            _SELF_SIGNED: "shows a self-signed certificate that is not among the accepted authorities; "
            "give it as the CA, if it is the right one",
            _SELF_SIGNED_CHAIN: _UNKNOWN,
            _NO_ISSUER: _UNKNOWN,
        }.get(error.verify_code, f"shows a certificate that is refused: {error.verify_message}")

    def _flush(self) -> None:
        """Put on the network what TLS has for it, in order."""
        with self._writing:
            with self._lock:
                data = self._outgoing.read()
            if data:
                self._socket.sendall(data)

    def _fill(self) -> bool:
        """Give TLS what comes from the network; False at its end."""
        data = self._socket.recv(RECORD)
        with self._lock:
            if data:
                self._incoming.write(data)
            else:
                self._incoming.write_eof()
        return bool(data)

    def recv(self, most: int) -> bytes:
        """Decrypted bytes, b"" at the end; blocks like a socket."""
        while True:
            with self._lock:
                try:
                    return self._tls.read(most)
                except ssl.SSLWantReadError:
                    pass
                except (ssl.SSLZeroReturnError, ssl.SSLEOFError):
                    return b""
                answers = self._outgoing.pending
            if answers:
                # TLS has something to say itself, as for a new key. Only then: reading must not wait for a writer
                # that waits for the broker, which may wait for us to read.
                self._flush()
            if not self._fill():
                return b""

    def sendall(self, data: bytes) -> None:
        """Encrypt and send; blocks like a socket."""
        with self._writing:
            with self._lock:
                view = memoryview(data)
                while view:
                    view = view[self._tls.write(view) :]
                encrypted = self._outgoing.read()
            self._socket.sendall(encrypted)

    # Without waiting, for who reads and writes the network by himself.

    def decrypt(self, data: bytes) -> tuple[bytes, bool]:
        """What came from the network, decrypted, and whether TLS has come to its end with it."""
        self._incoming.write(data)
        plain: list[bytes] = []
        while True:
            try:
                read = self._tls.read(RECORD)
            except ssl.SSLWantReadError:
                return b"".join(plain), False
            except (ssl.SSLZeroReturnError, ssl.SSLEOFError):
                read = b""
            if not read:  # the other end has said goodbye
                return b"".join(plain), True
            plain.append(read)

    def encrypt(self, data: bytes) -> bytes:
        """What has to go to the network so that the other end reads `data`."""
        view = memoryview(data)
        while view:
            view = view[self._tls.write(view) :]
        return self._outgoing.read()

    def said(self) -> bytes:
        """What TLS itself has to say to the other end, as for a new key."""
        return self._outgoing.read()

    def getsockname(self) -> object:
        return self._socket.getsockname()

    def shutdown(self, how: int) -> None:
        self._socket.shutdown(how)

    def close(self) -> None:
        self._socket.close()
