"""The TensorRT backend where there is no GPU: it says so, and nothing of TensorRT is loaded.

tests/runtime/engines has the rest, each file with what it proves.
"""

from __future__ import annotations

import subprocess
import sys

import pytest

from cdl_edge.errors import InputError
from cdl_edge.machine import cuda_driver
from cdl_edge.runtime import load
from cdl_edge.runtime.backends import BACKENDS


@pytest.mark.skipif(cuda_driver().devices > 0, reason="there is a GPU: tests/runtime/engines/test_gpu.py runs instead")
@pytest.mark.parametrize("name", ["tensorrt", "trt"])
def test_without_a_gpu_the_driver_s_answer_is_the_message(bundle, name):
    assert name in BACKENDS
    with pytest.raises(InputError, match="TensorRT cannot be used here") as caught:
        load(bundle, name)
    assert cuda_driver().detail in str(caught.value) and "--backend cpu" in str(caught.value)


@pytest.mark.slow
@pytest.mark.skipif(cuda_driver().devices > 0, reason="there is a GPU")
def test_without_a_gpu_nothing_of_nvidia_s_is_imported(bundle):
    code = (
        "import sys\nfrom cdl_edge.errors import InputError\nfrom cdl_edge.runtime import load\n"
        f"try:\n    load({str(bundle.path)!r}, 'tensorrt')\nexcept InputError:\n    pass\n"
        "print([m for m in sys.modules if m.split('.')[0] in ('tensorrt', 'tensorrt_rtx', 'pycuda', 'cuda')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
