"""How fast is the matrix itself generated, compared with as many numbers from torch.randn?

On a CPU, by one thread.
"""

import torch

from benchmarks.harness.shapes import Case, Promise

KINDS = (  # the last is the ratio promised on a CPU
    ("normal", torch.float32, 4.0),
    ("normal", torch.bfloat16, None),
    ("uniform", torch.float32, None),
    ("rademacher", torch.bfloat16, 10.0),
    ("hadamard", torch.float32, None),
)


def cases(device_type: str, full: bool) -> list[Case]:
    found = []
    for rows in (1_000, 10_000) if device_type == "cpu" else (100_000,):
        for distribution, dtype, at_least in KINDS:
            name = f"matrix {rows:,} x 1,000, {distribution} {str(dtype)[6:]}"
            options = {"device_type": device_type, "distribution": distribution, "dtype": dtype}
            if device_type == "cpu":
                name, options["threads"] = f"{name}, one thread", 1
                if at_least:
                    options["promises"] = (Promise("cpp", "torch.randn", at_least),)
            found.append(Case(name, (rows,), 1, 1000, ("torch.randn",), matrix=True, **options))
    return found


def test_matrix(compete, case, name):
    compete(case, name)
