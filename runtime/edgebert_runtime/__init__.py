"""Runs an edgebert bundle: texts in, labels out, on a GPU or on a CPU.

>>> from edgebert_runtime import Classifier
>>> with Classifier.load("bundle") as clf:  # doctest: +SKIP
...     clf.predict(["a great film"])
"""

from edgebert_runtime.classifier import Classifier, Prediction, Stats
from edgebert_runtime.errors import (
    BundleError,
    DeviceError,
    EdgebertError,
    InputError,
    MissingExtraError,
    UsageError,
)

__all__ = [
    "BundleError",
    "Classifier",
    "DeviceError",
    "EdgebertError",
    "InputError",
    "MissingExtraError",
    "Prediction",
    "Stats",
    "UsageError",
    "__version__",
]

__version__ = "0.1.0"
