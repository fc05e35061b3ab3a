"""sae_kernels.torch against autograd of the formulas in float64."""

import contextlib
import dataclasses
import types

import formulas
import pytest
import torch

import sae_kernels
from sae_kernels import torch as saek

# Fewer rows than latents and more, and around the edges of register tiles.
SHAPES = [(2, 1, 1), (5, 3, 1), (9, 20, 40), (33, 7, 64), (128, 20, 64), (130, 64, 33), (300, 100, 17)]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
WEIGHTS = {"lambda_lse": 0.75, "lambda_var": 0.5, "lambda_tc": 0.25, "lambda_wr": 0.125, "variance_eps": 1e-4}


def bar(dtype):
    """Relative error of sums of hundreds of terms, and of two roundings to storage."""
    return {torch.float32: 2e-5, torch.float64: 1e-12}.get(dtype, 4 * torch.finfo(dtype).eps)


def relative(found, truth):
    found, truth = found.detach().double(), truth.detach().double()
    scale = truth.norm().item()
    return (found - truth).norm().item() / (scale if scale > 0 else 1.0)


def random(*shape, dtype=torch.float32, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed + 7 * sum(shape))
    return (scale * torch.randn(*shape, generator=generator, dtype=torch.float64)).to(dtype)


@pytest.fixture(params=DTYPES, ids=str)
def dtype(request):
    return request.param


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("relu", [False, True])
def test_losses_of_activations(shape, relu, dtype):
    n, _, h = shape
    a = random(n, h, dtype=dtype)
    a = (torch.relu(a) if relu else a).requires_grad_()
    # With one latent nothing is correlated.
    losses = [(lambda a: saek.lse_loss(a)[0], formulas.lse), (saek.variance_loss, formulas.var)]
    losses += [(saek.correlation_loss, formulas.tc)] if h > 1 else []
    for loss, formula in losses:
        found = loss(a)
        truth, (grad,) = formulas.gradients(formula, a)
        assert found.dtype == dtype and found.shape == () and found.requires_grad
        assert relative(found, truth) < bar(dtype)
        (found_grad,) = torch.autograd.grad(3 * found, a)
        # Where a column has no variance, the formula's gradient is NaN but for PyTorch's convention for std.
        assert found_grad.dtype == dtype and found_grad.shape == a.shape
        assert relative(found_grad, 3 * torch.nan_to_num(grad)) < bar(dtype)


def test_one_latent_is_not_correlated(dtype):
    a = random(9, 1, dtype=dtype).requires_grad_()
    loss = saek.correlation_loss(a)
    loss.backward()
    assert loss.item() == 0 and (a.grad == 0).all()


@pytest.mark.parametrize("shape", [(5, 9), (40, 9), (1, 9), (3, 1)])
def test_responsibilities(shape, dtype):
    a = random(*shape, dtype=dtype, scale=3.0).requires_grad_()
    loss, r = saek.lse_loss(a)
    assert r.shape == a.shape and r.dtype == dtype
    assert relative(r, torch.softmax(-a.double(), 1)) < bar(dtype)
    assert relative(r.double().sum(1), torch.ones(len(a))) < bar(dtype)
    loss.backward()
    assert torch.equal(a.grad, r)
    # r is differentiable too.
    c = random(*shape, dtype=dtype, seed=5)
    (grad,) = torch.autograd.grad((saek.lse_loss(a)[1] * c).sum(), a)
    _, (truth,) = formulas.gradients(lambda a: (torch.softmax(-a, 1) * c.double()).sum(), a)
    scale = max(truth.norm().item(), c.double().norm().item())
    assert (grad.double() - truth).norm().item() < bar(dtype) * scale


@pytest.mark.parametrize("scale", [30.0, 1000.0])
def test_activations_far_from_0(scale):
    a = random(40, 30, scale=scale)
    loss, r = saek.lse_loss(a)
    truth, _ = formulas.gradients(formulas.lse, a)
    assert relative(loss, truth) < 1e-6
    # ℓ is rounded to float32 before r = exp(ℓ − a).
    rounding = 4 * 2.0**-24 * (1 + a.abs().max().item())
    assert (r.double() - torch.softmax(-a.double(), 1)).abs().max().item() < rounding
    for a in (a + 1e4, a.sign() * 1e30):
        assert torch.isfinite(saek.lse_loss(a)[0]) and torch.isfinite(saek.lse_loss(a)[1]).all()


