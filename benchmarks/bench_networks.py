"""How fast are the signals of whole networks, and how much memory do they take?"""

import torch

from benchmarks.harness.shapes import (
    ALL,
    DEEP_MLP,
    GPT2_SMALL,
    LLAMA,
    PAPER_MLP,
    STORED,
    STRUCTURED,
    UNEQUAL_MLP,
    VGG16,
    Case,
    Promise,
    with_batch,
)

ON_CUDA = (*STORED, "compiled", "randn blocks")


def on_cpu(full: bool) -> list[Case]:
    transformers = (*STORED, *(["randn blocks"] if full else []))
    than_naive, than_stored = (Promise("cpp", rival, 1.0) for rival in ("naive", "stored"))
    unequal = {"promises": (than_stored, Promise(STRUCTURED, "views", 1.0))}
    long = {1024: (Promise(STRUCTURED, "stored", 12.0, 20.0),)}  # errors, by batch size
    cases = [
        Case(
            f"3x800 (the paper's), n=10, M={batch}",
            *with_batch(PAPER_MLP, batch),
            (*rivals, "fill"),
            promises=(than_naive, than_stored),
        )
        for batch, rivals in ((1, STORED), (32, STORED), (128, ALL))
    ]
    cases += [
        Case("48 layers of 4,096, n=1,000, M=512", *with_batch(DEEP_MLP, 512), ALL),
        Case(
            "48 layers of 2,049 to 4,096, n=1,000, M=512",
            *with_batch(UNEQUAL_MLP, 512),
            (*ALL, "fill"),
            **unequal,
        ),
        Case("VGG-16 on ImageNet, n=1,000, M=4", *with_batch(VGG16, 4), ALL if full else ALL[:4]),
    ]
    for batch in (1024, 4096, 8192) if full else (1024,):
        name = f"GPT-2 small, 36 points, n=50,257, M={batch:,}"
        options = {"promises": long.get(batch, ())}
        cases.append(Case(name, *with_batch(GPT2_SMALL, batch), transformers, **options))
    for batch in (128, 1024) if full else (128,):
        name = f"Llama-like, 64 points, n=32,000, M={batch:,}"
        cases.append(Case(name, *with_batch(LLAMA, batch), transformers))
    return cases


def on_cuda(full: bool) -> list[Case]:
    options = {"device_type": "cuda", "precision": "high"}
    than_naive = tuple(Promise(ours, "naive", 1.5) for ours in ("cuda", "triton"))
    small = options | {"promises": than_naive}
    cases = []
    for batch, rivals in ((128, ON_CUDA), (32, STORED)):
        name, mlp = f"3x800 (the paper's), n=10, M={batch}, TF32", with_batch(PAPER_MLP, batch)
        cases.append(Case(name, *mlp, rivals, **small))
        cases.append(Case(f"{name}, graph replay", *mlp, STORED, graph=True, **small))
    for name, network, promised, at_least in (
        ("48 layers of 4,096", DEEP_MLP, ("triton",), 8.0),
        ("48 layers of 2,049 to 4,096", UNEQUAL_MLP, ("cuda", "triton"), 4.0),
    ):
        rest = {"promises": tuple(Promise(ours, "naive", at_least) for ours in promised)} | options
        cases.append(
            Case(f"{name}, n=1,000, M=512, TF32", *with_batch(network, 512), ON_CUDA, **rest)
        )
    near_fill = {"promises": (Promise(STRUCTURED, "fill", 1 / 1.3),)} | options
    name, rivals = "VGG-16 on ImageNet, n=1,000, M=32, TF32", (*ALL[:4], "fill")
    cases.append(Case(name, *with_batch(VGG16, 32), rivals, **near_fill))
    for batch in (1024, 4096, 8192) if full else (1024, 8192):
        name = f"GPT-2 small, 36 points, n=50,257, M={batch:,}, TF32"
        cases.append(Case(name, *with_batch(GPT2_SMALL, batch), ALL[:4], **options))
    options["dtype"], options["precision"] = torch.bfloat16, "highest"
    than_stored = {"promises": (Promise(STRUCTURED, "stored", 4.0),)} | options
    name = "GPT-2 small, 36 points, n=50,257, M=8,192, bf16"
    cases.append(Case(name, *with_batch(GPT2_SMALL, 8192), ("stored", "views"), **than_stored))
    for batch in (1024, 8192) if full else (1024,):
        name = f"Llama-like, 64 points, n=32,000, M={batch:,}, bf16"
        cases.append(Case(name, *with_batch(LLAMA, batch), ALL[:4], **options))
    return cases


def cases(device_type: str, full: bool) -> list[Case]:
    return on_cpu(full) if device_type == "cpu" else on_cuda(full)


def test_networks(compete, case, name):
    compete(case, name)
