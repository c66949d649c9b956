"""Starting the scripts as a user does, and reading what they leave; shared by the tests of whole runs."""

import contextlib
import importlib
import json
import os
import runpy
import shutil
import signal
import struct
import subprocess
import sys
import time
from dataclasses import dataclass
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
    torch.set_flush_denormal(False)
    for number, handler in handlers.items():
        signal.signal(number, handler)


@dataclass
class Script:
    """A control script, and a small run of it in one thread."""

    name: str
    arm: str  # the default exp_name of the run with `noise`
    env_id: str  # as resolved
    args: str
    batch: int  # environment steps of an iteration
    noise: str

    @property
    def module(self):
        return importlib.import_module(self.name.removesuffix(".py"))


ATARI = "--num-threads 1 --env-id Breakout --num-envs 4"
LANDER, A2C = "--env-id LunarLanderContinuous", "--log-interval 4 --checkpoint-interval 4"
PPO = "--update-epochs 1 --minibatch-size 64 --checkpoint-interval 1"
SCRIPTS = [  # each logs every 128 environment steps
    Script("sppo_atari.py", "sppo_a0.5_b1_bsc", "Breakout", f"{ATARI} --num-steps 32 {PPO}", 128, "bsc"),
    Script("sa2c_atari.py", "sa2c_a0.5_b5_bsc", "Breakout", f"{ATARI} --num-steps 8 {A2C}", 32, "bsc"),
    Script(
        "dsppo_continuous.py",
        "dsppo_a0.5_b20_gaussian",
        "LunarLanderContinuous-v3",
        f"{LANDER} --num-steps 128 {PPO}",
        128,
        "gaussian",
    ),
    Script("dsa2c_continuous.py", "dsa2c_a0.5_b0.2_gaussian", "LunarLanderContinuous-v3", f"{LANDER} {A2C}", 32, "gaussian"),
]
each_script = pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)


def call(script, *words):
    """What a control script's command line does, without starting Python and torch again."""
    with unchanged_process():
        script.module.main(script.module.parse_args([part for word in words for part in str(word).split()]))


def command(path, *words):
    """The exit status of `python path words` without the seconds of starting Python and torch."""
    with unchanged_process(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [str(path), *" ".join(map(str, words)).split()])
        try:
            runpy.run_path(str(path), run_name="__main__")
        except SystemExit as stopped:
            return stopped.code
    return 0


def train(script, parent, *words):
    """The folder of a small run."""
    call(script, script.args, *words, f"--run-dir {parent}")
    return only(parent)


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


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
