"""Keys, tokens and logins are in no file of a run, on neither stream and in no error."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from typing import Any

import pytest
from fake_server import Answer, closed_port, serving
from laws import save_model, write_rows

import prefopt
from prefopt import config
from prefopt.cli import main
from prefopt.endpoint import Endpoint, key_from
from prefopt.records import InputError, discreet, keep_secret, without_secrets

SECRET = "Planted-5ecret"
VARIABLES = ("HF_TOKEN", "WANDB_API_KEY", "JUDGE_KEY", "OPENAI_API_KEY")


@pytest.fixture(autouse=True)
def planted(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.setenv(name, f"{SECRET}-{name}")


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (f"http://me:{SECRET}@host:8000/v1: refused", "http://***@host:8000/v1: refused"),
        (f"'https://{SECRET}@host'", "'https://***@host'"),
        (f"GET https://h/x?a=1&api_key={SECRET}&b=2", "GET https://h/x?a=1&api_key=***&b=2"),
        (f"bad token {SECRET}-HF_TOKEN!", "bad token ***!"),
        ("mail a@b.c, see http://h/a@b and x?y=z", "mail a@b.c, see http://h/a@b and x?y=z"),
    ],
)
def test_what_is_a_secret_is_hidden_and_what_is_none_is_not(text: str, shown: str) -> None:
    assert discreet(text) == shown
    assert without_secrets({"a": [text, (text, 1)]}) == {"a": [shown, (shown, 1)]}
    assert str(InputError(text)) == shown


def test_what_is_logged_holds_no_secret(caplog: pytest.LogCaptureFixture) -> None:
    logging.getLogger("prefopt").warning("%s failed", f"http://me:{SECRET}@host")
    assert caplog.messages == ["http://***@host failed"]


def test_a_key_of_any_variable_is_hidden_once_it_was_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINE", f"{SECRET}-mine")
    keep_secret(key_from("MINE") or "")
    assert discreet(f"401: {SECRET}-mine") == "401: ***"


def test_a_login_in_an_address_is_sent_and_not_shown() -> None:
    def answer(asked: Any) -> Answer:
        return Answer({"error": f"who is {SECRET}? {asked.headers['authorization']}"}, 401)

    with serving(answer) as server:
        endpoint = Endpoint(server.url.replace("://", f"://me:{SECRET}@"))
        reply = endpoint.ask("/x", seconds=5.0)
        endpoint.close()
        assert server.asked[0].headers["authorization"].startswith("Basic ")
    assert endpoint.url == server.url and reply.status == 401
    assert SECRET not in reply.why and "who is ***? Basic ***" in reply.why


@pytest.mark.parametrize(
    ("url", "key", "said"),
    [
        (f"http://me:{SECRET}@host", "a-key-too", "a login and there is a key too"),
        ("http://***@host/v1", None, "the login is not kept with a run; give the whole address again"),
        (f"ftp://me:{SECRET}@host", None, "is not an address of a server"),
        ("http://[::1", None, "is not an address of a server"),
        ("http://host:99999", None, "is not an address of a server"),
    ],
)
def test_an_address_that_cannot_be_used_is_refused_without_its_login(url: str, key: str | None, said: str) -> None:
    with pytest.raises(InputError, match=said) as caught:
        Endpoint(url, key=key)
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize("option", ["judge_key_variable", "vllm_key_variable"])
def test_a_key_in_place_of_its_variables_name_is_refused_and_not_repeated(option: str) -> None:
    sections = config.sections("grpo")
    with pytest.raises(InputError, match=f"{option} takes the name of an environment variable") as caught:
        config.resolve(
            sections, {"model": "m", "data": "d", "out": "o"}, config.parse_overrides([f"{option}={SECRET}"])
        )
    assert SECRET not in str(caught.value)


# ---------------------------------------------------------------- whole runs


def judge(asked: Any) -> Answer:
    if asked.path.endswith("/models"):
        return Answer({"data": [{"id": "judge-1"}]})
    if asked.number % 5 == 4:
        return Answer({"error": f"overloaded; you are {asked.headers['authorization']}"}, 500)
    said = json.dumps({"score": asked.number % 10, "reason": "so"})
    return Answer({"model": "judge-1", "choices": [{"message": {"content": said}, "finish_reason": "stop"}]})


def holders(folder: Path) -> list[str]:
    return [str(path) for path in folder.rglob("*") if path.is_file() and SECRET.encode() in path.read_bytes()]


@pytest.mark.parametrize("how", ["login", "key"])
def test_a_judged_run_leaves_no_secret_anywhere(how: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model, data = save_model(tmp_path / "model"), write_rows(tmp_path / "prompts.jsonl", "prompts")
    words = [
        "train",
        "grpo",
        "--model",
        str(model),
        "--data",
        str(data),
        "--out",
        str(tmp_path / "run"),
        "--reward",
        "judge",
    ]
    words += ["num_completions=2", "batch_size=2", "max_steps=2", "max_tokens=4", "eval_fraction=0", "dtype=float32"]
    words += ["save_completions=null", "save_every=1", "judge_retries=0", "reward_failures=1", "judge_timeout=5"]
    with serving(judge) as server:
        address = server.url.replace("://", f"://me:{SECRET}@") if how == "login" else server.url
        own = [f"judge_url={address}", *(["judge_key_variable=JUDGE_KEY"] if how == "key" else [])]
        assert main([*words, *own]) == 0
        assert main([*words, *own, "--print-config"]) == 0
        seen = {asked.headers.get("authorization") for asked in server.asked}
    assert len(seen) == 1 and None not in seen  # it was sent
    said = capfd.readouterr()
    assert SECRET not in said.out + said.err
    assert holders(tmp_path / "run") == []
    if how == "login":
        assert "judge_url: http://***@127.0.0.1" in (tmp_path / "run" / "config.yaml").read_text()


def test_checkpoints_hold_no_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from prefopt.recipes.resume import options_of

    given = {"model": "m", "data": "d", "out": "o", "judge_url": f"http://me:{SECRET}@host/v1"}
    settings = config.resolve({**config.run_sections("prompts"), "objective": prefopt.GRPO}, given)
    noted = json.dumps(options_of(settings))
    assert SECRET not in noted and "http://***@host/v1" in noted


@pytest.mark.parametrize(
    "words",
    [
        ["--data", f"https://me:{SECRET}@host/rows.jsonl"],
        ["--model", f"https://me:{SECRET}@host/model"],
        ["--reward", f"https://me:{SECRET}@host/reward.py"],
        [f"judge_url=http://me:{SECRET}@127.0.0.1:{{port}}", "--reward", "judge"],
        [f"judge_url=[http://me:{SECRET}@host]"],
        [f"http://me:{SECRET}@host"],
    ],
    ids=["data", "model", "reward", "down", "type", "word"],
)
def test_errors_hold_no_secret(words: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    given = {"--model": str(save_model(tmp_path / "model")), "--out": str(tmp_path / "run")}
    given["--data"] = str(write_rows(tmp_path / "prompts.jsonl", "prompts"))
    own = [word.format(port=closed_port()) for word in words]
    rest = [part for pair in given.items() if pair[0] not in own for part in pair]
    assert main(["train", "grpo", *own, *rest]) == 2
    said = capfd.readouterr()
    assert re.search("error: ", said.err) and SECRET not in said.out + said.err
    assert holders(tmp_path) == []
