"""Many threads with one text each, and a stream without an end: what they cost over one batch.

Usage: python benchmarks/streams.py BUILD [--lines 1000000] [--most-words 40] [--threads 32]
           [--max-wait-ms 5]   (0 lines, or 0 threads, leaves that part out)

Threads: each calls ``predict`` on one text at a time; the throughput of all of them beside that of
one caller who brings as many texts a call as there are threads, and beside one call with all texts,
which are then sorted by length; and how long 99 of 100 calls take at most, beside ``max_wait_ms``
and the time of one batch: as many texts as a batch may have, all as long as the longest of these,
computed on the same cores in each round, right after the threads. Stream: ``stream`` over a
generator beside ``predict`` on a list, and by how much the process grows after its first tenth.
"""

from __future__ import annotations

import argparse
import statistics
import threading
import time
from collections.abc import Callable
from itertools import cycle, islice
from pathlib import Path

import numpy as np
from check import sentences

from edgebert_runtime import Classifier

ROUNDS, TEXTS, BATCHES = 9, 2048, 5


def rss_mb() -> float:
    """The memory that this process holds, in MB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1]) / 1000
    raise SystemExit("this system does not say how much memory a process holds")


def by_threads(classifier: Classifier, texts: list[str], threads: int) -> tuple[float, list[float]]:
    """Labels texts from threads; returns the seconds of all, and of each call in ms."""
    expected = [found.label for found in classifier.predict(texts)]
    answers: list[str | None] = [None] * len(texts)
    latencies_ms = [0.0] * len(texts)
    gate = threading.Barrier(threads + 1)

    def work(first: int) -> None:
        gate.wait()
        for index in range(first, len(texts), threads):
            start = time.perf_counter()
            answers[index] = classifier.predict([texts[index]])[0].label
            latencies_ms[index] = 1000 * (time.perf_counter() - start)

    workers = [threading.Thread(target=work, args=(first,)) for first in range(threads)]
    for worker in workers:
        worker.start()
    gate.wait()
    start = time.perf_counter()
    for worker in workers:
        worker.join()
    seconds = time.perf_counter() - start
    wrong = sum(one != other for one, other in zip(answers, expected, strict=True))
    if wrong > len(texts) // 50:  # dynamic INT8 depends a little on who shares a batch
        raise SystemExit(f"{wrong} of {len(texts)} answers were lost or swapped")
    return seconds, latencies_ms


def threads_beside_batches(bundle: Path, threads: int, max_wait_ms: float) -> None:
    """Prints how near threads come to batches."""
    texts = sentences(TEXTS)
    ratios: dict[str, list[float]] = {f"calls of {threads} texts": [], "one call with all": []}
    calls = [texts[first : first + threads] for first in range(0, len(texts), threads)]
    p99s_ms: list[float] = []
    longest_ms: list[float] = []
    with (
        Classifier.load(bundle, device="cpu", max_wait_ms=max_wait_ms) as shared,
        Classifier.load(bundle, device="cpu") as plain,
    ):
        longest = [max(texts, key=len)] * plain.batch_size
        for _ in range(ROUNDS):
            seconds, latencies_ms = by_threads(shared, texts, threads)
            beside = (
                seconds_of(lambda: [plain.predict(call) for call in calls]),
                seconds_of(lambda: plain.predict(texts)),
            )
            for found, other in zip(ratios.values(), beside, strict=True):
                found.append(other / seconds)
            p99s_ms.append(float(np.percentile(latencies_ms, 99)))
            batch_s = [seconds_of(lambda: plain.predict(longest)) for _ in range(BATCHES)]
            longest_ms.append(1000 * statistics.median(batch_s))
    for what, found in ratios.items():
        print(
            f"{threads} threads: {statistics.median(found):.2f} of the throughput of {what} "
            f"({min(found):.2f}-{max(found):.2f})"
        )
    bounds_ms = [max_wait_ms + batch_ms for batch_ms in longest_ms]
    within = sum(p99 <= bound for p99, bound in zip(p99s_ms, bounds_ms, strict=True))
    print(
        f"p99 {statistics.median(p99s_ms):.1f} ms ({min(p99s_ms):.1f}-{max(p99s_ms):.1f}); "
        f"max_wait_ms and one batch of {plain.batch_size} of the longest text make "
        f"{statistics.median(bounds_ms):.1f} ms ({min(bounds_ms):.1f}-{max(bounds_ms):.1f}); "
        f"within it in {within} of {ROUNDS} rounds"
    )


def stream_beside_list(bundle: Path, lines: int, most_words: int) -> None:
    """Prints how near a stream comes to a list, and how much memory a long one takes."""
    texts = sentences(4 * TEXTS, most_words)
    with Classifier.load(bundle, device="cpu") as classifier:
        if list(classifier.stream(iter(texts))) != classifier.predict(texts):
            print("stream and predict differ: batches of other texts, or a fault")
        ratios = []
        for _ in range(ROUNDS):
            streamed = seconds_of(lambda: list(classifier.stream(iter(texts))))
            ratios.append(seconds_of(lambda: classifier.predict(texts)) / streamed)
        start, held, most = time.perf_counter(), 0.0, 0.0
        for count, _ in enumerate(classifier.stream(islice(cycle(texts), lines)), start=1):
            if count == lines // 10:
                held = rss_mb()
            if count % 1000 == 0:
                most = max(most, rss_mb())
        seconds = time.perf_counter() - start
    print(
        f"stream: {statistics.median(ratios):.2f} of a list's throughput ({min(ratios):.2f}-"
        f"{max(ratios):.2f}); {lines} lines at {lines / seconds:.0f} texts/s, grown by "
        f"{max(0.0, most - held):.1f} MB after the first tenth"
    )


def seconds_of(job: Callable[[], object]) -> float:
    """Times a call."""
    start = time.perf_counter()
    job()
    return time.perf_counter() - start


def main() -> None:
    """Measures threads, then the stream."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("build", type=Path)
    parser.add_argument("--lines", type=int, default=1_000_000)
    parser.add_argument("--most-words", type=int, default=40, help="of a line of the stream")
    parser.add_argument("--threads", type=int, default=32)
    parser.add_argument("--max-wait-ms", type=float, default=5.0)
    options = parser.parse_args()
    bundle = options.build / "bundle"
    if options.threads:
        threads_beside_batches(bundle, options.threads, options.max_wait_ms)
    if options.lines:
        stream_beside_list(bundle, options.lines, options.most_words)


if __name__ == "__main__":
    main()
