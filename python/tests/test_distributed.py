"""sae_kernels.distributed over two and three processes, against one process and against autograd of the formulas in float64."""

import datetime
import functools
import multiprocessing
import re
import sys
import traceback

import formulas
import pytest
import torch
import torch.distributed as dist
from test_torch import bar, random, relative

import sae_kernels
from sae_kernels import distributed
from sae_kernels import torch as saek

ROWS, INPUTS, LATENTS = 130, 20, 33
SECONDS = 120
# Rows of each rank, by the number of ranks; ranks without rows stand first, in the middle and last.
SHARDS = {2: [(65, 65), (129, 1), (0, 130), (130, 0)], 3: [(60, 40, 30), (127, 0, 3), (0, 130, 0)]}
WEIGHTS = {"lambda_lse": 0.75, "lambda_var": 0.5, "lambda_tc": 0.25, "lambda_wr": 0.125, "variance_eps": 1e-4}
OBJECTIVES = {"paper": {}, "weights": WEIGHTS, "mean": {**WEIGHTS, "reduction": "mean"}, "lse": {"lambda_var": 0.0, "lambda_tc": 0.0}}
NAMES = ("total", "lse", "var", "tc", "wr", "grad_weight", "grad_bias")


def batch(dtype=torch.float32):
    # Far from 0 beside its deviation, as features are.
    x = random(ROWS, INPUTS, dtype=dtype) + 1.0
    return x, random(LATENTS, INPUTS, dtype=dtype, scale=0.3), random(LATENTS, dtype=dtype, scale=0.1)


def shard(counts, rank, dtype=torch.float32):
    x, weight, bias = batch(dtype)
    return x.split(counts)[rank], weight, bias


def fails(*_, **__):
    raise MemoryError("no memory on this rank")


def wrong_calls(rank, world):
    """Calls that must raise on all ranks: wrong on rank 1 alone, or only together."""
    x, weight, bias = shard(SHARDS[world][0], rank)
    other = rank == 1
    yield "inputs", (x[:, 1:], weight[:, 1:], bias) if other else (x, weight, bias), {}
    yield "latents", (x, weight[1:], bias[1:]) if other else (x, weight, bias), {}
    yield "type", (x.bfloat16(), weight.bfloat16(), bias) if other else (x, weight, bias), {}
    yield "objective", (x, weight, bias), {"config": {"lambda_tc": 2.0} if other else {}}
    yield "misfit", (x[:, 1:] if other else x, weight, bias), {}
    yield "no tensor", (x.tolist() if other else x, weight, bias), {}
    yield "float64", (x.double(), weight.double(), bias.double()), {}
    yield "few rows", (x[: int(other)], weight, bias), {}


def failing_calls(rank, world):
    """Calls in which a half of the step fails on rank 1."""
    for half in ("batch_statistics", "sharded_backward"):
        function = getattr(distributed, half)
        if rank == 1:
            setattr(distributed, half, fails)
        yield half, shard(SHARDS[world][0], rank), {}
        setattr(distributed, half, function)


