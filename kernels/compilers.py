"""What compilers find in the environment of a process that measures."""

import importlib.util
import os


def share_caches() -> None:
    """Let this process find what others compiled, and compile what it compiles itself.

    Once inductor has compiled, it names a folder of its own to Triton, for every kernel of the process: what lies in
    Triton's own is not found from then on, unless that folder is named before. It names torch's ptxas too, where there
    is one: of another version than Triton's, whose kernels then have other keys. And inductor, which has one or two
    kernels of an attention to compile, would start a pool of processes for them. Call it before anything is compiled.
    """
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
    if importlib.util.find_spec("triton") is not None:
        from triton import knobs

        os.environ.setdefault("TRITON_CACHE_DIR", knobs.cache.dir)
        os.environ.setdefault("TRITON_PTXAS_PATH", knobs.nvidia.ptxas.path)
