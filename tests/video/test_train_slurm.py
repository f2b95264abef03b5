"""The Slurm template, with stand-ins for Slurm's commands."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from stat_video.train.options import RunOptions

SCRIPT = Path(__file__).parents[2] / "stat" / "train.sbatch"

# srun runs what torchrun would: it takes a while, and TERM makes it fail after some more work.
STANDINS = {
    "scontrol": 'if [ "$1" = show ]; then printf "node7\\nnode8\\n"; else echo "$@" >> calls; fi',
    "scancel": 'echo "$@" >> calls; kill -TERM "$(cat srun.pid)"',
    "srun": """echo $$ > srun.pid
printf '%s\\n' "$@" > arguments
trap 'sleep 0.2; echo saved >> calls; exit 143' TERM
for _ in $(seq 100); do [ -e finish ] && exit 0; sleep 0.05; done""",
}


@pytest.fixture
def job(tmp_path):
    """A started job in its folder."""
    commands = tmp_path / "bin"
    commands.mkdir()
    for name, body in STANDINS.items():
        path = commands / name
        path.write_text(f"#!/bin/bash\n{body}\n")
        path.chmod(0o755)
    environment = {
        "PATH": f"{commands}:{os.environ['PATH']}",
        "SLURM_JOB_ID": "42",
        "SLURM_JOB_NODELIST": "node[7-8]",
        "SLURM_NNODES": "2",
        "SLURM_GPUS_ON_NODE": "4",
    }
    command = ["bash", str(SCRIPT), "--config", "k400_b16"]
    process = subprocess.Popen(command, cwd=tmp_path, env=environment)
    for _ in range(200):
        if (tmp_path / "arguments").exists():
            break
        time.sleep(0.02)
    yield process, tmp_path
    process.kill()


def test_a_job_that_ends_by_itself_is_not_queued_again(job):
    process, folder = job
    (folder / "finish").touch()
    assert process.wait(20) == 0
    assert not (folder / "calls").exists()
    words = (folder / "arguments").read_text().split()
    assert words[words.index("--nnodes") + 1] == "2"
    assert words[words.index("--nproc-per-node") + 1] == "4"
    assert words[words.index("--rdzv-endpoint") + 1] == "node7:29400"
    assert words[words.index("-m") :][:3] == ["-m", "stat_video", "train"]
    assert words[-2:] == ["--config", "k400_b16"]
    options = [w.removeprefix("--run.") for w in words if w.startswith("--run.")]
    assert options == ["save_every"]
    assert set(options) <= vars(RunOptions()).keys()


def test_a_job_out_of_time_saves_and_is_queued_again(job):
    process, folder = job
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 143
    calls = (folder / "calls").read_text().splitlines()
    assert calls == ["--signal=TERM 42.0", "saved", "requeue 42"]
