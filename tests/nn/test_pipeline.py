"""A model cut into stages learns as it does in one process."""

import copy

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from dfa_kernels import DFA, DFALayer, attach, project
from dfa_kernels.nn import FeedbackStage, OutputWeights, ranks
from tests import processes

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="needs torch.distributed")

BATCH, TOKENS, WIDTH, CLASSES = 12, 3, 6, 5


def perceptron():
    """Stages of one, two, one and one point, of other sizes."""
    return [
        nn.Sequential(nn.Linear(WIDTH, 8), nn.Tanh()),
        nn.Sequential(nn.Linear(8, 7), nn.Tanh(), nn.Linear(7, 7), nn.Tanh()),
        nn.Sequential(nn.Linear(7, 9), nn.Tanh()),
        nn.Sequential(nn.Linear(9, 7), nn.Tanh(), nn.Linear(7, CLASSES)),
    ]


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return x + torch.tanh(self.inner(x))


def residual():
    return [
        nn.Sequential(nn.Embedding(CLASSES, WIDTH), Residual()),
        nn.Sequential(Residual(), Residual()),
        nn.Sequential(Residual()),
        nn.Sequential(Residual(), nn.Linear(WIDTH, CLASSES)),
    ]


class Twice(nn.Module):
    """Calls one activation module again, with two rows for each of the error."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.act = nn.Linear(WIDTH, 8), nn.Linear(4, 4), nn.Tanh()

    def forward(self, x):
        x = self.act(self.first(x))
        return self.act(self.second(x.unflatten(1, (2, 4)).flatten(0, 1)))


class Pairs(nn.Module):
    def forward(self, x):
        return x.unflatten(0, (-1, 2)).flatten(1)


def recurrent():
    return [
        Twice(),
        nn.Sequential(nn.Linear(4, 4), nn.Tanh()),
        nn.Sequential(nn.Linear(4, 4), nn.Tanh()),
        nn.Sequential(Pairs(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, CLASSES)),
    ]


POINTS = {
    perceptron: (["1"], ["1", "3"], ["1"], ["1"]),
    residual: (["1"], ["0", "1"], ["0"], ["0"]),
    recurrent: (["act"], ["1"], ["1"], ["2"]),
}


def uneven(sizes, n):
    """Scales that depend on the sizes of all layers."""
    return [(index + 1) / sum(sizes) / n for index in range(len(sizes))]


def doubled(signal, layer):
    return signal * (2 if layer.name == "1.3" else 1)


def squashed(x):
    return x / (1 + x.square().mean(-1, keepdim=True))


class Signs:
    """A source of the user's own."""

    def project(self, error, layers, dtype):
        return [signal.sign().to(dtype) for signal in project(error, list(layers.sizes), seed=1)]

    def describe(self):
        return {"signs": 1}


def stored():
    return torch.randn(9, CLASSES, generator=torch.Generator().manual_seed(5)).double()


MASK = torch.arange(7).double() % 2
TOKENS_AS_ROWS = {"batch_dims": (0, 1)}

# name: (network, microbatches, options of the stage, options of the DFA)
CASES = {
    **{f"{count} microbatches": (perceptron, count, {}, {}) for count in (1, 2, 3, 4, 6)},
    "ahead": (perceptron, 6, {"ahead": 3}, {}),
    "sum": (perceptron, 3, {"scale_grads": False}, {}),
    "hadamard": (perceptron, 4, {}, {"distribution": "hadamard"}),
    "a matrix each": (perceptron, 3, {}, {"shared": False}),
    "masks": (perceptron, 3, {}, {"mask": {"1.3": MASK, "3.1": 1 - MASK}}),
    "transformed errors": (perceptron, 3, {}, {"error_transform": torch.sign}),
    "transformed signals": (perceptron, 2, {}, {"signal_transform": doubled}),
    "through": (perceptron, 2, {}, {"through": squashed}),
    "lean": (perceptron, 3, {}, {"lean": True}),
    "scales of all sizes": (perceptron, 2, {}, {"normalization": uneven}),
    "stored": (perceptron, 2, {}, {"matrix": stored()}),
    "a source": (perceptron, 2, {}, {"matrix": Signs()}),
    "gradients of inputs": (perceptron, 2, {}, {"requires_grad": True}),
    "shallow": (perceptron, 2, {}, {"no_training": True}),
    "tokens": (residual, 3, {}, TOKENS_AS_ROWS),
    "output weights": (residual, 2, {}, TOKENS_AS_ROWS | {"matrix": OutputWeights}),
    "calls": (recurrent, 2, {}, {"feedback_points_handling": "REDUCE"}),
}


