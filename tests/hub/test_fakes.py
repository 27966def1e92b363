"""The fake Hub itself: what it answers must not depend on how fast the machine is."""

import http.client
from collections.abc import Iterator

import pytest
from fake_publish import PublishingHub, publishing_hub

SOON = (429, "later"), (500, "broken"), (503, "busy"), (200, "")


@pytest.fixture
def hub() -> Iterator[PublishingHub]:
    with publishing_hub() as hub:
        yield hub


def chunks() -> Iterator[bytes]:
    yield b"a"
    yield b"b" * 100_000


@pytest.mark.parametrize("attack", SOON)
@pytest.mark.parametrize("chunked", [False, True])
def test_a_connection_serves_the_next_request_or_says_that_it_will_be_closed(
    hub: PublishingHub, attack: tuple[int, str], chunked: bool
) -> None:
    hub.attacks["POST /api/models/me/m/commit"] = attack
    connection = http.client.HTTPConnection("127.0.0.1", hub.server_port, timeout=60)
    for path, status in [("/api/models/me/m/commit/main", attack[0]), ("/api/nothing", 404)] * 2:
        connection.request("POST", path, body=chunks() if chunked else b"x" * 100_001, encode_chunked=chunked)
        answer = connection.getresponse()
        answer.read()
        assert answer.status == status
        if answer.will_close:
            connection.close()
    assert [len(body) for body in hub.said] == [100_001] * 4
    connection.close()


def test_a_dropped_request_is_read_to_its_end_and_not_answered(hub: PublishingHub) -> None:
    hub.attacks["POST /"] = "drop"
    connection = http.client.HTTPConnection("127.0.0.1", hub.server_port, timeout=60)
    connection.request("POST", "/api/models/me/m/commit/main", body=b"x" * 10_000_000)
    with pytest.raises(http.client.RemoteDisconnected):
        connection.getresponse()
    assert [len(body) for body in hub.said] == [10_000_000]
    connection.close()


def test_a_method_without_a_handler_is_answered_once_its_body_is_read(hub: PublishingHub) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", hub.server_port, timeout=60)
    connection.request("PATCH", "/api/nothing", body=b"x" * 10_000_000)
    answer = connection.getresponse()
    assert (answer.status, answer.will_close) == (501, True)
    connection.close()
