"""What an audit found: what a compiler made of a model, and what of that refuses an engine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypeAlias

import msgspec

__all__ = ["Audit", "ProductAudit", "ProfileAudit", "Ran", "Scale"]

Ran: TypeAlias = Literal["int8", "dequantised", "other"]
Scale: TypeAlias = Literal["inside", "after", "undecided"]

_NAMED = 3
"""How many products a message names."""


class ProductAudit(msgspec.Struct, frozen=True, kw_only=True):
    """What became of one INT8 product, in the profile where it fared worst.

    Attributes:
        node: Name of the ONNX node.
        kernel: Name of the kernel that runs it; empty if none was found.
        kind: Of that kernel: ``gemm``, ``attention``, ``kgen``, ``runtime_fusion``.
        ran: ``int8``; ``dequantised`` if a kernel makes FP16 of its INT8 weight at each run;
            ``other`` if it is computed in another precision.
        scale: Where its sums are scaled: ``inside`` the product, before they are stored;
            ``after`` they were stored as FP16, which most exceed; or ``undecided``.
    """

    node: str
    kernel: str
    kind: str
    ran: Ran
    scale: Scale


class ProfileAudit(msgspec.Struct, frozen=True, kw_only=True):
    """What one profile of an engine runs.

    Attributes:
        kernels: How many, in all.
        kernels_per_layer: From one attention to the next, on average; ``None`` for one layer.
        waits: How often one stream waits for another.
        fp32_tensors: How many tensors are FP32 on their way from one kernel to another.
        fused: Attentions that are one kernel.
    """

    kernels: int
    kernels_per_layer: float | None
    waits: int
    fp32_tensors: int
    fused: int


class Audit(msgspec.Struct, frozen=True, kw_only=True):
    """What a compiler made of a model, by its own log and by the engine's constants.

    Attributes:
        attentions: How many the model has, one for each transformer layer.
        products: Its INT8 products.
        profiles: In the engine's order.
        not_understood: Why nothing can be said, if so; the rest is empty then.
    """

    attentions: int = 0
    products: tuple[ProductAudit, ...] = ()
    profiles: tuple[ProfileAudit, ...] = ()
    not_understood: str | None = None

    @property
    def verdict(self) -> Literal["fine", "refused", "not understood"]:
        """``fine`` only if the log was understood and nothing is wrong."""
        if self.not_understood is not None or not self.profiles:
            return "not understood"
        return "refused" if self.breaches() else "fine"

    @property
    def fused(self) -> int:
        """Attentions that are one kernel in every profile."""
        return min((profile.fused for profile in self.profiles), default=0)

    def count(self, *, ran: Ran | None = None, scale: Scale | None = None) -> int:
        """Returns how many INT8 products ran so; or ran in INT8 with their scale there."""
        if scale is not None:
            return sum(each.ran == "int8" and each.scale == scale for each in self.products)
        return sum(each.ran == ran for each in self.products)

    def wrong_numbers(self) -> tuple[str, ...]:
        """Says why the engine may compute nonsense; empty if nothing speaks for it."""
        said = []
        for scale, what in (
            ("after", "scaled after they are stored as FP16, which they may exceed"),
            ("undecided", "scaled nobody knows where"),
        ):
            found = [p.node for p in self.products if p.scale == scale and p.ran == "int8"]
            if found:
                said.append(f"{self._share(found)} are {what}: {_some(found)}")
        return tuple(said)

    def breaches(self) -> tuple[str, ...]:
        """Says what is wrong with the engine, one short text each; empty if nothing is."""
        said = list(self.wrong_numbers())
        for ran, what in (
            ("dequantised", "have weights that are dequantised at each run"),
            ("other", "are not run in INT8"),
        ):
            found = [p.node for p in self.products if p.ran == ran]
            if found:
                said.append(f"{self._share(found)} {what}: {_some(found)}")
        if self.profiles and self.fused < self.attentions:
            said.append(f"{self.fused} of {self.attentions} attentions are fused")
        return tuple(said)

    def _share(self, found: Sequence[str]) -> str:
        return f"{len(found)} of {len(self.products)} INT8 products"


def _some(names: Sequence[str]) -> str:
    more = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {more} more" if more > 0 else "")