@pytest.mark.parametrize("shape", SHAPES[2:])
def test_weight_redundancy(shape, dtype):
    _, d, h = shape
    W = random(h, d, dtype=dtype).requires_grad_()
    loss = saek.weight_redundancy_loss(W)
    truth, (grad,) = formulas.gradients(formulas.wr, W)
    assert loss.dtype == dtype and relative(loss, truth) < bar(dtype)
    loss.backward()
    assert W.grad.dtype == dtype and relative(W.grad, grad) < bar(dtype)
    orthogonal = torch.linalg.qr(random(20, 20, dtype=torch.float64))[0].to(dtype)
    assert saek.weight_redundancy_loss(orthogonal).item() < 20 * bar(dtype)


@pytest.mark.parametrize("shape", SHAPES[2:])
@pytest.mark.parametrize("config", [None, {}, WEIGHTS, {"lambda_var": 0.0, "lambda_wr": 2.0}, {"lambda_lse": 0, "lambda_tc": 0}])
def test_combined_loss(shape, config, dtype):
    n, d, h = shape
    a, W = random(n, h, dtype=dtype).requires_grad_(), random(h, d, dtype=dtype).requires_grad_()
    found = saek.combined_loss(a, W, config)
    truth, (grad_a, grad_W) = formulas.gradients(lambda a, W: formulas.total(a, W, **(config or {})), a, W)
    eps = (config or {}).get("variance_eps", 1e-6)
    terms = {"lse": formulas.lse(a.double()), "var": formulas.var(a.double(), eps), "tc": formulas.tc(a.double())}
    terms.update(total=truth, wr=formulas.wr(W.double()), responsibilities=torch.softmax(-a.double(), 1))
    assert found.keys() == terms.keys()
    for name, truth in terms.items():
        assert found[name].dtype == dtype and found[name].requires_grad == (name == "total"), name
        scale = sum(t.abs().item() for key, t in terms.items() if key in ("lse", "var", "tc", "wr"))
        allowed = bar(dtype) * (scale if name == "total" else truth.norm().item())
        assert (found[name].double() - truth).norm().item() <= allowed, name
    found["total"].backward()
    assert relative(a.grad, grad_a) < bar(dtype)
    if (config or {}).get("lambda_wr"):
        assert relative(W.grad, grad_W) < bar(dtype)
    else:
        assert W.grad is None or (W.grad == 0).all()


def test_configurations():
    a, W = random(20, 8), random(8, 5)

    @dataclasses.dataclass
    class Config:
        lambda_var: float = 0.5
        variance_eps: float = 1e-3
        learning_rate: float = 1.0

    expected = saek.combined_loss(a, W, {"lambda_var": 0.5, "variance_eps": 1e-3})["total"]
    for config in (Config(), types.SimpleNamespace(lambda_var=0.5, variance_eps=1e-3), {"lambda_var": 0.5, "variance_eps": 1e-3, "other": 1}):
        assert torch.equal(saek.combined_loss(a, W, config)["total"], expected)
    mean = saek.combined_loss(a, W, {"reduction": "mean", "lambda_var": 0.0, "lambda_tc": 0.0})
    assert torch.allclose(mean["total"], saek.lse_loss(a)[0] / 20)
    for config, error in [
        ({"lambda_lse": float("nan")}, ValueError),
        ({"variance_eps": 0.0}, ValueError),
        ({"reduction": "max"}, ValueError),
        ([1.0], TypeError),
        (1.0, TypeError),
        ({"lambda_lse": "one"}, ValueError),
    ]:
        with pytest.raises(error):
            saek.combined_loss(a, W, config)


