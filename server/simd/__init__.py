"""Kernels for the CPU, compiled by Numba when they are first needed: no compiler is asked for.

A kernel is compiled code that each of torch's threads runs once, for its part of the work. Memory
is named by its address, and numbers are worked with as vectors of many:

    @compiled
    def body(a, thread, num_threads):
        first, end = part(a.size // LANES, thread, num_threads)
        for number in range(first * LANES, end * LANES, LANES):
            x = vectors.load(a.x + number * NUMBER, LANES, 32)
            vectors.store(a.x + number * NUMBER, vectors.add(x, x), 32)

    double = Kernel(body, {"x": "q", "size": "q"})
    double(x.data_ptr(), x.numel())

From the bottom up:

    support                 can this machine run kernels? All others need Numba, which is optional
    compiled, vectors,      what compiled code is made of: functions, vectors as values, and what
    functions               is computed of them
    kernel, program         running code on torch's threads; many kernels in one call from Python
    tiles                   products with a weight (`runner.simd_linear` makes a kernel of them)
    rows, attention         attention over paged KV
    weights, adjustment,    passes over one row of scores, and the kernel of them that decides
    truncation, noise,      tokens
    decisions
"""
