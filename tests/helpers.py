"""Starting the scripts as a user does, and reading what they leave; shared by the tests of whole runs."""

import contextlib
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from wandb.proto import wandb_internal_pb2

ROOT = Path(__file__).parents[1]
ENV = {
    "PATH": "/usr/bin:/bin",
    "HOME": "/tmp",
    "CUDA_VISIBLE_DEVICES": os.environ["CUDA_VISIBLE_DEVICES"],
    "OMP_NUM_THREADS": os.environ["OMP_NUM_THREADS"],
}
started = []

needs_compiler = pytest.mark.skipif(
    not (shutil.which("c++") or shutil.which("g++")), reason="torch.compile needs a C++ compiler"
)


@pytest.fixture(autouse=True)
def no_process_outlives_its_test():
    yield
    while started:
        process = started.pop()
        if process.poll() is None:
            process.kill()


def start(script, *args, **kwargs):
    command = [sys.executable, str(ROOT / script), *map(str, args)]
    started.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **kwargs))
    return started[-1]


def run(script, *args, code=0, **kwargs):
    process = start(script, *args, **kwargs)
    out, err = process.communicate()
    assert process.returncode == code, err
    return out, err


def scalars(folder):
    """tag -> [(step, value)] as TensorBoard shows them: what a resumed run logs anew counts once."""
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


@contextlib.contextmanager
def unchanged_process():
    """main() in this process saves the seconds of starting Python and torch; threads and signal handlers are put back."""
    threads, handlers = torch.get_num_threads(), {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
    yield
    torch.set_num_threads(threads)
    for number, handler in handlers.items():
        signal.signal(number, handler)


def only(folder, pattern="*"):
    (path,) = folder.glob(pattern)
    return path


def wait_for(condition, seconds=120):
    end = time.time() + seconds
    while not condition():
        assert time.time() < end, "waited too long"
        time.sleep(0.05)


def wandb_records(path):
    """The records of an offline W&B file: a 7-byte header, then LevelDB log blocks of 32 KiB holding protobufs."""
    data, position, record = path.read_bytes(), 7, b""
    while position + 7 <= len(data):
        left = 32768 - position % 32768
        _, length, kind = struct.unpack("<IHB", data[position : position + 7]) if left >= 7 else (0, 0, 0)
        if kind == 0:
            position += left
            continue
        record += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # a whole record, or the last piece of one
            yield wandb_internal_pb2.Record.FromString(record)
            record = b""


def wandb_run(path):
    config, history = {}, []
    for record in wandb_records(path):
        for item in record.run.config.update:
            config[item.key] = json.loads(item.value_json)
        if record.WhichOneof("record_type") == "history":
            history.append({item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item})
    return config, history
