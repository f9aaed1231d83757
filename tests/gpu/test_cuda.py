"""What ``Cuda`` does on any NVIDIA GPU, with TensorRT or without."""

from __future__ import annotations

import shutil
import subprocess
import threading
from collections.abc import Iterator

import numpy as np
import pytest

from edgebert_runtime.cuda import Cuda, Stream
from edgebert_runtime.errors import DeviceError
from edgebert_runtime.facts import DeviceFacts, GpuFacts

SIZE = 2**20 + 3
ROUNDS = 1000
MOST_LEFT = 16 * 2**20


@pytest.fixture
def cuda(gpu: GpuFacts) -> Iterator[Cuda]:
    with Cuda() as opened, opened.current():
        yield opened


def random_bytes(seed: int, size: int = SIZE) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, size, dtype=np.uint8)


def there_and_back(cuda: Cuda, stream: Stream, sent: np.ndarray) -> np.ndarray:
    """Copies bytes to the GPU and back, through memory of its own each way."""
    up, down = cuda.pinned_memory(sent.nbytes), cuda.pinned_memory(sent.nbytes)
    address = cuda.device_memory(sent.nbytes)
    up[:], down[:] = sent, 0
    stream.to_device(address, up)
    stream.to_host(down, address)
    stream.wait()
    return down.copy()


def test_the_gpu_is_the_one_that_nvidia_smi_lists(facts: DeviceFacts, gpu: GpuFacts) -> None:
    command = shutil.which("nvidia-smi")
    if command is None:
        pytest.skip("there is no nvidia-smi")
    fields = "name,compute_cap,memory.total,driver_version"
    listed = subprocess.run(
        [command, f"--query-gpu={fields}", "--format=csv,noheader,nounits"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    rows = [line.split(", ") for line in listed.stdout.splitlines()]
    (row, *_) = [row for row in rows if row[0] == gpu.name]
    assert ".".join(map(str, gpu.compute_capability)) == row[1]
    if row[2].isdigit():  # a Jetson's GPU has no memory of its own
        assert 0.9 < gpu.total_bytes / (int(row[2]) * 2**20) <= 1
    assert 0 < gpu.free_bytes <= gpu.total_bytes
    assert facts.driver in {None, row[3]}


def test_what_is_copied_to_the_gpu_comes_back(cuda: Cuda) -> None:
    stream = cuda.stream()
    for seed, size in enumerate([1, 3, 4096, SIZE]):
        sent = random_bytes(seed, size)
        np.testing.assert_array_equal(there_and_back(cuda, stream, sent), sent)


def test_a_graph_does_again_what_was_recorded(cuda: Cuda) -> None:
    stream = cuda.stream()
    up, down = cuda.pinned_memory(SIZE), cuda.pinned_memory(SIZE)
    address = cuda.device_memory(SIZE)

    def enqueue() -> None:
        stream.to_device(address, up)
        stream.to_host(down, address)

    up[:], down[:] = random_bytes(1), 0
    graph = stream.capture(enqueue)
    stream.wait()
    assert not down.any()  # recorded, and not done
    for seed in range(2, 5):
        up[:] = random_bytes(seed)
        stream.launch(graph)
        stream.wait()
        np.testing.assert_array_equal(down, random_bytes(seed))
    stream.destroy(graph)


@pytest.mark.parametrize("raised", [DeviceError, ValueError])
def test_a_stream_can_be_used_after_a_recording_that_failed(
    cuda: Cuda, raised: type[Exception]
) -> None:
    stream = cuda.stream()

    def wait_or_raise() -> None:
        if raised is DeviceError:
            stream.wait()  # which CUDA does not let anybody record
        raise ValueError

    with pytest.raises(raised):
        stream.capture(wait_or_raise)
    sent = random_bytes(5)
    np.testing.assert_array_equal(there_and_back(cuda, stream, sent), sent)


def test_more_memory_than_there_is_is_refused_and_the_gpu_goes_on(cuda: Cuda) -> None:
    with pytest.raises(DeviceError, match=r"cuMemAlloc failed: .*memory"):
        cuda.device_memory(2 * cuda.memory_bytes[1])
    sent = random_bytes(6)
    np.testing.assert_array_equal(there_and_back(cuda, cuda.stream(), sent), sent)


def test_threads_share_a_gpu(gpu: GpuFacts) -> None:
    wrong: list[BaseException | int] = []

    def work(number: int) -> None:
        try:
            with Cuda() as cuda, cuda.current():
                stream = cuda.stream()
                for turn in range(20):
                    sent = random_bytes(100 * number + turn)
                    if not np.array_equal(there_and_back(cuda, stream, sent), sent):
                        wrong.append(number)
        except BaseException as exc:
            wrong.append(exc)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_what_is_closed_gives_its_memory_back(cuda: Cuda) -> None:
    settled = 0
    for turn in range(ROUNDS):
        with Cuda() as opened, opened.current():
            stream = opened.stream()
            block, host = opened.device_memory(SIZE), opened.pinned_memory(4096)
            graph = stream.capture(lambda s=stream, b=block, h=host: s.to_device(b, h))
            stream.launch(graph)
            stream.wait()
            stream.destroy(graph)
        if turn == 10:  # the driver keeps some for itself when it is first asked
            settled = cuda.memory_bytes[0]
    left = settled - cuda.memory_bytes[0]
    print(f"{left / 2**20:.1f} MiB left after {ROUNDS} rounds")
    assert left < MOST_LEFT
