"""Programs of tests in processes of their own, on virtual devices."""

import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def start(n_devices: int, *arguments: str) -> subprocess.Popen:
    """Python with these arguments, this checkout and so many virtual CPU devices."""
    flags = f"--xla_force_host_platform_device_count={n_devices}"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    command = [sys.executable, *arguments]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(*programs: subprocess.Popen, patience: float) -> list[str]:
    """What each of them told, once all have ended well within so many seconds each; none is left behind."""
    try:
        told = [program.communicate(timeout=patience)[0] for program in programs]
    finally:
        for program in programs:
            program.kill()
    assert [program.returncode for program in programs] == [0] * len(programs), "\n".join(told)
    return told


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return str(free.getsockname()[1])
