"""Requests to an HTTP server that may be slow, busy, broken or gone: many at once, none past its deadline.

Knows nothing of what is asked: judges, generation servers and engines share it.
"""

from __future__ import annotations

import asyncio
import base64
import json
import os
import random
import re
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any, NamedTuple, TypeVar
from urllib.parse import SplitResult, unquote, urlsplit, urlunsplit

from prefopt.records import HIDDEN, InputError, discreet, keep_secret

T = TypeVar("T")
Task = Callable[[], Awaitable[T]]
BUSY = 429
RETRIED = {408, BUSY, *range(500, 600)}
LARGEST = 64 * 2**20  # bytes of an answer; a server that sends more is broken
GRACE = 0.5  # seconds past a deadline in which connections are given up


@dataclass(frozen=True)
class Patience:
    """How hard a server is tried.

    call: seconds for one request with its retries. retries: further tries after a busy answer (429), an error of the
    server (5xx) or of the connection. backoff: seconds before the first retry, doubled for each further one, with
    jitter. longest_wait: seconds at most that a server's Retry-After is obeyed. concurrency: requests under way at
    once. per_second: requests begun per second; 0 sets no limit. opens_after: tries lost in a row before the breaker
    opens and requests fail at once. cooldown: seconds before an open breaker lets one request try.
    """

    call: float = 60.0
    retries: int = 4
    backoff: float = 0.5
    longest_wait: float = 30.0
    concurrency: int = 16
    per_second: float = 0.0
    opens_after: int = 8
    cooldown: float = 15.0


class Reply(NamedTuple):
    """body: the answer, parsed from JSON; None where there is none, and then `why` says the reason. status: of the last
    answer; None where the server gave none.
    """

    body: Any
    why: str = ""
    status: int | None = None


