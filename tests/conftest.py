"""The tests run on the CPU, also where there is a GPU. `CUDA_VISIBLE_DEVICES=0 pytest` shows them the first GPU."""

import os
import signal

os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
# pytest-xdist starts a process a core. If each had a thread a core, too, they would wait for one another: on two busy cores a
# test of whole games took 116 seconds like this, and 9 with one thread.
os.environ.setdefault("OMP_NUM_THREADS", "1")
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # so in a shell's background; runs would inherit it and never end
    signal.signal(signal.SIGINT, signal.default_int_handler)
if hasattr(signal, "SIGHUP"):  # under nohup, runs that a test hangs up would go on for ever
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
