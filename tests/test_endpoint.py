"""Requests to servers that fail: each is retried where that helps, none is waited for past its deadline."""

from __future__ import annotations

import time
from email.utils import formatdate

import pytest
from fake_server import Answer, closed_port, serving

from prefopt.endpoint import Endpoint, Patience, key_from
from prefopt.records import InputError

SOON = Patience(call=2.0, retries=3, backoff=0.01, longest_wait=0.3, cooldown=0.2)
WELL = Answer({"well": True})


def first(*answers: Answer):
    """One answer after the other; the last one again and again."""
    return lambda asked: answers[min(asked.number, len(answers) - 1)]


def asked(answer, patience=SOON, seconds=None, key=None):
    """The reply to one request, what the endpoint counted, and what the server saw."""
    with serving(answer) as server:
        endpoint = Endpoint(server.url, patience, key)
        try:
            return endpoint.ask("/x", {"a": 1}, seconds), endpoint.counts, server.asked
        finally:
            endpoint.close()


def test_an_answer_comes_back_as_json():
    reply, counts, seen = asked(first(WELL), key="secret")
    assert (reply.body, reply.why, reply.status) == ({"well": True}, "", 200)
    assert (seen[0].path, seen[0].body) == ("/v1/x", {"a": 1})
    assert seen[0].headers["authorization"] == "Bearer secret"
    assert counts == {"requests": 1}


@pytest.mark.parametrize(
    "fault", [Answer({}, 500), Answer({}, 503), Answer({}, fault="reset"), Answer({"a": 1}, fault="cut")]
)
@pytest.mark.fault(20)
def test_a_lost_request_is_tried_again(fault):
    reply, counts, seen = asked(first(fault, fault, WELL))
    assert reply.body == {"well": True}
    assert len(seen) == 3
    assert (counts["retries"], counts["lost"]) == (2, 2)


@pytest.mark.fault(20)
def test_tries_end_after_the_retries():
    reply, counts, seen = asked(first(Answer({"error": "on fire"}, 500)))
    assert reply.body is None and reply.status == 500 and "on fire" in reply.why
    assert len(seen) == 4


def test_an_error_of_the_caller_is_not_tried_again_and_shows_no_key():
    reply, counts, seen = asked(first(Answer({"error": "bad key secret-123"}, 401)), key="secret-123")
    assert len(seen) == 1 and reply.status == 401
    assert "bad key ***" in reply.why and "secret-123" not in reply.why


@pytest.mark.parametrize(
    "said", ["0.2", formatdate(time.time() + 3600, usegmt=True), "86400", "soon", "nan"], ids=range(5)
)
@pytest.mark.fault(19)
def test_a_busy_server_is_asked_again_after_the_time_it_names_but_not_much_later(said):
    before = time.monotonic()
    reply, counts, seen = asked(first(Answer({}, 429, {"retry-after": said}), WELL))
    waited = time.monotonic() - before
    assert reply.body == {"well": True}
    assert (counts["busy"], counts["lost"]) == (1, 0)
    assert waited < 1.5
    if said not in ("soon", "nan"):
        assert waited >= 0.2


@pytest.mark.parametrize("fault", ["hang", "drip"])
@pytest.mark.fault(20)
def test_no_answer_is_waited_for_past_its_deadline(fault):
    before = time.monotonic()
    reply, counts, _ = asked(first(Answer({"long": "x" * 200}, fault=fault)), seconds=0.3)
    assert reply.body is None and ("in time" in reply.why or "within" in reply.why)
    assert time.monotonic() - before < 1.3


