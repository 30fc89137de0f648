from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable

import numpy as np
import pytest

from dlops.runtimes import Placement
from dlops.serve.queue import Answer, BatchDone, ClosedError, DeadlineError, InferenceQueue, OverloadedError
from dlops.signature import DimRange, Feed, Signature, TensorSpec

SIGNATURE = Signature(
    inputs=(TensorSpec(name="x", dtype="float32", shape=("batch", "length")),),
    outputs=(TensorSpec(name="y", dtype="float32", shape=("batch", "length")),),
    dims={"batch": DimRange(max=64), "length": DimRange(max=64)},
)
NO_BATCH_AXIS = Signature(
    inputs=(TensorSpec(name="x", dtype="float32", shape=("batch", "length")),),
    outputs=(TensorSpec(name="y", dtype="float32", shape=(1,)),),
    dims={"batch": DimRange(max=64), "length": DimRange(max=64)},
)


class DoublingSession:
    """y = 2x. Holds the runs back until `gate` is set, and keeps what it was given."""

    placement = Placement(runtime="fake", device="cpu", provider="fake", precision="fp32", threads=1)

    def __init__(self, signature: Signature = SIGNATURE) -> None:
        self.signature = signature
        self.gate = threading.Event()
        self.entered = threading.Event()
        self.seen: list[np.ndarray] = []

    def run(self, feed: Feed) -> Feed:
        self.entered.set()
        assert self.gate.wait(10)
        x = np.asarray(feed["x"])
        self.seen.append(x)
        if (x < 0).any():
            raise RuntimeError("negative")
        return {"y": x * 2}

    def close(self) -> None:
        pass


@pytest.fixture
def session() -> DoublingSession:
    return DoublingSession()


@pytest.fixture
def make_queue(session: DoublingSession):
    made: list[InferenceQueue] = []

    def make(**options) -> InferenceQueue:
        made.append(InferenceQueue(options.pop("session", session), **({"max_rows": 100, "max_batch": 8} | options)))
        return made[-1]

    yield make
    session.gate.set()
    for queue in made:
        assert queue.close(timeout_s=10)


def feed(*values: float, length: int = 2) -> Feed:
    return {"x": np.repeat(np.array(values, np.float32)[:, None], length, axis=1)}


async def occupied(queue: InferenceQueue, session: DoublingSession) -> asyncio.Future[Answer]:
    """The future of a first request that holds the thread, so that what follows waits."""
    first = queue.submit(feed(100), rows=1)
    await asyncio.to_thread(session.entered.wait, 10)
    return first


def test_an_idle_queue_runs_a_lone_request_at_once(make_queue, session) -> None:
    session.gate.set()

    async def scenario() -> Answer:
        return await asyncio.wait_for(make_queue().submit(feed(1, 2), rows=2), 5)

    answer = asyncio.run(scenario())
    assert answer.outputs["y"].tolist() == [[2, 2], [4, 4]]
    assert (answer.batch_rows, len(session.seen)) == (2, 1)


def test_waiting_requests_are_joined_up_to_the_largest_batch_in_order(make_queue, session) -> None:
    async def scenario() -> list[Answer]:
        queue = make_queue(max_batch=4)
        futures = [await occupied(queue, session)]
        futures += [queue.submit(feed(n), rows=1) for n in range(6)]
        session.gate.set()
        return await asyncio.gather(*futures)

    answers = asyncio.run(scenario())
    assert [batch[:, 0].tolist() for batch in session.seen] == [[100], [0, 1, 2, 3], [4, 5]]
    assert [answer.outputs["y"][0, 0] for answer in answers] == [200, 0, 2, 4, 6, 8, 10]
    assert [answer.batch_rows for answer in answers] == [1, 4, 4, 4, 4, 2, 2]


def test_rows_are_counted_and_each_request_gets_its_own(make_queue, session) -> None:
    async def scenario() -> list[Answer]:
        queue = make_queue(max_batch=8)
        first = await occupied(queue, session)
        futures = [queue.submit(feed(1, 2, 3), rows=3), queue.submit(feed(4), rows=1), queue.submit(feed(5, 6), rows=2)]
        futures.append(queue.submit(feed(7, 8, 9), rows=3))
        assert queue.rows_waiting == 9
        session.gate.set()
        await first
        return await asyncio.gather(*futures)

    answers = asyncio.run(scenario())
    assert [answer.outputs["y"][:, 0].tolist() for answer in answers] == [[2, 4, 6], [8], [10, 12], [14, 16, 18]]
    # The fourth would have made nine rows of a batch of eight.
    assert [len(batch) for batch in session.seen] == [1, 6, 3]


def test_requests_of_other_shapes_wait_for_a_batch_of_their_own(make_queue, session) -> None:
    async def scenario() -> list[Answer]:
        queue = make_queue()
        first = await occupied(queue, session)
        futures = [queue.submit(feed(n, length=2 + n % 2), rows=1) for n in range(4)]
        session.gate.set()
        await first
        return await asyncio.gather(*futures)

    answers = asyncio.run(scenario())
    assert [batch.shape for batch in session.seen] == [(1, 2), (2, 2), (2, 3)]
    assert [answer.outputs["y"][0, 0] for answer in answers] == [0, 2, 4, 6]


def _run_three(make: Callable[..., InferenceQueue], session: DoublingSession, **options) -> None:
    async def scenario() -> None:
        queue = make(session=session, **options)
        first = await occupied(queue, session)
        futures = [queue.submit(feed(n), rows=1) for n in range(3)]
        session.gate.set()
        await asyncio.gather(first, *futures)

    asyncio.run(scenario())


