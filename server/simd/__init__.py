"""Kernels for the CPU, compiled by Numba when they are first needed: no compiler is asked for.

`vectors` are many float32 numbers as one value of compiled code, `functions` what is computed of
them, and `kernel` runs compiled code over torch's own threads. Importing any of these but
`support` needs Numba, which is optional.
"""
