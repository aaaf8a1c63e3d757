"""What each variant of a LoRA layer must move, compute and launch on a GPU, before anything is measured:
python benchmarks/account.py [--bandwidth TB/s] [--matrix TFLOP/s] [--vector TFLOP/s] [--launch us]

Bytes are those that must cross the memory bus (x and dy once a pass, y written, partial sums written and read); operations
are those of the matrix units, or float32 FMA for the CUDA C++ kernels. A pass takes the longer of the two; passes add up.
The first choices in lorakernels/backends/triton/tiles.py come from here; a measurement replaces them.
"""

import argparse
from dataclasses import dataclass

SHAPES = [(8192, 4096, 4096), (8192, 4096, 14336), (8192, 14336, 4096), (2048, 4096, 4096), (512, 4096, 4096)]
HALF, FULL = 2, 4  # bytes


@dataclass
class Pass:
    name: str
    bytes: float = 0
    matrix: float = 0  # FLOP on matrix units
    vector: float = 0  # FLOP on float32 units
    launches: int = 1

    def seconds(self, machine):
        return max(self.bytes / machine.bandwidth, self.matrix / machine.matrix, self.vector / machine.vector) + self.launches * machine.launch


def base(M, K, N):
    return Pass("base", HALF * (M * K + N * K + M * N), 2 * M * K * N)


def terms(adapter, count):
    """Products of bfloat16 terms for one product of fp32 adapters: language.dot_terms."""
    return count if adapter == FULL else 1


def parts_of_dB(M):
    from lorakernels.backends.triton import tiles

    tile = tiles.lowrank_grad_up(M, 4096, 16, True)
    return min(-(-M // tile.BLOCK_M), tiles.PROGRAMS)


def variants(M, K, N, R, adapter):
    """{variant: [passes]} of forward + backward, bf16 base, no dropout."""
    thin = lambda a, b: 2 * M * (a + b) * R  # noqa: E731
    small = adapter * R * (K + N)
    frozen = [base(M, K, N), base(M, N, K)]
    u, du = FULL * M * R, FULL * M * R
    yield "frozen base", frozen
    yield "PEFT, adapters in bf16", [
        *frozen,
        Pass("forward: A, B, scale, add", HALF * (M * K + 2 * M * R + 6 * M * N) + small, thin(K, N), launches=4),
        Pass("backward", HALF * (2 * M * K + 7 * M * N + 2 * M * K) + 2 * small, 2 * thin(K, N), launches=8),
    ]
    yield "in-place addmm_", [
        *frozen,
        Pass("u; y += u B^T", HALF * (M * K + 2 * M * N) + small, thin(K, N), launches=2),
        Pass("du, dB, dA, dx += du A", HALF * (2 * M * N + M * K + 2 * M * K) + 2 * small, 2 * thin(K, N), launches=4),
    ]
    parts = FULL * N * R * 2 * parts_of_dB(M) + FULL * R * K * 2 * 8
    grads = [
        Pass("du and parts of dB", HALF * M * N + u + du + small + parts / 2, terms(adapter, 3) * thin(N, N)),
        Pass("parts of dA", HALF * M * K + du, terms(adapter, 3) * thin(K, 0)),
        Pass("sums", parts / 2 + small),
    ]
    yield "Triton, composed", [
        *frozen,
        Pass("u", HALF * M * K + u + small, terms(adapter, 3) * thin(K, 0)),
        Pass("y += u B^T", HALF * 2 * M * N + u, terms(adapter, 3) * thin(0, N)),
        *grads,
        Pass("dx += du A", HALF * 2 * M * K + du, terms(adapter, 3) * thin(K, 0)),
    ]
    fused = [base(M, K, N), base(M, N, K)]
    fused[0].matrix += terms(adapter, 3) * thin(0, N)
    fused[1].matrix += terms(adapter, 3) * thin(K, 0)
    yield "Triton, fused", [*fused, Pass("u", HALF * M * K + u + small, terms(adapter, 3) * thin(K, 0)), *grads]
    yield "CUDA C++", [
        *frozen,
        Pass("u", HALF * M * K + u + small, vector=thin(K, 0)),
        Pass("y += u B^T", HALF * 2 * M * N + u, vector=thin(0, N)),
        Pass("du and parts of dB", HALF * M * N + u + du + small + FULL * N * R * min(-(-M // 64), 256), vector=thin(N, N)),
        Pass("parts of dA", HALF * M * K + du, vector=thin(K, 0)),
        Pass("sums", FULL * N * R * min(-(-M // 64), 256) + small),
        Pass("dx += du A", HALF * 2 * M * K + du, vector=thin(K, 0)),
    ]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bandwidth", type=float, default=4.0, help="TB/s that a copy reaches (H200)")
    parser.add_argument("--matrix", type=float, default=700, help="TFLOP/s that a large bf16 product reaches")
    parser.add_argument("--vector", type=float, default=45, help="TFLOP/s of float32 FMA")
    parser.add_argument("--launch", type=float, default=1.0, help="us between two kernels")
    machine = parser.parse_args()
    machine.bandwidth, machine.matrix, machine.vector, machine.launch = machine.bandwidth * 1e12, machine.matrix * 1e12, machine.vector * 1e12, machine.launch * 1e-6
    print("An account, not a measurement. forward + backward, bf16 base")
    print(f"{'M,K,N':>16} {'R':>3} {'adapters':>8} {'variant':>24} {'MB':>8} {'TFLOP':>7} {'launches':>8} {'us':>8} {'x base':>7}")
    for M, K, N in SHAPES:
        for R in (16, 64):
            for adapter in (HALF, FULL):
                frozen = None
                for name, passes in variants(M, K, N, R, adapter):
                    total = sum(p.seconds(machine) for p in passes)
                    frozen = frozen or total
                    moved, done = sum(p.bytes for p in passes) / 1e6, sum(p.matrix + p.vector for p in passes) / 1e12
                    print(f"{f'{M},{K},{N}':>16} {R:>3} {'bf16' if adapter == HALF else 'fp32':>8} {name:>24} {moved:>8.0f} {done:>7.3f} {sum(p.launches for p in passes):>8} {total * 1e6:>8.0f} {total / frozen:>7.3f}")


if __name__ == "__main__":
    main()
