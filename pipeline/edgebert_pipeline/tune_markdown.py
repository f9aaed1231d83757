"""What a tuning tried and found, as tables for a terminal or a page."""

from __future__ import annotations

from collections.abc import Iterator

from edgebert_pipeline.markdown import table
from edgebert_pipeline.race import Gain
from edgebert_pipeline.tune import SettingsTrial, Trial, Tuned

__all__ = ["render_tuned"]

_GOALS = {
    "both": "geometric mean of one text's latency and many texts' throughput",
    "latency": "latency of one text",
    "throughput": "throughput of many texts",
}
_VARIANTS = ("variant", "MB", "flips", "lost", "p50 ms", "texts/s", "times today's", "")
_SETTINGS = ("tokens a batch", "a call's tokens", "batches", "texts/s", "times today's", "")


def render_tuned(tuned: Tuned) -> str:
    """Returns the tables, and what they came to."""
    parts = [f"{tuned.processor}, {tuned.cores} cores; goal: {_GOALS[tuned.goal]}"]
    parts.append(table(_VARIANTS, [_trial(trial, tuned) for trial in tuned.trials]))
    if tuned.budget is None:
        parts.append(
            "No labelled rows were given, so nothing new was tried: nothing could show what it "
            "answers. Only variants that are in the bundle competed, which were judged when it was "
            "exported, and settings. With --data FILE, new ones compete, too."
        )
    if tuned.settings:
        rows = [_settings(trial, tuned, first=i == 0) for i, trial in enumerate(tuned.settings)]
        parts.append(table(_SETTINGS, rows))
    parts.append(_outcome(tuned))
    return "\n\n".join(parts)


def _trial(trial: Trial, tuned: Tuned) -> tuple[str, ...]:
    notes = ["today's"] if trial.name == tuned.today else ["new"] if trial.new else []
    if trial.left_out is not None:
        notes.append(trial.left_out)
    if tuned.tuning is not None and trial.name == tuned.tuning.variant:
        notes.append("taken")
    judged = trial.fidelity
    return (
        trial.name,
        f"{trial.size_bytes / 1e6:.1f}" if trial.size_bytes else "-",
        f"{judged.flips} ({judged.flips / judged.rows:.2%})" if judged else "-",
        f"{judged.lost / judged.rows:+.2%}" if judged else "-",
        "-" if trial.latency_p50_ms is None else f"{trial.latency_p50_ms:.2f}",
        "-" if trial.throughput_texts_per_s is None else f"{trial.throughput_texts_per_s:.0f}",
        "-" if trial.gain is None or trial.name == tuned.today else _gain(trial.gain),
        ", ".join(notes),
    )


def _settings(trial: SettingsTrial, tuned: Tuned, *, first: bool) -> tuple[str, ...]:
    tuning = tuned.tuning
    same = tuning is not None and all(
        getattr(trial, name) == getattr(tuning, name)
        for name in ("batch_tokens", "call_tokens", "by_core")
    )
    return (
        str(trial.batch_tokens),
        str(trial.call_tokens),
        "one a core" if trial.by_core else "on all cores",
        f"{trial.throughput_texts_per_s:.0f}",
        "-" if first else _gain(trial.gain),
        ", ".join(["today's"] * first + ["taken"] * same),
    )


def _gain(gain: Gain) -> str:
    return f"{gain.ratio:.2f} ({gain.faster} of {gain.rounds} rounds)"


def _outcome(tuned: Tuned) -> str:
    return " ".join([*_final(tuned), *_outside(tuned)])


def _final(tuned: Tuned) -> Iterator[str]:
    """Says what was taken, or that nothing was, and why."""
    tuning, today, gain = tuned.tuning, tuned.today, tuned.final
    if gain is None:
        others = "nothing" if tuned.budget is None else "nothing within the budget"
        yield f"{today} stays, as it was: {others} was faster by more than 2 %."
        return
    final = (
        f"{gain.ratio:.2f} times today's speed in the final rounds, faster in {gain.faster} of "
        f"{gain.rounds}"
    )
    if tuning is None:
        yield f"{today} stays, as it was: the best of the rest had {final}, which shows nothing."
        return
    measured = tuning.measured
    yield (
        f"{tuning.variant}, batches of at most {tuning.batch_tokens} tokens "
        f"{'one a core' if tuning.by_core else 'on all cores'}: {final}; "
        f"{measured.latency_ratio:.2f} times as fast for one text, "
        f"{measured.throughput_ratio:.2f} times for many."
    )
    if not gain.shown:
        yield f"{today} is not shown to be slower, but is not within the budget."


def _outside(tuned: Tuned) -> Iterator[str]:
    """Says so if what will run is not within the budget."""
    fits = next(trial for trial in tuned.trials if trial.name == tuned.today).left_out is None
    if not fits and (tuned.tuning is None or tuned.tuning.variant == tuned.today):
        yield f"{tuned.today} is not within the budget, but nothing that runs here is."