def seeded(network, dtype=torch.float64):
    torch.manual_seed(0)
    return [stage.to(dtype) for stage in network()]


def batch(network, size=BATCH):
    generator = torch.Generator().manual_seed(1)
    if network is residual:
        tokens = torch.randint(CLASSES, (size, TOKENS + 1), generator=generator)
        return tokens[:, :-1], tokens[:, 1:]
    x = torch.randn(size, WIDTH, generator=generator, dtype=torch.float64)
    return x, torch.randint(CLASSES, (size,), generator=generator)


def cross_entropy(output, target):
    return F.cross_entropy(output.flatten(0, -2), target.flatten())


def gradients(module):
    return {name: parameter.grad for name, parameter in module.named_parameters()}


def in_one_process(name):
    """Loss, outputs, gradients and state of a DFA over the whole model."""
    network, count, settings, options = CASES[name]
    stages = seeded(network)
    whole = nn.Sequential(*stages)
    points = [f"{i}.{point}" for i, names in enumerate(POINTS[network]) for point in names]
    if options.get("matrix") is OutputWeights:
        options = options | {"matrix": OutputWeights(stages[-1][-1])}
    handle = attach(whole, points, seed=None if "matrix" in options else 3, **options)
    losses, outputs = [], []
    for x, y in zip(*(part.chunk(count) for part in batch(network)), strict=True):
        outputs.append(whole(x))
        losses.append(cross_entropy(outputs[-1], y))
    total = torch.stack(losses).sum()
    if settings.get("scale_grads", True):
        total = total / count
    total.backward()
    state = handle.dfa.get_extra_state()
    return total.detach(), torch.cat(outputs).detach(), [*map(gradients, stages)], state


def new_stage(rank, network, count=2, *, module=None, seed=3, matrix=None, **options):
    stages = seeded(network)
    module = stages[rank] if module is None else module
    if matrix is OutputWeights:
        last = rank == len(stages) - 1
        with torch.device("meta"):
            head = nn.Linear(WIDTH, CLASSES)
        matrix = OutputWeights(stages[-1][-1] if last else head)
    seed = seed if matrix is None else None
    points = options.pop("points", POINTS[network][rank])
    return FeedbackStage(module, count, cross_entropy, points, seed=seed, matrix=matrix, **options)


def steps(rank, send):
    found = {}
    for name, (network, count, settings, options) in CASES.items():
        if options.get("matrix") is OutputWeights and send == "error":
            continue
        stage = new_stage(rank, network, count, send=send, **settings, **options)
        x, y = batch(network)
        got = stage.step(x, target=y, return_outputs=True)
        state = stage.module.state_dict()["dfa._extra_state"]
        evaluated = stage.eval_step(x)
        found[name] = got, evaluated, gradients(stage.module), state, stage.gets, repr(stage)
    return found


@pytest.mark.parametrize("send", ["error", "signals"])
def test_stages_learn_as_one_process_does(tmp_path, send):
    found_by = processes.run(steps, 4, tmp_path, send)
    for name in found_by[-1]:
        loss, outputs, wanted, state = in_one_process(name)
        for rank, found in enumerate(found_by):
            got, evaluated, grads, own_state, gets, text = found[name]
            torch.testing.assert_close(grads, wanted[rank], msg=lambda text: f"{name}: {text}")  # noqa: B023
            assert torch.equal(own_state, state), name
            assert gets == (None,) * 4 if name == "shallow" else (send,) * 3 + (None,), name
            assert text.startswith(f"FeedbackStage({rank} of 4, microbatches=")
            if rank < 3:
                assert got is evaluated is None
        torch.testing.assert_close(got, (loss, outputs))
        torch.testing.assert_close(evaluated, outputs)


