"""Texts in, labels out: the one object that an application holds."""

from __future__ import annotations

import functools
import itertools
import math
import os
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from types import MappingProxyType
from typing import TYPE_CHECKING, Generic, NamedTuple, TypeVar

import msgspec
import numpy as np

import edgebert_runtime
from edgebert_runtime.batching import Gatherer, by_length
from edgebert_runtime.bundle import Bundle
from edgebert_runtime.cache import (
    is_known_right,
    is_known_whole,
    remember_right,
    remember_whole,
)
from edgebert_runtime.device import Choice, DeviceFacts, choose, gather_facts
from edgebert_runtime.encoder import Encoded, Text, TextEncoder
from edgebert_runtime.errors import BundleError, DeviceError, EdgebertError, InputError
from edgebert_runtime.manifest import Manifest, Task, Tuning
from edgebert_runtime.onnx_session import OnnxSession
from edgebert_runtime.processor import processor_kind, usable_cores
from edgebert_runtime.session import Inputs, Session

if TYPE_CHECKING:
    from concurrent.futures import Future, ThreadPoolExecutor
    from types import TracebackType

    from numpy.typing import NDArray

    from edgebert_runtime.tensorrt_session import TensorRTSession

__all__ = ["Classifier", "CpuSettings", "Prediction", "Stats"]

_T = TypeVar("_T")

_CHUNK_TEXTS = 1024
"""Texts that are tokenised and sorted by length at a time, so that memory stays bounded."""
_ANY = sys.maxsize
_MOST_ROWS = 4096
_MOST_UNCOUNTED = 256


class CpuSettings(NamedTuple):
    """How texts are computed on a CPU that the bundle was not tuned for (docs/performance.md).

    Attributes:
        batch_tokens: Most tokens of a batch, so that its activations stay in a core's cache.
        call_tokens: What a call takes besides its tokens, as so many tokens.
        by_core: Whether many texts are computed in batches one a core.
    """

    batch_tokens: int = 512
    call_tokens: int = 16
    by_core: bool = True

    @classmethod
    def of(cls, tuning: Tuning | None) -> CpuSettings:
        """Returns what a tuning says, or else what does well everywhere."""
        if tuning is None:
            return cls()
        return cls(tuning.batch_tokens, tuning.call_tokens, tuning.by_core)


class Prediction(msgspec.Struct, frozen=True):
    """What the model says of one text.

    Attributes:
        label: The best label; ``None`` when no label of a ``multi_label`` task applies.
        score: Its probability (with ``None``, the highest one), between 0 and 1.
        labels: Every label that applies, best first; exactly one in a ``single_label`` task.
    """

    label: str | None
    score: float
    labels: tuple[str, ...]


class Stats(msgspec.Struct, frozen=True):
    """What a classifier has done since it was loaded.

    Attributes:
        texts: Texts that the model computed.
        truncated: Of these, how many were cut to the model's ``max_length``.
        batches: Calls of the model that succeeded.
    """

    texts: int = 0
    truncated: int = 0
    batches: int = 0


class _Computed(NamedTuple):
    """Raw outputs that are there: what stands for a future where there are no threads."""

    found: NDArray[np.float32]

    def result(self) -> NDArray[np.float32]:
        return self.found

    def cancel(self) -> bool:
        return False


class _Chunk(NamedTuple):
    """Texts that are being computed.

    Attributes:
        rows: How many.
        batches: Which of them share a call of the model.
        futures: The raw outputs of each batch.
    """

    rows: int
    batches: list[list[int]]
    futures: list[Future[NDArray[np.float32]] | _Computed]

    def cancel(self) -> None:
        """Has what has not begun never begin."""
        for future in self.futures:
            future.cancel()