@pytest.mark.parametrize("n", [2, 3, 7])
def test_gradcheck(n):
    a, W = random(n, 5, dtype=torch.float64).requires_grad_(), random(5, 3, dtype=torch.float64).requires_grad_()
    x, b = random(n, 3, dtype=torch.float64, seed=9).requires_grad_(), random(5, dtype=torch.float64).requires_grad_()
    config = {**WEIGHTS, "variance_eps": 1e-2}
    functions = [
        (saek.lse_loss, (a,)),
        (lambda a: saek.variance_loss(a, 1e-2), (a,)),
        (saek.correlation_loss, (a,)),
        (saek.weight_redundancy_loss, (W,)),
        (lambda a, W: saek.combined_loss(a, W, config)["total"], (a, W)),
        (saek.encode_lse, (x, W, b)),
        (lambda x, W, b: saek.decoder_free_loss(x, W, b, config)["total"], (x, W, b)),
    ]
    # With two rows every correlation is 1 or −1, and its gradient 0: compared by its difference.
    for function, inputs in functions:
        assert torch.autograd.gradcheck(function, inputs, atol=1e-6)
    for function, inputs in functions[0], functions[5]:
        assert torch.autograd.gradgradcheck(function, inputs, atol=1e-6)


def test_second_derivatives_are_refused():
    a, W = random(6, 5).requires_grad_(), random(5, 3).requires_grad_()
    x, b = random(6, 3), random(5)
    for loss in [
        lambda: saek.variance_loss(a),
        lambda: saek.correlation_loss(a),
        lambda: saek.weight_redundancy_loss(W),
        lambda: saek.combined_loss(a, W, None)["total"],
        lambda: saek.decoder_free_loss(x, W, b)["total"],
    ]:
        grads = torch.autograd.grad(loss(), [a, W], create_graph=True, allow_unused=True)
        with pytest.raises(RuntimeError, match="second derivatives"):
            sum(grad.sum() for grad in grads if grad is not None).backward()


@pytest.mark.parametrize("shape", SHAPES)
def test_the_step_with_its_encoder(shape, dtype):
    n, d, h = shape
    x, W = random(n, d, dtype=dtype).requires_grad_(), random(h, d, dtype=dtype, seed=1).requires_grad_()
    b = (2 + random(h, dtype=torch.float64, seed=2)).to(dtype).requires_grad_()
    found = saek.decoder_free_loss(x, W, b, WEIGHTS)
    # The same rounding of the activations, and the same mask.
    a = found["activations"]
    mask = a.double() > 0

    def formula(x, W, b):
        z = x @ W.T + b
        stored = z + (a.double() - z).detach()
        return formulas.total(torch.where(mask, stored, torch.zeros(())), W, **WEIGHTS)

    truth, grads = formulas.gradients(formula, x, W, b)
    assert relative(a, torch.relu(x.double() @ W.double().T + b.double())) < bar(dtype)
    assert relative(found["row_loss"], -torch.logsumexp(-a.double(), 1)) < bar(dtype)
    terms = sum(abs(WEIGHTS["lambda_" + term] * found[term].item()) for term in ("lse", "var", "tc", "wr"))
    assert abs(found["total"].item() - truth.item()) < bar(dtype) * terms
    found["total"].backward()
    for name, tensor, grad in zip("xWb", (x, W, b), grads):
        assert tensor.grad.dtype == dtype
        assert relative(tensor.grad, torch.nan_to_num(grad)) < 4 * bar(dtype), name
    # Without gradients, and with some of them only.
    with torch.no_grad():
        assert torch.equal(saek.decoder_free_loss(x, W, b, WEIGHTS)["total"], found["total"])
    only = saek.decoder_free_loss(x.detach(), W, b.detach(), WEIGHTS)["total"]
    assert torch.equal(torch.autograd.grad(only, W)[0], W.grad)


@pytest.mark.parametrize("shape", [(1, 3, 4), (9, 20, 40), (70, 17, 33)])
def test_encode_lse(shape, dtype):
    n, d, h = shape
    x, W, b = (random(*s, dtype=dtype, seed=i).requires_grad_() for i, s in enumerate([(n, d), (h, d), (h,)]))
    a, row_loss = saek.encode_lse(x, W, b)
    mask = a.double() > 0
    c, e = random(n, h, dtype=torch.float64, seed=5), random(n, dtype=torch.float64, seed=6)

    def formula(x, W, b):
        z = torch.where(mask, x @ W.T + b, torch.zeros(()))
        return (z * c).sum() - (torch.logsumexp(-z, 1) * e).sum()

    _, grads = formulas.gradients(formula, x, W, b)
    found = torch.autograd.grad((a * c.to(dtype)).sum() + (row_loss * e.to(dtype)).sum(), [x, W, b])
    for name, grad, truth in zip("xWb", found, grads):
        assert grad.dtype == dtype and relative(grad, truth) < 4 * bar(dtype), name


