"""Who takes part in `gpu.py`, as its report names them. (`competitors.py` needs numpy, a report does not.)"""

OURS = "ours"
NAMES = {
    OURS: "sae-kernels", "eager": "PyTorch", "compile": "torch.compile", "manual": "torch.compile, gradient by hand",
    "unfused": "torch.compile, not fused", "cce": "cut-cross-entropy", "liger": "Liger", "cublas": "cuBLAS (torch.matmul)",
}