class Classifier:
    """A text classifier on a device. Safe to use from several threads, and a context manager.

    Most callers use ``Classifier.load``. The constructor takes the parts, so that tests and
    applications can bring their own session.

    Args:
        session: The loaded model.
        encoder: Turns texts into the model's inputs.
        task: What the outputs mean.
        batch_size: Most texts in one call of the model; at least 1.
        batch_tokens: Most tokens in one call of several texts, padding included; any number when
            ``None``.
        call_tokens: What a call takes besides its tokens, as so many tokens: less makes more and
            smaller calls with less padding; ``None`` makes as few as there can be.
        workers: Calls of the model at a time, when there are texts for several.
        start_worker_session: Loads the model for the workers, each of which runs it on its own
            core; when ``None`` they share ``session``.
        max_wait_ms: When threads bring few texts each, how long one may wait for others to share
            a call of the model with; ``None`` runs what each brings on its own.
        choice: What was chosen to run, and why; ``None`` when the caller chose.
        digest: Digest of the bundle that the parts came from; ``None`` without a bundle.
    """

    def __init__(
        self,
        session: Session,
        encoder: TextEncoder,
        task: Task,
        *,
        batch_size: int = 32,
        batch_tokens: int | None = None,
        call_tokens: int | None = None,
        workers: int = 1,
        start_worker_session: Callable[[], Session] | None = None,
        max_wait_ms: float | None = None,
        choice: Choice | None = None,
        digest: str | None = None,
    ) -> None:
        _check_sizes(batch_size, max_wait_ms)
        self.task = task
        self.choice = choice
        self.digest = digest
        self._session = session
        self._encoder = encoder
        self._columns = len(task.labels)
        answer = _single_label if task.thresholds is None else _multi_label
        self._prediction = functools.partial(answer, task)
        self.batch_size = batch_size
        self._cut = functools.partial(
            by_length,
            most_rows=batch_size,
            most_tokens=_ANY if batch_tokens is None else batch_tokens,
            call_tokens=_ANY if call_tokens is None else call_tokens,
        )
        self._workers = workers
        self._start_worker_session = start_worker_session
        self._worker_session: Session | None = None
        self._pool: ThreadPoolExecutor | None = None
        self._closed = False
        self._answered: deque[tuple[int, int]] = deque()  # of each call: its rows, and those cut
        self._texts = self._truncated = self._batches = 0
        self._counting = threading.Lock()
        self._starting = threading.Lock()
        self._gatherer: Gatherer | None = None
        if max_wait_ms is not None:
            self._gatherer = Gatherer(
                lambda text: encoder.encode([text])[0],
                self._on_worker,
                self._cut,
                most_rows=batch_size,
                max_wait_ms=max_wait_ms,
                workers=workers,
            )

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        *,
        device: str = "auto",
        variant: str | None = None,
        intra_op_threads: int | None = None,
        batch_size: int = 32,
        max_wait_ms: float | None = None,
        build_engine: bool = False,
        on_progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> Classifier:
        """Loads a bundle, after checking every byte of it.

        Args:
            path: The bundle: a directory, or one ``.tar``.
            device: ``auto`` (the best that works at once), ``cpu``, ``cuda``, ``tensorrt`` or
                ``rtx`` (TensorRT for RTX).
            variant: Name of the variant to load; the best for the device when ``None``. On a CPU
                of a kind that the bundle was tuned for, the fastest one.
            intra_op_threads: Cores to use on a CPU: a few texts are computed by all of them
                together, many texts in batches, one a core. All usable ones when ``None``.
            batch_size: Most texts in one call of the model.
            max_wait_ms: For programs whose threads bring one text each: texts of different
                threads share calls of the model, for which one waits this long at most. ``None``
                runs what each thread brings on its own.
            build_engine: Whether to build the TensorRT engine if there is none, which takes
                minutes. Without it, ``auto`` runs on ONNX Runtime until
                ``edgebert-rt engine`` has built one.
            on_progress: Called with the build's steps done and known so far.

        Raises:
            BundleError: The bundle is damaged, unsafe or unknown.
            DeviceError: The device cannot be used. ``auto`` raises it when nothing works.
            InputError: An argument is wrong.
            MissingExtraError: ONNX Runtime is not installed.
        """
        if intra_op_threads is not None and intra_op_threads < 1:
            raise InputError(f"intra_op_threads is {intra_op_threads}; it must be at least 1")
        _check_sizes(batch_size, max_wait_ms)
        bundle = Bundle.open(path)
        # The files that are parsed are hashed when they are read; the rest beside the loading.
        rest = None if is_known_whole(bundle) else _Background(bundle.verify)
        cores = intra_op_threads or usable_cores()
        tuning = tuning_for(bundle.manifest, cores)
        usual = tuning.variant if tuning is not None else None
        likely = _likely_model(bundle.manifest, device, variant or usual)
        model = (
            None if likely is None else _Background(functools.partial(bundle.read_model, likely))
        )
        facts = gather_facts(device)
        choice = choose_for(
            bundle, facts, device, variant, tuning=tuning, build_engine=build_engine
        )
        for reason in choice.faults:
            _warn("running %s on %s: %s", choice.variant.name, choice.device, reason)

        # The tokenizer is read while a session starts, and not while Python is needed for that.
        encoder = _Background(lambda: encoder_for(bundle), later=True)

        def build(chosen: Choice, failed: dict[tuple[str, str], str]) -> Choice:
            encoder.result()  # if it is at fault, no engine need be built
            return _with_built_engine(
                bundle, chosen, facts, on_progress, failed, any_variant=variant is None
            )

        def start(chosen: Choice) -> Session:
            if chosen.device == "tensorrt" or chosen.device == "rtx":
                encoder.begin()
                return _start_engine(bundle, chosen, facts)
            path = chosen.variant.model
            file = model.result() if model and path == likely else bundle.read_model(path)
            session = OnnxSession(
                file, device=chosen.device, intra_op_threads=cores, on_parsed=encoder.begin
            )
            bundle.check_unchanged(path)
            _check_belongs(session, bundle)
            _check_answers(session, bundle, chosen, facts)
            return session

        def start_worker_session() -> Session:
            path = choice.variant.model
            session = OnnxSession(bundle.read_model(path), intra_op_threads=1)
            bundle.check_unchanged(path)
            return session

        def choose_again(failed: Mapping[tuple[str, str], str]) -> Choice:
            return choose_for(
                bundle,
                facts,
                device,
                variant,
                tuning=tuning,
                build_engine=build_engine,
                failed=failed,
            )

        again = choose_again if device == "auto" else None
        try:
            session, choice = _start_session(choice, build, start, again)
        finally:
            encoder.end()
        try:
            if rest is not None:
                rest.result()
                remember_whole(bundle)
            text_encoder = encoder.result()
        except BaseException:
            session.close()
            raise
        on_cpu = choice.device == "cpu"
        measured = tuning is not None and tuning.variant == choice.variant.name
        settings = CpuSettings.of(tuning if measured else None)
        by_core = on_cpu and cores > 1 and settings.by_core
        return cls(
            session,
            text_encoder,
            bundle.manifest.task,
            batch_size=batch_size,
            batch_tokens=settings.batch_tokens if on_cpu else None,
            call_tokens=settings.call_tokens if on_cpu else None,
            workers=cores if by_core else 1,
            start_worker_session=start_worker_session if by_core else None,
            max_wait_ms=max_wait_ms,
            choice=choice,
            digest=bundle.digest,
        )

    def predict(self, texts: Sequence[Text]) -> list[Prediction]:
        """Labels ``texts``, in order.

        Args:
            texts: Strings, or pairs of strings where the task is on pairs. The empty string
                is valid; what is longer than ``max_length`` tokens is cut and counted.

        Raises:
            InputError: A text is not what the task takes.
            DeviceError: The backend failed, or gave what is not a finite number, or the classifier
                is closed.
        """
        return self.predictions_of(self._logits(texts))

    def predictions_of(self, logits: NDArray[np.float32]) -> list[Prediction]:
        """Returns what each row of the model's raw outputs, ``float32[rows, labels]``, says.

        Without numpy: after a call of the model, what numpy needs for a handful of numbers is in
        no cache of the processor, and takes longer than this (``benchmarks/single_text.py``).

        Raises:
            DeviceError: One is not a finite number.
        """
        rows = logits.tolist()
        for row in rows:
            if not math.isfinite(sum(row)):
                raise self._not_finite()
        return [self._prediction(row) for row in rows]

    def scores(self, texts: Sequence[Text]) -> NDArray[np.float32]:
        """Returns probabilities, ``float32[len(texts), labels]``, in the order of ``texts``.

        Rows sum to 1 in a ``single_label`` task; each entry stands alone in ``multi_label``.
        Raises what ``predict`` raises.
        """
        return self.scores_of(self._logits(texts))

    def scores_of(self, logits: NDArray[np.float32]) -> NDArray[np.float32]:
        """Returns the scores that raw outputs make; both are ``float32[rows, labels]``.

        Raises:
            DeviceError: One is not a finite number.
        """
        self._check_finite(logits)
        of_row = _softmax if self.task.thresholds is None else _sigmoid
        found = np.array([of_row(row) for row in logits.tolist()], dtype=np.float32)
        return found.reshape(logits.shape)

    def logits(self, texts: Sequence[Text]) -> NDArray[np.float32]:
        """Returns the model's raw outputs, ``float32[len(texts), labels]``, in order.

        Raises what ``predict`` raises.
        """
        found = self._logits(texts)
        self._check_finite(found)
        return found

    def _logits(self, texts: Sequence[Text]) -> NDArray[np.float32]:
        """Does what ``logits`` does, but does not look whether outputs are finite.

        Callers do, each at its own: others whose texts share a call of the model have answers.
        """
        if isinstance(texts, str):
            raise InputError("give a list of texts, not one string: [text]")
        try:
            count = len(texts)
        except TypeError as exc:
            raise InputError(f"give a list of texts, not a {type(texts).__name__}") from exc
        if count == 1 and self._gatherer is None:
            (text,) = texts
            inputs, truncated = self._encoder.encode_one(text)
            return self._run(self._session, inputs, 1, truncated)
        if 0 < count <= self.batch_size:
            if self._gatherer is not None and count == 1 < self._workers:
                alone = list(texts)
                self._encoder.check(alone)
                return np.stack(self._gatherer.logits(alone))
            rows = self._encoder.encode(texts)
            if self._gatherer is not None:
                return np.stack(self._gatherer.logits(rows))
            batches = self._cut(rows)
            if len(batches) == 1:
                return self._compute(rows, self._session)
            return self._collected(self._started(rows, batches))
        starts = range(0, count, _CHUNK_TEXTS)
        chunks = self._encoded(texts[start : start + _CHUNK_TEXTS] for start in starts)
        logits = np.empty((count, self._columns), dtype=np.float32)
        for start, found in zip(starts, self._by_chunk(chunks), strict=True):
            logits[start : start + len(found)] = found
        return logits

    def stream(self, texts: Iterable[Text], *, chunk_size: int = 1024) -> Iterator[Prediction]:
        """Labels texts as they come, in order, however many: memory does not grow.

        While a chunk is computed, the next is read and tokenised; no more is read than that, so
        a slow consumer slows the reading down. Answers come a chunk at a time.

        Args:
            texts: As for ``predict``, from anything that can be iterated over.
            chunk_size: Texts that are read, and sorted by length, at a time; at least 1.

        Raises what ``predict`` raises, while iterating.
        """
        if isinstance(texts, str):
            raise InputError("give texts to iterate over, not one string: [text]")
        if chunk_size < 1:
            raise InputError(f"chunk_size is {chunk_size}; it must be at least 1")
        source = iter(texts)
        chunks = iter(lambda: list(itertools.islice(source, chunk_size)), [])
        for logits in self._by_chunk(self._encoded(chunks)):
            yield from self.predictions_of(logits)

    def _encoded(self, chunks: Iterable[Sequence[Text]]) -> Iterator[list[Encoded]]:
        first_index = 0
        for chunk in chunks:
            yield self._encoder.encode(chunk, first_index=first_index)
            first_index += len(chunk)

    def _by_chunk(self, chunks: Iterable[list[Encoded]]) -> Iterator[NDArray[np.float32]]:
        """Yields the raw outputs of each chunk; the next one is tokenised meanwhile."""
        running: deque[_Chunk] = deque()
        try:
            for rows in chunks:
                running.append(self._started(rows, self._cut(rows)))
                if len(running) > 1:
                    yield self._collected(running.popleft())
            while running:
                yield self._collected(running.popleft())
        finally:
            for chunk in running:
                chunk.cancel()

    def _started(self, rows: list[Encoded], batches: list[list[int]]) -> _Chunk:
        """Hands batches of rows to the workers."""
        longest_first = batches[::-1]  # so that none is left over alone
        futures: list[Future[NDArray[np.float32]] | _Computed] = []
        for batch in longest_first:
            batch_rows = [rows[index] for index in batch]
            try:
                futures.append(self._running_pool().submit(self._on_worker, batch_rows))
            except (RuntimeError, ImportError) as exc:
                if self._closed:  # by another thread, a moment ago
                    raise DeviceError("the classifier is closed") from exc
                # The main thread has ended; from then on no pool takes anything, or can be had.
                futures.append(_Computed(self._on_worker(batch_rows)))
        return _Chunk(len(rows), longest_first, futures)

    def _collected(self, chunk: _Chunk) -> NDArray[np.float32]:
        """Waits for the raw outputs of a chunk."""
        from concurrent.futures import CancelledError

        logits = np.empty((chunk.rows, self._columns), dtype=np.float32)
        try:
            for batch, future in zip(chunk.batches, chunk.futures, strict=True):
                logits[batch] = future.result()
        except CancelledError as exc:
            raise DeviceError("the classifier was closed before this was computed") from exc
        finally:
            chunk.cancel()
        return logits

    def _running_pool(self) -> ThreadPoolExecutor:
        from concurrent.futures import ThreadPoolExecutor  # a single text needs none

        with self._starting:
            if self._closed:
                raise DeviceError("the classifier is closed")
            if self._pool is None:
                self._pool = ThreadPoolExecutor(self._workers, "edgebert-worker")
            return self._pool

    def _on_worker(self, rows: list[Encoded]) -> NDArray[np.float32]:
        with self._starting:
            if self._worker_session is None:
                self._worker_session = self._new_worker_session()
        return self._compute(rows, self._worker_session)

    def _new_worker_session(self) -> Session:
        if self._start_worker_session is None:
            return self._session
        try:
            return self._start_worker_session()
        except EdgebertError as exc:  # the bundle is gone, say; what was loaded still works
            _warn("workers share one session, which is slower: %s", exc)
            return self._session

    def _compute(self, rows: list[Encoded], session: Session) -> NDArray[np.float32]:
        """Runs the model on rows, in one batch."""
        truncated = sum([row.truncated for row in rows])
        return self._run(session, self._encoder.collate(rows), len(rows), truncated)

    def _run(
        self, session: Session, inputs: Inputs, count: int, truncated: int
    ) -> NDArray[np.float32]:
        """Runs the model on a batch of ``count`` rows, of which some were truncated."""
        found: NDArray[np.float32] = session.run(inputs)["logits"]
        if found.shape != (count, self._columns):
            raise BundleError(
                f"the model gave logits of shape {found.shape} for {count} texts and "
                f"{self._columns} labels; model and manifest do not belong together"
            )
        self._answered.append((count, truncated))
        if len(self._answered) > _MOST_UNCOUNTED:
            self._count()
        return found

    def _check_finite(self, logits: NDArray[np.float32]) -> None:
        if not np.isfinite(logits).all():
            raise self._not_finite()

    def _not_finite(self) -> DeviceError:
        of = "the model"
        if self.choice is not None:
            of = f"{self.choice.variant.name} on {self.choice.device}"
        return DeviceError(
            f"an output of {of} is not a finite number, and no answer: edgebert-rt verify BUNDLE "
            "says whether this device computes rightly"
        )

    def _count(self) -> Stats:
        """Adds up what was answered, which ``_run`` notes: to take a lock takes much longer."""
        with self._counting:
            while self._answered:
                rows, truncated = self._answered.popleft()
                self._texts += rows
                self._truncated += truncated
                self._batches += 1
            return Stats(self._texts, self._truncated, self._batches)

    @property
    def session(self) -> Session:
        """The loaded model, which this classifier closes."""
        return self._session

    @property
    def encoder(self) -> TextEncoder:
        """What turns texts into the model's inputs."""
        return self._encoder

    @property
    def stats(self) -> Stats:
        """What this classifier has done so far; a snapshot."""
        return self._count()

    def close(self) -> None:
        """Frees the model. Using the classifier afterwards raises ``DeviceError``."""
        with self._starting:
            self._closed = True
        if self._gatherer is not None:
            self._gatherer.close()
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
        if self._worker_session is not None:
            self._worker_session.close()
        self._session.close()

    def __enter__(self) -> Classifier:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def encoder_for(bundle: Bundle) -> TextEncoder:
    """Builds the encoder that a bundle describes. Raises ``BundleError``."""
    manifest = bundle.manifest
    return TextEncoder(
        bundle.read(manifest.tokenizer),
        input_names=[spec.name for spec in manifest.inputs],
        max_length=manifest.max_length,
        pad_token_id=manifest.pad_token_id,
        text_pair=manifest.task.text_pair,
    )


