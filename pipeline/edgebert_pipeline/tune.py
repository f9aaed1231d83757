"""Finds what runs a bundle fastest on this CPU, within a budget of answers, and writes it down.

First the kernels: the bundle's variants for a CPU, and its FP32 model written anew for others
(``edgebert_export.cpu_kernels``). Then, with the fastest, how many texts are computed. At the end
the winner meets what the bundle runs today in rounds that nothing was chosen by; only if it is
faster there, too, is it taken (docs/decisions/0020).
"""

from __future__ import annotations

import hashlib
import shutil
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from edgebert_export.cpu_kernels import CANDIDATES, write_for
from edgebert_export.dataset import Example
from edgebert_export.errors import ExportError
from edgebert_export.fidelity import Budget, Fidelity, Judge
from edgebert_export.tuned_bundle import Replacing, bring_back, write_tuned
from edgebert_pipeline.build import BuildDirectory
from edgebert_pipeline.errors import BuildError
from edgebert_pipeline.progress import Progress, Reporter
from edgebert_pipeline.race import Gain, Goal, Runner, Speed, call_tokens, time_rounds, times
from edgebert_runtime.bundle import Bundle
from edgebert_runtime.classifier import CpuSettings, encoder_for, tuning_for
from edgebert_runtime.encoder import Text
from edgebert_runtime.errors import EdgebertError, InputError
from edgebert_runtime.manifest import Measured, Tuning, Variant
from edgebert_runtime.processor import processor_kind, usable_cores

__all__ = ["SettingsTrial", "Trial", "Tuned", "open_to_tune", "tune"]

_ROUNDS, _FINAL_ROUNDS = 5, 21
_HEAT = 3
"""Variants that are open at once beside today's."""
_SINGLE_TEXTS, _MANY_TEXTS = 100, 1024
_BATCH_TOKENS = (128, 256, 512, 1024, 2048)


class Trial(msgspec.Struct, frozen=True, kw_only=True):
    """A variant that was tried.

    Attributes:
        name: Of the variant.
        new: Whether it was made here, from the bundle's FP32.
        size_bytes: Of its model; 0 if it could not be made.
        fidelity: Its answers against FP32's; ``None`` without labelled rows.
        left_out: Why it could not be taken; ``None`` if it could.
        latency_p50_ms: Median over texts, one text a call; the median round.
        throughput_texts_per_s: All texts in one call; the median round.
        gain: By the goal, over what the bundle runs today.
    """

    name: str
    new: bool
    size_bytes: int
    fidelity: Fidelity | None = None
    left_out: str | None = None
    latency_p50_ms: float | None = None
    throughput_texts_per_s: float | None = None
    gain: Gain | None = None


class SettingsTrial(msgspec.Struct, frozen=True, kw_only=True):
    """Settings that were tried with the fastest variant; ``Tuning`` says what they mean.

    Attributes:
        batch_tokens: See there.
        call_tokens: See there.
        by_core: See there.
        throughput_texts_per_s: Many texts; the median round.
        gain: In throughput, over the settings that hold today.
    """

    batch_tokens: int
    call_tokens: int
    by_core: bool
    throughput_texts_per_s: float
    gain: Gain


class Tuned(msgspec.Struct, frozen=True, kw_only=True):
    """What was tried, found, and written.

    Attributes:
        processor: The kind of this machine's.
        cores: That were used.
        today: The variant that the bundle ran here.
        goal: What was compared.
        budget: What a variant may cost; ``None`` without labelled rows.
        texts: Texts that were timed one by one.
        trials: Every variant that was tried.
        settings: Every setting that was tried, those that hold today first.
        final: The winner with its settings over what the bundle runs today, in rounds of their
            own; ``None`` if nothing was promising before.
        tuning: The winner; ``None`` if what the bundle runs here today stays.
        digest: Of the bundle that was written; ``None`` if none was.
    """

    processor: str
    cores: int
    today: str
    goal: Goal
    budget: Budget | None
    texts: int
    trials: tuple[Trial, ...]
    settings: tuple[SettingsTrial, ...]
    final: Gain | None
    tuning: Tuning | None
    digest: str | None


