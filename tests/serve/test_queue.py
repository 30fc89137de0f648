from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable

import numpy as np
import pytest

from dlops.runtimes import Placement
from dlops.serve.instance import Instance
from dlops.serve.outcome import Answer, BatchDone, BrokenError, ClosedError, DeadlineError, OverloadedError
from dlops.serve.pace import Pace
from dlops.serve.queue import InferenceQueue
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
        # The queue writes the next batch where this one lies.
        self.seen.append(x.copy())
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
        sessions = options.pop("sessions", [options.pop("session", session)])
        instances = [Instance(one) for one in sessions]
        made.append(InferenceQueue(instances, **({"max_rows": 100, "max_batch": 8} | options)))
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
        assert queue.refusal() is not None
        session.gate.set()
        await asyncio.gather(first, *waiting)
        assert queue.refusal() is None
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


class OnLoop(DoublingSession):
    """Runs at once, and remembers on which thread."""

    def __init__(self) -> None:
        super().__init__()
        self.gate.set()
        self.threads: set[int] = set()

    def run(self, feed: Feed) -> Feed:
        self.threads.add(threading.get_ident())
        return super().run(feed)


def test_a_quick_model_runs_on_the_event_loop_and_joins_what_came_in_one_turn(make_queue) -> None:
    session = OnLoop()

    async def scenario() -> list[Answer]:
        queue = make_queue(session=session, inline=True, max_batch=4)
        futures = [queue.submit(feed(0), rows=1)]
        queue.put(feed(1), rows=1, deliver=lambda result: pytest.fail("nobody waits for it")).cancel()
        futures += [queue.submit(feed(n), rows=1) for n in range(2, 6)]
        assert queue.rows_waiting == 5
        late = queue.submit(feed(9), rows=1, deadline_ns=time.perf_counter_ns() - 1)
        answers = await asyncio.gather(*futures)
        with pytest.raises(DeadlineError):
            await late
        with pytest.raises(RuntimeError, match="negative"):
            await queue.submit(feed(-1), rows=1)
        closing = asyncio.create_task(asyncio.to_thread(queue.close))
        last = queue.submit(feed(7), rows=1)
        await asyncio.sleep(0)
        answers.append(await last)
        assert await closing
        with pytest.raises(ClosedError):
            queue.submit(feed(1), rows=1)
        return answers

    answers = asyncio.run(scenario())
    assert [answer.outputs["y"][0, 0] for answer in answers] == [0, 4, 6, 8, 10, 14]
    assert [batch[:, 0].tolist() for batch in session.seen] == [[0, 2, 3, 4], [5], [-1], [7]]
    assert session.threads == {threading.get_ident()}


def test_two_instances_run_at_the_same_time_and_share_one_queue(make_queue, session) -> None:
    other = DoublingSession()

    async def scenario() -> list[Answer]:
        queue = make_queue(sessions=[session, other], max_batch=1)
        futures = [queue.submit(feed(n), rows=1) for n in range(6)]
        await asyncio.to_thread(session.entered.wait, 10)
        await asyncio.to_thread(other.entered.wait, 10)
        assert queue.busy_instances == 2
        other.gate.set()
        # The first holds one, and the second answers all the others.
        done, held = await asyncio.wait(futures, timeout=0.5)
        assert (len(done), len(held)) == (5, 1)
        session.gate.set()
        return await asyncio.gather(*futures)

    answers = asyncio.run(scenario())
    assert [answer.outputs["y"][0, 0] for answer in answers] == [0, 2, 4, 6, 8, 10]
    assert (len(session.seen), len(other.seen)) == (1, 5)


def test_an_instance_waits_for_more_rows_as_long_as_it_is_told_to(make_queue, session) -> None:
    session.gate.set()

    async def scenario(queue: InferenceQueue, *, apart_s: float) -> None:
        first = queue.submit(feed(1), rows=1)
        await asyncio.sleep(apart_s)
        await asyncio.gather(first, *[queue.submit(feed(n), rows=1) for n in (2, 3)])

    done: list[BatchDone] = []
    asyncio.run(scenario(make_queue(delay_ns=30_000_000_000, max_batch=3, on_batch=done.append), apart_s=0.05))
    # Thirty seconds were not waited for: the batch was full before.
    assert [(one.rows, one.reason) for one in done] == [(3, "full")]
    done.clear()
    asyncio.run(scenario(make_queue(delay_ns=1_000_000, max_batch=3, on_batch=done.append), apart_s=0.2))
    assert done[0].rows == 1
    assert sum(one.rows for one in done) == 3


