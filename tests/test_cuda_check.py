"""The CUDA kernels compile for the GPUs of data centres without spilling registers. Needs nvcc, no GPU."""

import pytest

from tests.cuda_check import check, find_nvcc, kernels_in, table

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


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_kernels_do_not_spill(arch: str) -> None:
    nvcc = find_nvcc()
    if nvcc is None:
        pytest.skip("needs nvcc, in CUDA_HOME or PATH")
    kernels = check(nvcc, [arch])
    assert {kernel.name.split("<")[0] for kernel in kernels} >= {"gram_registers_kernel", "combine_kernel"}
    assert [kernel for kernel in kernels if kernel.spilled] == []