def test_large_activations_in_16_bits(dtype):
    """Row losses near 100 are known to 0.25 in bfloat16, and responsibilities all the same to its 8 bits."""
    x, W, b = torch.eye(8, 4).to(dtype), random(16, 4, dtype=dtype), torch.full((16,), 100.0, dtype=dtype)
    _, row_loss = saek.encode_lse(x, W, b.requires_grad_())
    (grad,) = torch.autograd.grad(row_loss.sum(), b)
    a = saek.encode_lse(x, W, b)[0].detach().double()
    assert relative(grad, torch.softmax(-a, 1).sum(0)) < bar(dtype)


def test_a_scaled_loss_keeps_small_gradients():
    """A dW below what float16 holds, times the scale that a training loop undoes."""
    scale = 2.0**14
    x, W, b = random(64, 9, dtype=torch.float16, scale=1e-4), random(12, 9, dtype=torch.float16), torch.ones(12, dtype=torch.float16)
    config = {"lambda_lse": 1.0, "lambda_var": 0.0, "lambda_tc": 0.0, "reduction": "mean"}
    x, W, b = (t.requires_grad_() for t in (x, W, b))
    found = torch.autograd.grad(scale * saek.decoder_free_loss(x, W, b, config)["total"], [x, W, b])

    def formula(x, W, b):
        return -torch.logsumexp(-torch.relu(x @ W.T + b), 1).mean()

    _, grads = formulas.gradients(formula, x, W, b)
    for name, grad, truth in zip("xWb", found, grads):
        assert relative(grad, scale * truth) < 4 * bar(torch.float16), name


def test_behind_a_layer_the_loss_falls():
    torch.manual_seed(0)
    layer = torch.nn.Linear(20, 16)
    x = torch.rand(64, 20)
    optimizer = torch.optim.Adam(layer.parameters(), lr=1e-2)
    losses = []
    for _ in range(30):
        loss = saek.combined_loss(torch.relu(layer(x)), layer.weight, {"lambda_wr": 0.1})["total"]
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in layer.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 1


def test_both_ways_through_a_layer_agree():
    layer = torch.nn.Linear(20, 40, dtype=torch.float64)
    x = random(30, 20, dtype=torch.float64)
    apart = saek.combined_loss(torch.relu(layer(x)), layer.weight, WEIGHTS)["total"]
    fused = saek.decoder_free_loss(x, layer.weight, layer.bias, WEIGHTS)["total"]
    assert torch.allclose(apart, fused, rtol=1e-12)
    parameters = list(layer.parameters())
    for one, other in zip(torch.autograd.grad(apart, parameters), torch.autograd.grad(fused, parameters)):
        assert relative(one, other) < 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_dead_columns(dtype):
    for n in (6, 40):
        a = random(n, 12, dtype=dtype)
        a[:, 1], a[:, 5], a[:, 11] = 0.0, 2.5, -1.0
        a.requires_grad_()
        loss = saek.variance_loss(a) + saek.correlation_loss(a)
        loss.backward()
        assert torch.isfinite(loss) and torch.isfinite(a.grad).all()
        assert (a.grad[:, [1, 5, 11]] == 0).all() and (a.grad[:, 0] != 0).any()
        truth, _ = formulas.gradients(lambda a: formulas.var(a) + formulas.tc(a), a)
        assert relative(loss, truth) < bar(dtype)
    zero = torch.zeros(8, 4, dtype=dtype, requires_grad=True)
    total = saek.combined_loss(zero, random(4, 3, dtype=dtype), None)["total"]
    total.backward()
    assert torch.isfinite(total) and torch.allclose(zero.grad, torch.full_like(zero, 0.25))


