"""Kernels for the experiments of the tests, forked from a process that has imported what they need.

Each is a process of its own with its own notebook, as `uniemo run` starts them; what it does not do
again is to import torch, transformers and diffusers, which takes longer than most tiny trainings.
"""

import multiprocessing
import os
import sys
import time

# one server for all tests of a process: it starts with the first process that is asked for
PRELOADED = ["uniemo.mini.stages", "uniemo.mini.studies", "uniemo.pipeline", "uniemo.joint"]
PRELOADED += ["uniemo.mini.splits", "uniemo.measure.theme", "ipykernel.kernelapp", "seaborn"]

# steps of a warm start in these kernels: the mini preset's 600 are most of a tiny training;
# its batches are small there too
WARM_START = "UNIEMO_TESTS_WARM_START"

processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(PRELOADED)


def run_kernel(arguments, env, cwd):
    "What `python -m ipykernel_launcher` does, in a process that is there already."
    os.setsid()
    import matplotlib
    from huggingface_hub import constants
    from ipykernel.kernelapp import IPKernelApp

    from uniemo.joint import JointConfig
    from uniemo.measure.theme import SETTINGS
    from uniemo.understanding import UnderstandingConfig

    os.environ.clear()
    os.environ.update(env)
    if cwd:
        os.chdir(cwd)
    # matplotlib looks for MPLBACKEND when it is imported, which was before the kernel set it
    matplotlib.rcParams["backend"] = "module://matplotlib_inline.backend_inline"
    # nobody looks at these pictures: that they are drawn is what is tested
    small = {"figure.dpi": 25, "savefig.dpi": 25}
    SETTINGS.update(small)
    matplotlib.rcParams.update(small)
    # the place of the hub's cache is read when its library is imported
    constants.HF_HUB_CACHE = env.get("HF_HUB_CACHE", constants.HF_HUB_CACHE)
    if WARM_START in env:
        JointConfig.presets["mini"] |= dict(warm_start=int(env[WARM_START]), batch_size=8)
        UnderstandingConfig.presets["mini"]["batch_size"] = 16
    sys.argv = ["ipykernel_launcher", *arguments]
    IPKernelApp.launch_instance()


class Forked:
    "As much of `subprocess.Popen` as jupyter_client asks for."

    stdin = stdout = stderr = None

    def __init__(self, process):
        self.process, self.pid = process, process.pid

    def poll(self):
        return self.process.exitcode

    def wait(self, timeout=None):
        self.process.join(timeout)
        return self.process.exitcode

    def send_signal(self, signum):
        os.kill(self.pid, signum)

    def terminate(self):
        self.process.terminate()

    def kill(self):
        self.process.kill()


def fork_kernel(command, *, env, cwd=None, **_):
    "In the place of jupyter_client's `launch_kernel`."
    after = command.index("ipykernel_launcher") + 1
    process = processes.Process(target=run_kernel, args=(command[after:], dict(env), cwd))
    process.start()
    # signals go to the kernel's own group of processes: it must be there before anyone asks for it
    while process.exitcode is None and os.getpgid(process.pid) != process.pid:
        time.sleep(0.01)
    return Forked(process)
