"""Asking a server that may be slow, busy, broken or hostile."""

import json
import socket
import threading
import time

import pytest
from scripted_endpoint import Reply, says, scripted

from data_pipelines.errors import InputError
from data_pipelines.synthesis.endpoint import LONGEST, Endpoint, EndpointError, Unanswered, answer_of, key_from

HELLO = [{"role": "user", "content": "Hello?"}]


def endpoint(url, **options):
    pauses = []
    return Endpoint(url, "m", **{"timeout_s": 5.0, "retries": 2, "sleep": pauses.append, **options}), pauses


def test_what_is_asked_and_answered(monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # nobody is there
    with scripted(lambda body: says("Hi, é!")) as server:
        client, pauses = endpoint(server.url + "/", max_tokens=7, temperature=0.5, extra={"top_p": 0.9}, key="secret")
        assert client.ask(HELLO) == "Hi, é!" and pauses == []
    (request,), (headers,) = server.requests, server.headers
    said = {"model": "m", "messages": HELLO, "max_tokens": 7, "temperature": 0.5, "stream": False, "top_p": 0.9}
    assert request == {"path": "/v1/chat/completions", **said}
    assert headers["Authorization"] == "Bearer secret" and "secret" not in repr(client)


@pytest.mark.parametrize(
    ("first", "pauses"),
    (
        (Reply(b"busy", 429, {"Retry-After": "7"}), [7.0]),
        (Reply(b"busy", 429, {"Retry-After": "99999"}), [60.0]),
        (Reply(b"busy", 429, {"Retry-After": "soon"}), [1.0]),
        (Reply(b"", 500), [1.0]),
        (Reply(b"\xff" * 9, 503), [1.0]),
        (Reply(b"x" * 100, cut=True), [1.0]),
        (Reply(b"late", seconds=30.0), [1.0]),
    ),
)
def test_it_asks_again_where_the_moment_was_wrong(first, pauses):
    replies = iter((first, says("yes")))
    with scripted(lambda body: next(replies)) as server:
        client, paused = endpoint(server.url, timeout_s=0.5)
        assert client.ask(HELLO) == "yes"
    assert paused == pauses and len(server.requests) == 2


def test_it_gives_up_in_the_end():
    with scripted(lambda body: Reply(b"", 502)) as server:
        client, pauses = endpoint(server.url, retries=4)
        with pytest.raises(Unanswered, match="no_reply: HTTP 502") as error:
            client.ask(HELLO)
    assert not error.value.final and pauses == [1.0, 2.0, 4.0, 8.0] and len(server.requests) == 5
    client, _ = endpoint(server.url)  # nobody is there any more
    with pytest.raises(Unanswered, match="no_reply: ConnectionRefusedError"):
        client.ask(HELLO)


@pytest.mark.parametrize(
    ("reply", "reason"),
    (
        (Reply(b"{"), "malformed"),
        (Reply(b"[" * 100_000), "malformed"),
        (Reply(b""), "malformed"),
        (Reply(b"null"), "malformed"),
        (Reply(b'{"choices": []}'), "malformed"),
        (Reply(b'{"choices": [{"message": "text"}]}'), "malformed"),
        (Reply(b'{"choices": [{"message": {"content": null}}]}'), "malformed"),
        (Reply(b'{"choices": [{"message": {"content": ["a"]}}]}'), "malformed"),
        (Reply(b'{"choices": [{"message": {"content": "' + b"\xff" + b'"}}]}'), "not_utf8"),
        (Reply(b'{"choices": [{"message": {"content": "\\ud800"}}]}'), "not_utf8"),
        (Reply(json.dumps({"choices": [{"message": {"content": "hi"}}]}).encode("utf-16")), "not_utf8"),
        (Reply(b" " * (LONGEST + 1)), "too_long"),
        (says("cut", finish_reason="length"), "cut_off"),
        (says("cut", finish_reason="content_filter"), "cut_off"),
        (Reply(b"too many tokens", 400), "refused"),
        (Reply(b"", 422), "refused"),
    ),
)
def test_what_is_no_answer(reply, reason):
    with scripted(lambda body: reply) as server:
        client, pauses = endpoint(server.url)
        with pytest.raises(Unanswered) as error:
            client.ask(HELLO)
    assert error.value.reason == reason and error.value.final and not pauses and len(server.requests) == 1


@pytest.mark.parametrize("status", (401, 403, 404, 302, 307))
def test_what_is_wrong_for_every_prompt_ends_the_run(status):
    with scripted(lambda body: says("elsewhere")) as other:
        reply = Reply(b"no\x1b[31m", status, {"Location": other.url})
        with scripted(lambda body: reply) as server:
            client, _ = endpoint(server.url, key="secret")
            with pytest.raises(
                EndpointError, match=f"found HTTP {status}.*look at the address, model and key"
            ) as error:
                client.ask(HELLO)
    assert not other.requests and "secret" not in str(error.value) and "\x1b" not in str(error.value)


def test_a_reply_that_drips_ends(monkeypatch):
    """A byte now and then would be no timeout of the socket."""
    server = socket.create_server(("127.0.0.1", 0))

    def drip():
        while True:
            try:
                connection, _ = server.accept()
                connection.recv(1 << 16)
                connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
                for _ in range(1000):
                    connection.sendall(b"x")
                    time.sleep(0.05)
            except OSError:
                return

    threading.Thread(target=drip, daemon=True).start()
    client, _ = endpoint(f"http://127.0.0.1:{server.getsockname()[1]}", timeout_s=0.4, retries=0)
    start = time.monotonic()
    with pytest.raises(Unanswered, match="did not end in time"):
        client.ask(HELLO)
    assert time.monotonic() - start < 5
    server.close()


@pytest.mark.parametrize(
    "url", ("", "127.0.0.1:8000", "file:///etc/passwd", "ftp://x/v1", "http://", "http://x/v1?key=1")
)
def test_addresses_that_do_not_do(url):
    with pytest.raises(InputError, match="expected an address such as"):
        Endpoint(url, "m")


def test_keys_come_from_the_environment_alone(monkeypatch):
    with pytest.raises(InputError, match="expected the key in the environment"):
        Endpoint("http://user:secret@x/v1", "m")
    assert key_from("") is None and key_from("NO_SUCH_KEY") is None
    monkeypatch.setenv("KEY", " secret\n")
    assert key_from("KEY") == "secret"
    monkeypatch.setenv("KEY", "sec\nret")
    with pytest.raises(InputError, match="variable KEY: found letters that no key has") as error:
        key_from("KEY")
    assert "sec" not in str(error.value).replace("seconds", "")


def test_answers_by_other_servers():
    """Fields that some leave out, and some add."""
    assert answer_of(b'{"choices": [{"message": {"content": "a"}}]}') == "a"
    assert (
        answer_of(b'{"choices": [{"message": {"content": "", "tool_calls": []}, "finish_reason": null}], "usage": 1}')
        == ""
    )