def layouts(matrix):
    """The same numbers, lying in other ways."""
    n, cols = matrix.shape
    wide = torch.full((n, cols + 5), float("nan"), dtype=matrix.dtype)
    wide[:, 2 : 2 + cols] = matrix
    yield "strided rows", wide[:, 2 : 2 + cols]
    yield "transposed", matrix.T.contiguous().T
    every = torch.full((2 * n, 2 * cols), float("nan"), dtype=matrix.dtype)
    every[::2, ::2] = matrix
    yield "every other", every[::2, ::2]
    yield "backwards", matrix.flip(0).flip(0)
    yield "a negation", torch._neg_view(-matrix)


def test_tensors_that_are_not_contiguous(dtype):
    n, d, h = 17, 9, 21
    a, W, x, b = random(n, h, dtype=dtype), random(h, d, dtype=dtype), random(n, d, dtype=dtype), random(h, dtype=dtype)

    def results(a, W, x, b):
        a, W, x, b = (t.detach().requires_grad_() for t in (a, W, x, b))
        combined, fused = saek.combined_loss(a, W, WEIGHTS)["total"], saek.decoder_free_loss(x, W, b, WEIGHTS)["total"]
        return combined, fused, *torch.autograd.grad(combined, [a, W]), *torch.autograd.grad(fused, [x, W, b])

    expected = results(a, W, x, b)
    for which, tensor in enumerate((a, W, x)):
        for name, other in layouts(tensor):
            given = [a, W, x, b]
            given[which] = other
            for found, truth in zip(results(*given), expected):
                assert torch.equal(found, truth), f"{name} for {'aWx'[which]}"
    row = a[:1].expand(n, h)
    assert torch.equal(saek.lse_loss(row)[1], saek.lse_loss(row.contiguous())[1])


def test_rows_are_read_where_they_lie():
    wide = random(10, 30)
    a = wide[:, 3:20]
    matrix, stride = saek._rows(a)
    assert matrix.data_ptr() == a.data_ptr() and stride == 30


def test_wrong_tensors_are_refused():
    a, W, x, b = random(6, 5), random(5, 3), random(6, 3), random(5)
    for call, error, text in [
        (lambda: saek.lse_loss([[1.0]]), TypeError, "as_tensor"),
        (lambda: saek.lse_loss(a.int()), TypeError, r"a\.float\(\)"),
        (lambda: saek.lse_loss(a.to(torch.complex64)), TypeError, "complex64"),
        (lambda: saek.lse_loss(a.to_sparse()), TypeError, "to_dense"),
        (lambda: saek.lse_loss(a.to("meta")), ValueError, r"on meta.*a\.cpu\(\)"),
        (lambda: saek.lse_loss(a[0]), ValueError, r"\(5,\).*matrix"),
        (lambda: saek.lse_loss(a[None]), ValueError, r"\(1, 6, 5\)"),
        (lambda: saek.lse_loss(a[:, :0]), ValueError, "latent"),
        (lambda: saek.variance_loss(a[:1]), ValueError, "row"),
        (lambda: saek.correlation_loss(a[:0]), ValueError, "row"),
        (lambda: saek.variance_loss(a, 0.0), ValueError, "variance_eps"),
        (lambda: saek.weight_redundancy_loss(b), ValueError, r"W has shape \(5,\)"),
        (lambda: saek.combined_loss(a, W[:4], None), ValueError, r"\(4, 3\).*\(5, 3\)"),
        (lambda: saek.combined_loss(a, W.double(), None), TypeError, "float64.*float32"),
        (lambda: saek.combined_loss(a, None, None), TypeError, "W is a NoneType"),
        (lambda: saek.encode_lse(x, W[:, :2], b), ValueError, "weight"),
        (lambda: saek.encode_lse(x, W, b[:4]), ValueError, "bias"),
        (lambda: saek.encode_lse(x, W, b.double()), TypeError, "bias"),
        (lambda: saek.decoder_free_loss(x.to("meta"), W, b), ValueError, "x.cpu"),
        (lambda: saek.combined_loss(a, W.to("meta"), None), ValueError, "W.cpu"),
        (lambda: saek.decoder_free_loss(x[:1], W, b), ValueError, "row"),
    ]:
        with pytest.raises(error, match=text):
            call()
    # One row is enough for the log-sum-exp alone, and none gives 0.
    assert saek.lse_loss(a[:1])[1].shape == (1, 5)
    assert saek.lse_loss(a[:0])[0].item() == 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_cuda_tensors_are_as_those_of_the_cpu(dtype):
    x, W, b = random(33, 20, dtype=dtype), random(40, 20, dtype=dtype, seed=1), 2 + random(40, dtype=dtype, seed=2)

    def results(*inputs):
        inputs = [tensor.requires_grad_() for tensor in inputs]
        loss = saek.decoder_free_loss(*inputs, WEIGHTS)["total"]
        given = saek.combined_loss(torch.relu(inputs[0] @ inputs[1].T + inputs[2]), inputs[1], WEIGHTS)["total"]
        return loss, given, *torch.autograd.grad(loss, inputs)

    expected = results(x, W, b)
    try:
        found = results(*(tensor.detach().cuda() for tensor in (x, W, b)))
    except RuntimeError as error:
        if "built without CUDA" not in str(error):
            raise
        pytest.skip(str(error))
    for one, other in zip(found, expected):
        assert one.is_cuda and relative(one.cpu(), other) < 4 * bar(dtype)
    with pytest.raises(TypeError, match="float64"):
        saek.lse_loss(random(6, 5, dtype=torch.float64).cuda())
    with pytest.raises(ValueError, match="same device"):
        saek.combined_loss(random(6, 5).cuda(), random(5, 3), None)


