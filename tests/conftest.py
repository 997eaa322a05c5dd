"""Shared fixtures, and one thread so that tests do not fight for cores."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

import torch

# Neither a user's caches nor a hub have a part in the tests.
os.environ["DMMD_CACHE"] = tempfile.mkdtemp(prefix="dmmd-cache-")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_CACHE"] = tempfile.mkdtemp(prefix="dmmd-datasets-")
sys.path.insert(0, str(Path(__file__).parent))
torch.set_num_threads(1)
