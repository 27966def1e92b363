"""What this installation and machine can do. Never the token, only whether there is one."""

import importlib.util
import os
import platform
import shutil
import sys
from pathlib import Path
from typing import Any

from llmquant.errors import SourceError
from llmquant.formats.facts import FACTS
from llmquant.source.hub import reach_hub
from llmquant.versions import installed

PACKAGES = (
    *("llmquant", "torch", "transformers", "accelerate", "datasets", "safetensors", "tokenizers", "bitsandbytes"),
    *("compressed-tensors", "huggingface_hub", "numpy", "numba", "typer", "rich", "matplotlib", "jinja2"),
)


def diagnose(folder: Path = Path()) -> dict[str, Any]:
    """Versions, machine, devices, disk, Hub and formats, as plain data; `problems` holds what to mend."""
    found = {
        "python": sys.version.split()[0],
        "versions": {name: installed(name) for name in PACKAGES},
        "machine": _machine(),
        "devices": _devices(),
        "disk": {"folder": str(folder.resolve()), "free_bytes": shutil.disk_usage(folder).free},
        "hub": _hub(),
        "formats": _formats(),
    }
    return found | {"problems": _problems(found)}


def _machine() -> dict[str, Any]:
    import torch

    names = ("SC_PHYS_PAGES", "SC_PAGE_SIZE")
    pages = [os.sysconf(name) if name in os.sysconf_names else 0 for name in names]
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "instruction_set": torch.backends.cpu.get_cpu_capability(),
        "memory_bytes": pages[0] * pages[1] or None,
    }


def _devices() -> list[dict[str, Any]]:
    import torch

    devices: list[dict[str, Any]] = [{"name": "cpu", "what": platform.processor() or platform.machine()}]
    if (accelerator := torch.accelerator.current_accelerator(check_available=True)) is not None:
        ask = getattr(torch.get_device_module(accelerator), "get_device_properties", lambda index: None)
        for index in range(torch.accelerator.device_count()):
            what, memory = (getattr(ask(index), fact, None) for fact in ("name", "total_memory"))
            name = f"{accelerator.type}:{index}"
            devices.append({"name": name, "what": what or accelerator.type, "memory_bytes": memory})
    return devices


def _hub() -> dict[str, Any]:
    """Where the Hub is, whether it answers, and whether a token is there; the token is not sent.

    offline           HF_HUB_OFFLINE is set: nothing is asked
    answered_seconds  how long the Hub took to answer; None where it did not, or was not asked
    not_reached       why there was no answer; None where there was one, or nothing was asked
    """
    from huggingface_hub import constants, get_token

    try:
        free = shutil.disk_usage(next(p for p in Path(constants.HF_HUB_CACHE).parents if p.is_dir())).free
    except (StopIteration, OSError):
        free = None
    seconds = failure = None
    if not constants.HF_HUB_OFFLINE:
        try:
            seconds = reach_hub()
        except SourceError as error:
            failure = str(error).removeprefix("Hub: ")
    return {
        "endpoint": constants.ENDPOINT.rpartition("@")[2],  # a proxy's address may hold a password
        "offline": bool(constants.HF_HUB_OFFLINE),
        "answered_seconds": seconds,
        "not_reached": failure,
        "token": get_token() is not None,
        "cache": constants.HF_HUB_CACHE,
        "cache_free_bytes": free,
    }


def _formats() -> dict[str, dict[str, Any]]:
    """Every output format, and what its checkpoints need to be opened here."""
    found = {}
    for name, facts in FACTS.items():
        module, package = facts.opened_by
        found[name] = {"opened_by": package, "installed": importlib.util.find_spec(module) is not None}
    return found


def _problems(found: dict[str, Any]) -> list[str]:
    problems = [f"{name} is not installed: pip install {name}" for name, v in found["versions"].items() if v is None]
    if any(device["name"].startswith("cuda") for device in found["devices"]) and installed("triton") is None:
        problems.append("a GPU without Triton: the CPU does the solver's loops, which takes longer: pip install triton")
    if found["hub"]["offline"]:
        problems.append("HF_HUB_OFFLINE is set: only local folders and what was downloaded before can be opened")
    elif found["hub"]["not_reached"]:
        problems.append("the Hub cannot be reached: only local folders and what was downloaded before can be opened")
    elif not found["hub"]["token"]:
        problems.append("no Hub token: gated models cannot be read; `hf auth login` or HF_TOKEN")
    if found["disk"]["free_bytes"] < 10e9:
        problems.append(f"{found['disk']['free_bytes'] / 1e9:.1f} GB of disk are free here: little for a model")
    for name, facts in found["formats"].items():
        if not facts["installed"]:
            problems.append(f"--format {name} can be written, but not opened here: pip install {facts['opened_by']}")
    return problems
