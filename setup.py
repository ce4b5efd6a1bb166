"""The compiled part; all else about the package stands in pyproject.toml."""

import platform

from setuptools import Extension, setup

X86 = platform.machine() in ("x86_64", "AMD64")

setup(
    ext_modules=[
        Extension(
            "longstride.engine._native",
            ["engine/native.c"],
            # OpenMP's functions are not linked: they are those of torch, so that both share one pool of threads
            extra_compile_args=["-O3", "-mavx2", "-mfma", "-mf16c", "-fopenmp", "-fvisibility=hidden"],
            optional=True,  # without a compiler for it, torch's operations do the same
        )
    ]
    if X86
    else []
)