def choices(rank):
    """What each stage gets where nobody chose, of points of 16, of 8 and 8, and of 8 beside 10."""
    stages = [
        nn.Sequential(nn.Linear(4, 16), nn.Tanh()),
        nn.Sequential(nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh()),
        nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 10)),
    ]
    points = (["1"], ["1", "3"], ["1"])
    found = []
    for options in ({}, {"shared": False}, {"lean": True}, {"normalization": uneven}):
        stage = FeedbackStage(stages[rank], 1, cross_entropy, points[rank], seed=3, **options)
        assert stage.gets is None
        stage.step(torch.ones(2, 4), target=torch.zeros(2, dtype=torch.long))
        found.append((stage.gets, repr(stage).partition("gets ")[2]))
        stage.detach()
    return found


def test_each_stage_gets_what_takes_fewer_bytes(tmp_path):
    first, second, _ = processes.run(choices, 3, tmp_path)
    kinds = ("error", "signals", None), ("error", "error", None)
    assert [gets for gets, _ in first] == [kinds[0], kinds[1], kinds[0], kinds[1]]
    assert [text for _, text in first] == ["error, 10 numbers a row)"] * 4
    wanted = ["signals, 8 numbers a row)", "error, 10 numbers a row)"]
    assert [text for _, text in second] == wanted * 2


class Counted(nn.Linear):
    """Notes each microbatch that it keeps for a backward pass, and each that it has done."""

    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.held, self.most = 0, 0

    def forward(self, x):
        y = super().forward(x)
        if y.requires_grad:
            self.held += 1
            self.most = max(self.most, self.held)
            y.register_hook(self.done)
        return y

    def done(self, gradient):
        self.held -= 1


def held(rank, ahead):
    module = nn.Sequential(Counted(4, 4), DFALayer())
    stage = FeedbackStage(
        module, 6, lambda output, target: output.square().mean(), ahead=ahead, seed=0
    )
    for _ in range(3):
        stage.step(torch.ones(6, 4))
    return module[0].most, module[0].held


@pytest.mark.parametrize(
    ("ahead", "wanted"), [(None, [4, 3, 2, 1]), (3, [4, 3, 3, 3]), (9, [6, 6, 6, 6])]
)
def test_a_stage_holds_as_many_microbatches_as_with_1f1b_or_as_told(tmp_path, ahead, wanted):
    assert processes.run(held, 4, tmp_path, ahead) == [(most, 0) for most in wanted]


class Gated(nn.Module):
    """Gets two tensors and a keyword, and returns two."""

    def __init__(self):
        super().__init__()
        self.linear, self.point = nn.Linear(4, 4), DFALayer("gate")

    def forward(self, x, count, scale=None):
        x = self.point(torch.tanh(self.linear(x)))
        return (x if scale is None else x * scale), count + 1


class Head(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, CLASSES)

    def forward(self, x, count):
        return self.linear(x) + count


def gated(rank):
    torch.manual_seed(0)
    stages = [Gated(), Gated(), Head()]
    whole = copy.deepcopy(stages)
    module = stages[rank]
    stage = FeedbackStage(module, 2, cross_entropy, seed=1)
    # By time steps: the batch is the second dimension.
    x, count = torch.randn(4, 4), torch.zeros(4, 1, dtype=torch.long)
    target = torch.arange(4)
    scale = {"scale": torch.arange(4.0)[:, None]} if rank < 2 else {}
    stage.step(x, count, target=target, **scale)
    names = [layer.name for layer in stage.dfa.dfa_layers]

    for index, one in enumerate(whole[:2]):
        one.point.name = names[index]
    dfa = DFA([one.point for one in whole[:2]], seed=1)
    scale = torch.arange(4.0)[:, None]
    output = dfa(whole[2](*whole[1](*whole[0](x, count, scale), scale)))
    cross_entropy(output, target).backward()
    return gradients(module), gradients(whole[rank]), names


def test_stages_pass_on_several_tensors_and_take_keywords(tmp_path):
    for found, wanted, names in processes.run(gated, 3, tmp_path):
        torch.testing.assert_close(found, wanted)
        assert names == ["0.gate", "1.gate"]


