"""What a compiler made of a model: read from its log and from the engine, without a GPU."""

from edgebert_export.audit.verdict import Audit, ProductAudit, ProfileAudit, audit

__all__ = ["Audit", "ProductAudit", "ProfileAudit", "audit"]