class _Background(threading.Thread, Generic[_T]):
    """Calls a function in a thread of its own.

    Args:
        function: What to call.
        later: Whether to begin only when told. A program that ends waits for such a thread, as the
            tokenizer's own code would abort it if its thread was ended.
    """

    def __init__(self, function: Callable[[], _T], *, later: bool = False) -> None:
        super().__init__(daemon=not later)
        self._function = function
        self._found: _T
        self._fault: BaseException | None = None
        if not later:
            self.begin()

    def run(self) -> None:
        try:
            self._found = self._function()
        except BaseException as exc:
            self._fault = exc

    def begin(self) -> None:
        """Begins, if it has not, and if there is a thread to be had."""
        if self.ident is None:
            with suppress(RuntimeError):
                self.start()

    def end(self) -> None:
        """Waits for the function to end, if it has begun."""
        if self.ident is not None:
            self.join()

    def result(self) -> _T:
        """Waits for the function to end, and returns what it did, or raises what it raised."""
        self.begin()
        if self.ident is None:
            self.run()
        self.end()
        if self._fault is not None:
            raise self._fault
        return self._found


def tuning_for(manifest: Manifest, cores: int) -> Tuning | None:
    """Returns what ``edgebert tune`` found to be the fastest on this kind of CPU, if it did."""
    return manifest.tuning(processor_kind(), cores) if manifest.tunings else None