def rank_main(rank, world, folder):
    """All calls of one rank; what they gave goes to a file, and a rank that ends otherwise leaves none."""
    torch.set_num_threads(1)
    sae_kernels.set_num_threads(1)
    limit = datetime.timedelta(seconds=SECONDS / 2)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world, timeout=limit)
    found = {}
    for calls in (wrong_calls, failing_calls):
        for name, arguments, named in calls(rank, world):
            try:
                distributed.decoder_free_step(*arguments, **named)
                found[name] = None
            except Exception as error:
                found[name] = type(error).__name__, str(error)
    # After all that, the ranks are still in step.
    for counts in SHARDS[world]:
        for name, config in OBJECTIVES.items():
            found[counts, name, torch.float32] = distributed.decoder_free_step(*shard(counts, rank), config)
        for dtype in (torch.bfloat16, torch.float16):
            found[counts, "weights", dtype] = distributed.decoder_free_step(*shard(counts, rank, dtype), WEIGHTS)
    if world == 3:
        # A group in which no rank has the number that it has among all.
        group = dist.new_group([2, 1])
        try:
            found["group"] = distributed.decoder_free_step(*shard((0, 40, 90), rank), WEIGHTS, group)
        except ValueError as error:
            found["group"] = type(error).__name__, str(error)
    torch.save(found, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def rank_or_trace(*arguments):
    try:
        rank_main(*arguments)
    except BaseException:
        traceback.print_exc()
        sys.exit(1)


@pytest.fixture(scope="module", params=[2, 3])
def world(request, tmp_path_factory):
    """What each rank found; no rank outlives its time."""
    folder = tmp_path_factory.mktemp("ranks")
    context = multiprocessing.get_context("spawn")
    ranks = [context.Process(target=rank_or_trace, args=(rank, request.param, str(folder)), daemon=True) for rank in range(request.param)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(SECONDS)
    late = [process for process in ranks if process.is_alive()]
    for process in late:
        process.kill()
    assert not late, "ranks wait for each other"
    assert [process.exitcode for process in ranks] == [0] * request.param
    return [torch.load(folder / f"{rank}.pt") for rank in range(request.param)]


@functools.lru_cache(None)
def truth(name):
    """Losses and gradients of the whole batch, in float64."""
    config = dict(OBJECTIVES[name])
    mean = config.pop("reduction", "sum") == "mean"
    config["lambda_lse"] = config.get("lambda_lse", 1.0) / (ROWS if mean else 1)

    def loss(x, weight, bias):
        return formulas.total(torch.relu(x @ weight.T + bias), weight, **config)

    total, (_, grad_weight, grad_bias) = formulas.gradients(loss, *batch())
    return {"total": total, "grad_weight": grad_weight, "grad_bias": grad_bias}


def one_process(name, dtype=torch.float32):
    x, weight, bias = (tensor.requires_grad_() for tensor in batch(dtype))
    step = saek.decoder_free_loss(x, weight, bias, OBJECTIVES[name])
    step["total"].backward()
    return {**step, "grad_weight": weight.grad, "grad_bias": bias.grad}


def assert_same(found, expected, limit):
    for key in NAMES:
        if key in expected:
            assert relative(found[key], expected[key]) < limit, key


@pytest.mark.parametrize("name", OBJECTIVES)
def test_as_one_process(world, name):
    expected = one_process(name)
    for counts in SHARDS[len(world)]:
        for found in world:
            found = found[counts, name, torch.float32]
            assert set(found) == set(NAMES) and all(found[key].dtype == torch.float32 for key in NAMES)
            assert_same(found, truth(name), bar(torch.float32))
            assert_same(found, expected, bar(torch.float32))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_storage_of_16_bits(world, dtype):
    for counts in SHARDS[len(world)]:
        for found in world:
            assert_same(found[counts, "weights", dtype], one_process("weights", dtype), bar(dtype))


def test_all_ranks_have_the_same_bits(world):
    for key, first in world[0].items():
        if key != "group" and isinstance(first, dict):
            for found in world[1:]:
                assert all(torch.equal(first[name], found[key][name]) for name in NAMES), key


WRONG = {
    "inputs": r"D = 19.*D = 20",
    "latents": r"H = 32.*H = 33",
    "type": "bfloat16 on cpu.*float32 on cpu",
    "objective": "lambda_tc = 2.0.*lambda_tc = 1.0",
    "misfit": "rank 1 refused its arguments",
    "no tensor": "rank 1 refused its arguments",
    "float64": "use x.float",
    "few rows": "row",
}
OWN = {"misfit": ("ValueError", "weight has shape"), "no tensor": ("TypeError", "use torch.as_tensor")}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_on_one_rank_raises_on_all(world, name):
    for rank, found in enumerate(world):
        default = ("TypeError" if name == "float64" else "ValueError", WRONG[name])
        kind, text = OWN.get(name, default) if rank == 1 else default
        assert found[name] is not None, f"rank {rank} saw nothing"
        assert found[name][0] == kind and re.search(text, found[name][1]), found[name]


@pytest.mark.parametrize("half", ["batch_statistics", "sharded_backward"])
def test_a_rank_that_fails_is_no_hang(world, half):
    for rank, found in enumerate(world):
        kind, text = ("MemoryError", "no memory on this rank") if rank == 1 else ("RuntimeError", "another rank failed")
        assert found[half][0] == kind and text in found[half][1]


def test_of_a_group(world):
    if len(world) < 3:
        pytest.skip("two ranks have no smaller group")
    assert world[0]["group"][0] == "ValueError" and "not in the group" in world[0]["group"][1]
    for found in world[1:]:
        assert_same(found["group"], truth("weights"), bar(torch.float32))


def test_blocks_of_one_process():
    """The two halves by themselves, with a shift and into buffers that are there."""
    x, weight, bias = batch()
    shift = torch.relu(x @ weight.T + bias).mean(0)
    blocks = x.split((40, 0, 1, 89))
    statistics = None
    for block in blocks:
        statistics = saek.batch_statistics(block, weight, bias, shift, add_to=statistics)
    assert statistics.dtype == torch.float64 and statistics[0] == ROWS
    assert statistics.shape == (2 + LATENTS + LATENTS * (LATENTS + 1) // 2,)
    gradients = torch.ones(LATENTS, INPUTS), torch.ones(LATENTS)
    for first, block in enumerate(blocks):
        found = saek.sharded_backward(block, weight, bias, statistics, WEIGHTS, shift, add_weight_term=first == 0, add_to=gradients)
    assert found["grad_weight"] is gradients[0] and found["grad_bias"] is gradients[1]
    assert_same({**found, "grad_weight": gradients[0] - 1, "grad_bias": gradients[1] - 1}, truth("weights"), bar(torch.float32))


def test_statistics_are_the_sums_they_say():
    x, weight, bias = batch()
    a = torch.relu(x.double() @ weight.double().T + bias.double())
    c = random(LATENTS)
    centred = a - c.double()
    upper = torch.triu_indices(LATENTS, LATENTS)
    products = (centred.T @ centred)[upper[0], upper[1]]
    expected = torch.cat([torch.tensor([ROWS, formulas.lse(a)]).double(), centred.sum(0), products])
    assert relative(saek.batch_statistics(x, weight, bias, c), expected) < bar(torch.float32)


def test_halves_refuse_what_does_not_fit():
    x, weight, bias = batch()
    statistics = saek.batch_statistics(x, weight, bias)
    with pytest.raises(TypeError, match="use x.float"):
        saek.batch_statistics(x.double(), weight.double(), bias.double())
    with pytest.raises(ValueError, match="shift has shape"):
        saek.batch_statistics(x, weight, bias, torch.zeros(LATENTS + 1))
    with pytest.raises(TypeError, match="add_to is torch.float32"):
        saek.batch_statistics(x, weight, bias, add_to=statistics.float())
    with pytest.raises(ValueError, match="statistics has shape"):
        saek.sharded_backward(x, weight, bias, statistics[1:])
    with pytest.raises(ValueError, match="must be dense"):
        saek.sharded_backward(x, weight, bias, statistics.repeat_interleave(2)[::2])
    with pytest.raises(ValueError, match="number of rows"):
        saek.sharded_backward(x, weight, bias, statistics / 2)
    with pytest.raises(ValueError, match="grad_bias has shape"):
        saek.sharded_backward(x, weight, bias, statistics, add_to=(torch.zeros(LATENTS, INPUTS), torch.zeros(1)))


def test_without_a_group_the_error_names_the_fix():
    with pytest.raises(ValueError, match="init_process_group"):
        distributed.decoder_free_step(*batch())
