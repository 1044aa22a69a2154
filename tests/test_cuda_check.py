"""The CUDA kernels compile without spilling registers, and take what the kept table says. Needs nvcc, no GPU."""

import pytest

from tests.cuda_check import Kernel, check, complaints, find_nvcc, kernels_in, table

SPILLING = """\
ptxas info    : Compiling entry function 'spilling_kernel' for 'sm_90'
ptxas info    : Function properties for spilling_kernel
    48 bytes stack frame, 64 bytes spill stores, 304 bytes spill loads
ptxas info    : Used 80 registers, used 1 barriers, 48 bytes cumulative stack size, 19456 bytes smem
ptxas info    : Compile time = 36.706 ms
"""


def test_reads_what_ptxas_says() -> None:
    (kernel,) = kernels_in(SPILLING)
    assert (kernel.registers, kernel.shared, kernel.stack, kernel.spilled) == (80, 19456, 48, 368)
    assert "SPILLS 368" in table([kernel])


def test_complains_of_spills_and_of_what_is_unlike_the_table() -> None:
    name = "gram_triangle_kernel<SplitF32<false>, 5>"
    grown = Kernel(name, "sm_90", 255, 1 << 15, 0, 8)
    text = "\n".join(complaints([grown, Kernel("new_kernel", "sm_90", 10, 0, 0, 0)]))
    assert f"{name}: 8 bytes spilled" in text
    assert f"{name} takes 255 registers and 32768 bytes of shared memory on sm_90, more than" in text
    assert "new_kernel is not in cuda_kernels.csv" in text
    assert "combine_kernel<float, float> is in cuda_kernels.csv, but no such kernel is compiled" in text


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_kernels_do_not_spill_and_take_what_the_table_says(arch: str) -> None:
    nvcc = find_nvcc()
    if nvcc is None:
        pytest.skip("needs nvcc, in CUDA_HOME or PATH")
    assert complaints(check(nvcc, [arch])) == []