def choose_for(
    bundle: Bundle,
    facts: DeviceFacts,
    device: str = "auto",
    variant: str | None = None,
    *,
    tuning: Tuning | None = None,
    build_engine: bool = False,
    failed: Mapping[tuple[str, str], str] = MappingProxyType({}),
) -> Choice:
    """Chooses what of a bundle runs on this machine; see ``choose`` for what it raises."""
    tuned = {} if tuning is None else {"cpu": tuning.variant}
    if not facts.tensorrt:
        return choose(bundle.manifest, facts, device, variant, preferred=tuned, failed=failed)
    from edgebert_runtime.engine_cache import EngineCache
    from edgebert_runtime.engines import available_engines, preferred_variants

    cache = EngineCache()
    return choose(
        bundle.manifest,
        facts,
        device,
        variant,
        engines=available_engines(bundle, cache),
        preferred={**tuned, **preferred_variants(bundle, cache, facts)},
        failed=failed,
        build_engine=build_engine,
    )


def _with_built_engine(
    bundle: Bundle,
    choice: Choice,
    facts: DeviceFacts,
    on_progress: Callable[[int, int], None],
    failed: dict[tuple[str, str], str],
    *,
    any_variant: bool,
) -> Choice:
    """Builds the engine that was chosen, or if that fails and it may be any, another variant's.

    What cannot be built is added to ``failed``, and what is there already is not tried.
    """
    from edgebert_runtime.engine_cache import EngineCache
    from edgebert_runtime.engines import build_engines, variants_for

    assert choice.engine is not None
    flavour = choice.engine.flavour
    others = [
        v
        for v in variants_for(bundle.manifest, flavour)
        if any_variant and v.name != choice.variant.name and (flavour, v.name) not in failed
    ]
    _warn("building an engine of %s for %s", choice.variant.name, choice.engine)
    try:
        built = build_engines(
            bundle,
            flavour,
            facts,
            EngineCache(),
            variants=[choice.variant, *others],
            first_only=True,
            on_progress=on_progress,
        )
    except DeviceError as exc:
        failed.update({(flavour, v.name): str(exc) for v in (choice.variant, *others)})
        raise
    for name, failure in built.failures.items():
        _warn("%s: not built: %s", name, failure)
        failed[flavour, name] = failure
    ((name, engine),) = built.keys.items()
    variant = bundle.manifest.variant(name)
    return msgspec.structs.replace(choice, variant=variant, engine=engine, engine_missing=False)


