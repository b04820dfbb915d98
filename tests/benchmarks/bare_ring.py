"""
The peer of `tests.benchmarks.utilisation`: two bare processes a device, with neither Celery nor a database.

    python -m tests.benchmarks.bare_ring DIRECTORY DEVICES BS BATCH_MS SECONDS

One reads bins into a ring of shared memory, checks their hashes and takes the top 5 of what comes back; the other looks
at every byte and waits as long as the device would. They tell each other of batches by a byte in a pipe. Prints what
all of them took and did: seconds of CPU, samples, samples a second.
"""

from __future__ import annotations

import json
import mmap
import os
import resource
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import xxhash
from numpy.typing import NDArray

from farm.data import manifest
from farm.data.manifest import Sample
from farm.metrics import topk
from workers.reader import read_bin

SLOTS, CLASSES = 4, 1000


def main() -> None:
    directory, devices, bs = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    batch_s, seconds = float(sys.argv[4]) / 1000, float(sys.argv[5])
    samples = list(manifest.read(directory).samples)
    nbytes = manifest.bin_path(directory, samples[0].name).stat().st_size
    told, tell = os.pipe()
    children = []
    start = time.monotonic() + 1 + 0.05 * devices
    for number in range(devices):
        child = os.fork()
        if not child:
            first = number * 17 % len(samples)
            own = samples[first:] + samples[:first]
            line = json.dumps(_device(directory, own, nbytes, bs, batch_s, start, seconds))
            os.write(tell, f"{line}\n".encode())
            os._exit(0)
        children.append(child)
    os.close(tell)
    for child in children:
        os.waitpid(child, 0)
    with os.fdopen(told) as answers:
        found = [json.loads(line) for line in answers]
    assert len(found) == devices
    names = ("cpu_s", "samples", "fps")
    print(json.dumps({name: sum(each[name] for each in found) for name in names}))


def _device(
    directory: Path, samples: Sequence[Sample], nbytes: int, bs: int, batch_s: float, start: float, seconds: float
) -> dict[str, float]:
    """Both processes of one device, from `start` on."""
    memory = mmap.mmap(-1, SLOTS * bs * (nbytes + CLASSES * 4))
    bins = np.frombuffer(memory, np.uint8, SLOTS * bs * nbytes).reshape(SLOTS, bs, nbytes)
    scores = np.frombuffer(memory, np.float32, SLOTS * bs * CLASSES, bins.nbytes).reshape(SLOTS, bs, CLASSES)
    bins[:] = 0
    given, wanted = os.pipe(), os.pipe()
    if not os.fork():
        os.close(given[1])
        _compute(given[0], wanted[1], bins, scores, batch_s)
        os._exit(0)
    os.close(given[0])
    time.sleep(max(0.0, start - time.monotonic()))
    before, began, batches = _cpu_s(), time.monotonic(), 0

    def fill(slot: int) -> None:
        nonlocal batches
        for place in range(bs):
            read_bin(directory, samples[(batches * bs + place) % len(samples)], bins[slot, place])
        batches += 1
        os.write(given[1], bytes([slot]))

    for slot in range(SLOTS):
        fill(slot)
    done = 0
    while time.monotonic() - began < seconds:
        slot = os.read(wanted[0], 1)[0]
        topk.best(scores[slot])
        done += 1
        fill(slot)
    took = time.monotonic() - began
    os.close(given[1])
    os.wait()
    return {"cpu_s": _cpu_s() - before, "samples": batches * bs, "fps": done * bs / took}


def _compute(given: int, wanted: int, bins: NDArray[np.uint8], scores: NDArray[np.float32], batch_s: float) -> None:
    row = np.random.default_rng(0).standard_normal(CLASSES, dtype=np.float32)
    while slot := os.read(given, 1):
        began = time.perf_counter()
        for place, sample in enumerate(bins[slot[0]]):
            scores[slot[0], place] = row
            scores[slot[0], place, xxhash.xxh3_64_intdigest(sample) % CLASSES] = 9
        time.sleep(max(0.0, began + batch_s - time.perf_counter()))
        os.write(wanted, slot)


def _cpu_s() -> float:
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


if __name__ == "__main__":
    main()
