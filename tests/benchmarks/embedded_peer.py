"""The peer of `tests.benchmarks.embedded`: what one would write without a farm, for one half of the bins."""

from __future__ import annotations

import sys
from pathlib import Path
from time import perf_counter

import numpy as np
import onnxruntime

from farm.data import manifest

BS, HALVES = 4, 2


def main() -> None:
    data_dir, graph, half = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    directory = manifest.bins_dir(data_dir, "lvvit")
    names = [sample.name for sample in manifest.read(directory).samples]
    batches = [names[i : i + BS] for i in range(0, len(names), BS)][half::HALVES]
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(graph, options)
    batch = np.zeros((BS, 3, 224, 224), np.float32)
    session.run(None, {"image": batch})
    print("ready", flush=True)
    sys.stdin.readline()
    began = perf_counter()
    for part in batches:
        for place, name in enumerate(part):
            batch[place] = np.fromfile(manifest.bin_path(directory, name), np.float32).reshape(3, 224, 224)
        session.run(None, {"image": batch})
    print(perf_counter() - began)


if __name__ == "__main__":
    main()