@pytest.mark.fault(20)
def test_a_batch_keeps_what_was_answered_before_its_deadline():
    def answer(request):
        return Answer({}, fault="hang") if request.body["n"] % 2 else Answer(request.body)

    with serving(answer) as server:
        endpoint = Endpoint(server.url, SOON)
        before = time.monotonic()
        found = endpoint.gather([lambda n=n: endpoint.send("/x", {"n": n}) for n in range(6)], 0.5)
        assert time.monotonic() - before < 1.5
        assert [None if reply is None else reply.body for reply in found] == [
            {"n": 0},
            None,
            {"n": 2},
            None,
            {"n": 4},
            None,
        ]
        assert endpoint.ask("/x", {"n": 8}).body == {"n": 8}
        endpoint.close()


@pytest.mark.fault(20)
def test_a_closed_port_is_refused_at_once():
    endpoint = Endpoint(f"http://127.0.0.1:{closed_port()}/v1", Patience(retries=0))
    reply = endpoint.ask("/x", {})
    assert reply.body is None and "ConnectError" in reply.why
    endpoint.close()


@pytest.mark.fault(20)
def test_after_many_losses_nobody_asks_until_the_breaker_cooled_down():
    state = {"well": False}
    with serving(lambda asked: WELL if state["well"] else Answer({}, 500)) as server:
        patience = Patience(retries=0, opens_after=3, cooldown=0.3)
        endpoint = Endpoint(server.url, patience)
        for _ in range(10):
            assert endpoint.ask("/x", {}).body is None
        assert len(server.asked) == 3
        assert endpoint.counts["refused by the breaker"] == 7
        state["well"] = True
        time.sleep(0.35)
        assert endpoint.ask("/x", {}).body == {"well": True}
        assert endpoint.ask("/x", {}).body == {"well": True}
        endpoint.close()


def test_no_more_requests_at_once_than_allowed():
    def answer(request):
        time.sleep(0.05)
        return WELL

    with serving(answer) as server:
        endpoint = Endpoint(server.url, Patience(concurrency=3))
        assert all(endpoint.gather([lambda: endpoint.send("/x", {}) for _ in range(12)], 5.0))
        assert server.most == 3
        endpoint.close()


def test_requests_begin_at_the_rate_that_is_allowed():
    with serving(lambda asked: WELL) as server:
        endpoint = Endpoint(server.url, Patience(per_second=20))
        before = time.monotonic()
        assert all(endpoint.gather([lambda: endpoint.send("/x", {}) for _ in range(7)], 5.0))
        assert time.monotonic() - before >= 6 / 20 - 0.01
        endpoint.close()


@pytest.mark.fault(21)
def test_what_is_not_json_is_an_absent_answer_with_a_reason():
    for raw in (b"<html>", b"\xff\xfe", b"[" * 200_000):
        reply, _, seen = asked(first(Answer(raw)))
        assert reply.body is None and "not JSON" in reply.why
        assert len(seen) == 1


@pytest.mark.parametrize("url", ["", "localhost:8000", "ftp://x/y", "http://", "file:///etc/passwd"])
def test_what_is_no_address_is_refused(url):
    with pytest.raises(InputError, match="not an address"):
        Endpoint(url)


def test_a_key_comes_from_the_environment(monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", " abc\n")
    assert key_from("JUDGE_KEY") == "abc"
    assert key_from("") is None
    monkeypatch.delenv("JUDGE_KEY")
    with pytest.raises(InputError, match="JUDGE_KEY is not set"):
        key_from("JUDGE_KEY")


@pytest.mark.fault(20)
def test_a_call_that_hangs_is_given_up_long_before_the_batch_and_makes_room_for_the_next():
    def answer(request):
        return Answer({}, fault="hang") if request.body["n"] == 0 else WELL

    with serving(answer) as server:
        endpoint = Endpoint(server.url, Patience(call=0.3, concurrency=1))
        before = time.monotonic()
        found = endpoint.gather([lambda n=n: endpoint.send("/x", {"n": n}) for n in range(3)], 10.0)
        assert time.monotonic() - before < 5
        assert [reply.body for reply in found] == [None, {"well": True}, {"well": True}]
        assert "in time" in found[0].why and endpoint.counts["lost"] == 1
        endpoint.close()
