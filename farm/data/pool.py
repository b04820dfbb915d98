"""Processes that do one thing to many items, and end when the process that started them does, however it ends."""

from __future__ import annotations

import os
import signal
import threading
import warnings
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import get_context
from typing import TypeVar

from farm.errors import FarmError, StorageError
from farm.leash import die_with_parent

T = TypeVar("T")
R = TypeVar("R")

#: Items handed over at a time: few enough for a prompt stop, enough that handing over costs nothing beside the work.
PIECE = 4
#: Pieces under way for each process, so that none waits for this one.
AHEAD = 3
#: What the processes' libraries are told. numpy must not start a thread a core, which on a big host hits the limit of
#: processes; glibc must not hand memory back after each image, only to have it cleared for the next one.
CHILDREN = {
    "OPENBLAS_NUM_THREADS": "1",
    "MALLOC_MMAP_THRESHOLD_": str(32 << 20),
    "MALLOC_TRIM_THRESHOLD_": str(128 << 20),
}
#: Items that take their process down with them before it must be the machine rather than the items.
MOST_DEATHS = 8


def each(
    function: Callable[[T], R], items: Sequence[T], *, processes: int, died: Callable[[T], R]
) -> Generator[R, None, None]:
    """What `function` makes of every item, in any order; `died(item)` if the item takes its process down.

    A `FarmError` from `function` comes out here after the results of all that was under way. Function, items and
    results travel between processes. The calling thread must live as long as the generator does.
    """
    waiting = deque(items[start : start + PIECE] for start in range(0, len(items), PIECE))
    deaths = 0
    while waiting:
        suspects = yield from _pass(function, waiting, processes, AHEAD)
        # One at a time, so that a death tells which one it was.
        alone: deque[Sequence[T]] = deque([suspect] for suspect in suspects)
        while alone:
            for item in (yield from _pass(function, alone, 1, 1)):
                deaths += 1
                if deaths > MOST_DEATHS:
                    raise StorageError(
                        f"{deaths} processes ended by themselves: is the machine out of memory? "
                        "What was finished is kept: run the same command again, perhaps with fewer --processes"
                    )
                yield died(item)


def _pass(
    function: Callable[[T], R], waiting: deque[Sequence[T]], processes: int, ahead: int
) -> Generator[R, None, list[T]]:
    """Work until nothing waits or a process dies; returns the items that were under way when one did."""
    under_way: dict[Future[tuple[list[R], FarmError | None]], Sequence[T]] = {}
    suspects: list[T] = []
    error: FarmError | None = None
    broken = False
    with _executor(min(processes, len(waiting))) as executor:
        while True:
            while waiting and len(under_way) < processes * ahead and not (broken or error):
                try:
                    future = _submit(executor, function, waiting[0])
                except BrokenProcessPool:
                    broken = True
                else:
                    under_way[future] = waiting.popleft()
            if not under_way:
                break
            for future in wait(under_way, return_when=FIRST_COMPLETED).done:
                piece = under_way.pop(future)
                try:
                    results, failed = future.result()
                except BrokenProcessPool:
                    broken = True
                    suspects.extend(piece)
                else:
                    yield from results
                    error = error or failed
    if error:
        raise error
    return suspects


def _work(function: Callable[[T], R], piece: Sequence[T]) -> tuple[list[R], FarmError | None]:
    results: list[R] = []
    for item in piece:
        try:
            results.append(function(item))
        except FarmError as exc:
            return results, exc
    return results, None


@contextmanager
def _executor(processes: int) -> Iterator[ProcessPoolExecutor]:
    # Spawned, not forked: the caller may have threads, and a child must not inherit its locks.
    executor = ProcessPoolExecutor(
        processes, mp_context=get_context("spawn"), initializer=_settle_in, initargs=(os.getpid(),)
    )
    try:
        yield executor
    finally:
        executor.shutdown(wait=True, cancel_futures=True)


def _submit(
    executor: ProcessPoolExecutor, function: Callable[[T], R], piece: Sequence[T]
) -> Future[tuple[list[R], FarmError | None]]:
    try:
        with _uninterrupted(), _environment(CHILDREN):
            return executor.submit(_work, function, piece)
    except OSError as exc:
        raise StorageError(f"cannot start a process: {exc.strerror}. Try fewer --processes") from exc


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """
    Put Ctrl-C off while a process may be starting, which inherits the mask.

    Ctrl-C reaches the whole process group, but only the parent may act on it: a child would print a traceback, or
    leave a piece without an answer. The parent must not either before the child has all it needs; and the mask is
    this thread's alone, while Python acts here on what another thread was interrupted by.
    """
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    mine = threading.current_thread() is threading.main_thread()
    told: list[int] = []
    handler = signal.signal(signal.SIGINT, lambda number, _: told.append(number)) if mine else None
    try:
        yield
    finally:
        if mine:
            signal.signal(signal.SIGINT, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        if told:
            signal.raise_signal(signal.SIGINT)


@contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Set them for the processes started meanwhile."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _settle_in(parent: int) -> None:
    die_with_parent(parent)
    # Pillow warns of odd metadata on stderr, in the midst of the parent's progress.
    warnings.simplefilter("ignore")
