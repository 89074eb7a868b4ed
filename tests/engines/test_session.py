"""An engine in use: from any thread, in the background, closed, and fed the wrong things."""

import gc
import re
import threading
import time
from concurrent.futures import wait

import numpy as np
import pytest

from _support.engines import SHAPE, images, write_engine
from ulae_rt.engines import Engine, load_engine
from ulae_rt.engines.backends.base import failure
from ulae_rt.engines.session import AT_ONCE, WAITING
from ulae_rt.errors import DtypeError, EngineMismatch, OutOfMemory, ShapeError, UsageError
from ulae_rt.manifest import ANY_BATCH, EngineMetadata

METADATA = EngineMetadata("paper", SHAPE, 1.0, "max", "none", "CC0")


class SlowBackend:
    """Gives M + F and M - F after a while, and fails if two threads use it at once."""

    name, device = "slow", "cpu"

    def __init__(self, batch=1, seconds=0.01, device="cpu"):
        self.inputs = dict.fromkeys(("moving", "fixed"), (batch, 1, *SHAPE))
        self.outputs = {"moved": (batch, 1, *SHAPE), "disp": (batch, 3, *SHAPE)}
        self.seconds, self.device = seconds, device
        self.inside, self.closed = 0, 0
        self.seen = []
        self.error = None
        self.hold = threading.Event()
        self.hold.set()

    def run(self, feeds, outputs=None):
        self.inside += 1
        assert self.inside == 1
        assert not self.closed
        assert all(image.flags.c_contiguous for image in feeds.values())
        self.hold.wait(20)
        time.sleep(self.seconds)
        self.seen.append(feeds["moving"].copy())
        self.inside -= 1
        if self.error is not None:
            raise self.error
        difference = feeds["moving"] - feeds["fixed"]
        return {"moved": feeds["moving"] + feeds["fixed"], "disp": np.repeat(difference, 3, 1)}

    def close(self):
        assert not self.inside
        self.closed += 1


@pytest.fixture
def backend():
    return SlowBackend()


@pytest.fixture
def engine(backend):
    with Engine(backend, METADATA, "fp32") as engine:
        yield engine
        backend.hold.set()


def test_says_what_it_is(engine):
    assert (engine.backend, engine.device, engine.precision) == ("slow", "cpu", "fp32")
    assert engine.description == "slow, cpu, fp32"
    assert engine.metadata.shape == SHAPE
    assert engine.batch == 1


def test_threads_take_turns_and_each_gets_its_own(engine):
    results = {}

    def work(number):
        moving, fixed = images() / np.float32(number + 1)
        results[number] = engine.run(moving, fixed).moved - (moving + fixed)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(results) == list(range(8))
    assert not any(difference.any() for difference in results.values())