def _start_engine(bundle: Bundle, choice: Choice, facts: DeviceFacts) -> Session:
    """Opens the engine that was chosen, once it has given the known answers on this machine."""
    from edgebert_runtime.engine_cache import EngineCache
    from edgebert_runtime.engines import arithmetic_of, open_engine, open_verified

    assert choice.engine is not None
    cache, name = EngineCache(), choice.variant.name
    known = is_known_right(*arithmetic_of(bundle, choice.engine, facts, cache))
    session = None if known else open_verified(bundle, choice.engine, name, facts, cache)
    if session is not None and choice.engine.flavour == "rtx":
        # A session that serves begins with kernels for any shape, while a shape's own, which were
        # asked just now, are loaded.
        session.close()
        session = None
    if session is None:
        session = open_engine(bundle, choice.engine, cache)
        if not known:
            _verify(session, bundle, choice)
    _check_belongs(session, bundle)
    return session


def arithmetic_of_onnx_runtime(
    bundle: Bundle, choice: Choice, facts: DeviceFacts
) -> tuple[str, ...]:
    """Returns what a session's answers are of, for ``is_known_right``: libraries and processor."""
    processor = processor_kind() if choice.device == "cpu" else f"{facts.driver} {facts.gpus}"
    of_session = bundle.digest, choice.variant.name, choice.device
    return *of_session, *facts.onnxruntime, processor, edgebert_runtime.__version__


