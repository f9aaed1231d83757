"""Reads TensorRT's verbose log: the kernels that an engine runs, or why they cannot be told.

The list is read strictly. What a compiler of another release writes differently, and what was
cut or lost, must end as "not understood": a kernel that is not seen would pass as fine.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence

import msgspec

__all__ = ["SECTION", "Kernel", "NotUnderstoodError", "Tensor", "read_kernels"]

SECTION = "Layers:"
"""How the message starts that lists an engine's kernels."""

_END = "I/O Tensors:"
_KERNELS = frozenset({"gemm", "kgen", "runtime_fusion"})
_WAITS = frozenset({"wait"})
_OTHERS = frozenset({"shape_call", "signal"})
"""What computes shapes on the host, and the other half of a wait: no kernels."""

_TYPES = frozenset({"BFloat16", "Bool", "Float", "Half", "Int32", "Int64", "Int8", "UInt8"})

_LINE = re.compile(
    r"Name: (?P<name>.*?), LayerType: (?P<kind>\w+), Inputs: \[(?P<inputs>.*?)\], "
    r"Constants: \[(?P<constants>.*?)\], Outputs: \[(?P<outputs>.*?)\], "
    r"TacticName: (?P<tactic>[^,]*), StreamId: \d+(?:, EventId: \d+)?, Metadata: ?(?P<nodes>.*)"
)
_TENSOR = re.compile(
    r" \{ Name: (?P<name>[^{}]*?), Dimensions: \[(?P<shape>-?\d+(?:,-?\d+)*|)\], "
    r"Strides: \[[-\d,]*\], StrideOrder: \[[\d,]*\], Datatype: (?P<type>\w+), Format: [^{}]*\}"
)
_PLACE = re.compile(r".*_myl(?P<profile>\d+)_(?P<index>\d+)")
_NODE = re.compile(r"\[ONNX Layer: ([^\x1f]+)\]")
_BETWEEN_NODES = "\x1f"
_BORDER = re.compile(
    r" Name: (?P<name>.*?), IOMode: (?P<mode>Input|Output), .*ProfileInfo: \[(?P<profiles>.*)\]"
)


class NotUnderstoodError(Exception):
    """What was read is not what this reader knows; never seen outside of this package."""


