"""For how long a session's threads look for work after a call: time of the process while it sleeps.

Usage: python benchmarks/after_a_call.py BUNDLE
"""

from __future__ import annotations

import sys
import time
from itertools import pairwise

from edgebert_runtime.classifier import Classifier
from edgebert_runtime.processor import usable_cores

STEP_S, STEPS = 0.01, 20


def main(path: str) -> None:
    """Prints milliseconds of processor time, in all and by the last step that had any."""
    with Classifier.load(path, device="cpu") as classifier:
        text = ("a text", "another") if classifier.task.text_pair else "a text"
        for _ in range(50):
            classifier.predict([text])
        spent = [time.process_time()]
        for _ in range(STEPS):
            time.sleep(STEP_S)
            spent.append(time.process_time())
    by_step = [after - before for before, after in pairwise(spent)]
    busy = [step for step, seconds in enumerate(by_step, start=1) if seconds > STEP_S / 10]
    last = 1000 * STEP_S * max(busy, default=0)
    print(
        f"{1000 * sum(by_step):.0f} ms of processor time after the last call, all of it in the "
        f"first {last:.0f} ms; {usable_cores()} cores"
    )


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(sys.argv[1])
