"""What changes with bf16 errors, other entries, full fp32 accuracy, or short errors?"""

import torch

from benchmarks.harness.shapes import Case, Promise, layer_name


def on_cpu() -> list[Case]:
    sizes = (100_000, 99_000, 98_000)
    name = "M=128, n=1,000, layers of 100,000, 99,000, 98,000"
    than_naive = (Promise("cpp", "naive", 2.0),)
    low = {"dtype": torch.bfloat16}
    # A batch of one pays for every entry; bench_sweeps.py has it with normal ones.
    once = [
        Case(
            layer_name(sizes[0], 1, 1000, title),
            sizes[:1],
            1,
            1000,
            ("views", "stored"),
            distribution=distribution,
            promises=promises,
        )
        for distribution, title, promises in (
            ("rademacher", "+-1", (Promise("cpp", "views", 2.0),)),
            ("uniform", "uniform", ()),
        )
    ]
    return [
        *once,
        Case(layer_name(sizes[0], 128, 1000, "bf16"), sizes[:1], 128, 1000, ("views",), **low),
        Case(name, sizes, 128, 1000, ("naive", "stored"), promises=than_naive),
    ]


def on_cuda(size: int = 200_000, long: int = 1_000_000) -> list[Case]:
    def case(m: int, *promises: Promise, details: tuple[str, ...], **options) -> Case:
        rivals = options.pop("rivals", ("views",))
        n, rows = options.pop("n", 1000), options.pop("rows", size)
        name = layer_name(rows, m, n, *details)
        return Case(name, (rows,), m, n, rivals, device_type="cuda", promises=promises, **options)

    found = []
    for m in (1, 8, 64, 128, 512, 2048, 4096):
        promises = []
        if m <= 64:
            promises = [
                Promise("triton", "entries/s", 1.2e12),
                Promise("cuda", "entries/s", 1.5e12),
                Promise("cuda", "views", 0.9, 1.0),
            ]
        elif m >= 2048:
            promises = [
                Promise("triton", "views", 1 / 1.2, 1 / 1.05),
                Promise("cuda", "views", 1 / 1.1),
            ]
        low = {"dtype": torch.bfloat16, "details": ("bf16",), "series": "batch, bf16", "x": m}
        found.append(case(m, *promises, **low))
    for m, at_least in ((8, 2.0), (64, 2.0), (128, 1.0), (256, 0.9)):
        promises = [Promise("cuda", "views", at_least)]
        if m <= 128:
            promises.append(Promise("triton", "views", 1.0, 1.4))
        signs = {"dtype": torch.bfloat16, "distribution": "rademacher", "x": m}
        signs |= {"details": ("bf16", "+-1"), "series": "batch, bf16, +-1"}
        found.append(case(m, *promises, **signs))
    found.append(case(128, Promise("cuda", "views", 2.5, 4.0), details=("fp32 without TF32",)))
    output_bound = {"n": 10, "rows": long, "rivals": ("views", "fill"), "precision": "high"}
    than_fill = Promise("cuda", "fill", 1 / 1.25, 1 / 1.1)
    found.append(case(128, than_fill, details=("TF32",), **output_bound))
    return found


def cases(device_type: str, full: bool) -> list[Case]:
    return on_cpu() if device_type == "cpu" else on_cuda()


def test_precisions(compete, case, name):
    compete(case, name)
