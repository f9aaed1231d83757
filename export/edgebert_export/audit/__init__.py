"""What a compiler made of a model: read from its log and from the engine, without a GPU.

``edgebert_export.audit.verdict.audit`` finds it out, and loads onnx for that.
"""

from edgebert_export.audit.result import Audit, ProductAudit, ProfileAudit

__all__ = ["Audit", "ProductAudit", "ProfileAudit"]
