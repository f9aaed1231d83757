"""Holds every variant of a bundle that runs on this machine against the bundle's known answers."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import msgspec

from edgebert_runtime.cache import is_known_right, remember_right
from edgebert_runtime.classifier import arithmetic_of_onnx_runtime, choose_for
from edgebert_runtime.device import DEVICES, Choice
from edgebert_runtime.errors import DeviceError, EdgebertError, InputError, MissingExtraError
from edgebert_runtime.facts import DeviceFacts, gather_facts
from edgebert_runtime.known_answers import KnownAnswers, deviation, read_known_answers
from edgebert_runtime.onnx_session import OnnxSession
from edgebert_runtime.processor import usable_cores

if TYPE_CHECKING:
    from edgebert_runtime.bundle import Bundle
    from edgebert_runtime.session import Session

__all__ = ["Verified", "VerifiedVariant", "is_verified", "verify_here"]


class VerifiedVariant(msgspec.Struct, frozen=True, kw_only=True):
    """What a variant gave for the known inputs on one device.

    Attributes:
        variant: Its name.
        device: Where it ran.
        passed: Whether its outputs are as is known.
        largest: Its largest difference from its own expected outputs; ``None`` if an output is
            not a finite number, or it did not run.
        tolerance: How large that may be.
        from_reference: Its largest difference from FP32's outputs.
        expected_from_reference: What that should be.
        ms: Milliseconds that the known inputs took, the first batch's warming up included.
        fault: Why it did not run, if so.
    """

    variant: str
    device: str
    passed: bool
    tolerance: float
    expected_from_reference: float = 0.0
    largest: float | None = None
    from_reference: float | None = None
    ms: float = 0.0
    fault: str | None = None

    def __str__(self) -> str:
        name = f"{self.variant} on {self.device}"
        if self.fault is not None:
            return f"{name}: WRONG: {self.fault}"
        if self.largest is None:
            return f"{name}: WRONG: its outputs are not finite numbers"
        return (
            f"{name}: {'right' if self.passed else 'WRONG'}: off by {self.largest:.3g} at most, "
            f"{self.tolerance:.3g} allowed; {self.from_reference:.3g} from FP32, "
            f"{self.expected_from_reference:.3g} expected; {self.ms:.0f} ms"
        )


class Verified(msgspec.Struct, frozen=True, kw_only=True):
    """What ``verify_here`` found.

    Attributes:
        verified: What ran, in the bundle's order.
        not_run: Why the others did not, by name and device.
    """

    verified: tuple[VerifiedVariant, ...]
    not_run: dict[str, str]


def verify_here(
    bundle: Bundle, *, device: str = "auto", variant: str | None = None, threads: int | None = None
) -> Verified:
    """Runs a bundle's known inputs on everything that can run it here.

    Args:
        bundle: The bundle.
        device: ``auto`` for all, or one of ``DEVICES``.
        variant: Name of the only variant to run; all if left out.
        threads: Cores to use on a CPU; all usable ones if left out.

    Raises:
        BundleError: The bundle is damaged, or its known answers are.
        DeviceError: Nothing of what was asked for runs here.
        InputError: ``device`` is unknown, or the variant is not for it.
        MissingExtraError: Nothing runs here, as ONNX Runtime is not installed.
    """
    if device not in DEVICES:
        raise InputError(f"device {device!r} is not one of {', '.join(DEVICES)}")
    manifest = bundle.manifest
    variants = manifest.variants if variant is None else (manifest.variant(variant),)
    asked = [(v.name, d) for v in variants for d in v.devices if device in {"auto", d}]
    if not asked:
        names = ", ".join(v.name for v in manifest.variants if device in v.devices)
        raise InputError(
            f"{variant or 'the bundle'} has nothing for {device}; for it is: {names or 'nothing'}"
        )
    facts = gather_facts(device)
    bundle.verify()  # of a bundle that is damaged anywhere, nothing is right
    answers = read_known_answers(bundle)
    found, not_run = [], {}
    fault: EdgebertError | None = None
    for name, where in asked:
        try:
            choice = choose_for(bundle, facts, where, name)
            session = _open(bundle, choice, threads or usable_cores())
        except (DeviceError, MissingExtraError) as exc:
            not_run[f"{name} on {where}"] = str(exc)
            fault = exc
            continue
        found.append(_verified(bundle, answers, choice, facts, session))
    if fault is not None and not found:
        raise fault
    return Verified(verified=tuple(found), not_run=not_run)


def _verified(
    bundle: Bundle, answers: KnownAnswers, choice: Choice, facts: DeviceFacts, session: Session
) -> VerifiedVariant:
    name = choice.variant.name
    what: dict[str, Any] = {
        "variant": name,
        "device": choice.device,
        "tolerance": answers.expected[name].tolerance,
    }
    try:
        try:
            start = time.perf_counter()
            seen = deviation(session, answers, bundle.manifest, name)
            taken = time.perf_counter() - start
        finally:
            session.close()
    except DeviceError as exc:
        return VerifiedVariant(passed=False, fault=str(exc), **what)
    if seen.passed:
        remember_right(*_arithmetic(bundle, choice, facts))
    return VerifiedVariant(
        passed=seen.passed,
        largest=seen.largest,
        from_reference=seen.from_reference,
        expected_from_reference=seen.expected_from_reference,
        ms=taken * 1000,
        **what,
    )


def is_verified(bundle: Bundle, choice: Choice, facts: DeviceFacts) -> bool:
    """Whether what was chosen has given the known answers on this machine, as it is now."""
    return is_known_right(*_arithmetic(bundle, choice, facts))


def _arithmetic(bundle: Bundle, choice: Choice, facts: DeviceFacts) -> tuple[str, ...]:
    if choice.engine is None:
        return arithmetic_of_onnx_runtime(bundle, choice, facts)
    from edgebert_runtime.engine_cache import EngineCache
    from edgebert_runtime.engines import arithmetic_of

    return arithmetic_of(bundle, choice.engine, facts, EngineCache())


def _open(bundle: Bundle, choice: Choice, cores: int) -> Session:
    """Opens a session as ``Classifier.load`` does; TensorRT for RTX with its lasting kernels."""
    if choice.engine is not None:
        from edgebert_runtime.engine_cache import EngineCache
        from edgebert_runtime.engines import open_engine

        return open_engine(bundle, choice.engine, EngineCache(), specialise_at_once=True)
    path = choice.variant.model
    device = "cuda" if choice.device == "cuda" else "cpu"
    session = OnnxSession(bundle.read_model(path), device=device, intra_op_threads=cores)  # type: ignore[arg-type]
    bundle.check_unchanged(path)
    return session
