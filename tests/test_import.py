"""What importing costs, shown in fresh processes."""

import subprocess
import sys

BLOCKED = ("triton", "numpy", "rich", "torchvision", "timm")
BLOCK = f"import sys; sys.modules.update(dict.fromkeys({BLOCKED!r}))\n"

FUSE = """
import torch, resnet_fused as rf
model = rf.resnet20().eval()
fused = rf.fuse(model)
x = torch.randn(1, 3, 16, 16)
assert rf.is_fused(fused) and len(rf.report(fused).fused) == 10
with torch.no_grad():
    torch.testing.assert_close(fused(x), model(x))
"""


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_and_fusing_needs_torch_alone():
    run(BLOCK + FUSE)


def test_import_loads_neither_triton_nor_torchvision():
    out = run(
        "import resnet_fused, sys; print([m for m in ('triton', 'torchvision', 'timm', 'rich') if m in sys.modules])"
    )
    assert out.strip() == "[]"
