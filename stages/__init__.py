"""The six jobs of the cascade, one file each, started as DeepSpeed launch jobs."""

import os
import sys

from cogview2.pipeline.training.preemption import hold_signals

# The checkout root on sys.path would make this folder importable under a second name, as a second module object.
if __name__ != "cogview2.stages":
    raise ModuleNotFoundError(f"import this package as 'cogview2.stages', not as '{__name__}'")

# DeepSpeed's launcher numbers the GPUs 0, 1, ... whatever share of the host's a scheduler gave the job; before anything
# looks at a GPU the ranks get back what the host said (launch.local.device_variables).
if "COGVIEW2_VISIBLE_DEVICES" in os.environ:
    os.environ["CUDA_VISIBLE_DEVICES"] = os.environ["COGVIEW2_VISIBLE_DEVICES"]

# A rank, started as `python -m cogview2.stages.NAME --run-dir RUN --attempt N`: torch takes seconds to import, and a
# signal that comes meanwhile would end the process without a word.
if sys.argv[:1] == ["-m"] and "--attempt" in sys.argv:
    hold_signals()
