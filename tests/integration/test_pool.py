"""Real processes, some of which die."""

import multiprocessing
import os
import signal
import time
from contextlib import closing

import numpy as np
import pytest

from farm.data import pool
from farm.errors import StorageError


def double(number: int) -> int:
    return 2 * number


def double_unless_13(number: int) -> int:
    if number == 13:
        os.kill(os.getpid(), signal.SIGKILL)
    return 2 * number


def die(number: int) -> int:
    os._exit(number)


def refuse_7(number: int) -> int:
    if number == 7:
        raise StorageError("no 7")
    return number


def misuse(number: int) -> int:
    return number // 0


def threads(number: int) -> int:
    np.ones((64, 64)) @ np.ones((64, 64))
    return len(os.listdir("/proc/self/task"))


def sleep(number: int) -> int:
    time.sleep(0.01)
    return number


def minus(number: int) -> int:
    return -number


def test_every_item_has_its_result() -> None:
    results = list(pool.each(double, range(50), processes=2, died=minus))

    assert sorted(results) == list(range(0, 100, 2))


def test_no_items_need_no_process() -> None:
    assert list(pool.each(double, [], processes=2, died=minus)) == []


def test_an_item_that_kills_its_process_is_the_only_one_without_a_result() -> None:
    results = list(pool.each(double_unless_13, range(30), processes=2, died=minus))

    assert sorted(results) == sorted([-13, *(2 * number for number in range(30) if number != 13)])


def test_a_machine_on_which_every_process_dies_is_an_error() -> None:
    with pytest.raises(StorageError, match="9 processes ended by themselves: is the machine out of memory"):
        list(pool.each(die, range(100), processes=1, died=minus))


def test_a_farm_error_comes_after_the_results_of_what_was_under_way() -> None:
    results: list[int] = []

    with pytest.raises(StorageError, match="no 7"):
        results.extend(pool.each(refuse_7, range(100_000), processes=1, died=minus))

    assert {0, 1, 2, 3, 4, 5, 6} <= {*results}
    assert len(results) < 100


def test_a_mistake_in_the_function_comes_out_as_it_is() -> None:
    with pytest.raises(ZeroDivisionError):
        list(pool.each(misuse, range(3), processes=1, died=minus))


def test_closing_early_leaves_no_process() -> None:
    with closing(pool.each(sleep, range(10_000), processes=2, died=minus)) as results:
        next(results)
        assert multiprocessing.active_children()

    assert not multiprocessing.active_children()


def test_numpy_in_a_process_starts_no_threads_of_its_own() -> None:
    assert set(pool.each(threads, range(4), processes=1, died=minus)) == {1}


def test_the_environment_is_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "3")

    list(pool.each(double, range(4), processes=1, died=minus))

    assert os.environ["OPENBLAS_NUM_THREADS"] == "3"


def test_the_callers_ctrl_c_is_not_blocked_afterwards() -> None:
    list(pool.each(double, range(4), processes=1, died=minus))

    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, [])