def test_requests_are_not_joined_where_the_model_must_not_batch(make_queue, session) -> None:
    _run_three(make_queue, session, batching=False)
    assert [len(batch) for batch in session.seen] == [1, 1, 1, 1]


def test_requests_are_not_joined_where_an_output_has_no_batch_axis(make_queue) -> None:
    session = DoublingSession(NO_BATCH_AXIS)
    _run_three(make_queue, session)
    assert [len(batch) for batch in session.seen] == [1, 1, 1, 1]


def test_a_full_queue_refuses_and_takes_again_when_it_has_drained(make_queue, session) -> None:
    async def scenario() -> None:
        queue = make_queue(max_rows=3)
        first = await occupied(queue, session)
        waiting = [queue.submit(feed(n), rows=1) for n in range(2)]
        with pytest.raises(OverloadedError, match="2 rows wait"):
            queue.submit(feed(1, 2), rows=2)
        waiting.append(queue.submit(feed(3), rows=1))
        assert queue.is_full
        session.gate.set()
        await asyncio.gather(first, *waiting)
        assert not queue.is_full
        assert (await queue.submit(feed(4), rows=1)).outputs["y"][0, 0] == 8

    asyncio.run(scenario())


def test_a_request_larger_than_the_bound_is_taken_when_nothing_waits(make_queue, session) -> None:
    session.gate.set()

    async def scenario() -> Answer:
        return await make_queue(max_rows=2).submit(feed(1, 2, 3), rows=3)

    assert len(asyncio.run(scenario()).outputs["y"]) == 3


def test_a_request_past_its_deadline_is_refused_and_not_run(make_queue, session) -> None:
    async def scenario() -> None:
        queue = make_queue()
        first = await occupied(queue, session)
        late = queue.submit(feed(7), rows=1, deadline_ns=time.perf_counter_ns() + 1_000_000)
        patient = queue.submit(feed(8), rows=1, deadline_ns=time.perf_counter_ns() + 60_000_000_000)
        await asyncio.sleep(0.01)
        session.gate.set()
        await first
        with pytest.raises(DeadlineError):
            await late
        assert (await patient).outputs["y"][0, 0] == 16

    asyncio.run(scenario())
    assert [batch[0, 0] for batch in session.seen] == [100, 8]


def test_a_request_whose_client_left_is_not_run(make_queue, session) -> None:
    async def scenario() -> None:
        queue = make_queue()
        first = await occupied(queue, session)
        left, stayed = queue.submit(feed(7), rows=1), queue.submit(feed(8), rows=1)
        left.cancel()
        session.gate.set()
        await first
        assert (await stayed).outputs["y"][0, 0] == 16
        assert queue.rows_waiting == 0

    asyncio.run(scenario())
    assert [batch[0, 0] for batch in session.seen] == [100, 8]


def test_a_request_that_breaks_a_run_fails_alone(make_queue, session) -> None:
    async def scenario() -> list[Answer | BaseException]:
        queue = make_queue()
        first = await occupied(queue, session)
        futures = [queue.submit(feed(n), rows=1) for n in (1, -1, 2)]
        session.gate.set()
        await first
        return await asyncio.gather(*futures, return_exceptions=True)

    good, bad, also_good = asyncio.run(scenario())
    assert isinstance(bad, RuntimeError)
    assert isinstance(good, Answer)
    assert isinstance(also_good, Answer)
    assert (good.outputs["y"][0, 0], also_good.outputs["y"][0, 0]) == (2, 4)


def test_the_thread_outlives_a_failed_run(make_queue, session) -> None:
    session.gate.set()

    async def scenario() -> Answer:
        queue = make_queue()
        with pytest.raises(RuntimeError, match="negative"):
            await queue.submit(feed(-1), rows=1)
        return await queue.submit(feed(1), rows=1)

    assert asyncio.run(scenario()).outputs["y"][0, 0] == 2


def test_close_answers_what_waits_and_takes_no_more(make_queue, session) -> None:
    async def scenario() -> list[Answer]:
        queue = make_queue(max_batch=1)
        futures = [await occupied(queue, session), *[queue.submit(feed(n), rows=1) for n in range(3)]]
        closing = asyncio.create_task(asyncio.to_thread(queue.close))
        await asyncio.sleep(0.05)
        with pytest.raises(ClosedError):
            queue.submit(feed(9), rows=1)
        session.gate.set()
        assert await closing
        return await asyncio.gather(*futures)

    assert [answer.outputs["y"][0, 0] for answer in asyncio.run(scenario())] == [200, 0, 2, 4]


def test_batches_are_reported_with_their_rows(make_queue, session) -> None:
    done: list[BatchDone] = []

    async def scenario() -> None:
        queue = make_queue(on_batch=done.append)
        first = await occupied(queue, session)
        futures = [queue.submit(feed(1, 2), rows=2), queue.submit(feed(3), rows=1)]
        session.gate.set()
        await asyncio.gather(first, *futures)

    asyncio.run(scenario())
    assert [batch.rows for batch in done] == [1, 3]


def test_many_concurrent_requests_never_get_one_anothers_answers(make_queue, session) -> None:
    session.gate.set()

    async def client(queue: InferenceQueue, start: int) -> None:
        for n in range(start, start + 50):
            rows = 1 + n % 3
            answer = await queue.submit(feed(*[n + i / 4 for i in range(rows)], length=1 + n % 2), rows=rows)
            assert answer.outputs["y"][:, 0].tolist() == [2 * (n + i / 4) for i in range(rows)]

    async def scenario() -> None:
        queue = make_queue(max_rows=1000)
        await asyncio.gather(*(client(queue, 1000 * c) for c in range(16)))

    asyncio.run(scenario())
    assert max(len(batch) for batch in session.seen) > 1
