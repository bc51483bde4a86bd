"""Before any test module here imports TRL: without the notice that its CPO and ORPO are experimental."""

from __future__ import annotations

import os

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
