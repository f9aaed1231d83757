"""A tuning counts on the kind of processor that it is for, and nowhere else."""

from __future__ import annotations

import itertools
import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from edgebert_runtime import BundleError, Classifier, processor
from edgebert_runtime.bundle import Bundle
from edgebert_runtime.cli import main
from edgebert_runtime.processor import described, processor_kind, usable_cores

INTEL = """processor\t: 0
vendor_id\t: GenuineIntel
cpu family\t: 6
model\t\t: 207
model name\t: Intel(R) Xeon(R)
flags\t\t: fpu sse avx2 avx amx_int8 avx512_vnni

processor\t: 1
vendor_id\t: Impostor
"""
PHONE = """processor\t: 0
Features\t: fp asimd asimddp
CPU implementer\t: 0x41
CPU part\t: 0xd05

processor\t: 1
Features\t: fp asimd asimddp i8mm
CPU implementer\t: 0x41
CPU part\t: 0xd0b

processor\t: 2
CPU implementer\t: 0x41
CPU part\t: 0xd05
"""
TEXTS = [f"text number {number} of many" for number in range(40)]


def tuning(variant: str = "tuned", **changes: Any) -> dict[str, Any]:
    return {
        "processor": processor_kind(),
        "cores": usable_cores(),
        "variant": variant,
        "batch_tokens": 256,
        "call_tokens": 8,
        "by_core": True,
        "measured": {
            "bundle_sha256": "0" * 64,
            "before": "fp32",
            "rows": 100,
            "flips": 2,
            "lost": -1,
            "latency_ratio": 1.25,
            "throughput_ratio": 1.5,
            "onnxruntime": "1.0.0",
        },
        **changes,
    }


@pytest.fixture
def tuned(copy_bundle, add_variant, edit_manifest) -> Callable[..., Path]:
    """Returns a function that makes a bundle with a variant ``tuned`` and some tunings."""

    numbers = itertools.count()

    def make(*tunings: dict[str, Any]) -> Path:
        path: Path = copy_bundle(to=f"tuned-{next(numbers)}")
        add_variant(path, "tuned")
        edit_manifest(path, lambda manifest: manifest.update(tunings=list(tunings)))
        return path

    return make


def variant_of(path: Path, **options: Any) -> str:
    with Classifier.load(path, device="cpu", **options) as classifier:
        assert classifier.choice is not None
        classifier.predict(TEXTS)
        return classifier.choice.variant.name


def test_a_kind_is_its_maker_its_model_and_what_kernels_use() -> None:
    found = described(INTEL.splitlines(), by_first=True)
    assert found == "GenuineIntel 6-207 avx avx2 avx512_vnni amx_int8"


def test_a_kind_with_fast_cores_and_small_ones_names_both_whatever_their_order() -> None:
    found = described(PHONE.splitlines(), by_first=False)
    assert found == "0x41 0xd05 0xd0b asimddp i8mm"
    blocks = PHONE.split("\n\n")
    assert described("\n\n".join(blocks[::-1]).splitlines(), by_first=False) == found


def test_a_system_that_does_not_tell_still_has_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_file(*args: object, **kwargs: object) -> None:
        raise FileNotFoundError

    monkeypatch.setattr("builtins.open", no_file)
    monkeypatch.setattr(processor.platform, "machine", lambda: "AMD64")
    monkeypatch.setattr(processor.platform, "system", lambda: "Windows")
    monkeypatch.setattr(processor.platform, "processor", lambda: "AMD64 Family 25")
    assert processor_kind.__wrapped__() == "windows amd64 AMD64 Family 25"


def test_the_tuned_variant_runs_here(tuned) -> None:
    assert variant_of(tuned()) == "fp32"
    assert variant_of(tuned(tuning())) == "tuned"


def test_auto_takes_it_too(tuned) -> None:
    with Classifier.load(tuned(tuning())) as classifier:
        assert classifier.choice is not None
        assert (classifier.choice.device, classifier.choice.variant.name) == ("cpu", "tuned")


def test_another_kind_of_processor_runs_what_it_ran_before(tuned) -> None:
    path = tuned(tuning(processor="aarch64 0x41 0xd0b asimddp"))
    assert variant_of(path) == "fp32"
    assert batches(path) == batches(tuned())


