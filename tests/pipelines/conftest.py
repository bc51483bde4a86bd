"""Fixtures of the pipelines' tests."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from ray.cluster_utils import Cluster

NODE = {
    "num_cpus": 1,
    "object_store_memory": 80 << 20,
    "include_dashboard": False,
    "node_ip_address": "127.0.0.1",
}


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """A head with one core, bound to 127.0.0.1; nothing of it looks for the network."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    # For the processes it starts, and for this one, which may have imported ray already: the name notwithstanding,
    # off makes 127.0.0.1 the address of every machine.
    os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    from ray._private import ray_constants
    from ray.cluster_utils import Cluster

    ray_constants.ENABLE_RAY_CLUSTER = False
    # Short: sockets lie in it. Ray's own default, too: the address is written there, and nobody makes it.
    root = os.environ["RAY_TMPDIR"] = tempfile.mkdtemp(prefix="ray-")
    folder = os.path.join(root, "ray")
    os.mkdir(folder)
    cluster = Cluster(initialize_head=True, head_node_args={**NODE, "temp_dir": folder})
    try:
        yield cluster
    finally:
        cluster.shutdown()
        shutil.rmtree(root, ignore_errors=True)
