"""sae_kernels on NumPy arrays against the formulas."""

import multiprocessing

import formulas
import numpy as np
import pytest
import torch

import sae_kernels

BAR = {"float32": 2e-5, "float64": 1e-12, "float16": 4e-3}
WEIGHTS = {"lambda_lse": 0.75, "lambda_var": 0.5, "lambda_tc": 0.25, "lambda_wr": 0.125, "variance_eps": 1e-4}


def random(*shape, dtype="float32", seed=0):
    return np.random.default_rng(seed + sum(shape)).standard_normal(shape).astype(dtype)


def relative(found, truth):
    truth = np.asarray(truth, np.float64)
    return np.linalg.norm(np.asarray(found, np.float64) - truth) / np.linalg.norm(truth)


@pytest.mark.parametrize("dtype", BAR)
@pytest.mark.parametrize("shape", [(9, 20, 40), (70, 17, 33)])
def test_activation_losses(shape, dtype):
    n, d, h = shape
    a, W = random(n, h, dtype=dtype), random(h, d, dtype=dtype)
    found = sae_kernels.activation_losses(a, W, WEIGHTS)
    truth, (grad_a, grad_W) = formulas.gradients(lambda a, W: formulas.total(a, W, **WEIGHTS), *map(torch.from_numpy, (a, W)))
    wide = torch.from_numpy(a).double()
    assert abs(found.total - truth.item()) < BAR[dtype] * (abs(found.lse) + abs(found.var) + abs(found.tc) + abs(found.wr))
    assert relative(found.responsibilities, torch.softmax(-wide, 1)) < BAR[dtype]
    assert relative(found.row_loss, -torch.logsumexp(-wide, 1)) < BAR[dtype]
    assert relative(found.grad_activations, grad_a) < BAR[dtype] and relative(found.grad_weight, grad_W) < BAR[dtype]
    without = sae_kernels.activation_losses(a)
    assert without.grad_weight is None and without.wr == 0 and without.lse == found.lse
    with pytest.raises(ValueError, match="lambda_wr"):
        sae_kernels.activation_losses(a, config=WEIGHTS)


@pytest.mark.parametrize("dtype", BAR)
def test_step_and_encoder(dtype):
    n, d, h = 70, 17, 33
    x, W, b = random(n, d, dtype=dtype), random(h, d, dtype=dtype), random(h, dtype=dtype)
    found = sae_kernels.decoder_free_step(x, W, b, WEIGHTS)
    a, row_loss = sae_kernels.encode_lse(x, W, b)
    assert np.array_equal(a, found.activations) and np.array_equal(row_loss, found.row_loss) and a.dtype == dtype
    stored, mask = torch.from_numpy(a).double(), torch.from_numpy(a > 0)

    def formula(x, W, b):
        z = x @ W.T + b
        return formulas.total(torch.where(mask, z + (stored - z).detach(), torch.zeros(())), W, **WEIGHTS)

    truth, grads = formulas.gradients(formula, *map(torch.from_numpy, (x, W, b)))
    assert abs(found.total - truth.item()) < BAR[dtype] * (abs(found.lse) + abs(found.var) + abs(found.tc) + abs(found.wr))
    for name, grad in zip(("grad_x", "grad_weight", "grad_bias"), grads):
        assert relative(getattr(found, name), grad) < 4 * BAR[dtype], name


def test_arrays_in_any_layout():
    a, W = random(12, 7), random(7, 5)
    expected = sae_kernels.activation_losses(a, W, WEIGHTS)
    wide = np.full((12, 20), np.nan, np.float32)
    wide[:, 4:11] = a
    unaligned = np.frombuffer(b"x" + a.tobytes(), np.uint8)[1:].view(np.float32).reshape(a.shape)
    for other in (wide[:, 4:11], np.asfortranarray(a), a[::-1].copy()[::-1], a[:, ::-1].copy()[:, ::-1], unaligned):
        found = sae_kernels.activation_losses(other, np.asfortranarray(W), WEIGHTS)
        assert np.array_equal(found.grad_activations, expected.grad_activations) and found.total == expected.total
    repeated = np.broadcast_to(a[:1], (5, 7))
    assert sae_kernels.activation_losses(repeated, config={"lambda_var": 0, "lambda_tc": 0}).lse == pytest.approx(5 * expected.row_loss[0])
    array, pointer, stride = sae_kernels._rows(wide[:, 4:11])
    assert pointer == wide[:, 4:11].ctypes.data and stride == 20


def test_wrong_arrays_are_refused():
    x, W, b = random(6, 3), random(5, 3), random(5)
    for call, error, text in [
        (lambda: sae_kernels.encode_lse([[1.0]], W, b), TypeError, "asarray"),
        (lambda: sae_kernels.encode_lse(x.astype(int), W, b), TypeError, "astype"),
        (lambda: sae_kernels.encode_lse(x.astype(">f4"), W, b), TypeError, "astype"),
        (lambda: sae_kernels.encode_lse(x, W.astype(float), b), TypeError, "float64"),
        (lambda: sae_kernels.encode_lse(x, W, b.astype(float)), TypeError, "bias"),
        (lambda: sae_kernels.encode_lse(x[0], W, b), ValueError, "matrix"),
        (lambda: sae_kernels.encode_lse(x, W[:, :2], b), ValueError, "weight"),
        (lambda: sae_kernels.encode_lse(x, W, b[:2]), ValueError, "bias"),
        (lambda: sae_kernels.decoder_free_step(x[:1], W, b), ValueError, "row"),
        (lambda: sae_kernels.activation_losses(x[:, :0]), ValueError, "latent"),
    ]:
        with pytest.raises(error, match=text):
            call()


def test_version():
    assert sae_kernels.__version__ == sae_kernels.version() != ""


def _some_loss():
    # Enough work for a context's threads.
    return sae_kernels.activation_losses(random(900, 300)).total


def test_a_forked_child_has_a_context_of_its_own():
    # A child does not inherit threads: ours, nor PyTorch's, which therefore has no part in this.
    try:
        sae_kernels.set_num_threads(2)
        expected = _some_loss()
        with multiprocessing.get_context("fork").Pool(1) as pool:
            assert pool.apply_async(_some_loss).get(timeout=60) == expected
    finally:
        sae_kernels.set_num_threads(0)
