"""Network addresses as users give them: where they lead, and whether anything answers there."""

import socket
from urllib.parse import urlsplit

_CONNECT_TIMEOUT_S = 5


def place_of(address: str) -> tuple[str, int] | None:
    """Host and port of an address with or without a scheme; None if it names none, as Ray's ``auto``."""
    try:
        parts = urlsplit(address if "://" in address else f"//{address}")
        port = parts.port or {"http": 80, "https": 443}.get(parts.scheme)
    except ValueError:
        return None
    return (parts.hostname, port) if parts.hostname and port else None


def silence_at(place: tuple[str, int]) -> str | None:
    """Why nothing answers at a host and port; None if something does."""
    try:
        with socket.create_connection(place, timeout=_CONNECT_TIMEOUT_S):
            return None
    except OSError as error:
        return error.strerror or str(error)
