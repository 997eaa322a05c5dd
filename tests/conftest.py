"""Shared fixtures, and one thread so that tests do not fight for cores."""

from __future__ import annotations

import atexit
import os
import shutil
import sys
import tempfile
from pathlib import Path

import torch


def _scratch(prefix: str) -> str:
    """A folder that goes with this process."""
    folder = tempfile.mkdtemp(prefix=prefix)
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


# Neither a user's caches nor a hub have a part in the tests.
os.environ["DMMD_CACHE"] = _scratch("dmmd-cache-")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_CACHE"] = _scratch("dmmd-datasets-")
sys.path.insert(0, str(Path(__file__).parent))
torch.set_num_threads(1)