def alone(rank):
    stage = FeedbackStage(nn.Sequential(*seeded(perceptron)), 3, cross_entropy, ALL, seed=3)
    x, y = batch(perceptron)
    return stage.step(x, target=y), gradients(stage.module), stage.gets


ALL = [f"{i}.{point}" for i, names in enumerate(POINTS[perceptron]) for point in names]


def test_one_stage_is_the_whole(tmp_path):
    ((loss, grads, gets),) = processes.run(alone, 1, tmp_path)
    wanted, _, stages, _ = in_one_process("3 microbatches")
    torch.testing.assert_close(loss, wanted)
    whole = {f"{i}.{name}": grad for i, one in enumerate(stages) for name, grad in one.items()}
    torch.testing.assert_close(grads, whole)
    assert gets == (None,)


def trained(rank):
    """Steps of an optimizer, one with a batch of another size, and a state that is loaded."""
    stage = new_stage(rank, perceptron)
    x, y = batch(perceptron)
    optimizer = torch.optim.SGD(stage.module.parameters(), 0.1)
    stage.eval_step(x)
    for size in (12, 6, 12):
        optimizer.zero_grad()
        stage.forget()
        stage.step(x[:size], target=y[:size])
        optimizer.step()
    outputs = [stage.eval_step(x[:size]) for size in (12, 12)]
    saved = stage.module.state_dict()

    other = new_stage(rank, perceptron, seed=None)
    other.module.load_state_dict(saved)
    optimizer.zero_grad()
    other.step(x, target=y)
    stage.step(x, target=y)
    return outputs, gradients(stage.module), gradients(other.module), other.dfa.seed


def test_steps_and_states(tmp_path):
    stages = seeded(perceptron)
    whole = nn.Sequential(*stages)
    attach(whole, ALL, seed=3)
    x, y = batch(perceptron)
    optimizer = torch.optim.SGD(whole.parameters(), 0.1)
    for size in (12, 6, 12):
        optimizer.zero_grad()
        cross_entropy(whole(x[:size]), y[:size]).backward()
        optimizer.step()
    found = processes.run(trained, 4, tmp_path)
    torch.testing.assert_close(found[-1][0], [whole(x)] * 2)
    for _, ours, loaded, seed in found:
        torch.testing.assert_close(ours, loaded, rtol=0, atol=0)
        assert seed == 3


def raised(kind, act):
    with pytest.raises(kind) as refusal:
        act()
    return str(refusal.value)


def refusals(rank):
    """What each of two stages says to settings that differ, and to misuse."""
    x, y = torch.ones(4, 4), torch.arange(4)
    found = {}

    def made(**options):
        module = nn.Sequential(nn.Linear(4, 4), DFALayer())
        settings = {"microbatches": 2, "loss": cross_entropy} | options
        return FeedbackStage(module, **settings)

    different = {
        "seed": rank,
        "distribution": ("normal", "hadamard")[rank],
        "normalization": (True, False)[rank],
        "microbatches": (2, 4)[rank],
        "batch_dims": ((0,), (-2,))[rank],
        "send": ("error", None)[rank],
        "ahead": (None, 2)[rank],
        "scale_grads": rank == 0,
        "shared": rank == 0,
        "matrix": (None, Signs())[rank],
        "no_training": rank == 0,
    }
    for name, value in different.items():
        stage = made(**{name: value})
        found[name] = raised(ValueError, lambda: stage.step(x, target=y))  # noqa: B023
    stage = made()
    stage.step(x, target=y)
    stage.dfa.mode = "backprop"
    found["backprop"] = raised(ValueError, lambda: stage.step(x, target=y))
    stage.dfa.mode = "dfa"
    with torch.no_grad():
        found["no_grad"] = raised(RuntimeError, lambda: stage.step(x, target=y))
    if rank == 0:
        found["microbatch"] = raised(ValueError, lambda: stage.step(x[:3]))
        found["shape"] = raised(ValueError, lambda: stage.step(x[:2]))
    else:
        found["target"] = raised(ValueError, lambda: stage.step(target=y[:3]))
    return found


