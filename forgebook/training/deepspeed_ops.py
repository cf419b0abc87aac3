"""DeepSpeed's C++ extensions, built before they are needed, by one process at a time.

torch guards such a build by a file, which a process that is killed leaves behind: all later ones would wait for it
without end. Here a lock of the system guards it, which ends with its process, and what is left behind is removed.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import sys
import time
from pathlib import Path
from typing import Any

__all__ = ["build_extensions", "extensions_folder"]

# What is built under our lock holds torch's for this long at most, in seconds: without a compiler's work.
SETTLED = 60


def extensions_folder() -> Path:
    """Name the folder of built extensions: $TORCH_EXTENSIONS_DIR, or one of this Python environment alone.

    Two environments that shared one would build it anew for each other, again and again.
    """
    import torch
    from torch.utils.cpp_extension import get_default_build_root

    environment = hashlib.sha256(f"{sys.prefix} {sys.version} {torch.__version__}".encode()).hexdigest()[:12]
    own = Path(get_default_build_root()) / f"forgebook-{environment}"
    return Path(os.environ.get("TORCH_EXTENSIONS_DIR") or own)


def build_extensions(settings: dict[str, Any], on_cpu: bool) -> None:
    """Build what DeepSpeed will load under these settings, unless it was built before; wait while another builds.

    settings: DeepSpeed's config. The first time takes a minute, and a C++ compiler.
    """
    zero = settings.get("zero_optimization", {})
    offloads = (zero.get("offload_optimizer") or {}).get("device", "none") != "none"
    needed = ["ShareMemCommBuilder"] * on_cpu + ["CPUAdamBuilder"] * offloads
    if not needed:
        return
    folder = extensions_folder()
    folder.mkdir(parents=True, exist_ok=True)
    os.environ["TORCH_EXTENSIONS_DIR"] = str(folder)
    from deepspeed.accelerator import get_accelerator

    with open(folder / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for left_behind in folder.glob("*/lock"):
            with contextlib.suppress(FileNotFoundError):  # its holder was quicker
                if time.time() - left_behind.stat().st_mtime > SETTLED:
                    left_behind.unlink()
        for name in needed:
            builder = get_accelerator().create_op_builder(name)
            if builder.is_compatible():
                builder.load(verbose=False)
