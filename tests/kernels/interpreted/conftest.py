"""Settings of the interpreted tests."""

from __future__ import annotations

import os

from hypothesis import HealthCheck, Phase, settings

assert os.environ.get("TRITON_INTERPRET") == "1", "set TRITON_INTERPRET=1 to run these tests"

settings.register_profile(
    "kernels",
    deadline=None,
    derandomize=True,
    phases=[Phase.explicit, Phase.generate],
    max_examples=20,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.load_profile("kernels")