def test_what_differs_between_stages_is_told_by_name(tmp_path):
    first, second = processes.run(refusals, 2, tmp_path)
    for found in (first, second):
        assert found["seed"].startswith("FeedbackStage: seed must be the same on all stages, got")
        assert found["seed"].endswith("got 1 on stages [1] and 0 on the first")
        for name in (
            "distribution",
            "normalization",
            "microbatches",
            "batch_dims",
            "send",
            "ahead",
        ):
            assert f"FeedbackStage: {name} must be the same on all stages" in found[name]
        assert "scale_grads must be the same" in found["scale_grads"]
        assert "row_offsets must be the same" in found["shared"]
        assert "seed must be the same" in found["matrix"]
        assert "mode must be the same" in found["no_training"]
        assert "got 'backprop'; torch.distributed.pipelining has it" in found["backprop"]
        assert "eval_step is for without" in found["no_grad"]
    assert "args must split into 2 equal microbatches, got [3, 4]" in first["microbatch"]
    assert "float32[2, 4]], got [float32[1, 4]]; call forget() on all" in first["shape"]
    assert "target must split into 2 equal microbatches, got [3]" in second["target"]


def warnings_of(rank):
    """A stage that ends without a point trains in part, one with no point not at all."""
    module = nn.Sequential(nn.Linear(4, 4), *[DFALayer()] * rank, nn.Linear(4, 4))
    stage = FeedbackStage(module, 2, lambda output, target: output.sum())
    if rank == 2:
        stage.step()
        return [], gradients(module)
    with pytest.warns(UserWarning, match="nothing trains what comes after the last") as warned:
        stage.step(torch.ones(4, 4))
    return [str(one.message) for one in warned], gradients(module)


def test_a_stage_that_ends_without_a_point_is_told(tmp_path):
    (none, untrained), (one, half), (_, whole) = processes.run(warnings_of, 3, tmp_path)
    assert ["stage 0," in text for text in none] == [True]
    assert ["stage 1," in text for text in one] == [True]
    assert all(grad is None for grad in untrained.values())
    assert [name for name, grad in half.items() if grad is None] == ["2.weight", "2.bias"]
    assert all(grad is not None for grad in whole.values())


def dies(rank):
    stage = new_stage(
        rank, perceptron, module=nn.Sequential(nn.Linear(6, 6), DFALayer()), points=()
    )
    x, y = batch(perceptron)
    x, y = x.float(), y
    stage.step(x, target=y)
    if rank == 1:
        return "died"
    return raised(RuntimeError, lambda: stage.step(x, target=y))


def test_a_process_that_dies_leaves_the_others_with_an_error(tmp_path):
    first, second, third = processes.run(dies, 3, tmp_path)
    assert second == "died"
    assert "onnection" in first
    assert "onnection" in third


def half(stage):
    """One of two stages, and its points."""
    stages = seeded(perceptron)
    halves = nn.Sequential(*stages[:2]), nn.Sequential(*stages[2:])
    return halves[stage], (["0.1", "1.1", "1.3"], ["0.1", "1.1"])[stage]


def compiled(rank):
    module, points = half(rank)
    stage = FeedbackStage(torch.compile(module, backend="eager"), 3, cross_entropy, points, seed=3)
    x, y = batch(perceptron)
    for _ in range(2):
        module.zero_grad()
        stage.step(x, target=y)
    return gradients(module), ""


def two_pipelines(rank):
    """Of two stages each, whose replicas are averaged by DistributedDataParallel."""
    mesh = dist.init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "stages"))
    data, stage = mesh.get_coordinate()
    inner, points = half(stage)
    module = nn.parallel.DistributedDataParallel(inner, process_group=mesh["data"].get_group())
    own = FeedbackStage(module, 3, cross_entropy, points, seed=3, group=mesh["stages"].get_group())
    x, y = (part.chunk(2)[data] for part in batch(perceptron))
    for _ in range(2):
        module.zero_grad()
        own.step(x, target=y)
    found = gradients(inner)
    own.dfa.seed = data
    own.forget()
    return found, raised(ValueError, lambda: own.step(x, target=y))


