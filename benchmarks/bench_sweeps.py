"""How does the cost grow with the batch, the error, the layer and the number of layers?

The batch sweeps have one layer so large that its matrix is far beyond any cache.
"""

from shapes import CUDA_NO_SLOWER, Case, Promise, layer_name

LAYER = {"cpu": 100_000, "cuda": 200_000}


def batch(device_type: str, full: bool) -> list[Case]:
    if device_type == "cpu":
        counts = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024) if full else (1, 8, 32, 128, 512)
        return [over_batch("cpu", m, promises=cpu_promises(m)) for m in counts]
    counts = (1, 4, 16, 64, 128, 256, 512, 1024, 2048, 4096)
    if full:
        counts = tuple(2**i for i in range(13))
    return [over_batch("cuda", m, precision="high", promises=cuda_promises(m)) for m in counts]


def over_batch(device_type: str, m: int, **options) -> Case:
    size = LAYER[device_type]
    rivals = ("views", "stored", "randn blocks")
    rivals += ("scikit-learn",) if device_type == "cpu" else ()
    options |= {"device_type": device_type, "series": "batch", "x": m}
    details = ("TF32",) if device_type == "cuda" else ()
    return Case(layer_name(size, m, 1000, *details), (size,), m, 1000, rivals, **options)


def cpu_promises(m: int) -> tuple[Promise, ...]:
    at_least = {512: 1 / 1.10, 128: 1 / 1.25, 8: 1.0}
    promises = [Promise("cpp", "views", at_least[m])] if m in at_least else []
    return (*promises, *([Promise("cpp", "randn blocks", 3.0)] if m == 128 else []))


def cuda_promises(m: int) -> tuple[Promise, ...]:
    if m > 128:
        return CUDA_NO_SLOWER
    return (
        Promise("triton", "views", 1.1, 1.4),
        Promise("triton", "randn blocks", 3.0, 5.0),
        Promise("cuda", "views", 1.4, 1.8),
        *CUDA_NO_SLOWER,
    )


def error_size(device_type: str, full: bool) -> list[Case]:
    size = LAYER[device_type] // 5
    counts = (10, 30, 100, 300, 1000, 3000, 10_000) if full else (10, 100, 1000, 10_000)
    options = {"device_type": device_type, "series": "n"}
    options |= {"precision": "high"} if device_type == "cuda" else {}
    rivals = ("views", "stored", "fill")
    return [Case(layer_name(size, 32, n), (size,), 32, n, rivals, x=n, **options) for n in counts]


def layer_size(device_type: str, full: bool) -> list[Case]:
    sizes = (1_000, 10_000, 1_000_000) if device_type == "cpu" else (1_000, 100_000, 1_000_000)
    options = {"device_type": device_type, "series": "size"}
    options |= {"precision": "high"} if device_type == "cuda" else {}
    found = [
        Case(layer_name(size, 4, 1000), (size,), 4, 1000, ("views",), x=size, **options)
        for size in sizes
    ]
    largest = 64 * 224**2  # VGG-16's on ImageNet; its stored matrix is measured with the network
    return [
        *found,
        Case(layer_name(largest, 4, 1000), (largest,), 4, 1000, (), x=largest, **options),
    ]


def layers(device_type: str, full: bool) -> list[Case]:
    counts = (1, 4, 12, 48, 192, 768, 1024) if full else (1, 4, 12, 48)
    options = {"device_type": device_type, "series": "layers"}
    options |= {"precision": "high"} if device_type == "cuda" else {}
    rivals = ("naive", "stored", "views")
    return [
        Case(
            f"{count:,} unequal layers of about 4,096, n=1,000, M=32",
            tuple(range(4096, 4096 - count, -1)),
            32,
            1000,
            rivals,
            x=count,
            **options,
        )
        for count in counts
    ]


def cases(device_type: str, full: bool) -> list[Case]:
    sweeps = (batch, error_size, layer_size, layers)
    return [case for sweep in sweeps for case in sweep(device_type, full)]


def test_sweeps(compete, case, name):
    compete(case, name)
