"""Which variant runs where: ``choose`` is a function of the bundle and of facts, nothing else."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgebert_runtime import BundleError, DeviceError, InputError
from edgebert_runtime.device import DEVICES, DeviceFacts, choose, gather_facts
from edgebert_runtime.manifest import FileEntry, Manifest, Provenance, Task, TensorSpec, Variant

CPU_ONLY = DeviceFacts(
    machine="x86_64",
    cpu_count=2,
    onnxruntime=("onnxruntime 1.20.0",),
    providers=("AzureExecutionProvider", "CPUExecutionProvider"),
)
WITH_CUDA = DeviceFacts(
    machine="x86_64",
    cpu_count=16,
    onnxruntime=("onnxruntime-gpu 1.20.0",),
    providers=("TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"),
)

BOTH = ("both", ("cpu", "cuda"))
CPU = ("for-cpu", ("cpu",))
CUDA = ("for-cuda", ("cuda",))


def manifest_of(*variants: tuple[str, tuple[str, ...]]) -> Manifest:
    paths = [
        "tokenizer.json",
        "known_answers.json",
        *(f"models/{name}.onnx" for name, _ in variants),
    ]
    return Manifest(
        format_version=4,
        name="m",
        task=Task(kind="single_label", labels=("a", "b"), text_pair=False),
        tokenizer="tokenizer.json",
        known_answers="known_answers.json",
        max_length=64,
        pad_token_id=0,
        inputs=(TensorSpec(name="input_ids", dtype="int64", shape=("batch", "seq")),),
        outputs=(TensorSpec(name="logits", dtype="float32", shape=("batch", 2)),),
        variants=tuple(
            Variant(name=name, model=f"models/{name}.onnx", precision="fp32", devices=devices)  # type: ignore[arg-type]
            for name, devices in variants
        ),
        files=tuple(FileEntry(path=path, size_bytes=1, sha256="0" * 64) for path in paths),
        provenance=Provenance(
            edgebert="0", recipe_sha256="", model_sha256="", data_sha256="", seed=None, versions={}
        ),
    )


@pytest.mark.parametrize(
    ("variants", "facts", "device", "variant", "expected"),
    [
        # auto takes the best device, and on it the first variant that names it
        ([BOTH], WITH_CUDA, "auto", None, ("cuda", "both")),
        ([BOTH], CPU_ONLY, "auto", None, ("cpu", "both")),
        ([CPU, CUDA], WITH_CUDA, "auto", None, ("cuda", "for-cuda")),
        ([CPU, CUDA], CPU_ONLY, "auto", None, ("cpu", "for-cpu")),
        ([CUDA, CPU], CPU_ONLY, "auto", None, ("cpu", "for-cpu")),
        ([CPU, BOTH], WITH_CUDA, "auto", None, ("cuda", "both")),
        ([CPU, BOTH], CPU_ONLY, "auto", None, ("cpu", "for-cpu")),
        ([BOTH, CPU], CPU_ONLY, "auto", None, ("cpu", "both")),
        ([CPU], WITH_CUDA, "auto", None, ("cpu", "for-cpu")),
        ([CUDA], WITH_CUDA, "auto", None, ("cuda", "for-cuda")),
        # a named device is taken
        ([BOTH], WITH_CUDA, "cpu", None, ("cpu", "both")),
        ([CUDA, CPU], WITH_CUDA, "cpu", None, ("cpu", "for-cpu")),
        ([CPU, CUDA], WITH_CUDA, "cuda", None, ("cuda", "for-cuda")),
        # a named variant is taken, on the best device that it is for
        ([CPU, BOTH], CPU_ONLY, "auto", "both", ("cpu", "both")),
        ([CPU, BOTH], WITH_CUDA, "auto", "both", ("cuda", "both")),
        ([BOTH, CPU], WITH_CUDA, "auto", "for-cpu", ("cpu", "for-cpu")),
        ([BOTH, CUDA], WITH_CUDA, "cuda", "for-cuda", ("cuda", "for-cuda")),
        ([CPU, BOTH], WITH_CUDA, "cpu", "both", ("cpu", "both")),
    ],
)
def test_the_best_that_fits_is_chosen(
    variants: list[tuple[str, tuple[str, ...]]],
    facts: DeviceFacts,
    device: str,
    variant: str | None,
    expected: tuple[str, str],
) -> None:
    choice = choose(manifest_of(*variants), facts, device, variant)
    assert (choice.device, choice.variant.name) == expected


@pytest.mark.parametrize(
    ("variants", "facts", "device", "variant", "reasons"),
    [
        ([BOTH], CPU_ONLY, "cuda", None, ["onnxruntime 1.20.0 has no CUDAExecutionProvider"]),
        ([CPU], WITH_CUDA, "cuda", None, ["cuda: the bundle has no variant for it"]),
        ([CUDA], WITH_CUDA, "cpu", None, ["cpu: the bundle has no variant for it"]),
        ([CUDA], CPU_ONLY, "auto", None, ["no CUDAExecutionProvider", "cpu: the bundle has no"]),
        ([CPU, CUDA], CPU_ONLY, "auto", "for-cuda", ["no CUDAExecutionProvider", "cpu: "]),
        ([CPU, CUDA], CPU_ONLY, "cpu", "for-cuda", ["cpu: "]),
        ([CPU, CUDA], WITH_CUDA, "cuda", "for-cpu", ["cuda: "]),
    ],
)
def test_what_cannot_run_is_refused_with_every_reason(
    variants: list[tuple[str, tuple[str, ...]]],
    facts: DeviceFacts,
    device: str,
    variant: str | None,
    reasons: list[str],
) -> None:
    with pytest.raises(DeviceError) as caught:
        choose(manifest_of(*variants), facts, device, variant)
    for reason in reasons:
        assert reason in str(caught.value)


@pytest.mark.parametrize(
    ("variants", "facts", "device", "passed_over"),
    [
        ([BOTH], WITH_CUDA, "auto", []),
        ([BOTH], CPU_ONLY, "cpu", []),
        ([BOTH], CPU_ONLY, "auto", ["cuda: onnxruntime 1.20.0 has no CUDAExecutionProvider"]),
        ([CPU], WITH_CUDA, "auto", ["cuda: the bundle has no variant for it"]),
        ([CPU], CPU_ONLY, "auto", ["cuda: the bundle has no variant for it"]),
    ],
)
def test_the_choice_says_why_better_devices_were_passed_over(
    variants: list[tuple[str, tuple[str, ...]]],
    facts: DeviceFacts,
    device: str,
    passed_over: list[str],
) -> None:
    assert list(choose(manifest_of(*variants), facts, device).passed_over) == passed_over


@pytest.mark.parametrize("device", ["gpu", "CPU", "", "tpu", "cuda:1"])
def test_an_unknown_device_is_refused_with_the_known_ones(device: str) -> None:
    with pytest.raises(InputError) as caught:
        choose(manifest_of(BOTH), WITH_CUDA, device)
    for known in DEVICES:
        assert known in str(caught.value)


@pytest.mark.parametrize("device", DEVICES)
def test_an_unknown_variant_is_refused_with_the_known_ones(device: str) -> None:
    with pytest.raises(BundleError, match=r"no variant 'best'; it has: for-cpu, for-cuda"):
        choose(manifest_of(CPU, CUDA), WITH_CUDA, device, "best")


_ANY_VARIANTS = st.lists(
    st.sampled_from([("cpu",), ("cuda",), ("cpu", "cuda"), ("cuda", "cpu")]),
    min_size=1,
    max_size=4,
).map(lambda devices: [(f"v{index}", each) for index, each in enumerate(devices)])


@given(_ANY_VARIANTS, st.sampled_from([CPU_ONLY, WITH_CUDA]), st.sampled_from(DEVICES))
def test_whatever_is_chosen_can_run_and_nothing_better_could(
    variants: list[tuple[str, tuple[str, ...]]], facts: DeviceFacts, device: str
) -> None:
    offered = {"cpu", "cuda"} if facts is WITH_CUDA else {"cpu"}
    wanted = offered if device == "auto" else offered & {device}
    possible = {place for _, devices in variants for place in devices if place in wanted}
    manifest = manifest_of(*variants)
    if not possible:
        with pytest.raises(DeviceError):
            choose(manifest, facts, device)
        return
    choice = choose(manifest, facts, device)
    assert choice.device == ("cuda" if "cuda" in possible else "cpu")
    assert choice.variant.name == next(name for name, d in variants if choice.device in d)
    assert bool(choice.passed_over) == (device == "auto" and choice.device == "cpu")


def test_the_facts_of_this_machine_name_its_processors_and_its_onnx_runtime() -> None:
    facts = gather_facts()
    assert facts.machine
    assert facts.cpu_count >= 1
    assert "CPUExecutionProvider" in facts.providers
    (wheel,) = facts.onnxruntime
    assert wheel.startswith("onnxruntime")
    assert facts == gather_facts()
