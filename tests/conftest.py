"""The tests run on the CPU, also where there is a GPU. `CUDA_VISIBLE_DEVICES=0 pytest` shows them the first GPU."""

import os

os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
# pytest-xdist starts a process a core. If each had a thread a core, too, they would wait for one another: on two busy cores a
# test of whole games took 116 seconds like this, and 9 with one thread.
os.environ.setdefault("OMP_NUM_THREADS", "1")
