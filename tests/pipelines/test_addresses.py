import socket

import pytest

from pipelines.addresses import place_of, silence_at


@pytest.mark.parametrize(
    ("address", "place"),
    [
        ("127.0.0.1:6379", ("127.0.0.1", 6379)),
        ("ray://head.example:10001", ("head.example", 10001)),
        ("http://head.example", ("head.example", 80)),
        ("[::1]:6379", ("::1", 6379)),
        ("auto", None),
        ("head.example:many", None),
        ("head.example:70000", None),
    ],
)
def test_an_address_is_a_host_and_a_port_or_nothing(address: str, place: tuple[str, int] | None) -> None:
    assert place_of(address) == place


def test_a_server_is_heard_and_a_port_without_one_is_silent() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        place = server.getsockname()
        assert silence_at(place) is None
    assert silence_at(place) == "Connection refused"