def test_a_variant_that_is_asked_for_runs_with_the_settings_that_do_well_everywhere(tuned) -> None:
    path = tuned(tuning(batch_tokens=1))
    assert variant_of(path, variant="fp32") == "fp32"
    assert batches(path, variant="fp32") == batches(tuned())


def test_of_several_numbers_of_cores_the_nearest_counts(tuned) -> None:
    manifest = Bundle.open(
        tuned(tuning("fp32", cores=2), tuning(cores=8), tuning(processor="other", cores=5))
    ).manifest
    found = {n: manifest.tuning(processor_kind(), n) for n in (1, 2, 4, 6, 64)}
    assert {n: t.cores for n, t in found.items() if t} == {1: 2, 2: 2, 4: 2, 6: 8, 64: 8}
    assert manifest.tuning("unheard of", 2) is None


def batches(path: Path, **options: Any) -> int:
    with Classifier.load(path, device="cpu", **options) as classifier:
        classifier.predict(TEXTS)
        return classifier.stats.batches


def test_its_batches_are_as_large_as_it_says(tuned) -> None:
    assert batches(tuned(tuning(batch_tokens=1))) == len(TEXTS)
    assert batches(tuned(tuning(batch_tokens=4096, call_tokens=4096))) == 2  # of 32 texts at most


@pytest.mark.parametrize(("by_core", "workers"), [(True, 3), (False, 1)])
def test_its_batches_are_computed_by_as_many_as_it_says(tuned, by_core: bool, workers: int) -> None:
    path = tuned(tuning(batch_tokens=1, by_core=by_core))
    before = set(threading.enumerate())
    with Classifier.load(path, device="cpu", intra_op_threads=3) as classifier:
        classifier.predict(TEXTS)
        names = [thread.name for thread in set(threading.enumerate()) - before]
    assert len([name for name in names if name.startswith("edgebert-worker")]) == workers


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda m: m["tunings"][0].update(variant="gone"), "'gone'"),
        (lambda m: m["variants"][1].update(devices=["cuda"]), "'tuned', no variant for cpu"),
        (lambda m: m["tunings"].append(m["tunings"][0]), "same processor and cores"),
        (lambda m: m["tunings"][0].update(colour=1), "colour"),
        (lambda m: m["tunings"][0].update(processor=""), "processor"),
        (lambda m: m["tunings"][0].update(processor="a\x1b[31m"), "processor"),
        (lambda m: m["tunings"][0].update(cores=0), "cores"),
        (lambda m: m["tunings"][0].update(batch_tokens=0), "tokens"),
        (lambda m: m["tunings"][0].update(call_tokens=-1), "tokens"),
        (lambda m: m["tunings"][0]["measured"].update(flips=101), "flips"),
        (lambda m: m["tunings"][0]["measured"].update(latency_ratio=0), "ratios"),
        (lambda m: m["tunings"][0]["measured"].update(bundle_sha256="x"), "bundle_sha256"),
    ],
)
def test_a_tuning_that_is_wrong_is_refused(
    tuned, edit_manifest, change: Callable[[Any], object], named: str
) -> None:
    path = tuned(tuning())
    edit_manifest(path, change)
    with pytest.raises(BundleError, match=r"manifest\.json") as caught:
        Bundle.open(path)
    assert named in str(caught.value)


def call(*arguments: object) -> str:
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.stderr
    return result.stdout


def test_inspect_lists_tunings(tuned) -> None:
    path = tuned(tuning(), tuning("fp32", processor="aarch64 0x41", cores=4))
    said = call("inspect", path)
    assert "tuned for aarch64 0x41, 4 cores: fp32, 1.25 times as fast for one text" in said
    assert f"tuned for {processor_kind()}, {usable_cores()} cores: tuned, 1.25 times" in said


def test_doctor_says_whether_one_counts_here(tuned) -> None:
    said = call("doctor", tuned(tuning()))
    assert "would run: tuned on cpu" in said
    assert "tuned: for this processor, tuned: 1.25 times as fast for one text" in said
    elsewhere = usable_cores() + 1
    said = call("doctor", tuned(tuning(cores=elsewhere)))
    assert f"for this processor on {elsewhere} cores (here: {usable_cores()})" in said
    path = tuned(tuning(processor="other"))
    said = call("doctor", path)
    assert "would run: fp32 on cpu" in said
    assert f"tuned: not for this processor ({processor_kind()})" in said
    assert json.loads(call("doctor", path, "--json"))["tuning"] is None
