"""The compiled part; all else about the package stands in pyproject.toml."""

import platform
from pathlib import Path

from setuptools import Extension, setup

X86 = platform.machine() in ("x86_64", "AMD64")

# one build for each kind of processor that has something to gain from it; which one runs is decided when it is loaded
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx2", "-mfma", "-mf16c"]
BUILDS = {
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": AVX512,
    "bf16_fp32": AVX512,
    "bf16_fp16": [*AVX512, "-mavx512fp16"],
    "bf16": [*AVX512, "-mavx512bf16"],
}

setup(
    ext_modules=[
        Extension(
            f"longstride.engine._native_{name}",
            [f"engine/native_{name}.c"],
            depends=sorted(map(str, Path("engine").glob("native*.h"))),
            # OpenMP's functions are not linked: they are those of torch, so that both share one pool of threads
            extra_compile_args=["-O3", *flags, "-fopenmp", "-fvisibility=hidden", "-fno-strict-aliasing"],
            optional=True,  # without a compiler for it, torch's operations do the same
        )
        for name, flags in BUILDS.items()
    ]
    if X86
    else []
)