@dataclass(frozen=True)
class _Model:
    """A variant and its model's bytes; ``new`` if the bundle does not have it yet."""

    variant: Variant
    data: bytes
    new: bool


def open_to_tune(path: Path) -> Bundle:
    """Opens a bundle that is to be tuned.

    Raises:
        BundleError: There is none, or it is damaged.
        InputError: It is a ``.tar``.
    """
    bring_back(path)
    bundle = Bundle.open(path)
    if not path.is_dir():
        raise InputError(
            f"{path} is one file; unpack it (tar -xf), tune the directory, and pack it again"
        )
    return bundle


def tune(
    bundle: Bundle,
    examples: Sequence[Example],
    texts: Sequence[Text],
    *,
    goal: Goal = "both",
    budget: Budget = Budget(),  # noqa: B008 - it is frozen
    cores: int | None = None,
    out: Path | None = None,
    dry_run: bool = False,
    reporter: Reporter,
) -> Tuned:
    """Tunes a bundle for this CPU, and writes the result into it, if anything won.

    Args:
        bundle: From ``open_to_tune``.
        examples: Labelled rows to judge by; without any, only what the bundle has competes, since
            nothing would show what new variants answer.
        texts: What to time; at least one.
        goal: Latency of one text, throughput of many, or both.
        budget: What a variant may cost against FP32.
        cores: Cores to use; all usable ones when ``None``.
        out: Where to write the tuned bundle instead: a directory that is not there, or empty. If
            nothing won, it becomes a copy.
        dry_run: Whether to write nothing.
        reporter: Where to report to.

    Raises:
        BundleError: The bundle is damaged.
        InputError: It has no variant to start from, or cannot be written.
        BuildError: It was changed meanwhile.
    """
    path = bundle.path
    _check(bundle, out, with_rows=bool(examples))
    with ExitStack() as stack:
        place = None if dry_run else stack.enter_context(Replacing(out or path))
        bundle.verify()
        run = _Run(bundle, examples, texts, goal, budget, cores or usable_cores(), reporter)
        tuned, winner = run.tune()
        if place is None or (tuned.tuning is None and out is None):
            return tuned
        _check_unchanged(bundle)
        if tuned.tuning is None:
            shutil.copytree(path, place.directory, dirs_exist_ok=True)
            written = Bundle.open(place.directory)
            written.verify()
        else:
            added = (winner.variant, winner.data) if winner.new else None
            written = write_tuned(bundle, place.directory, tuned.tuning, added)
        stack.enter_context(_no_export_into(path, reporter))
        _check_unchanged(bundle)
        place.publish()
        return msgspec.structs.replace(tuned, digest=written.digest)


def _check_unchanged(bundle: Bundle) -> None:
    if Bundle.open(bundle.path).digest != bundle.digest:
        raise BuildError(f"{bundle.path} was changed while it was being tuned; tune it again")


def _no_export_into(path: Path, reporter: Reporter) -> AbstractContextManager[object]:
    """Holds the build directory that a bundle lies in, if it does; waits for an export's end."""
    parent = path.resolve().parent
    if not (parent / ".stages").is_dir():
        return nullcontext()
    return BuildDirectory(parent, reporter, wait=True)


def _check(bundle: Bundle, out: Path | None, *, with_rows: bool) -> None:
    path = bundle.path
    if out is not None and out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise InputError(f"--out {out}: there is something already; give another place")
    if not any("cpu" in variant.devices for variant in bundle.manifest.variants):
        raise InputError(f"{path} has no variant for a CPU; export it anew")
    if with_rows and _fp32(bundle) is None:
        raise InputError(
            f"{path} has no fp32 variant to make others from and to hold answers against; leave "
            "--data out to choose among the variants that it has"
        )


