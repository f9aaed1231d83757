"""Stand-ins for what a test has no use for, or no hardware for.

``FakeSession`` answers without a model, so that an application can test its own code without a
bundle::

    clf = Classifier(FakeSession(labels=2), encoder, task)

``FakeDriver`` and ``FakeTensorRT`` take the place of a GPU: the TensorRT session runs on them as
it does on a device, and they raise where a device would compute nonsense.
"""

from __future__ import annotations

from edgebert_runtime.testing.fake_cuda import FakeDriver, Misuse
from edgebert_runtime.testing.fake_session import FakeSession
from edgebert_runtime.testing.fake_tensorrt import FakeTensorRT

__all__ = ["FakeDriver", "FakeSession", "FakeTensorRT", "Misuse"]
