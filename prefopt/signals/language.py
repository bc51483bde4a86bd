"""The language of a text, by langdetect with a fixed seed: the detector of IFEval's published checker."""

from __future__ import annotations

import functools
from typing import Any

from prefopt.errors import ConfigError

SEED = 0
"""langdetect samples n-grams; unseeded, short and mixed texts change language from call to call."""


@functools.cache
def detector_factory() -> Any:
    """A factory of our own, so that nobody else's langdetect is seeded.

    Raises: ConfigError if langdetect is not installed.
    """
    try:
        from langdetect.detector_factory import PROFILES_DIRECTORY, DetectorFactory
    except ImportError as error:
        raise ConfigError(
            "a constraint on language or case is set, and whether a text is English is asked of langdetect, which "
            'is not installed: pip install "prefopt[eval]", or leave these constraints out'
        ) from error
    factory = DetectorFactory()
    factory.load_profile(PROFILES_DIRECTORY)
    factory.seed = SEED
    return factory


def detect_language(text: str) -> str | None:
    """ISO 639-1 code (``zh-cn`` and ``zh-tw`` for Chinese); None for a text that shows no language (digits).

    Raises: ConfigError if langdetect is not installed.
    """
    factory = detector_factory()
    from langdetect.lang_detect_exception import LangDetectException

    detector = factory.create()
    detector.append(text)
    try:
        return detector.detect()
    except LangDetectException:
        return None
