"""How does the time grow with batch size, length of the error, layer size and number of layers?

The sweeps over the batch size have one layer, with a matrix far larger than any cache.
"""

from benchmarks.harness.shapes import STRUCTURED, WRITE_ROOF, Case, Promise, layer_name

LAYER = {"cpu": 100_000, "cuda": 200_000}


def settings(device_type: str, series: str) -> dict:
    """What all cases of a sweep share. On a GPU, stored fp32 matrices may be multiplied in TF32."""
    precision = "high" if device_type == "cuda" else "highest"
    return {"device_type": device_type, "series": series, "precision": precision}


def tf32(device_type: str) -> tuple[str, ...]:
    """What the names of its cases say about that."""
    return ("TF32",) if device_type == "cuda" else ()


def batch(device_type: str, full: bool) -> list[Case]:
    size, rivals = LAYER[device_type], ("views", "stored", "randn blocks")
    if device_type == "cpu":
        counts = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024) if full else (1, 8, 32, 128, 512)
        rivals, promises = (*rivals, "scikit-learn"), cpu_promises
    else:
        counts = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
        counts, promises = counts if full else (*counts[::2], 128, 2048), cuda_promises
    options = settings(device_type, "batch")
    return [
        Case(
            layer_name(size, m, 1000, *tf32(device_type)),
            (size,),
            m,
            1000,
            (*rivals, "views bf16", "fill") if device_type == "cuda" and m == 128 else rivals,
            promises=promises(m),
            x=m,
            **options,
        )
        for m in counts
    ]


def cpu_promises(m: int) -> tuple[Promise, ...]:
    at_least = {512: 1 / 1.10, 128: 1 / 1.25, 8: 1.0, 1: 0.9}
    promises = [Promise("cpp", "views", at_least[m])] if m in at_least else []
    if m == 1:
        promises.append(Promise(STRUCTURED, "views", 20.0, 100.0))
    if m == 128:
        promises.append(Promise("cpp", "randn blocks", 3.0))
        promises.append(Promise(STRUCTURED, "views", 12.0, 30.0))
        promises.append(Promise(STRUCTURED, WRITE_ROOF, 0.6, 0.8))
    return tuple(promises)


def cuda_promises(m: int) -> tuple[Promise, ...]:
    if m > 128:
        return ()
    promises = [Promise("cuda", "views", 1.5 if m <= 64 else 1.0)]
    if m <= 64:
        promises.append(Promise("triton", "views", 1.1, 1.4))
    promises.append(Promise("triton", "randn blocks", 3.0, 5.0))
    if m == 128:
        promises += [Promise(STRUCTURED, rival, 2.0) for rival in ("cuda", "views bf16")]
        promises.append(Promise(STRUCTURED, "fill", 1 / 1.3))
    return tuple(promises)


def error_size(device_type: str, full: bool) -> list[Case]:
    size = LAYER[device_type] // 5
    counts = (10, 30, 100, 300, 1000, 3000, 10_000) if full else (10, 100, 1000, 10_000)
    rivals, options = ("views", "stored", "fill"), settings(device_type, "n")
    return [
        Case(
            layer_name(size, 32, n, *tf32(device_type)),
            (size,),
            32,
            n,
            rivals,
            promises=no_slower_than_stored(device_type) if n <= 100 else (),
            x=n,
            **options,
        )
        for n in counts
    ]


def no_slower_than_stored(device_type: str) -> tuple[Promise, ...]:
    """What is promised on a CPU where there is little to compute."""
    return (Promise("cpp", "stored", 1.0),) if device_type == "cpu" else ()


def layer_size(device_type: str, full: bool) -> list[Case]:
    largest = 64 * 224**2  # of VGG-16 on ImageNet; bench_networks.py times its stored matrix
    m, options = 4, settings(device_type, "size")
    smallest = 1_000
    rivals = {smallest: ("views", "stored"), largest: ()}
    promises = {smallest: no_slower_than_stored(device_type)}
    if device_type == "cpu":
        promises[largest] = (Promise(STRUCTURED, "cpp", 60.0, 120.0),)
    sizes = (smallest, 10_000, 300_000, *([1_000_000] if full else []), largest)
    return [
        Case(
            layer_name(size, m, 1000, *tf32(device_type)),
            (size,),
            m,
            1000,
            rivals.get(size, ("views",)),
            promises=promises.get(size, ()),
            x=size,
            **options,
        )
        for size in sizes
    ]


def layers(device_type: str, full: bool) -> list[Case]:
    options = settings(device_type, "layers")

    def name(count: int) -> str:
        layers = "one layer of 4,096" if count == 1 else f"{count:,} unequal layers up to 4,096"
        return ", ".join((layers, "n=1,000, M=32", *tf32(device_type)))

    return [
        Case(
            name(count),
            tuple(range(4096, 4096 - count, -1)),
            32,
            1000,
            ("naive", "stored", "views", "fill"),
            promises=no_slower_than_stored(device_type),
            x=count,
            **options,
        )
        for count in ((1, 4, 12, 48, 192, 1024) if full else (1, 4, 12, 48))
    ]


def cases(device_type: str, full: bool) -> list[Case]:
    sweeps = (batch, error_size, layer_size, layers)
    return [case for sweep in sweeps for case in sweep(device_type, full)]


def test_sweeps(compete, case, name):
    compete(case, name)
