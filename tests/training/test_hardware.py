import pytest
import torch

from isthmus.training.hardware import peak_flops

KNOWN = {
    "NVIDIA B200": 2250,
    "NVIDIA GH200 480GB": 989,
    "NVIDIA GH200 144G HBM3e": 989,
    "NVIDIA H200": 989,
    "NVIDIA H200 NVL": 835,
    "NVIDIA H100 80GB HBM3": 989,
    "NVIDIA H100 PCIe": 756,
    "NVIDIA H100 NVL": 835,
    "NVIDIA A100-SXM4-80GB": 312,
    "NVIDIA A100-PCIE-40GB": 312,
    "NVIDIA A100 80GB PCIe": 312,
    "NVIDIA A10": 125,
    "NVIDIA A10G": 70,
    "NVIDIA L4": 121,
    "NVIDIA L40S": 362,
    "NVIDIA RTX 6000 Ada Generation": 364.2,
    "NVIDIA GeForce RTX 3090": 71,
    "NVIDIA GeForce RTX 3090 Ti": 80,
    "NVIDIA GeForce RTX 4090": 165.2,
    "NVIDIA GeForce RTX 5090": 209.5,
    "Tesla V100-SXM2-16GB": 125,
    "Tesla V100-PCIE-32GB": 112,
    "Tesla T4": 65,
}
UNKNOWN = [  # each is less, or more, than the GPU that its name begins with
    "NVIDIA H100 80GB HBM3 MIG 1g.10gb",
    "NVIDIA A100-SXM4-40GB MIG 3g.20gb",
    "NVIDIA A100-SXM-64GB",
    "NVIDIA GeForce RTX 4090 Laptop GPU",
    "NVIDIA GeForce RTX 4090 D",
    "NVIDIA GeForce GTX 1080",
    "AMD Instinct MI300X",
]


def named(name: str, monkeypatch: pytest.MonkeyPatch) -> float | None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    return peak_flops(torch.device("cuda", 0))


@pytest.mark.parametrize(("name", "tflops"), KNOWN.items())
def test_a_gpu_is_known_by_its_name(
    name: str, tflops: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert named(name, monkeypatch) == pytest.approx(tflops * 1e12)


@pytest.mark.parametrize("name", UNKNOWN)
def test_another_gpu_is_not_taken_for_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert named(name, monkeypatch) is None


def test_a_cpu_has_none() -> None:
    assert peak_flops(torch.device("cpu")) is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_matrix_products_stay_below_the_peak() -> None:
    device = torch.device("cuda", 0)
    peak = peak_flops(device)
    if peak is None:
        pytest.skip(f"{torch.cuda.get_device_name(device)} is not known")
    size, times = 8192, 20
    matrix = torch.randn(size, size, dtype=torch.bfloat16, device=device)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for event in (begin, end):
        for _ in range(times):
            matrix @ matrix
        event.record()
    torch.cuda.synchronize()
    rate = 2 * size**3 * times / (begin.elapsed_time(end) / 1000)
    assert rate < peak