class Tensor(msgspec.Struct, frozen=True):
    """What a kernel reads or writes.

    Attributes:
        name: The compiler's.
        shape: -1 where it is not fixed.
        dtype: The compiler's word for it: ``Int8``, ``Half``, ``Float``.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str


class Kernel(msgspec.Struct, frozen=True):
    """One line of the list: a kernel, or a wait of one stream for another.

    Attributes:
        name: The compiler's.
        kind: ``gemm`` (a product of the library), ``kgen`` (made for this graph), and others.
        inputs: What other kernels wrote, or the caller.
        constants: What the engine holds.
        outputs: What it writes.
        nodes: Names of the ONNX nodes that went into it.
    """

    name: str
    kind: str
    inputs: tuple[Tensor, ...]
    constants: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    nodes: frozenset[str]

    @property
    def is_wait(self) -> bool:
        """Whether nothing is computed, but a stream waits for another."""
        return self.kind in _WAITS


def read_kernels(messages: Sequence[str], profiles: int) -> tuple[tuple[Kernel, ...], ...]:
    """Returns the kernels and waits of each profile, in the order that they are run in.

    Args:
        messages: Of a verbose log with detailed profiling, line breaks kept.
        profiles: How many the engine was built for.

    Raises:
        NotUnderstoodError: It has no list of kernels, or one that is not as expected.
    """
    sections = [message for message in messages if message.startswith(SECTION)]
    if len(sections) != 1:
        raise NotUnderstoodError(f"the log has {len(sections)} lists of kernels, not one")
    lines = [line.rstrip() for line in sections[0].split("\n")]
    if _END not in lines:
        raise NotUnderstoodError("the list of kernels is cut off")
    end = lines.index(_END)
    border = _read_border(lines[end + 1 :], profiles)
    found: list[list[Kernel]] = [[] for _ in range(profiles)]
    places = [0] * profiles
    for number, line in enumerate(lines[1:end], start=1):
        if not line:
            continue
        kernel, profile, index = _read_line(line, number)
        if profile >= profiles:
            raise NotUnderstoodError(
                f"there are kernels of profile {profile}; the engine has {profiles}"
            )
        if index != places[profile]:
            raise NotUnderstoodError(
                f"kernel {places[profile]} of profile {profile} is not in the list"
            )
        places[profile] += 1
        if kernel.kind not in _OTHERS:
            found[profile].append(kernel)
    for profile, kernels in enumerate(found):
        _check_complete(kernels, border, profile)
    return tuple(map(tuple, found))


def _read_line(line: str, number: int) -> tuple[Kernel, int, int]:
    """Reads a kernel, its profile, and its place in that."""
    match = _LINE.fullmatch(line)
    place = _PLACE.fullmatch(match["name"]) if match is not None else None
    if match is None or place is None:
        raise NotUnderstoodError(f"line {number} of the list of kernels is not as expected")
    if match["kind"] not in _KERNELS | _WAITS | _OTHERS:
        raise NotUnderstoodError(f"there is a kernel of the kind {match['kind']}")
    nodes = [_NODE.fullmatch(part) for part in match["nodes"].split(_BETWEEN_NODES) if part]
    if None in nodes:
        raise NotUnderstoodError(f"line {number} of the list of kernels names nodes unreadably")
    kernel = Kernel(
        match["name"],
        match["kind"],
        _read_tensors(match["inputs"], number),
        _read_tensors(match["constants"], number),
        _read_tensors(match["outputs"], number),
        frozenset(node[1] for node in nodes if node is not None),
    )
    if kernel.kind in _KERNELS and not (kernel.outputs and kernel.inputs + kernel.constants):
        raise NotUnderstoodError(f"line {number} of the list of kernels reads or writes nothing")
    return kernel, int(place["profile"]), int(place["index"])


def _read_tensors(text: str, number: int) -> tuple[Tensor, ...]:
    """Reads what stands between the brackets of a list of tensors."""
    matches = list(_TENSOR.finditer(text))
    if ",".join(match.group() for match in matches) != text:
        raise NotUnderstoodError(f"line {number} of the list of kernels has unreadable tensors")
    for match in matches:
        if match["type"] not in _TYPES:
            raise NotUnderstoodError(f"line {number} of the list of kernels has {match['type']}")
    return tuple(
        Tensor(
            match["name"],
            tuple(int(size) for size in match["shape"].split(",") if size),
            match["type"],
        )
        for match in matches
    )


def _read_border(lines: Sequence[str], profiles: int) -> dict[str, frozenset[str]]:
    """Reads the names of the engine's inputs and outputs; each must be there in all profiles."""
    found: dict[str, set[str]] = {"Input": set(), "Output": set()}
    for line in lines:
        if not line:
            break
        match = _BORDER.fullmatch(line)
        if match is None:
            raise NotUnderstoodError("the list of the engine's inputs and outputs is not readable")
        if match["profiles"].count("Format: ") != profiles:
            raise NotUnderstoodError(f"{match['name']} is not in all profiles of the engine")
        found[match["mode"]].add(match["name"])
    if not all(found.values()):
        raise NotUnderstoodError("the engine's inputs and outputs are not listed")
    return {mode: frozenset(names) for mode, names in found.items()}


def _check_complete(
    kernels: Sequence[Kernel], border: Mapping[str, Collection[str]], profile: int
) -> None:
    """Refuses a profile in which something is read, or given back, that nothing has written."""
    suffix = f" [profile {profile}]" if profile else ""
    written = {name + suffix for name in border["Input"]}
    for kernel in kernels:
        for tensor in kernel.inputs:
            if tensor.name not in written:
                raise NotUnderstoodError(f"nothing writes what {kernel.name} reads")
        written.update(tensor.name for tensor in kernel.outputs)
    if not written >= {name + suffix for name in border["Output"]}:
        raise NotUnderstoodError(f"no kernel of profile {profile} writes the engine's outputs")
