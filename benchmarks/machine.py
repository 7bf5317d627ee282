"""What a row of docs/benchmarks.md says of the machine; imports nothing that threads must be pinned for."""

import platform
from pathlib import Path


def machine(threads: int, device: str = "cpu") -> str:
    """The processor's name and how many threads were used, and the GPU's name where one was."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    named = (line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    gpu = ""
    if device != "cpu":
        import torch

        gpu = f"{torch.cuda.get_device_name(device)}, "
    return f"{gpu}{next(named, platform.processor() or platform.machine())}, {threads} thread{'s' * (threads > 1)}"