def _check_answers(session: Session, bundle: Bundle, choice: Choice, facts: DeviceFacts) -> None:
    """Holds a session against the known answers, unless this machine has done so before."""
    what = arithmetic_of_onnx_runtime(bundle, choice, facts)
    if is_known_right(*what):
        return
    _verify(session, bundle, choice)
    remember_right(*what)


def _verify(session: Session, bundle: Bundle, choice: Choice) -> None:
    """Holds a session against the known answers; closes it if it does not give them."""
    from edgebert_runtime.known_answers import verify  # few starts need it

    try:
        verify(session, bundle, choice.variant.name, choice.device)
    except BaseException:
        session.close()
        raise


def _likely_model(manifest: Manifest, device: str, variant: str | None) -> str | None:
    """The model that a CPU would run: it is read and hashed while ONNX Runtime is imported."""
    if device not in {"auto", "cpu"}:
        return None
    fitting = (v for v in manifest.variants if "cpu" in v.devices and variant in {None, v.name})
    return next((v.model for v in fitting), None)


def _warn(message: str, *args: object) -> None:
    import logging  # here: a start that goes well does not pay for it

    logging.getLogger("edgebert").warning(message, *args)


def _start_session(
    choice: Choice,
    build: Callable[[Choice, dict[tuple[str, str], str]], Choice],
    start: Callable[[Choice], Session],
    choose_again: Callable[[Mapping[tuple[str, str], str]], Choice] | None,
) -> tuple[Session, Choice]:
    """Starts what was chosen; if that fails and there may be another choice, takes it, loudly.

    Args:
        choice: What was chosen.
        build: Builds its engine, and adds what cannot be built to what has failed.
        start: Starts it.
        choose_again: Chooses once more, by what has failed; ``None`` if nothing else may run.
    """
    failed: dict[tuple[str, str], str] = {}
    while True:
        try:
            if choice.engine_missing:
                choice = build(choice, failed)
            return start(choice), choice
        except DeviceError as exc:
            if choose_again is None:
                raise
            first = choice.device, choice.variant.name
            failed[first] = str(exc)
        # Out of the except clause, so that what the exception holds on to is freed.
        choice = choose_again(failed)
        _warn(
            "falling back to %s, variant %s: %s: %s",
            choice.device, choice.variant.name, first[0], failed[first],
        )  # fmt: skip


