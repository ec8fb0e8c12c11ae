# Copyright 2026 The transformers-aurea authors. Licensed under the Apache License, Version 2.0.
"""Time, memory and hardware of one processor core or of a CUDA device."""

import ctypes
import gc
import importlib.metadata
import os
import platform
import signal
import subprocess
import time
from contextlib import contextmanager
from pathlib import Path

import torch


os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # its profiler reports each start and stop

ROUNDS = 5
MIB = 2**20


class Processor:
    """One core. Time is the process's processor time, which other programs disturb least."""

    type = "cpu"

    def repeats(self, seconds):
        return 1

    def seconds(self, call, repeats=1):
        start = time.process_time()
        for _ in range(repeats):
            call()
        return (time.process_time() - start) / repeats

    def graph_of(self, call):
        return None

    def observe(self, call):
        """The result of a call, and the most that torch's allocator held during it, above what it held before."""
        gc.collect()
        with torch.profiler.profile(profile_memory=True) as profile:
            result = call()
        events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
        held = peak = 0
        for event in sorted(events, key=lambda event: event.start_ns()):
            held += event.nbytes()
            peak = max(peak, held)
        return result, {"mb": peak / MIB}

    def resident(self, call):
        """Growth of the resident set during a call, in MiB: what the allocator holds and everybody's scratch space.

        Of a second call in a process of its own, whose C library takes memory from the system and returns it at once:
        neither memory kept from earlier calls nor code read for the first time counts. None without Linux's counters.
        """
        read_end, write_end = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                os.write(write_end, repr(_resident_growth(call)).encode())
            finally:
                os._exit(0)
        os.close(write_end)
        with open(read_end) as pipe:
            answer = pipe.read()
        os.waitpid(child, 0)
        return float(answer) if answer else None

    def free_bytes(self):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")

    def hardware(self):
        return {}


def _resident_growth(call):
    libc = ctypes.CDLL(None)
    trim_threshold, mmap_threshold = -1, -3  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD of malloc.h
    libc.mallopt(mmap_threshold, 2**14)
    libc.mallopt(trim_threshold, 0)

    def kilobytes(name):
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(name))

    call()
    libc.malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = kilobytes("VmRSS")
    call()
    return (kilobytes("VmHWM") - before) / 1024


class Cuda:
    """A CUDA device. Time is between events around calls that follow each other without a pause."""

    type = "cuda"

    def repeats(self, seconds):
        """Enough calls of so many seconds that the events around them do not count."""
        return max(1, min(100, int(2e-3 / seconds)))

    def seconds(self, call, repeats=1):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(repeats):
            call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / repeats

    def graph_of(self, call):
        """The call as a CUDA graph: its replay costs what the device needs, and nothing of the host's time."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                call()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        return graph.replay

    def observe(self, call):
        call()  # compilation and libraries' workspaces
        torch.cuda.synchronize()
        gc.collect()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = call()
        torch.cuda.synchronize()
        return result, {"mb": (torch.cuda.max_memory_allocated() - before) / MIB}

    def resident(self, call):
        return None

    def free_bytes(self):
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info()[0]

    def hardware(self):
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        try:
            driver = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]
        except (OSError, subprocess.CalledProcessError, IndexError):
            driver = "unknown"
        return {"gpu": torch.cuda.get_device_name(), "driver": driver, "cuda": torch.version.cuda or torch.version.hip}


DEVICES = {"cpu": Processor, "cuda": Cuda}


@contextmanager
def time_limit(seconds):
    """TimeoutError after so many seconds, for a compilation that may not end in time."""

    def stop(signum, frame):
        raise TimeoutError(f"stopped after {seconds} s")

    previous = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)


def fastest(calls, device, budget, least=None, most=50):
    """Seconds of each call at its fastest, and of how many samples. The calls take turns in each of five rounds.

    The fastest sample is the one that other programs disturbed least; a median would measure them too.

    Args:
        budget: seconds for the samples of one call, of which there are at most `most`.
        least: samples, by name, of a call that is too long for the budget; 5 unless given.
    """
    samples, missing, repeats = {}, {}, {}
    for name, call in calls.items():
        once = device.seconds(call)
        samples[name] = [once] if once > budget / most else []  # a short call is warm only now
        once = once if samples[name] else device.seconds(call)
        repeats[name] = device.repeats(once)
        count = max((least or {}).get(name, 5), min(most, int(budget / (once * repeats[name]))))
        missing[name] = count - len(samples[name])
    for turn in range(ROUNDS):
        for name, call in calls.items():
            for _ in range(missing[name] * (turn + 1) // ROUNDS - missing[name] * turn // ROUNDS):
                samples[name].append(device.seconds(call, repeats[name]))
    return {name: (min(times), len(times)) for name, times in samples.items()}


def relative_error(actual, expected):
    """The largest difference, relative to the largest value expected."""
    return ((actual.double() - expected).abs().max() / expected.abs().max()).item()


def set_precision(device, precision):
    if device.type == "cuda":
        torch.backends.cuda.matmul.fp32_precision = "tf32" if precision == "tf32" else "ieee"


def hardware(device):
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    flags = {flag for line in lines if line.startswith("flags") for flag in line.split(":", 1)[1].split()}
    try:
        kernels = importlib.metadata.version("kernels")
    except importlib.metadata.PackageNotFoundError:
        kernels = None
    return {
        "processor": models[0] if models else platform.processor(),
        "vector_instructions": sorted(flag for flag in flags if flag.startswith(("avx", "amx", "fma", "sse4"))),
        "bfloat16_instructions": sorted(flags & {"avx512_bf16", "amx_bf16"}),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "kernels": kernels,
        "python": platform.python_version(),
        **device.hardware(),
    }
