"""What both tasks share: recipes, cache, sampling, loading, engine, results. Knows no task."""

import os

# Read when OpenMP loads, so before torch is imported. Threads that wait by spinning make a CPU step eight times slower
# as soon as anything else runs on one of their cores (a loader worker, another user); sleeping costs nothing alone.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