@pytest.mark.parametrize(("worker", "world"), [(compiled, 2), (two_pipelines, 4)])
def test_compiled_and_data_parallel_stages(tmp_path, worker, world):
    whole = nn.Sequential(*seeded(perceptron))
    attach(whole, ALL, seed=3)
    x, y = batch(perceptron)
    cross_entropy(whole(x), y).backward()
    halves = nn.Sequential(*whole[:2]), nn.Sequential(*whole[2:])
    for rank, (found, refusal) in enumerate(processes.run(worker, world, tmp_path)):
        torch.testing.assert_close(found, gradients(halves[rank % 2]))
        assert world == 2 or "FeedbackStage: seed must be the same on all replicas" in refusal


def wrapped(rank):
    from torch.distributed.fsdp import fully_shard

    def refusal(module, *arguments, kind=ValueError, **options):
        return raised(kind, lambda: FeedbackStage(module, *arguments, **options))

    parallel = nn.parallel.DistributedDataParallel
    import torch.distributed.pipelining  # noqa: F401  which subclasses FSDPModule

    assert not ranks.fully_sharded()
    fully_shard(nn.Linear(4, 4))
    assert ranks.fully_sharded()
    twice = nn.Sequential(nn.Linear(4, 4))
    FeedbackStage(twice, 2, cross_entropy, ["0"], state=None)
    loose = parallel(nn.Linear(4, 4), find_unused_parameters=True)
    return {
        "fsdp": refusal(nn.Sequential(fully_shard(nn.Linear(4, 4))), 2, cross_entropy),
        "inner": refusal(nn.Sequential(parallel(nn.Linear(4, 4))), 2, cross_entropy),
        "loose": refusal(loose, 2, cross_entropy),
        "dfa": refusal(nn.Sequential(DFA([])), 2, cross_entropy),
        "twice": refusal(twice, 2, cross_entropy, ["0"]),
        "loss": refusal(nn.Linear(4, 4), 2),
        "send": refusal(nn.Linear(4, 4), 2, cross_entropy, send="both"),
        "microbatches": refusal(nn.Linear(4, 4), 0, cross_entropy),
        "points": refusal(nn.Sequential(nn.Linear(4, 4)), 2, cross_entropy, ["1"]),
        "module": refusal(cross_entropy, 2, cross_entropy, kind=TypeError),
    }


def parts(rank):
    """A point on a part of the features, as ColwiseParallel leaves it."""
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    mesh = dist.init_device_mesh("cpu", (2, 2), mesh_dim_names=("stages", "features"))
    linear = parallelize_module(nn.Linear(4, 4), mesh["features"], ColwiseParallel())
    module = nn.Sequential(linear if rank < 2 else nn.Linear(2, 4), nn.Tanh(), DFALayer())
    stage = FeedbackStage(module, 2, cross_entropy, group=mesh["stages"].get_group())
    return raised(ValueError, lambda: stage.step(torch.ones(4, 4), target=torch.arange(4)))


def test_a_part_of_an_activation_is_refused_on_all_stages(tmp_path):
    for refusal in processes.run(parts, 4, tmp_path):
        assert "must be whole in each process, got parts on stage 0: dfa_layers[0];" in refusal


def test_what_cannot_be_a_stage_is_refused(tmp_path):
    (found,) = processes.run(wrapped, 1, tmp_path)
    assert "module cannot be trained in microbatches, got FSDPLinear '0'" in found["fsdp"]
    assert "got DistributedDataParallel '0': a DistributedDataParallel must be" in found["inner"]
    assert "got a DistributedDataParallel: find_unused_parameters" in found["loose"]
    assert "module must hold no DFA" in found["dfa"]
    assert "detach() another attachment or stage first" in found["twice"]
    assert "loss must be given on the last stage, got None" in found["loss"]
    assert "send must be 'error', 'signals' or None, got 'both'" in found["send"]
    assert "microbatches must be" in found["microbatches"]
    assert "FeedbackStage: points must be submodules of the model, got '1'" in found["points"]
    assert "module must be a module, got function" in found["module"]


def test_a_group_is_needed():
    with pytest.raises(RuntimeError, match=r"FeedbackStage: torch.distributed must be initialized"):
        FeedbackStage(nn.Linear(4, 4), 1, cross_entropy)
