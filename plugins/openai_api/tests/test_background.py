"""Responses that are made in the background: their states, streams, ends, and what is left of them."""

from __future__ import annotations

import asyncio
import json
import signal
import time

import httpx2
import pytest

from calpaca.core.errors import ModelError
from calpaca_openai_api.response_store import ResponseStore, Stored
from calpaca_openai_api.settings import KeySettings, digest

PATH = "/v1/responses"
SLOW = {"delay": 0.05}
TEXT = "one two three four five six"


async def begun(server, **fields) -> str:
    """The id of a response that has just been queued."""
    made = await server.post(PATH, **{"input": "Hi", "background": True, **fields})
    assert made.status_code == 200, made.text
    assert made.json()["status"] == "queued"
    return made.json()["id"]


async def shown(server, id: str) -> dict:
    return (await server.client.get(f"{PATH}/{id}")).json()


async def ended(server, id: str) -> dict:
    """The response when it has ended."""
    while (found := await shown(server, id))["status"] in ("queued", "in_progress"):
        await asyncio.sleep(0.01)
    return found


async def streamed(server, events_of, id: str, **query) -> list[dict]:
    response = await server.client.get(f"{PATH}/{id}", params={"stream": "true", **query})
    assert response.status_code == 200, response.text
    return events_of(response.text)


async def test_a_response_is_queued_then_in_progress_then_completed(server, fits):
    asked = server(TEXT, engine=SLOW, max_running=1)
    first, second = await begun(asked), await begun(asked)
    states = []
    while not states or states[-1] != "completed":
        found = await shown(asked, second)
        fits("Response", found)
        if not states or states[-1] != found["status"]:
            states.append(found["status"])
        await asyncio.sleep(0.01)
    assert states == ["queued", "in_progress", "completed"]
    assert found["output"][0]["content"][0]["text"] == TEXT
    assert found["background"] is True
    assert (await shown(asked, first))["status"] == "completed"
    assert asked.engine.peak == 1


async def test_every_event_of_a_background_stream_fits_and_is_kept(server, events_of, streamed_response, fits_event):
    asked = server(TEXT)
    live = await streamed_response(asked, input="Hi", background=True)
    for event in live:
        fits_event(event)
    kinds = [event["type"].removeprefix("response.") for event in live]
    assert kinds[:3] == ["created", "queued", "in_progress"]
    assert kinds[-1] == "completed"
    assert [event["sequence_number"] for event in live] == list(range(len(live)))
    id = live[0]["response"]["id"]
    again = await streamed(asked, events_of, id)
    assert again == live
    assert await streamed(asked, events_of, id, starting_after=4) == live[5:]
    assert await streamed(asked, events_of, id, starting_after=len(live)) == []


async def test_a_stream_is_followed_from_any_event_on_while_it_runs(server, events_of):
    asked = server(TEXT, engine=SLOW)
    id = await begun(asked)
    all_events, rest = await asyncio.gather(
        streamed(asked, events_of, id), streamed(asked, events_of, id, starting_after=5)
    )
    assert all_events[6:] == rest
    assert all_events[-1]["response"] == await shown(asked, id)


async def test_what_was_not_made_in_the_background_is_not_streamed_again(server):
    asked = server()
    id = (await asked.post(PATH, input="Hi")).json()["id"]
    refused = await asked.client.get(f"{PATH}/{id}", params={"stream": "true"})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "stream")
    refused = await asked.client.get(f"{PATH}/{id}", params={"starting_after": 3})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "starting_after")


async def test_a_cancelled_response_stops_the_work_and_stays_cancelled(server, events_of, until, fits):
    asked = server(TEXT * 50, engine=SLOW)
    id = await begun(asked)
    follower = asyncio.create_task(streamed(asked, events_of, id))
    assert await until(lambda: asked.engine.running == 1)
    cancelled = (await asked.client.post(f"{PATH}/{id}/cancel")).json()
    fits("Response", cancelled)
    assert cancelled["status"] == "cancelled"
    assert await until(lambda: asked.engine.running == asked.api.admission.running == 0)
    assert (await follower)[-1]["type"] != "response.completed"
    assert (await asked.client.post(f"{PATH}/{id}/cancel")).json() == cancelled
    assert await shown(asked, id) == cancelled
    assert await shown(server(), id) == cancelled


