"""The benchmarks are scripts: their folder is on sys.path when one runs."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[3] / "benchmarks/local_attention"))
