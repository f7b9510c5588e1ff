"""Makes selective_scan.safetensors: inputs, outputs and gradients of the official `selective_scan_ref` of mamba_ssm, in float32.

    pip install --no-deps mamba-ssm==2.3.2.post1 triton einops      # with MAMBA_SKIP_CUDA_BUILD=TRUE MAMBA_FORCE_BUILD=TRUE
    python data/golden/make_selective_scan.py

Names are "case/input/u", "case/output/y", "case/gradient/u"; the cases are those of tests/test_scan_peers.py, the loss that
the gradients belong to is that of `outputs_and_gradients` in tests/scan_cases.py.
"""
import importlib.metadata
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent.parent), str(HERE.parent.parent / "tests")]

from scan_cases import draw, outputs_and_gradients                  # noqa: E402
from test_scan_peers import CASES, official_reference               # noqa: E402

if __name__ == "__main__":
    tensors = {}
    with pytest.MonkeyPatch.context() as monkeypatch:
        official = official_reference(monkeypatch)
        for case, settings in CASES.items():
            args = draw(**settings)
            outputs, gradients = outputs_and_gradients(official, args, torch.float32)
            inputs = {k: v.float() for k, v in args.items() if isinstance(v, torch.Tensor)}
            for kind, group in (("input", inputs), ("output", outputs), ("gradient", gradients)):
                tensors |= {f"{case}/{kind}/{name}": x.contiguous() for name, x in group.items()}
    version = importlib.metadata.version("mamba_ssm")
    save_file(tensors, HERE / "selective_scan.safetensors", metadata={"made by": f"selective_scan_ref of mamba_ssm {version}"})
