"""Asks a language model over HTTP: any endpoint that speaks OpenAI's chat completions.

    POST ENDPOINT/chat/completions   {"model", "messages", "max_tokens", "temperature", …}

Where an answer does not come because of the moment (429, 5xx, a timeout, a lost connection), the request is made again
after 1, 2, 4, … seconds, or after what Retry-After says. Where the endpoint says that the request itself is wrong for
every prompt (401, 403, 404, a certificate, a redirect), the run ends. What it sends is untrusted: length, encoding and
form are checked, and a reply that does not fit is no answer.

The key is read from an environment variable, is sent as a header and nowhere else, and is in no message or file.
Redirects are not followed, since they would carry it elsewhere.
"""

import dataclasses
import functools
import http.client
import ipaddress
import json
import os
import ssl
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from typing import IO, Any

from data_pipelines.errors import InputError, shown

Message = dict[str, str]

LONGEST = 1 << 20  # bytes of a reply, at most
LONGEST_PAUSE = 60.0  # seconds
WRONG_FOR_ALL = (301, 302, 303, 307, 308, 401, 402, 403, 404, 405)
PASSING = (408, 409, 425, 429)  # and 5xx


class EndpointError(InputError):
    """The endpoint answers nothing: its address, the key or the model is wrong."""


class Unanswered(Exception):
    """No answer to one request: a short reason, and what was found. `final` is false where it may come later."""

    def __init__(self, reason: str, found: str, *, final: bool):
        super().__init__(f"{reason}: {found}")
        self.reason, self.found, self.final = reason, found, final


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any, **__: Any) -> None:
        return None  # so that it is an error with its own status


@dataclasses.dataclass(frozen=True)
class Endpoint:
    """Where and how to ask; may be used by several threads at once. `extra`: further fields of the request."""

    url: str
    model: str
    max_tokens: int = 1024
    temperature: float = 1.0
    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    key: str | None = dataclasses.field(default=None, repr=False)
    timeout_s: float = 120.0  # of one request
    retries: int = 5
    backoff_s: float = 1.0
    sleep: Callable[[float], object] = time.sleep

    def __post_init__(self) -> None:
        parts = urllib.parse.urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
            raise InputError(f"--endpoint: found {self.url!r}; expected an address such as http://127.0.0.1:8000/v1")
        if parts.username or parts.password:
            raise InputError("--endpoint: found a user or password in the address; expected the key in the environment")

    def ask(self, messages: Sequence[Message]) -> str:
        """The text of the answer. Raises Unanswered, and EndpointError where going on makes no sense."""
        body = {"model": self.model, "messages": list(messages), "max_tokens": self.max_tokens}
        body |= {"temperature": self.temperature, "stream": False, **self.extra}
        data = json.dumps(body).encode()
        for attempt in range(self.retries + 1):
            try:
                return answer_of(self.post(data))
            except _Passing as error:
                if attempt == self.retries:
                    raise Unanswered("no_reply", error.found, final=False) from None
                pause = self.backoff_s * 2**attempt if error.pause is None else error.pause
                self.sleep(min(pause, LONGEST_PAUSE))
        raise AssertionError("unreachable")

    def post(self, data: bytes) -> bytes:
        """The body of a reply with status 200."""
        headers = {"Content-Type": "application/json", "Accept": "application/json", "User-Agent": "easylm_plus"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        request = urllib.request.Request(f"{self.url.rstrip('/')}/chat/completions", data, headers, method="POST")
        deadline = time.monotonic() + self.timeout_s
        try:
            with self.opener.open(request, timeout=self.timeout_s) as reply:
                return read(reply, deadline)
        except urllib.error.HTTPError as error:
            with error:
                raise self.refused(error, deadline) from None
        except (OSError, http.client.HTTPException) as error:  # URLError and timeouts are OSErrors
            reason = getattr(error, "reason", error)
            if isinstance(reason, ssl.SSLCertVerificationError):
                raise EndpointError(f"{self.url}: found {reason}; expected a certificate that is trusted") from None
            raise _Passing(f"{type(reason).__name__}: {reason}") from None

    @functools.cached_property  # it reads all certificates
    def opener(self) -> urllib.request.OpenerDirector:
        """Without redirects, and without the environment's proxies for this machine itself."""
        proxies = [urllib.request.ProxyHandler({})] if is_loopback(self.url) else []
        return urllib.request.build_opener(_NoRedirect(), *proxies)

    def refused(self, error: urllib.error.HTTPError, deadline: float) -> Exception:
        try:
            said = read(error, deadline)[:2000].decode(errors="replace")
        except (OSError, http.client.HTTPException, _Passing, Unanswered):
            said = ""
        found = f"HTTP {error.code} ({shown(said)})"
        if error.code in WRONG_FOR_ALL:
            return EndpointError(f"{self.url}: found {found}; expected answers: look at the address, model and key")
        if error.code in PASSING or error.code >= 500:
            return _Passing(found, retry_after(error.headers.get("Retry-After")))
        return Unanswered("refused", found, final=True)


class _Passing(Exception):
    def __init__(self, found: str, pause: float | None = None):
        super().__init__(found)
        self.found, self.pause = found, pause


def retry_after(value: str | None) -> float | None:
    """Seconds; None without a header, and for a date."""
    return float(value) if value and value.isascii() and value.isdigit() and len(value) < 6 else None


def is_loopback(url: str) -> bool:
    host = urllib.parse.urlsplit(url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def read(reply: IO[bytes], deadline: float) -> bytes:
    """The whole body, however slowly it comes, until the deadline."""
    chunks, size = [], 0
    while chunk := reply.read1(1 << 16):  # type: ignore[attr-defined]  # what there is, not all of 64 kB
        chunks.append(chunk)
        size += len(chunk)
        if size > LONGEST:
            raise Unanswered("too_long", f"a reply of more than {LONGEST:,} bytes", final=True)
        if time.monotonic() > deadline:
            raise _Passing("a reply that did not end in time")
    length = getattr(reply, "length", None)
    if length:
        raise _Passing(f"a reply that ended {length} bytes early")
    return b"".join(chunks)


def answer_of(body: bytes) -> str:
    """The text of the first choice. Raises Unanswered where there is none."""
    try:
        reply = json.loads(body.decode())
    except UnicodeDecodeError:
        raise Unanswered("not_utf8", "a reply that is not UTF-8", final=True) from None
    except (ValueError, RecursionError) as error:
        raise Unanswered("malformed", f"a reply that is not JSON ({type(error).__name__})", final=True) from None
    try:
        choice = reply["choices"][0]
        text, ended = choice["message"]["content"], choice.get("finish_reason")
    except (KeyError, IndexError, TypeError, AttributeError):
        raise Unanswered("malformed", "a reply without choices[0].message.content", final=True) from None
    if not isinstance(text, str):
        raise Unanswered("malformed", f"the content is {shown(text)}", final=True)
    if ended in ("length", "content_filter"):
        raise Unanswered("cut_off", f"an answer that ended by {ended}", final=True)
    try:
        text.encode()
    except UnicodeEncodeError:
        raise Unanswered("not_utf8", "an answer with half a surrogate pair", final=True) from None
    return text


def key_from(variable: str) -> str | None:
    """The key in an environment variable, if there is one. Raises InputError for one that no header can hold."""
    key = os.environ.get(variable, "").strip() if variable else ""
    if not key.isascii() or not key.isprintable():
        raise InputError(f"the environment variable {variable}: found letters that no key has; expected plain ASCII")
    return key or None
