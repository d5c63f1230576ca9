"""Triton kernels. A file here holds device code and its launcher; what may be launched is in kernels/backends."""
