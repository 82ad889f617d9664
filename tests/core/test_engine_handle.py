"""The handle of a request: read at once or late, from threads and event loops, cancelled, failed."""

import asyncio
import threading

import pytest

from calpaca.core.engine import Chunk, Handle, Timings, TokenLogprob, Usage
from calpaca.core.errors import ModelError

LAST = Chunk("", (), finish_reason="stop", stop="###", usage=Usage(3, 2), timings=Timings(0.1, 0.2))


def finished_handle():
    handle = Handle()
    handle.put(Chunk("Hel", (1,), (TokenLogprob(1, "Hel", -0.5),)))
    handle.put(Chunk("lo", (2,), (TokenLogprob(2, "lo", -0.1),)))
    handle.put(LAST)
    return handle


def texts(handle):
    return [chunk.text for chunk in handle]


async def async_texts(handle):
    return [chunk.text async for chunk in handle]


def in_thread(work):
    thread = threading.Thread(target=work)
    thread.start()
    return thread


def test_the_completion_is_all_chunks_together():
    answer = finished_handle().result()
    assert (answer.text, answer.token_ids, answer.finish_reason, answer.stop) == ("Hello", (1, 2), "stop", "###")
    assert [entry.text for entry in answer.logprobs] == ["Hel", "lo"]
    assert answer.usage.total_tokens == 5
    assert answer.timings == Timings(0.1, 0.2)


def test_a_late_and_a_second_reader_get_everything():
    handle = finished_handle()
    assert texts(handle) == texts(handle) == ["Hel", "lo", ""]


async def test_async_readers_get_everything_too():
    handle = finished_handle()
    assert await async_texts(handle) == await async_texts(handle) == ["Hel", "lo", ""]
    assert (await handle).text == (await handle).text == "Hello"


def test_a_reader_waits_for_another_thread():
    handle = Handle()
    seen = []
    reader = in_thread(lambda: seen.extend(texts(handle)))
    for chunk in (Chunk("a"), Chunk("b"), LAST):
        handle.put(chunk)
    reader.join(5)
    assert seen == ["a", "b", ""]


async def test_an_event_loop_stays_free_while_a_handle_is_awaited():
    handle = Handle()
    ticks = 0

    async def tick():
        nonlocal ticks
        while not handle.done:
            ticks += 1
            await asyncio.sleep(0.001)

    def work():
        for chunk in (Chunk("a"), LAST):
            threading.Event().wait(0.02)
            handle.put(chunk)

    thread = in_thread(work)
    answer, _ = await asyncio.gather(async_texts(handle), tick())
    thread.join(5)
    assert answer == ["a", ""]
    assert ticks > 3


def test_one_handle_serves_a_thread_and_two_event_loops():
    handle = Handle()
    seen = []
    readers = [in_thread(lambda: seen.append(texts(handle)))]
    readers += [in_thread(lambda: seen.append(asyncio.run(async_texts(handle)))) for _ in range(2)]
    for chunk in (Chunk("a"), Chunk("b"), LAST):
        handle.put(chunk)
    for reader in readers:
        reader.join(5)
    assert seen == [["a", "b", ""]] * 3


def test_an_error_reaches_every_reader_after_the_chunks_before_it():
    handle = Handle()
    handle.put(Chunk("a"))
    handle.fail(ModelError("out of memory"))
    stream = iter(handle)
    assert next(stream).text == "a"
    for read in (lambda: next(stream), handle.result, lambda: texts(handle), lambda: asyncio.run(async_texts(handle))):
        with pytest.raises(ModelError, match="out of memory"):
            read()


async def test_an_error_reaches_an_awaiting_reader():
    handle = Handle()
    thread = in_thread(lambda: handle.fail(ModelError("out of memory")))
    with pytest.raises(ModelError, match="out of memory"):
        await handle
    thread.join(5)


def test_nothing_changes_after_the_end():
    handle = finished_handle()
    handle.put(Chunk("more"))
    handle.fail(ModelError("late"))
    assert handle.result().text == "Hello"


def test_a_result_that_takes_too_long_is_a_timeout():
    with pytest.raises(TimeoutError, match=r"0\.01 s"):
        Handle().result(0.01)


def test_cancel_asks_the_engine_and_only_while_it_runs():
    asked = []
    handle = Handle(lambda: asked.append(1))
    handle.cancel()
    handle.put(Chunk("", finish_reason="cancelled"))
    handle.cancel()
    assert asked == [1]
    assert handle.result().finish_reason == "cancelled"


def test_leaving_a_loop_cancels_and_reading_to_the_end_does_not():
    asked = []
    handle = Handle(lambda: asked.append(1))
    handle.put(Chunk("a"))
    for _ in handle:
        break
    assert asked == [1]
    handle.put(LAST)
    texts(handle)
    assert asked == [1]


async def test_leaving_an_async_loop_cancels():
    asked = []
    handle = Handle(lambda: asked.append(1))
    handle.put(Chunk("a"))
    stream = aiter(handle)
    await anext(stream)
    await stream.aclose()
    assert asked == [1]


async def test_cancelling_the_waiting_task_cancels_the_request():
    asked = []
    handle = Handle(lambda: asked.append(1))
    task = asyncio.create_task(async_texts(handle))
    await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert asked == [1]


def test_a_callback_is_called_once_with_the_ended_handle_early_or_late():
    ended: list[Handle] = []
    handle, failed = Handle(), Handle()
    handle.on_end(ended.append)
    handle.put(Chunk("Hel", (1,)))
    assert ended == []
    handle.put(LAST)
    handle.put(LAST)
    handle.on_end(ended.append)
    failed.on_end(ended.append)
    failed.fail(ModelError("gone"))
    assert ended == [handle, handle, failed]


def test_a_closed_event_loop_does_not_disturb_the_engine():
    handle = Handle()

    async def give_up():
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(async_texts(handle), 0.01)

    asyncio.run(give_up())
    handle.put(LAST)
    assert handle.result().finish_reason == "stop"
