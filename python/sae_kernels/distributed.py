"""A step of the decoder-free autoencoder whose rows are spread over the ranks of torch.distributed.

Variances and correlations are of the batch, so averaging gradients that each rank computes of its own rows, as DistributedDataParallel does, is
the gradient of another objective. Here statistics are summed over ranks before gradients are: the result is that of one process with all rows, up
to rounding. docs/scaling.md of the repository counts what that sends.
"""

import torch
import torch.distributed as dist

from . import _library
from .torch import _STORAGE, _shard, batch_statistics, sharded_backward

__all__ = ["decoder_free_step"]

_DTYPES = list(_STORAGE)
_DEVICES = ["cpu", "cuda"]


@torch.no_grad()
def decoder_free_step(x, weight, bias, config=None, group=None):
    """Losses and gradients of the batch whose rows are those of all ranks' x, as the dict of `sae_kernels.torch.sharded_backward`; the gradients are
    summed over ranks, and every rank has the same.

    x [N,D], N of each rank's own and 0 on some if need be; weight [H,D] and bias [H], the same on all ranks, which is not checked. float32,
    bfloat16 or float16, on the CPU or a CUDA device, as the group's backend has it. config: as of `sae_kernels.torch.combined_loss`; "mean" is over
    the rows of all ranks. group: the ranks that take part, all if None. Each of them must call this.

    Three collective operations: what the ranks have is gathered and compared, 2 + H + H(H+1)/2 float64 statistics are summed, H·D + H float32
    gradients are summed. Where one rank raises, all of them do, and none waits for the others: the one whose arguments are wrong says what is
    wrong (ValueError, TypeError), the others ValueError; so do all where D, H, types, kinds of device or objectives differ between ranks, or
    where there are fewer than two rows in all and a variance is needed. If a rank's computation fails, the others raise RuntimeError.
    """
    rank = dist.get_rank(group)
    if rank < 0:
        raise ValueError("this process is not in the group: only its members may call this")
    error = None
    try:
        real, (_, d, h), _ = _shard(x, weight, bias)
        objective = _library.objective(config)
        # Made here, so that there is something to sum even on a rank that fails later. One buffer for both gradients, and whether the rank failed.
        statistics = torch.zeros(_library.statistics_len(h), dtype=torch.float64, device=x.device)
        gradients = torch.zeros(h * d + h + 1, dtype=real, device=x.device)
    except Exception as caught:
        error = caught
    header = [0] * 11 if error else [1, d, h, _DTYPES.index(x.dtype), _DEVICES.index(x.device.type), *memoryview(bytes(objective)).cast("q")]
    _check_headers(_gather(header, x, group), error)

    try:
        batch_statistics(x, weight, bias, add_to=statistics)
    except Exception as caught:
        error = caught
        statistics[0] = torch.nan
    dist.all_reduce(statistics, group=group)
    # A number of rows that is none says that a rank failed, to all of them.
    _check_ranks(bool(statistics[0].isnan()), error)

    grad_weight, grad_bias = gradients[: h * d].view(h, d), gradients[h * d : -1]
    try:
        # No sum over rows, so on one rank.
        once = rank == 0
        result = sharded_backward(x, weight, bias, statistics, config, add_weight_term=once, add_to=(grad_weight, grad_bias))
    except Exception as caught:
        error = caught
        gradients[-1] = 1.0
    dist.all_reduce(gradients, group=group)
    _check_ranks(bool(gradients[-1] != 0), error)
    return result


def _gather(header, x, group):
    """All ranks' headers. NCCL sends what is on a device, and only that; else the host's memory will do, whatever x is on."""
    device = torch.device("cpu")
    if dist.get_backend(group) == "nccl":
        device = x.device if isinstance(x, torch.Tensor) and x.is_cuda else torch.device("cuda", torch.cuda.current_device())
    mine = torch.tensor(header, dtype=torch.int64, device=device)
    everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(everyone, mine, group=group)
    return torch.stack(everyone).tolist()


def _check_headers(headers, error):
    if error:
        raise error
    for rank, header in enumerate(headers):
        if not header[0]:
            raise ValueError(f"rank {rank} refused its arguments, and its own error says why")
        if header != headers[0]:
            raise ValueError(f"rank {rank} has {_describe(header)}, and rank 0 {_describe(headers[0])}: all ranks must have the same")


def _describe(header):
    _, d, h, dtype, device, *objective = header
    objective = _library.Objective.from_buffer_copy(memoryview(torch.tensor(objective).numpy()).cast("B"))
    terms = ", ".join(f"{name} = {getattr(objective, name)}" for name, _ in objective._fields_)
    return f"D = {d}, H = {h}, {_DTYPES[dtype]} on {_DEVICES[device]}, {terms}"


def _check_ranks(failed, error):
    if error:
        raise error
    if failed:
        raise RuntimeError("another rank failed in this step, and its own error says why")
