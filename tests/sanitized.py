"""Every CUDA and Triton kernel once or twice at small, uneven sizes: `compute-sanitizer --tool memcheck python tests/sanitized.py`.

Under the sanitizer a kernel takes a hundred times as long, and pytest's fixtures would be most of it. Results are not looked at here.
"""

import torch

import lorakernels as lk
from lorakernels import backends
from lorakernels.functional import lora_linear, multi_lora_linear, nf4_linear


def layer(dtype, adapter, M=37, K=96, N=72, R=5, p=0.1):
    draw = lambda *shape, of=dtype: torch.randn(*shape, device="cuda").to(of).requires_grad_()  # noqa: E731
    x, W, A, B = draw(M, K), draw(N, K).detach(), draw(R, K, of=adapter), draw(N, R, of=adapter)
    lora_linear(x, W, A, B, 2.0, dropout_p=p).sum().backward()
    q = lk.quantize_nf4(W.detach())
    for rows in (1, 5, 20, 150):
        some = draw(rows, K)
        nf4_linear(some, q).sum().backward()
        lora_linear(some, q, A, B, 2.0).sum().backward()


def many(dtype, adapter, M=50, K=96, N=72, R=9, E=3):
    draw = lambda *shape, of=dtype: torch.randn(*shape, device="cuda").to(of).requires_grad_()  # noqa: E731
    ids = torch.arange(M, device="cuda") % (E + 1) - 1
    ranks = torch.tensor([9, 1, 4], device="cuda")
    multi_lora_linear(draw(M, K), draw(N, K).detach(), draw(E, R, K, of=adapter), draw(E, N, R, of=adapter), ids, 1.0, ranks=ranks, dropout_p=0.1).sum().backward()


for name in ("cuda", "triton"):
    if reason := backends.why_not(name, "cuda", torch.bfloat16):
        print(f"{name} not run: {reason}")
        continue
    with lk.use_backend(name):
        for dtype, adapter in ((torch.bfloat16, torch.float32), (torch.float16, torch.float16), (torch.float32, torch.float32)):
            layer(dtype, adapter)
            layer(dtype, adapter, R=40, p=0.0)
            if name == "triton":
                many(dtype, adapter)
    torch.cuda.synchronize()
    print(f"{name} ran")