def test_the_bytes_that_wait_are_bounded_too(make_queue, session) -> None:
    async def scenario() -> None:
        queue = make_queue(max_bytes=16)
        first = await occupied(queue, session)
        waiting = queue.submit(feed(1), rows=1)
        with pytest.raises(OverloadedError, match="8 bytes wait already, at most 16"):
            queue.submit(feed(1, 2), rows=2)
        last = queue.submit(feed(2), rows=1)
        assert queue.refusal() is not None
        session.gate.set()
        await asyncio.gather(first, waiting, last)
        assert queue.refusal() is None

    asyncio.run(scenario())


def test_why_a_batch_began_with_no_more_rows_is_told(make_queue, session) -> None:
    done: list[BatchDone] = []

    async def scenario() -> None:
        queue = make_queue(on_batch=done.append, max_batch=4)
        first = await occupied(queue, session)
        futures = [queue.submit(feed(*range(rows)), rows=rows) for rows in (2, 2, 3, 2, 1)]
        session.gate.set()
        await asyncio.gather(first, *futures)

    asyncio.run(scenario())
    assert [(one.rows, one.reason) for one in done] == [
        (1, "nothing_more"), (4, "full"), (3, "next_too_large"), (3, "nothing_more"),
    ]  # fmt: skip


def test_a_deadline_is_told_when_it_passes_and_not_when_an_instance_frees(make_queue, session) -> None:
    async def scenario() -> None:
        queue = make_queue(max_rows=2)
        first = await occupied(queue, session)
        late = [queue.submit(feed(n), rows=1, deadline_ns=time.perf_counter_ns() + 20_000_000) for n in (7, 8)]
        assert queue.refusal() is not None
        for one in late:
            with pytest.raises(DeadlineError):
                await asyncio.wait_for(one, 5)
        assert not first.done(), "the instance still runs"
        # Their places are others' now.
        assert (queue.rows_waiting, queue.refusal()) == (0, None)
        session.gate.set()
        await first

    asyncio.run(scenario())
    assert [batch[0, 0] for batch in session.seen] == [100]


def test_a_client_that_leaves_makes_room_at_once(make_queue, session) -> None:
    async def scenario() -> None:
        queue = make_queue(max_rows=2)
        first = await occupied(queue, session)
        leaving = [queue.submit(feed(n), rows=1) for n in (7, 8)]
        assert queue.refusal() is not None
        for one in leaving:
            one.cancel()
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        stays = queue.submit(feed(9), rows=1)
        session.gate.set()
        await first
        assert (await stays).outputs["y"][0, 0] == 18

    asyncio.run(scenario())
    assert [batch[0, 0] for batch in session.seen] == [100, 9]


def test_one_answer_that_cannot_be_delivered_costs_no_other_theirs(make_queue, session) -> None:
    told: list[object] = []

    def broken(result: object) -> None:
        raise OSError("the connection is gone")

    async def scenario() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: told.append(context["exception"]))
        queue = make_queue()
        first = await occupied(queue, session)
        queue.put(feed(1), rows=1, deliver=broken)
        after = queue.submit(feed(2), rows=1)
        session.gate.set()
        await first
        assert (await after).outputs["y"][0, 0] == 4

    asyncio.run(scenario())
    assert [str(error) for error in told] == ["the connection is gone"]


def test_closing_waits_for_what_runs_on_the_event_loop(make_queue) -> None:
    session = OnLoop()
    session.gate.clear()

    async def scenario() -> None:
        queue = make_queue(session=session, inline=True)
        last = queue.submit(feed(1), rows=1)
        closed: list[bool] = []
        closing = threading.Thread(target=lambda: closed.append(queue.close(timeout_s=10)))
        threading.Timer(0.2, closing.start).start()
        threading.Timer(0.5, lambda: (closed.append(False), session.gate.set())).start()
        # Holds the event loop up, as a run on it does.
        await last
        await asyncio.to_thread(closing.join, 10)
        assert closed == [False, True]

    asyncio.run(scenario())


