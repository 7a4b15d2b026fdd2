"""GPUs that are not there: torch's "cuda" devices, played on the CPU and as late as they may be.

What a GPU is asked is only enqueued, and is done once the host waits for it; memory that nothing
was written to holds NaN, and a captured graph makes its intermediate results into that again. So
whatever mixes devices, reads before it has waited, writes a pinned buffer that is yet to be read,
waits where nothing should, or captures a number that is to change, fails here as it may there.

Numbers are the CPU's, and Triton's kernels run in its interpreter. How long things take is not
told: an operation takes a microsecond.
"""

from tests.support.pretended_gpus.installed import pretended_gpus

__all__ = ["pretended_gpus"]
