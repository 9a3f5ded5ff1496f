"""Who may ask: key, web pages, names of the host; ids, log and metrics."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable

import pytest

from tests.serve.conftest import Served
from tests.serve.fake_engine import FakeEngine, data_uri, picture, question
from tests.toy_server import wait_for
from vipllava.inference.protocol import EngineStopped
from vipllava.serve.app import build_app
from vipllava.serve.settings import ServerSettings
from vipllava.types import ConfigError

KEY = "sk-" + "k" * 40
BODY = {"model": "toy", "messages": [question("What?", data_uri(picture()))]}
GUARDED = ["/v1/models", "/v1/models/toy", "/metrics"]


def test_without_its_key_nobody_asks(serve: Callable[..., Served]):
    served = serve(api_key=KEY)
    for header in (None, f"Bearer {KEY}x", f"Bearer {KEY[:-1]}", f"Basic {KEY}", "Bearer", KEY,
                   "Bearer ", "Bearer \xe9"):  # fmt: skip
        headers = {} if header is None else {"Authorization": header}
        replies = [served.http.get(path, headers) for path in GUARDED]
        replies += [served.http.post(path, BODY, headers)
                    for path in ("/v1/chat/completions", "/v1/regions/preview")]  # fmt: skip
        for reply in replies:
            assert (reply.status, reply.error["code"]) == (401, "invalid_api_key"), header
            assert reply.headers["www-authenticate"] == "Bearer"
    assert not served.engine.asked
    headers = {"Authorization": f"Bearer {KEY}"}
    assert all(served.http.get(path, headers).status == 200 for path in GUARDED)
    assert served.http.chat(**BODY, headers=headers).status == 200


def test_probes_need_no_key_and_name_no_model_without_it(serve: Callable[..., Served]):
    served = serve(api_key=KEY)
    assert served.http.get("/health").json == {"status": "ok"}
    assert served.http.get("/ready").json == {"status": "ready"}
    found = served.http.get("/ready", {"Authorization": f"bearer {KEY}"}).json
    assert found == {"status": "ready", "models": {"toy": "ready"}}


def test_a_key_is_refused_before_a_body_is_read(serve: Callable[..., Served]):
    served = serve(api_key=KEY)
    found = served.http.ask("POST", "/v1/chat/completions", None, {"Content-Length": "50000000"})
    assert (found.status, found.headers["connection"]) == (401, "close")


def test_ready_says_which_model_does_not_answer(serve: Callable[..., Served]):
    served = serve(FakeEngine())
    served.engine.fault = EngineStopped("the device is lost")
    found = served.http.get("/ready")
    assert found.status == 503
    assert found.json == {"status": "not ready", "models": {"toy": "the device is lost"}}
    refused = served.http.chat(**BODY)
    assert (refused.status, refused.error["code"]) == (503, "engine_stopped")
    assert refused.headers["retry-after"] == "10"
    assert served.http.get("/health").status == 200
    served.engine.fault = None
    assert served.http.chat(**BODY).status == 200
    asked = len(served.engine.asked)
    assert all(served.http.get("/ready").status == 200 for _ in range(5))
    assert len(served.engine.asked) == asked  # an answer proves it for a while


def test_pages_of_other_origins(serve: Callable[..., Served]):
    page = "https://page.example"
    ask = {"Origin": page, "Access-Control-Request-Method": "POST",
           "Access-Control-Request-Headers": "authorization,content-type"}  # fmt: skip
    closed, opened = serve(), serve(cors_origins=(page,), api_key=KEY)
    assert "access-control-allow-origin" not in closed.http.chat(**BODY, headers=ask).headers
    found = opened.http.ask("OPTIONS", "/v1/chat/completions", headers=ask)
    assert (found.status, found.headers["access-control-allow-origin"]) == (200, page)
    assert "authorization" in found.headers["access-control-allow-headers"].lower()
    refused = opened.http.chat(**BODY, headers={"Origin": page})
    assert (refused.status, refused.headers["access-control-allow-origin"]) == (401, page)
    assert "X-Request-ID" in refused.headers["access-control-expose-headers"]
    other = opened.http.get("/health", {"Origin": "https://other.example"})
    assert "access-control-allow-origin" not in other.headers


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "localhost:80", "LOCALHOST", "[::1]:80", "127.3.2.1"]
)
def test_own_names(host: str, serve: Callable[..., Served]):
    assert serve().http.get("/health", {"Host": host}).status == 200


@pytest.mark.parametrize("host", ["evil.example", "evil.example:8000", "10.0.0.1", "[", "a b"])
def test_a_name_that_was_made_to_mean_this_machine(host: str, serve: Callable[..., Served]):
    found = serve().http.get("/v1/models", {"Host": host})
    assert (found.status, found.error["code"]) == (421, "unknown_host")
    known = ServerSettings(allowed_hosts=("evil.example",))
    assert known.knows_host(host) == host.startswith("evil")


def test_other_addresses_are_known_by_any_name():
    assert ServerSettings(host="0.0.0.0").knows_host("gpu7:8000")
    named = ServerSettings(host="0.0.0.0", allowed_hosts=("gpu7",))
    assert named.knows_host("gpu7:8000")
    assert not named.knows_host("gpu8")


def test_names_do_not_depend_on_case(serve: Callable[..., Served]):
    served = serve(allowed_hosts=("MyBox.local",), cors_origins=("HTTPS://Good.example",))
    for host in ("mybox.local", "MyBox.LOCAL:8000"):
        found = served.http.get("/health", {"Host": host, "Origin": "https://good.example"})
        assert found.status == 200
        assert found.headers["access-control-allow-origin"] == "https://good.example"


def test_request_ids(serve: Callable[..., Served]):
    served = serve()
    for sane in ("abc-1_2.Z", "a" * 64):
        assert served.http.get("/health", {"X-Request-ID": sane}).headers["x-request-id"] == sane
    made = [served.http.get("/nothing", {"X-Request-ID": bad}).headers["x-request-id"]
            for bad in ("", "a" * 65, "a b", '"x"', "\xe9")]  # fmt: skip
    assert all(re.fullmatch("[0-9a-f]{32}", each) for each in made)
    assert len(set(made)) == len(made)


def test_the_log(serve: Callable[..., Served], caplog: pytest.LogCaptureFixture):
    served = serve(api_key=KEY)
    headers = {"Authorization": f"Bearer {KEY}", "X-Request-ID": "mine"}
    secret = BODY | {"messages": [question("my secret words", data_uri(picture()))]}

    def requests() -> list[logging.LogRecord]:
        return [each for each in caplog.records if each.name == "vipllava.serve.requests"]

    with caplog.at_level(logging.INFO, "vipllava.serve.requests"):
        for stream in (False, True):
            assert served.http.chat(**secret, stream=stream, headers=headers).status == 200
        served.http.chat(**secret | {"model": "nope"}, headers=headers)
        served.http.chat(**secret)
        served.http.get("/health")
        served.http.get("/v1/nothing\u2028?key=hidden".replace("\u2028", "%E2%80%A8"), headers)
        wait_for(lambda: len(requests()) >= 5)  # a line follows its answer
    lines = [json.loads(each.getMessage()) for each in requests()]
    assert [each["status"] for each in lines] == [200, 200, 404, 401, 404]
    first = lines[0]
    assert {name: first[name] for name in ("request_id", "client", "method", "path", "model")} == {
        "request_id": "mine", "client": "127.0.0.1", "method": "POST",
        "path": "/v1/chat/completions", "model": "toy",
    }  # fmt: skip
    assert (first["prompt_tokens"], first["completion_tokens"]) == (14, 4)
    assert first["finish_reason"] == "stop"
    assert 0 <= first["first_token_s"] <= first["seconds"]
    assert lines[1]["stream"] is True
    assert (lines[2]["error"], "model" in lines[2]) == ("model_not_found", False)
    assert lines[3]["error"] == "invalid_api_key"
    text = caplog.text
    for hidden in (KEY, "secret words", "base64", "hidden", "nope"):
        assert hidden not in text


def test_metrics(serve: Callable[..., Served]):
    served = serve()
    for stream in (False, True):
        served.http.chat(**BODY, stream=stream)
    served.http.chat(**BODY, temperature=-1)
    served.http.chat(**BODY | {"model": "nope"})
    served.http.get("/made/up")
    wait_for(lambda: b'route="other"' in served.http.get("/metrics").body)
    found = served.http.get("/metrics")
    assert found.headers["content-type"].startswith("text/plain")
    text = found.body.decode()
    chat = 'route="/v1/chat/completions"'
    for line in (
        f'vipllava_requests_total{{model="toy",{chat},status="200"}} 2.0',
        f'vipllava_requests_total{{model="",{chat},status="404"}} 1.0',
        'vipllava_requests_total{model="",route="other",status="404"} 1.0',
        'vipllava_rejected_total{model="",reason="model_not_found"} 1.0',
        'vipllava_request_seconds_count{model="toy"} 2.0',
        'vipllava_first_token_seconds_count{model="toy"} 2.0',
        'vipllava_prompt_tokens_total{model="toy"} 28.0',
        'vipllava_completion_tokens_total{model="toy"} 8.0',
        'vipllava_running{model="toy"} 0.0',
        'vipllava_waiting{model="toy"} 0.0',
    ):
        assert line in text.splitlines(), text
    assert "made" not in text


def test_settings_that_mean_nothing():
    with pytest.raises(ConfigError, match=r"deadline_s=0.*port=70000.*api_key.*cors=example"):
        ServerSettings(deadline_s=0, port=70000, api_key="a b", cors_origins=("example.org",))
    with pytest.raises(ConfigError, match="name='a b'"):
        build_app({"a b": FakeEngine()}, ServerSettings())
    assert KEY not in repr(ServerSettings(api_key=KEY))