def _fp32(bundle: Bundle) -> Variant | None:
    fitting = (v for v in bundle.manifest.variants if v.precision == "fp32" and "cpu" in v.devices)
    return next(fitting, None)


class _Run:
    """One tuning, step by step: what is tried, and what came of it."""

    def __init__(
        self,
        bundle: Bundle,
        examples: Sequence[Example],
        texts: Sequence[Text],
        goal: Goal,
        budget: Budget,
        cores: int,
        reporter: Reporter,
    ) -> None:
        self._bundle = bundle
        self._examples = examples
        self._goal = goal
        self._budget = budget
        self._cores = cores
        self._reporter = reporter
        chosen = np.linspace(0, len(texts) - 1, min(_SINGLE_TEXTS, len(texts))).astype(int)
        self._texts = [texts[index] for index in chosen]
        self._many = [texts[index % len(texts)] for index in range(_MANY_TEXTS)]
        self._encoder = encoder_for(bundle)
        own = [variant for variant in bundle.manifest.variants if "cpu" in variant.devices]
        known = tuning_for(bundle.manifest, cores)
        self._today = own[0].name if known is None else known.variant
        self._settings_today = CpuSettings.of(known)
        self._models = {v.name: _Model(v, bundle.read(v.model), new=False) for v in own}
        self._trials: dict[str, Trial] = {}

    def tune(self) -> tuple[Tuned, _Model]:
        """Does it all; returns what was found, and the model that won."""
        if self._examples:
            self._make_models()
            self._judge_models()
        self._time_models()
        winner = self._best_model()
        with ExitStack() as stack:
            runners = {
                name: stack.enter_context(self._runner(name)) for name in {self._today, winner}
            }
            trials = [] if self._goal == "latency" else self._time_settings(runners[winner])
            settings = _best_settings(trials) or self._settings_today
            rounds: list[dict[str, Speed]] = []
            if (winner, settings) != (self._today, self._settings_today):
                rounds = self._final_rounds(runners, winner, settings)
        final = None
        if rounds:
            final = Gain.of([r["new"].ratio(r["old"], self._goal) for r in rounds])
            if not final.shown and (winner == self._today or self._fits(self._today)):
                rounds = []
        return Tuned(
            processor=processor_kind(),
            cores=self._cores,
            today=self._today,
            goal=self._goal,
            budget=self._budget if self._examples else None,
            texts=len(self._texts),
            trials=tuple(self._trials.values()),
            settings=tuple(trials),
            final=final,
            tuning=self._tuning(winner, settings, rounds) if rounds else None,
            digest=None,
        ), self._models[winner]

    def _fits(self, name: str) -> bool:
        return self._trials[name].left_out is None

    def _make_models(self) -> None:
        """Writes FP32 for other kernels; what is the same as another model is left out."""
        fp32 = _fp32(self._bundle)
        assert fp32 is not None
        seen = {hashlib.sha256(model.data).digest() for model in self._models.values()}
        names = {variant.name for variant in self._bundle.manifest.variants}
        paths = {entry.path for entry in self._bundle.manifest.files}
        what = f"{len(CANDIDATES)} ways to write {fp32.name} for a CPU"
        with (
            self._reporter.stage("candidates", what) as progress,
            tempfile.TemporaryDirectory() as directory,
        ):
            source = Path(directory) / "fp32.onnx"
            source.write_bytes(self._models[fp32.name].data)
            for done, kernels in enumerate(CANDIDATES, start=1):
                name, path = kernels.name, f"models/{kernels.name}.onnx"
                data = b""
                try:
                    if name not in names and path not in paths:
                        data = write_for(kernels, source)
                    elif name not in self._models:
                        self._leave_out(name, f"the bundle has another {name} or {path}")
                except ExportError as exc:
                    self._leave_out(name, str(exc))
                if data and hashlib.sha256(data).digest() not in seen:
                    seen.add(hashlib.sha256(data).digest())
                    variant = Variant(
                        name=name,
                        model=path,
                        precision=kernels.precision,
                        devices=("cpu",),
                    )
                    self._models[name] = _Model(variant, data, new=True)
                progress(done, len(CANDIDATES))

    def _leave_out(self, name: str, reason: str) -> None:
        new = name not in self._models or self._models[name].new
        trial = self._trials.get(name) or Trial(name=name, new=new, size_bytes=0)
        self._trials[name] = msgspec.structs.replace(trial, left_out=" ".join(reason.split()))

    def _judge_models(self) -> None:
        """Holds every model's answers against FP32's."""
        fp32 = _fp32(self._bundle)
        assert fp32 is not None
        task, rows = self._bundle.manifest.task, len(self._examples)
        with self._reporter.stage(
            "answers", f"{len(self._models)} models, {rows} rows"
        ) as progress:
            judge = Judge(self._models[fp32.name].data, task, self._encoder, self._examples)
            for done, (name, model) in enumerate(self._models.items(), start=1):
                try:
                    fidelity = judge.judge(model.data)
                except EdgebertError as exc:
                    if name == self._today:
                        raise
                    self._leave_out(name, str(exc))
                else:
                    self._trials[name] = Trial(
                        name=name,
                        new=model.new,
                        size_bytes=len(model.data),
                        fidelity=fidelity,
                        left_out=None if fidelity.fits(self._budget) else "not within the budget",
                    )
                progress(done, len(self._models))

    def _runner(self, name: str) -> Runner:
        return Runner(
            self._models[name].data, self._encoder, self._bundle.manifest.task, self._cores
        )

    def _time_models(self) -> None:
        """Times what fits the budget against what runs today, whatever that answers.

        A few at a time: a device may not have the memory for all of them.
        """
        for name, model in self._models.items():
            trial = Trial(name=name, new=model.new, size_bytes=len(model.data))
            self._trials.setdefault(name, trial)
        others = [name for name in self._models if name != self._today and self._fits(name)]
        heats = [others[first : first + _HEAT] for first in range(0, len(others), _HEAT)] or [[]]
        what = f"{1 + len(others)} variants in turns, {_ROUNDS} rounds"
        with (
            self._reporter.stage("speed", what) as progress,
            self._runner(self._today) as today,
        ):
            rounds = [
                round_
                for number, heat in enumerate(heats)
                for round_ in self._time_heat(
                    heat, today, partial(_part, progress, number, len(heats))
                )
            ]
        for name in (self._today, *others):
            own = [round_ for round_ in rounds if name in round_]
            if own:
                self._trials[name] = msgspec.structs.replace(
                    self._trials[name],
                    latency_p50_ms=_median(own, name, lambda speed: speed.latency_p50_ms),
                    throughput_texts_per_s=_median(
                        own, name, lambda speed: speed.throughput_texts_per_s
                    ),
                    gain=Gain.of([r[name].ratio(r[self._today], self._goal) for r in own]),
                )

    def _time_heat(
        self, names: Sequence[str], today: Runner, progress: Progress
    ) -> list[dict[str, Speed]]:
        with ExitStack() as stack:
            runners = {self._today: today}
            for name in names:
                try:
                    runners[name] = stack.enter_context(self._runner(name))
                except EdgebertError as exc:
                    self._leave_out(name, str(exc))
            classifiers = {
                name: stack.enter_context(runner.classifier(self._settings_today))
                for name, runner in runners.items()
            }
            return time_rounds(classifiers, self._texts, self._many, _ROUNDS, progress)

    def _best_model(self) -> str:
        """The fastest that fits: promising beside today's, unless that does not fit."""
        gains = {
            name: trial.gain
            for name, trial in self._trials.items()
            if trial.gain is not None and self._fits(name)
        }
        if self._fits(self._today):
            gains = {name: gain for name, gain in gains.items() if gain.promising}
        return max(gains, key=lambda name: gains[name].ratio, default=self._today)

    def _time_settings(self, runner: Runner) -> list[SettingsTrial]:
        """Tries settings for many texts, beginning with those that hold today."""
        trials = [self._settings_today]
        for by_core in (True, False) if self._cores > 1 else (True,):
            session = runner.session(by_core=by_core)
            by_call = call_tokens(session, self._long_row())
            by_call = self._settings_today.call_tokens if by_call is None else by_call
            trials += [CpuSettings(tokens, by_call, by_core) for tokens in _BATCH_TOKENS]
        trials = list(dict.fromkeys(trials))
        what = f"{len(trials)} ways to compute many texts, {_ROUNDS} rounds"
        with self._reporter.stage("settings", what) as progress, ExitStack() as stack:
            everyone = [stack.enter_context(runner.classifier(settings)) for settings in trials]
            calls = [partial(classifier.predict, self._many) for classifier in everyone]
            rounds = times(calls, _ROUNDS, progress)
        return [
            SettingsTrial(
                batch_tokens=settings.batch_tokens,
                call_tokens=settings.call_tokens,
                by_core=settings.by_core,
                throughput_texts_per_s=_MANY_TEXTS / statistics.median(r[index] for r in rounds),
                gain=Gain.of([row[0] / row[index] for row in rounds]),
            )
            for index, settings in enumerate(trials)
        ]

    def _long_row(self) -> dict[str, NDArray[Any]]:
        words = " ".join(text if isinstance(text, str) else " ".join(text) for text in self._many)
        text: Text = (words, words) if self._bundle.manifest.task.text_pair else words
        return dict(self._encoder.collate(self._encoder.encode([text])))

    def _final_rounds(
        self, runners: Mapping[str, Runner], winner: str, settings: CpuSettings
    ) -> list[dict[str, Speed]]:
        what = f"{winner} against today's {self._today}, {_FINAL_ROUNDS} rounds"
        with (
            self._reporter.stage("final", what) as progress,
            runners[winner].classifier(settings) as new,
            runners[self._today].classifier(self._settings_today) as old,
        ):
            return time_rounds(
                {"new": new, "old": old}, self._texts, self._many, _FINAL_ROUNDS, progress
            )

    def _tuning(
        self, winner: str, settings: CpuSettings, rounds: Sequence[Mapping[str, Speed]]
    ) -> Tuning:
        fidelity = self._trials[winner].fidelity
        worth = [round_["new"].ratios(round_["old"]) for round_ in rounds]
        return Tuning(
            processor=processor_kind(),
            cores=self._cores,
            variant=winner,
            batch_tokens=settings.batch_tokens,
            call_tokens=settings.call_tokens,
            by_core=settings.by_core,
            measured=Measured(
                bundle_sha256=self._bundle.digest,
                before=self._today,
                rows=fidelity.rows if fidelity else 0,
                flips=fidelity.flips if fidelity else 0,
                lost=fidelity.lost if fidelity else 0,
                latency_ratio=statistics.median(latency for latency, _ in worth),
                throughput_ratio=statistics.median(throughput for _, throughput in worth),
                onnxruntime=_onnxruntime_version(),
            ),
        )


def _best_settings(trials: Sequence[SettingsTrial]) -> CpuSettings | None:
    """The settings with the highest throughput, if they are promising beside today's."""
    promising = [trial for trial in trials if trial.gain.promising]
    best = max(promising, key=lambda trial: trial.gain.ratio, default=None)
    if best is None:
        return None
    return CpuSettings(best.batch_tokens, best.call_tokens, best.by_core)


def _part(progress: Progress, number: int, parts: int, done: int, total: int) -> None:
    """Reports progress in one of so many parts."""
    progress(number * total + done, parts * total)


def _median(
    rounds: Sequence[Mapping[str, Speed]], name: str, of: Callable[[Speed], float]
) -> float:
    return statistics.median(of(round_[name]) for round_ in rounds)


def _onnxruntime_version() -> str:
    import onnxruntime

    version: str = onnxruntime.__version__
    return version
