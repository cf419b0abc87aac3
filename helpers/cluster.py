"""The Ray cluster: this machine's own, or the one that RAY_ADDRESS names."""

from __future__ import annotations

import os

__all__ = ["start_ray"]


def start_ray() -> None:
    """Join the cluster of RAY_ADDRESS, or start one on this machine; do nothing if that was done before."""
    # Ray would move each worker into a folder of its own, where the config's relative paths lead nowhere.
    os.environ["RAY_CHDIR_TO_TRIAL_DIR"] = "0"
    import ray

    if ray.is_initialized():
        return
    ray.init(
        address=os.environ.get("RAY_ADDRESS") or "local",
        include_dashboard=False if not os.environ.get("RAY_ADDRESS") else None,
        log_to_driver=False,
        logging_level="ERROR",
    )
