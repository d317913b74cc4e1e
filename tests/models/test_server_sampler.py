"""A server as a source of completions: each is asked for with its own seed, and one that fails costs no other."""

from __future__ import annotations

import re
import threading

import pytest
from fake_server import Answer, chat, closed_port, serving

from prefopt.models.sampling import Sampling
from prefopt.models.server import Server, ServerOptions, Written
from prefopt.records import InputError

SAMPLING = Sampling(max_tokens=7, temperature=0.5, top_p=0.9)
TURNS = [{"role": "user", "content": "Hi"}]


def model_server(answer):
    """A server with one model and this way to complete."""
    lock, asked = threading.Lock(), []

    def respond(request):
        if request.path.endswith("/models"):
            return Answer({"data": [{"id": "writer"}]})
        with lock:
            asked.append(request)
        return answer(request)

    respond.asked = asked
    return respond


def text(said, finish="stop", **more):
    return Answer({"model": "writer-1", "choices": [{"index": 0, "text": said, "finish_reason": finish, **more}]})


def drawn(answer, prompts, n=1, sampling=SAMPLING, seeds=None, **options):
    respond = model_server(answer)
    with serving(respond) as server:
        settings = {"server_timeout": 2.0, "server_retries": 1, **options}
        sampler = Server(ServerOptions(server_url=server.url, **settings))
        try:
            return sampler.sample(prompts, n, sampling, seeds or list(range(len(prompts)))), respond.asked
        finally:
            sampler.close()


def echo(request):
    """The prompt and the seed, so that a completion is a function of both."""
    return text(f"{request.body['prompt']}/{request.body['seed']}")


def test_a_text_is_completed_and_a_conversation_answered():
    found, asked = drawn(
        lambda r: chat("hello", model="w") if "messages" in r.body else text("b", "length"), ["a", TURNS]
    )
    assert found == [[Written("b", False, "", "writer-1")], [Written("hello", True, "", "w")]]
    bodies = {request.path: request.body for request in asked}
    assert bodies["/v1/completions"]["prompt"] == "a" and bodies["/v1/chat/completions"]["messages"] == TURNS
    body = bodies["/v1/completions"]
    assert (body["model"], body["max_tokens"], body["temperature"], body["top_p"]) == ("writer", 7, 0.5, 0.9)
    assert not {"top_k", "min_p", "stop"} & body.keys()


def test_every_completion_has_a_seed_of_its_own_that_depends_on_nothing_else():
    whole, _ = drawn(echo, ["a", "b"], n=3, seeds=[5, 6])
    assert len({written.text for own in whole for written in own}) == 6
    alone, _ = drawn(echo, ["b"], n=2, seeds=[6])
    assert alone[0] == whole[1][:2]


def test_what_only_some_servers_know_is_sent_where_it_was_asked_for():
    _, asked = drawn(echo, ["a"], sampling=Sampling(top_k=4, min_p=0.1, stop=("\n",)))
    assert (asked[0].body["top_k"], asked[0].body["min_p"], asked[0].body["stop"]) == (4, 0.1, ["\n"])


def test_a_stop_text_is_kept_where_the_server_names_it():
    found, _ = drawn(lambda r: text("one", stop_reason="END"), ["a"], sampling=Sampling(stop=("END",)))
    assert found[0][0] == Written("oneEND", True, "", "writer-1")
    found, _ = drawn(lambda r: text("one", stop_reason=50256), ["a"])
    assert found[0][0].text == "one"


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (Answer({"error": "overloaded"}, 500), "overloaded"),
        (Answer({}, fault="reset"), "Error"),
        (Answer({"no": 1}), "no completion"),
        (Answer({"choices": [{"text": None}]}), "no text"),
        (Answer(b"{"), "not JSON"),
        (Answer({"choices": [{"text": "x", "finish_reason": "content_filter"}]}), "filtered"),
        (Answer({"x": "y" * 500}, fault="drip"), "in time|within"),
    ],
)
def test_a_completion_that_fails_is_absent_with_a_reason_and_the_others_stay(fault, said):
    found, _ = drawn(lambda r: fault if r.body["prompt"] == "bad" else text("fine"), ["a", "bad", "c"])
    assert [own[0].text for own in found] == ["fine", None, "fine"]
    assert re.search(said, found[1][0].why)


def test_a_busy_moment_costs_a_retry():
    answers = iter([Answer({}, 429, {"retry-after": "0.1"}), text("fine")])
    assert drawn(lambda r: next(answers), ["a"])[0][0][0].text == "fine"


def test_a_server_that_calls_the_length_otherwise_is_understood():
    def answer(request):
        wrong = "max_tokens" in request.body
        return Answer({"error": "use max_completion_tokens instead"}, 400) if wrong else chat("fine")

    found, asked = drawn(answer, [TURNS, TURNS], server_concurrency=1)
    assert [own[0].text for own in found] == ["fine", "fine"]
    assert asked[-1].body["max_completion_tokens"] == 7


def test_a_server_that_is_down_or_of_many_models_is_said():
    sampler = Server(ServerOptions(server_url=f"http://127.0.0.1:{closed_port()}/v1"))
    with pytest.raises(InputError, match=r"no server answers.*change server_url"):
        sampler.sample(["a"], 1, SAMPLING, [0])
    sampler.close()
    with serving(lambda r: Answer({"data": [{"id": "one"}, {"id": "two"}]})) as server:
        with pytest.raises(InputError, match=r"lists 2 models \(one, two\); name one in server_model"):
            Server(ServerOptions(server_url=server.url)).ping()
        assert Server(ServerOptions(server_url=server.url, server_model="two")).ping() == "two"
    with serving(lambda r: Answer({}, 401)) as server, pytest.raises(InputError, match="server_key_variable"):
        Server(ServerOptions(server_url=server.url)).ping()


@pytest.mark.parametrize("options", [{"server_timeout": 0}, {"server_concurrency": 0}, {"server_per_second": -1}])
def test_options_out_of_range_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        ServerOptions(**options)