class Endpoint:
    """A server's address with patience. Its requests run in a thread of their own, so that a caller always returns.

    url: what paths are appended to, without the login that the address may hold. key: sent as a bearer token, never
    shown. counts: requests, retries, busy answers, lost requests, refusals by the open breaker.
    """

    def __init__(self, url: str, patience: Patience = Patience(), key: str | None = None) -> None:
        parts = _parts(url)
        bare = urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))
        self.url, self.patience, self.counts = bare.rstrip("/"), patience, Counter[str]()
        self._local = parts.hostname in ("localhost", "127.0.0.1", "::1")
        self._secrets, self._authorization = _credentials(parts, key)
        self._lost = 0  # requests lost in a row
        self._closed_until = self._quiet_until = self._next_start = 0.0
        self._loop: asyncio.AbstractEventLoop | None = None
        self._owner = -1
        self._client: Any = None
        self._gate: asyncio.Semaphore | None = None

    # -- from any thread

    def gather(self, tasks: Sequence[Task[T]], seconds: float) -> list[T | None]:
        """The results of all tasks, in their order; None for those that did not end within so many seconds.

        Returns at most a second after the deadline. An exception of a task is raised here.
        """
        if not tasks:
            return []
        future = asyncio.run_coroutine_threadsafe(_all(tasks, seconds), self._running())
        try:
            return future.result(seconds + 2 * GRACE - 0.1)
        except FutureTimeout:  # the thread itself is held up
            future.cancel()
            return [None] * len(tasks)

    def ask(self, path: str, body: Any = None, seconds: float | None = None, retries: int | None = None) -> Reply:
        """One request and its answer: a POST of `body` as JSON, or a GET where there is none."""
        seconds = self.patience.call if seconds is None else seconds
        [reply] = self.gather([lambda: self.send(path, body, seconds, retries)], seconds)
        return reply or Reply(None, f"no answer within {seconds:g} s")

    def close(self) -> None:
        if self._loop is not None and self._owner == os.getpid():
            asyncio.run_coroutine_threadsafe(_shut(self._client, self._loop), self._loop)
        self._loop = self._client = None

    # -- within the thread

    async def send(
        self, path: str, body: Any = None, seconds: float | None = None, retries: int | None = None
    ) -> Reply:
        """As `ask`, for tasks of `gather`. The time for a call starts when its turn has come."""
        assert self._gate is not None
        seconds = self.patience.call if seconds is None else min(seconds, self.patience.call)
        retries = self.patience.retries if retries is None else retries
        async with self._gate:
            self.counts["requests"] += 1
            until = time.monotonic() + seconds
            for attempt in range(retries + 1):
                reply, wait = await self._try(path, body, until)
                pause = None if wait is None else max(wait, self._pause(attempt))
                if pause is None or attempt == retries or time.monotonic() + pause >= until:
                    break
                self.counts["retries"] += 1
                await asyncio.sleep(pause)
            return reply

    async def _try(self, path: str, body: Any, until: float) -> tuple[Reply, float | None]:
        """An answer, and the seconds to wait before another try; None where another would not help."""
        import httpx

        if not await self._turn(until):
            return Reply(None, f"{self.url}: busy, no turn in time", BUSY), None
        if not self._admitted():
            self.counts["refused by the breaker"] += 1
            return Reply(None, f"{self.url}: not asked, the last {self._lost} tries were lost"), None
        try:
            async with asyncio.timeout(max(until - time.monotonic(), 0)):
                status, headers, raw = await self._exchange(path, body)
        except TimeoutError:
            return self._failed(f"{self.url}: no answer in time"), None
        except (httpx.HTTPError, httpx.InvalidURL, OSError) as error:
            return self._failed(f"{self.url}: {type(error).__name__}: {error}"), 0.0
        if status == BUSY:
            self.counts["busy"] += 1
            wait = self._asked_to_wait(headers)
            self._quiet_until = max(self._quiet_until, time.monotonic() + wait)
            return Reply(None, f"{self.url}: busy (429): {self._shown(raw)}", status), wait
        if status in RETRIED:
            return self._failed(f"{self.url}: {status}: {self._shown(raw)}", status), self._asked_to_wait(headers)
        self._lost = 0
        if status != 200:
            return Reply(None, f"{self.url}: {status}: {self._shown(raw)}", status), None
        return _parsed(raw, self.url), None

    async def _exchange(self, path: str, body: Any) -> tuple[int, Any, bytes]:
        """Status, headers and body of one exchange."""
        method, content = ("GET", None) if body is None else ("POST", json.dumps(body).encode())
        headers = {"content-type": "application/json"} if content else {}
        if self._authorization:
            headers["authorization"] = self._authorization
        async with self._open().stream(method, self.url + path, content=content, headers=headers) as answer:
            raw = bytearray()
            async for piece in answer.aiter_bytes():
                raw += piece
                if len(raw) > LARGEST:
                    raise OSError(f"an answer of more than {LARGEST >> 20} MiB")
            return answer.status_code, answer.headers, bytes(raw)

    async def _turn(self, until: float) -> bool:
        """Wait until the rate limit, and a server that asked for quiet, let a request begin; False if not in time."""
        while (now := time.monotonic()) < (start := max(self._quiet_until, self._next_start)):
            if start >= until:
                return False
            await asyncio.sleep(start - now)
        if self.patience.per_second > 0:
            self._next_start = max(now, self._next_start) + 1 / self.patience.per_second
        return True

    def _admitted(self) -> bool:
        """Whether the breaker lets a request through; once it cooled down, one at a time."""
        if self._lost < self.patience.opens_after:
            return True
        if time.monotonic() < self._closed_until:
            return False
        self._closed_until = time.monotonic() + self.patience.cooldown
        return True

    def _failed(self, why: str, status: int | None = None) -> Reply:
        self.counts["lost"] += 1
        self._lost += 1
        if self._lost == self.patience.opens_after:
            self._closed_until = time.monotonic() + self.patience.cooldown
        return Reply(None, why, status)

    def _pause(self, attempt: int) -> float:
        """Seconds before a retry: doubling, with jitter, so that many clients do not come back at once."""
        return self.patience.backoff * 2**attempt * random.uniform(0.5, 1.5)

    def _asked_to_wait(self, headers: Any) -> float:
        """Retry-After in seconds, as a number or a date, at most as long as patience allows."""
        said = headers.get("retry-after", "")
        try:
            wait = float(said)
        except ValueError:
            try:
                wait = parsedate_to_datetime(said).timestamp() - time.time()
            except (ValueError, TypeError, IndexError, OverflowError):
                wait = 0.0
        return min(max(wait, 0.0), self.patience.longest_wait) if wait == wait else 0.0

    def _shown(self, raw: bytes) -> str:
        """The beginning of an error's text, without the key that a server may repeat."""
        text = discreet(" ".join(raw[:2000].decode("utf-8", "replace").split()))
        for secret in self._secrets:
            text = text.replace(secret, HIDDEN)
        return text[:300]

    def _open(self) -> Any:
        import httpx

        if self._client is None:
            limits = httpx.Limits(max_connections=self.patience.concurrency, max_keepalive_connections=None)
            # no timeouts of its own: those are per read, so that a drip of bytes would never end
            secure = self.url.startswith("https")  # loading certificates takes longer than a local answer
            self._client = httpx.AsyncClient(timeout=None, limits=limits, trust_env=not self._local, verify=secure)
        return self._client

    def _running(self) -> asyncio.AbstractEventLoop:
        """The event loop in its thread; a new one after a fork, where the thread is gone."""
        if self._loop is None or self._owner != os.getpid():
            self._loop, self._owner, self._client = asyncio.new_event_loop(), os.getpid(), None
            self._gate = asyncio.Semaphore(self.patience.concurrency)
            threading.Thread(target=self._loop.run_forever, daemon=True, name="prefopt-endpoint").start()
        return self._loop


