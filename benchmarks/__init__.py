"""The benchmark suite: `python -m benchmarks --help`, from the root of a checkout. Above the library and imported by nothing.

    shapes.py    which layers                          cases.py     what a row is, and what takes part in it
    lora.py nf4.py multi.py model.py                   an operator each: its rows and its contenders
    peers.py     other people's packages               accuracy.py  every result against float64, before its time counts
    serving.py   serving systems' kernels, from a folder
    timing.py    in turn, on a CPU or a GPU            machine.py   what machine this is, and its ceilings
    run.py       the loop, within a budget             results.py   a file of rows, and the figures made of it
    report.py    RESULTS.md and plots                  compare.py   two files, the noise taken into account
    marks.py     what the design asks                  gpu.py       what a GPU should take: an account
    tune.py      candidates for the tile tables
"""