def test_real_engine_is_shared_by_threads(tmp_path):
    with load_engine(write_engine(tmp_path)) as engine:
        pairs = [images() / np.float32(number + 1) for number in range(16)]
        found = [None] * len(pairs)

        def work(numbers):
            for number in numbers:
                found[number] = engine.run(*pairs[number]).moved

        threads = [threading.Thread(target=work, args=(range(i, 16, 4),)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for pair, moved in zip(pairs, found, strict=True):
        np.testing.assert_array_equal(moved, pair[0] + pair[1])


def test_submitted_pairs_run_in_their_order(engine, backend):
    pairs = [images() / np.float32(number + 1) for number in range(6)]
    futures = [engine.submit(moving, fixed) for moving, fixed in pairs]
    for (moving, fixed), future in zip(pairs, futures, strict=True):
        np.testing.assert_array_equal(future.result(20).moved, moving + fixed)
    for (moving, _), seen in zip(pairs, backend.seen, strict=True):
        np.testing.assert_array_equal(moving, seen)


def test_error_is_delivered_and_the_next_pair_runs(engine, backend):
    backend.error = EngineMismatch("no", "hint")
    failing = engine.submit(*images())
    with pytest.raises(EngineMismatch, match="no"):
        failing.result(20)
    backend.error = None
    wrong = engine.submit(images()[0][:, :, :-1], images()[1])
    right = engine.submit(*images())
    with pytest.raises(ShapeError, match="moving has shape"):
        wrong.result(20)
    assert right.result(20).moved.shape == (1, 1, *SHAPE)


def test_submitting_waits_when_enough_wait(engine, backend):
    backend.hold.clear()
    futures = [engine.submit(*images()) for _ in range(WAITING + 1)]
    one_more = threading.Thread(target=lambda: futures.append(engine.submit(*images())))
    one_more.start()
    one_more.join(0.2)
    assert one_more.is_alive()
    backend.hold.set()
    one_more.join(20)
    assert not one_more.is_alive()
    done, _ = wait(futures, 20)
    assert len(done) == WAITING + 2


def test_cancelled_pair_makes_place(engine, backend):
    backend.hold.clear()
    futures = [engine.submit(*images()) for _ in range(WAITING + 1)]
    assert futures[-1].cancel()
    engine.submit(*images())
    backend.hold.set()


def test_closing_waits_for_what_was_submitted_then_refuses(backend):
    engine = Engine(backend, METADATA, "fp32")
    futures = [engine.submit(*images()) for _ in range(3)]
    engine.close()
    engine.close()
    assert all(future.done() and future.exception() is None for future in futures)
    assert backend.closed
    for call in (engine.run, engine.submit):
        for _ in range(WAITING + 3):  # a refusal keeps no place
            with pytest.raises(UsageError, match="the engine is closed") as caught:
                call(*images())
    assert "load_engine" in caught.value.hint


def test_forgotten_engine_leaves_no_thread(backend):
    engine = Engine(backend, METADATA, "fp32")
    engine.submit(*images()).result(20)
    del engine
    gc.collect()
    for thread in threading.enumerate():
        if thread.name.startswith("engine"):
            thread.join(20)
            assert not thread.is_alive()


class OfAnotherLibrary:
    def __array__(self, *arguments, **options):
        raise TypeError("implicit conversion to a NumPy array is not allowed")


@pytest.mark.parametrize(
    ("image", "message", "hint"),
    [
        (OfAnotherLibrary(), "cannot be read as an array: implicit conversion", "of numpy, or a"),
        ([[1.0], [2.0, 3.0]], "cannot be read as an array", "float32"),
        (np.zeros((1, 1, *SHAPE), object), "moving is object, expected float32", "astype"),
    ],
)
def test_images_of_a_wrong_type_are_refused(engine, image, message, hint):
    with pytest.raises(DtypeError, match=message) as caught:
        engine.run(image, images()[1])
    assert re.search(hint, caught.value.hint)


def test_batch_it_was_not_built_for_is_refused():
    engine = Engine(SlowBackend(batch=4), METADATA, "fp16")
    assert engine.batch == 4
    assert engine.run(*images(8)).moved.shape[0] == 8
    with pytest.raises(ShapeError, match="6 pairs were given, expected a multiple of 4") as caught:
        engine.run(*images(6))
    assert "--batch 1" in caught.value.hint


@pytest.mark.parametrize(("device", "parts"), [("cpu", [1] * 10), ("cuda:0", [8, 2])])
def test_open_batch_is_split_where_memory_ends(device, parts):
    backend = SlowBackend(batch=ANY_BATCH, seconds=0, device=device)
    moving, fixed = images(10)
    out = Engine(backend, METADATA, "fp32").run(moving, fixed)
    np.testing.assert_array_equal(out.moved, moving + fixed)
    assert [len(seen) for seen in backend.seen] == parts
    assert max(parts) == AT_ONCE[device[:4].rstrip(":")]


def test_full_memory_halves_what_is_given_at_once(caplog):
    backend = SlowBackend(batch=ANY_BATCH, seconds=0, device="cuda:0")
    run, sizes = backend.run, []

    def small(feeds, outputs):
        sizes.append(len(feeds["moving"]))
        if len(feeds["moving"]) > 2:
            raise failure("running it", RuntimeError("CUDA out of memory. Tried to allocate"))
        return run(feeds, outputs)

    backend.run = small
    engine = Engine(backend, METADATA, "fp16")
    moving, fixed = images(10)
    np.testing.assert_array_equal(engine.run(moving, fixed).moved, moving + fixed)
    assert sizes == [8, 4, 2, 2, 2, 2, 2]
    assert engine.at_once == 2
    assert [record.message.rpartition(";")[2] for record in caplog.records] == [
        " from here on 4 at once instead of 8",
        " from here on 2 at once instead of 4",
    ]
    backend.error = failure("running it", MemoryError())
    with pytest.raises(OutOfMemory, match="out of memory running it"):  # one cannot be halved
        engine.run(moving[:1], fixed[:1])


def test_full_memory_is_one_error_with_a_remedy(engine, backend):
    backend.error = MemoryError()
    with pytest.raises(EngineMismatch, match="out of memory registering 1 pairs") as caught:
        engine.run(*images())
    assert "fewer pairs" in caught.value.hint


def test_results_are_the_callers_own(engine):
    moving, fixed = images()
    first = engine.run(moving, fixed)
    first.moved[...] = 7
    second = engine.run(moving, fixed)
    np.testing.assert_array_equal(second.moved, moving + fixed)


def test_views_reach_the_backend_in_one_piece(engine):
    moving, fixed = images()
    flipped = moving[..., ::-1]
    np.testing.assert_array_equal(engine.run(flipped, fixed).moved, flipped + fixed)


# Hints, followed


@pytest.mark.follows("{}.astype('float32')")
@pytest.mark.parametrize("dtype", [np.float64, np.float16, np.uint8])
def test_hint_for_another_type(engine, dtype):
    moving, fixed = images()
    fixed = fixed.astype(dtype)
    with pytest.raises(DtypeError) as caught:
        engine.run(moving, fixed)
    assert caught.value.hint == "fixed.astype('float32')"
    assert engine.run(moving, eval(caught.value.hint, {"fixed": fixed})).moved.shape


@pytest.mark.follows("open it again with load_engine")
def test_hint_for_an_engine_that_was_closed(tmp_path):
    engine = load_engine(write_engine(tmp_path), device="cpu")
    engine.close()
    with pytest.raises(UsageError, match="the engine is closed") as caught:
        engine.run(*images())
    assert caught.value.hint == "open it again with load_engine"
    assert load_engine(tmp_path, device="cpu").run(*images()).moved.shape


@pytest.mark.follows("close other programs, give fewer pairs at once, or take an engine of fp16")
def test_hint_for_more_pairs_than_there_is_memory_for(engine, backend):
    """The results of four fill it."""
    run, held = backend.run, []

    def filling(feeds, outputs):
        if len(held) == 4:
            raise MemoryError
        held.append(feeds)
        return run(feeds, outputs)

    backend.run = filling
    moving, fixed = images(6)
    with pytest.raises(OutOfMemory, match="out of memory registering 6 pairs") as caught:
        engine.run(moving, fixed)
    assert "give fewer pairs at once" in caught.value.hint
    for part in (slice(4), slice(4, 6)):
        held.clear()
        found = engine.run(moving[part], fixed[part])
        np.testing.assert_array_equal(found.moved, moving[part] + fixed[part])