def test_what_would_miss_its_deadline_is_turned_away_before_it_waits(make_queue, session) -> None:
    async def scenario() -> None:
        queue = make_queue(max_wait_ns=60 * 10**9)
        # Ten seconds a row, in every run so far.
        queue._pace.add(rows=3, ns=30 * 10**9)
        now = time.perf_counter_ns
        # Nothing runs: what the last runs took may have been the machine's fault.
        assert queue.refusal(deadline_ns=now() + 10**9) is None
        first = await occupied(queue, session)
        taken = [queue.submit(feed(1), rows=1, deadline_ns=now() + 100 * 10**9), queue.submit(feed(2), rows=1)]
        # Three rows before it and itself: 40 s.
        refusal = queue.refusal(deadline_ns=now() + 30 * 10**9)
        assert refusal is not None
        assert "would take 40 s, and has 20 s" in str(refusal)
        assert refusal.retry_after_s == pytest.approx(20, abs=0.1)
        with pytest.raises(OverloadedError, match="would take 40 s"):
            queue.submit(feed(3), rows=1, deadline_ns=now() + 59 * 10**9)
        assert queue.refusal(deadline_ns=now() + 61 * 10**9) is None
        assert queue.refusal(rows=3) is None
        with queue.expecting(1):  # another one is being decoded
            assert queue.refusal(rows=2) is None
            assert queue.refusal(rows=3) is not None
        refusal = queue.refusal(rows=4)
        assert refusal is not None
        assert "would take 70 s, and has 60 s" in str(refusal)
        session.gate.set()
        await asyncio.gather(first, *taken)
        # And the runs since were quick.
        for _ in range(20):
            await queue.submit(feed(4), rows=1)
        assert queue._pace.ns_for(1) < 10**9

    asyncio.run(scenario())


def test_the_pace_is_the_last_runs_and_counts_all_instances() -> None:
    pace = Pace(2)
    assert pace.ns_for(10) == 0
    pace.add(rows=4, ns=4000)
    assert pace.ns_for(10) == 5000
    for _ in range(20):
        pace.add(rows=4, ns=40_000)
    assert pace.ns_for(10) == pytest.approx(50_000, rel=0.05)


def test_a_broken_instance_leaves_what_waits_to_the_others(make_queue, session) -> None:
    session.gate.set()
    broken = DoublingSession()

    async def scenario() -> None:
        queue = make_queue(sessions=[broken, session], max_batch=1)
        queue._instances[0].is_broken = True
        assert not queue.is_broken
        for round_ in range(50):
            answers = await asyncio.wait_for(asyncio.gather(*[queue.submit(feed(n), rows=1) for n in range(4)]), 10)
            assert [answer.outputs["y"][0, 0] for answer in answers] == [0, 2, 4, 6], round_
        assert not broken.seen
        queue._instances[1].is_broken = True
        # Told so, and not left to wait.
        with pytest.raises(BrokenError, match="opened anew"):
            await asyncio.wait_for(queue.submit(feed(1), rows=1), 10)

    asyncio.run(scenario())


def test_a_run_that_cannot_be_counted_is_answered(make_queue, session) -> None:
    session.gate.set()

    def fails(done: BatchDone) -> None:
        raise RuntimeError("no cell is left")

    async def scenario() -> list[dict[str, object]]:
        said: list[dict[str, object]] = []
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: said.append(context))
        queue = make_queue(on_batch=fails)
        for _ in range(2):
            answer = await asyncio.wait_for(queue.submit(feed(1), rows=1), 10)
            assert answer.outputs["y"].tolist() == [[2, 2]]
        return said

    assert [str(context["exception"]) for context in asyncio.run(scenario())] == ["no cell is left"] * 2


def test_outputs_that_cannot_be_shared_out_fail_their_requests_alone(make_queue, session) -> None:
    class Odd(DoublingSession):
        def run(self, feed: Feed) -> Feed:
            y = super().run(feed)["y"]
            return {"y": y if len(y) == 1 else np.float32(0)}  # type: ignore[dict-item]

    async def scenario() -> None:
        odd = Odd()
        queue = make_queue(session=odd)
        first = await occupied(queue, odd)
        others = [queue.submit(feed(value), rows=1) for value in (1, 2)]
        odd.gate.set()
        await asyncio.wait_for(first, 10)
        answers = await asyncio.wait_for(asyncio.gather(*others), 10)
        assert [answer.outputs["y"].tolist() for answer in answers] == [[[2, 2]], [[4, 4]]]

    asyncio.run(scenario())
