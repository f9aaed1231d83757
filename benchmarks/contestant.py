"""A way to label texts, in a process of its own, and the parent's end of it.

``speed.py`` and ``check.py`` start one process for each way: ``python contestant.py KIND SETTINGS``
(a name in ``KINDS``, and its arguments as JSON). The process loads, then answers one JSON request
a line. A cold start is timed through the same program, so nothing is imported before it is needed.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

Label = Callable[[Sequence[str], int], list[str]]
"""Labels texts; the number is the batch size, where the caller has a say in it."""

TURN_WARM_UP = 3
"""Texts labelled before the clock starts: the others pushed this model out of the cache."""


def edgebert(bundle: str, variant: str) -> Label:
    """The runtime, on one variant of a bundle. It forms its own batches."""
    from edgebert_runtime import Classifier

    classifier = Classifier.load(bundle, device="cpu", variant=variant)
    return lambda texts, batch: [found.label for found in classifier.predict(texts)]


def bare(model: str, tokenizer: str, labels: list[str], max_length: int) -> Label:
    """``tokenizers`` and ``onnxruntime`` alone, default settings, batches formed by length."""
    import numpy as np
    import onnxruntime
    from tokenizers import Tokenizer

    encoder = Tokenizer.from_file(tokenizer)
    encoder.no_padding()
    encoder.enable_truncation(max_length)
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    names = {spec.name for spec in session.get_inputs()}

    def label(texts: Sequence[str], batch: int) -> list[str]:
        found = [""] * len(texts)
        rows = encoder.encode_batch(texts) if len(texts) > 1 else [encoder.encode(texts[0])]
        order = sorted(range(len(rows)), key=lambda index: len(rows[index].ids))
        for first in range(0, len(order), batch):
            chosen = order[first : first + batch]
            shape = len(chosen), len(rows[chosen[-1]].ids)
            inputs = {name: np.zeros(shape, dtype=np.int64) for name in names}
            for line, index in enumerate(chosen):
                ids = rows[index].ids
                inputs["input_ids"][line, : len(ids)] = ids
                inputs["attention_mask"][line, : len(ids)] = 1
            for index, row in zip(chosen, session.run(["logits"], inputs)[0], strict=True):
                found[index] = labels[row.argmax()]
        return found

    return label


def transformers(checkpoint: str, max_length: int) -> Label:
    """``transformers.pipeline``, as its documentation calls it."""
    from transformers import pipeline

    classify = pipeline("text-classification", model=checkpoint, device="cpu")
    return _pipeline(classify, max_length)


def torch_int8(checkpoint: str, max_length: int) -> Label:
    """The same pipeline, every ``Linear`` quantised by PyTorch when it is loaded."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline

    model = AutoModelForSequenceClassification.from_pretrained(checkpoint)
    model = torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, dtype=torch.qint8)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    classify = pipeline("text-classification", model=model, tokenizer=tokenizer, device="cpu")
    return _pipeline(classify, max_length)


def optimum(checkpoint: str, max_length: int) -> Label:
    """The same pipeline over Optimum's model, which runs on ONNX Runtime."""
    from optimum.onnxruntime import ORTModelForSequenceClassification
    from transformers import AutoTokenizer, pipeline

    model = ORTModelForSequenceClassification.from_pretrained(checkpoint)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    return _pipeline(pipeline("text-classification", model=model, tokenizer=tokenizer), max_length)


def _pipeline(classify: Any, max_length: int) -> Label:
    def label(texts: Sequence[str], batch: int) -> list[str]:
        settings = {"batch_size": batch, "truncation": True, "max_length": max_length}
        return [found["label"] for found in classify(texts, **settings)]

    return label


KINDS = {f.__name__: f for f in (edgebert, bare, transformers, torch_int8, optimum)}


class Contestant:
    """A contestant as the parent sees it; a context manager that ends the process."""

    def __init__(self, kind: str, **settings: object) -> None:
        self.command = [sys.executable, __file__, kind, json.dumps(settings)]

    def __enter__(self) -> Contestant:
        import subprocess

        self.process = subprocess.Popen(
            self.command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONWARNINGS": "ignore", "TRANSFORMERS_VERBOSITY": "error"},
        )
        return self

    def ask(
        self, texts: Sequence[str], *, batch: int = 32, one_by_one: bool = False
    ) -> dict[str, Any]:
        """Has texts labelled, all in one call or each in its own.

        Returns ``labels``, ``seconds`` (of every call), and ``peak_mb`` of the process so far.
        """
        self.send({"texts": list(texts), "batch": batch, "one_by_one": one_by_one})
        return self.receive()

    def send(self, request: dict[str, Any]) -> None:
        """Writes a request."""
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()

    def receive(self) -> dict[str, Any]:
        """Waits for the answer."""
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.command[2:]} ended; its message is above")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def __exit__(self, *exc: object) -> None:
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()


def cold_start_s(contestant: Contestant, text: str = "a great film") -> float:
    """Times a new process from its start to its first label."""
    start = time.perf_counter()
    with contestant:
        contestant.send({"texts": [text], "cold": True})
        contestant.receive()
        return time.perf_counter() - start


def main() -> None:
    """Answers requests until standard input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    label = KINDS[sys.argv[1]](**json.loads(sys.argv[2]))
    for line in sys.stdin:
        request = json.loads(line)
        texts, batch = request["texts"], request.get("batch", 1)
        one_by_one = request.get("one_by_one", True)
        if not request.get("cold"):
            for text in texts[:TURN_WARM_UP]:
                label([text], 1)
        labels: list[str] = []
        seconds: list[float] = []
        for call in [[text] for text in texts] if one_by_one else [texts]:
            start = time.perf_counter()
            labels += label(call, batch)
            seconds.append(time.perf_counter() - start)
        answer = {"labels": labels, "seconds": seconds, "peak_mb": peak_mb()}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def peak_mb() -> float:
    """The most memory that this process has held, in MB."""
    with open("/proc/self/status") as lines:  # noqa: PTH123 - pathlib is an import more
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1000


if __name__ == "__main__":
    main()