def _parts(url: str) -> SplitResult:
    """An address taken apart. InputError where it is none, or its login was left out where it was written down."""
    try:
        parts = urlsplit(url)
        whole = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
    except ValueError:
        whole = False
    if not whole:
        raise InputError(f"{url!r} is not an address of a server; give one like http://127.0.0.1:8000/v1")
    if HIDDEN in parts.netloc:
        raise InputError(f"{url}: the login is not kept with a run; give the whole address again")
    return parts


def _credentials(parts: SplitResult, key: str | None) -> tuple[list[str], str | None]:
    """What must not be shown, and the header that proves who asks; None where nothing does."""
    if "@" not in parts.netloc:
        secrets, said = [key] if key else [], f"Bearer {key}" if key else None
    elif key:
        raise InputError(f"{parts.hostname}: the address holds a login and there is a key too; leave one of them out")
    else:
        user, password = unquote(parts.username or ""), unquote(parts.password or "")
        coded = base64.b64encode(f"{user}:{password}".encode()).decode()
        secrets, said = [one for one in (password or user, coded) if one], f"Basic {coded}"
    for secret in secrets:
        keep_secret(secret)
    return secrets, said


async def _all(tasks: Sequence[Task[T]], seconds: float) -> list[T | None]:
    running = [asyncio.ensure_future(task()) for task in tasks]
    done, late = await asyncio.wait(running, timeout=seconds)
    for task in late:
        task.cancel()
    if late:
        await asyncio.wait(late, timeout=GRACE)
    return [task.result() if task in done else None for task in running]


async def _shut(client: Any, loop: asyncio.AbstractEventLoop) -> None:
    """Close the connections, then end the thread."""
    try:
        if client is not None:
            await client.aclose()
    finally:
        loop.stop()


def _parsed(raw: bytes, url: str) -> Reply:
    try:
        return Reply(json.loads(raw), "", 200)
    except (ValueError, RecursionError):
        return Reply(None, discreet(f"{url}: the answer is not JSON: {raw[:80]!r}"), 200)


def require_name(option: str, variable: str) -> None:
    """ValueError unless `variable` can name an environment variable. It may be the key itself, so it is not shown."""
    if variable and not re.fullmatch(r"[A-Z_][A-Z0-9_]*", variable):
        raise ValueError(f"{option} takes the name of an environment variable, such as MY_KEY, and not the key itself")


def key_from(variable: str) -> str | None:
    """The key in an environment variable; None without a name. InputError where the variable is not set."""
    if not variable:
        return None
    key = os.environ.get(variable, "").strip()
    if not key:
        raise InputError(f"{variable} is not set; put the server's key there: export {variable}=...")
    if not key.isascii() or not key.isprintable():
        raise InputError(f"the key in {variable} holds characters that no key has; copy it anew")
    return key