async def test_a_queued_response_is_cancelled_before_it_runs(server, until):
    asked = server(TEXT, engine=SLOW, max_running=1)
    running, waiting = await begun(asked), await begun(asked)
    assert (await asked.client.post(f"{PATH}/{waiting}/cancel")).json()["status"] == "cancelled"
    assert asked.api.admission.waiting == 0
    assert (await ended(asked, running))["status"] == "completed"
    assert len(asked.engine.requests) == 1


async def test_only_what_is_made_in_the_background_can_be_cancelled(server, fits):
    asked = server()
    id = (await asked.post(PATH, input="Hi")).json()["id"]
    refused = await asked.client.post(f"{PATH}/{id}/cancel")
    assert refused.status_code == 400
    fits("ErrorResponse", refused.json())
    assert "synchronous" in refused.json()["error"]["message"]
    assert (await asked.client.post(f"{PATH}/resp_1/cancel")).status_code == 404
    done = await begun(asked)
    whole = await ended(asked, done)
    assert (await asked.client.post(f"{PATH}/{done}/cancel")).json() == whole


async def test_a_deleted_response_is_made_no_longer(server, until):
    asked = server(TEXT * 50, engine=SLOW)
    id = await begun(asked)
    assert await until(lambda: asked.engine.running == 1)
    assert (await asked.client.delete(f"{PATH}/{id}")).json()["deleted"] is True
    assert await until(lambda: asked.engine.running == 0)
    assert (await asked.client.get(f"{PATH}/{id}")).status_code == 404


async def test_an_engine_that_crashes_makes_a_failed_response(server, events_of, fits, until):
    asked = server([ModelError("The engine has crashed.")])
    id = await begun(asked)
    failed = await ended(asked, id)
    fits("Response", failed)
    assert failed["status"] == "failed"
    assert failed["error"] == {"code": "server_error", "message": "The engine has crashed."}
    assert await until(lambda: asked.api.background.find("", id) is None)
    assert (await streamed(asked, events_of, id))[-1]["response"] == failed == await shown(server(), id)


async def test_it_is_the_keys_own_and_counts_for_it(server, until):
    keys = {name: KeySettings(sha256=digest(name), concurrency=1, tokens_per_minute=1000) for name in ("ann", "bob")}
    asked = server(TEXT, keys=keys, engine=SLOW)
    asked.client.headers["Authorization"] = "Bearer ann"
    id = await begun(asked)
    assert await until(lambda: asked.api.admission.running == 1)
    too_many = await asked.post(PATH, input="Hi", background=True)
    assert (too_many.status_code, too_many.json()["error"]["code"]) == (429, "rate_limit_exceeded")
    asked.client.headers["Authorization"] = "Bearer bob"
    for refused in (
        await asked.client.get(f"{PATH}/{id}"),
        await asked.client.post(f"{PATH}/{id}/cancel"),
        await asked.client.delete(f"{PATH}/{id}"),
        await asked.client.get(f"{PATH}/{id}/input_items"),
    ):
        assert refused.status_code == 404
    refused = await asked.post(PATH, input="Go on", previous_response_id=id)
    assert refused.json()["error"]["code"] == "previous_response_not_found"
    asked.client.headers["Authorization"] = "Bearer ann"
    used = (await ended(asked, id))["usage"]
    assert await until(
        lambda: f'key="ann",model="fake"}} {used["output_tokens"]}.0' in asked.api.metrics.text().decode()
    )
    left = int((await asked.post(PATH, input="Hi")).headers["x-ratelimit-remaining-tokens"])
    assert left <= 1000 - used["total_tokens"] + 5  # a little has come back meanwhile


async def test_a_response_that_is_not_complete_cannot_be_continued(server):
    asked = server(TEXT, engine=SLOW)
    id = await begun(asked)
    refused = await asked.post(PATH, input="Go on", previous_response_id=id)
    assert refused.json()["error"]["code"] == "previous_response_not_complete"
    assert [item["content"][0]["text"] for item in (await asked.client.get(f"{PATH}/{id}/input_items")).json()["data"]]
    await ended(asked, id)
    assert (await asked.post(PATH, input="Go on", previous_response_id=id)).status_code == 200