def test_a_context_for_each_device_and_stream(monkeypatch):
    """With a library that only notes what it is asked for: no device is needed."""
    made, used = [], []

    class Fake:
        def saek_context_create_cuda(self, device, stream, out):
            made.append((device, stream))
            out._obj.value = 100 + len(made)
            return 0

        def saek_activation_losses_f32(self, context, *arguments):
            used.append(context.value)
            return 0

    class Device(contextlib.nullcontext):
        current = None

        def __init__(self, device):
            super().__init__()
            Device.current = device

    streams = {0: 7, 1: 0}
    monkeypatch.setattr(sae_kernels._library, "_library", Fake())
    monkeypatch.setattr(sae_kernels._library, "_contexts", {})
    monkeypatch.setattr(torch.cuda, "device", Device)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: types.SimpleNamespace(cuda_stream=streams[Device.current.index]))

    def call(index):
        like = types.SimpleNamespace(device=torch.device("cuda", index))
        saek._library_call("activation_losses", "f32", sae_kernels._library.objective(), (1, 1, 1), like, *[None] * 7)

    for index in (0, 1, 0):
        call(index)
    streams[0] = 8
    call(0)
    assert made == [(0, 7), (1, 0), (0, 8)]
    assert used == [101, 102, 101, 103]


def test_a_library_without_cuda_says_how_to_build_one():
    # Whatever the library is built with, there is no such device.
    with pytest.raises(RuntimeError, match="SAE_KERNELS_FEATURES=cuda pip install|no NVIDIA driver|no CUDA device|kernels were not built"):
        sae_kernels._library._context("cuda", 2**31 - 1, 0)


def test_nan_is_not_hidden():
    a = random(6, 5)
    a[2, 3] = float("nan")
    loss, r = saek.lse_loss(a)
    assert loss.isnan() and r[2].isnan().all() and torch.isfinite(r[[0, 1, 3, 4, 5]]).all()
    assert saek.variance_loss(a).isnan() and saek.correlation_loss(a).isnan()


def test_threads_are_of_no_consequence():
    x, W, b = random(700, 300), random(200, 300), random(200)
    results = []
    try:
        for threads in (1, 2, 3):
            sae_kernels.set_num_threads(threads)
            results.append(saek.decoder_free_loss(x, W, b, WEIGHTS))
    finally:
        sae_kernels.set_num_threads(0)
    for other in results[1:]:
        assert all(torch.equal(other[name], results[0][name]) for name in other)
    with pytest.raises(ValueError, match="threads"):
        sae_kernels.set_num_threads(-1)