def _check_belongs(session: OnnxSession | TensorRTSession, bundle: Bundle) -> None:
    """Checks that a model takes what the manifest says. Raises ``BundleError``."""
    listed = {spec.name for spec in bundle.manifest.inputs}
    if session.input_names != listed:
        session.close()
        raise BundleError(
            f"{bundle.path}: the model takes {sorted(session.input_names)}, the manifest lists "
            f"{sorted(listed)}"
        )


def _check_sizes(batch_size: int, max_wait_ms: float | None) -> None:
    if not 1 <= batch_size <= _MOST_ROWS:
        raise InputError(f"batch_size is {batch_size}; it must lie between 1 and {_MOST_ROWS}")
    if max_wait_ms is not None and not 0 <= max_wait_ms <= 60_000:
        raise InputError(f"max_wait_ms is {max_wait_ms}; it must lie between 0 and 60000")


def _single_label(task: Task, logits: list[float]) -> Prediction:
    largest = max(logits)
    label = task.labels[logits.index(largest)]
    share = 1 / sum([math.exp(logit - largest) for logit in logits])  # as in ``_softmax``
    return Prediction(label, share, (label,))


def _multi_label(task: Task, logits: list[float]) -> Prediction:
    assert task.thresholds is not None
    scores = _sigmoid(logits)
    best_first = sorted(range(len(scores)), key=scores.__getitem__, reverse=True)
    applying = [index for index in best_first if scores[index] >= task.thresholds[index]]
    if not applying:
        return Prediction(None, max(scores), ())
    labels = tuple(task.labels[index] for index in applying)
    return Prediction(labels[0], scores[applying[0]], labels)


def _softmax(logits: list[float]) -> list[float]:
    largest = max(logits)  # without it, exp would overflow
    shares = [math.exp(logit - largest) for logit in logits]
    total = sum(shares)
    return [share / total for share in shares]


def _sigmoid(logits: list[float]) -> list[float]:
    # exp of -|x| cannot overflow, whatever the model puts out.
    small = [math.exp(-abs(logit)) for logit in logits]
    return [(1 if x >= 0 else e) / (1 + e) for x, e in zip(logits, small, strict=True)]