async def test_a_full_queue_refuses_what_would_run_in_the_background(server, until):
    asked = server(TEXT, engine=SLOW, max_running=1, max_waiting=0)
    await begun(asked)
    assert await until(lambda: asked.api.admission.running == 1)
    assert (await asked.post(PATH, input="Hi", background=True)).status_code == 503


async def test_an_end_lets_responses_end_or_fails_them(server, events_of):
    quick, slow = server(TEXT), server(TEXT * 50, engine=SLOW)
    done, stopped = await begun(quick), await begun(slow)
    await quick.api.background.end(10)
    await slow.api.background.end(0.1)
    after = server()
    assert (await shown(after, done))["status"] == "completed"
    failed = await shown(after, stopped)
    assert failed["status"] == "failed"
    assert "shut down" in failed["error"]["message"]
    assert (await streamed(after, events_of, stopped))[-1]["response"] == failed


async def test_an_end_that_cannot_be_written_down_is_a_failure(server, tmp_path, monkeypatch, until):
    asked = server(TEXT)
    monkeypatch.setattr(ResponseStore, "end", _full_disk)
    id = await begun(asked)
    assert await until(lambda: asked.api.background.find("", id) is None)
    monkeypatch.undo()
    assert (await shown(asked, id))["status"] == "failed"


def _full_disk(*_: object) -> None:
    raise OSError("No space left on device")


async def test_what_another_living_server_makes_is_shown_and_not_cancelled(server):
    one, other = server(TEXT, engine=SLOW), server()
    id = await begun(one)
    assert (await shown(other, id))["status"] == "queued"
    for refused in (
        await other.client.post(f"{PATH}/{id}/cancel"),
        await other.client.get(f"{PATH}/{id}", params={"stream": "true"}),
    ):
        assert refused.status_code == 409
    await ended(one, id)
    assert (await shown(other, id))["status"] == "completed"


async def test_a_response_whose_server_was_killed_has_failed(server, tmp_path, events_of, fits, fits_event):
    (tmp_path / "kept").mkdir()
    store = ResponseStore(tmp_path / "kept" / "responses.sqlite", 10, 60)
    asked = server()
    made = (await asked.post(PATH, input="Hi", store=False)).json()
    store.add("", Stored({**made, "status": "queued", "output": []}, [], None, "a process that is gone"))
    found = await shown(asked, made["id"])
    fits("Response", found)
    assert (found["status"], found["error"]["code"]) == ("failed", "server_error")
    (event,) = await streamed(asked, events_of, made["id"], starting_after=7)
    fits_event(event)
    assert (event["type"], event["sequence_number"]) == ("response.failed", 8)
    assert (await asked.client.post(f"{PATH}/{made['id']}/cancel")).json() == found


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=["kill", "term"])
def test_after_a_restart_a_response_has_a_definite_state(program, tmp_path, number):
    flags = ("--responses", str(tmp_path / "responses.sqlite"), "--drain", "1")
    process, url = program(*flags)
    # At this temperature hardly any answer ends by itself while the server waits for it.
    body = {"input": "Count.", "max_output_tokens": 4000, "temperature": 2.0, "background": True}
    id = httpx2.post(f"{url}/responses", json=body, timeout=60).json()["id"]
    end = time.monotonic() + 60
    while not (found := httpx2.get(f"{url}/responses/{id}").json())["output"]:
        assert time.monotonic() < end
        time.sleep(0.05)
    assert found["status"] == "in_progress"
    process.send_signal(number)
    process.wait(30)
    _, url = program(*flags)
    found = httpx2.get(f"{url}/responses/{id}").json()
    assert (found["status"], found["error"]["code"]) == ("failed", "server_error")
    with httpx2.stream("GET", f"{url}/responses/{id}", params={"stream": "true"}) as response:
        frames = response.read().decode().strip().split("\n\n")
    assert json.loads(frames[-2].partition("data: ")[2])["type"] == "response.failed"
