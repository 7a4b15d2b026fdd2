"""Steps of few tokens in padded shapes, each captured as a CUDA graph: one launch, no host work.

Without capture the same padded forwards run eagerly, on any device. That is how the padding is
tested, and how a fault on a GPU is told from one of capturing.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import Tensor

from server.runner.base import Batch, Span
from server.runner.self_check import TOLERANCE, difference
from server.runner.static_shapes import Shape, Shapes, StaticBuffers
from server.runner.torch_runner import TorchRunner

# Before a capture: kernels are compiled and libraries take their workspaces.
_WARM_UPS = 2


@dataclass(slots=True)
class _Padded:
    """Forwards of one shape: their buffers, and the graph that reads these once it is captured."""

    buffers: StaticBuffers
    graph: torch.cuda.CUDAGraph | None = None


class GraphRunner:
    """A ModelRunner: steps that fit a shape are padded to it, all others pass through as they are.

    Its attributes are those of the runner below, and like that it is not thread-safe.
    """

    def __init__(self, runner: TorchRunner, shapes: Shapes, capture: bool) -> None:
        """`runner` is not forwarded by anyone else from now on.

        Args:
            runner: runs what fits no shape, and is what is captured; its store, kernels and
                shortlist are those that it will serve with.
            shapes: to pad to.
            capture: as CUDA graphs, at `warm_up`; False: run padded forwards eagerly.
        """
        # Copies will do: nothing of this changes any more.
        self.name = runner.name
        self.vocab_size = runner.vocab_size
        self.max_length = runner.max_length
        self.page_size = runner.page_size
        self.num_pages = runner.num_pages
        self.device = runner.device
        self.dtype = runner.dtype
        self.gathers = runner.gathers
        self.deferred = runner.deferred  # these forwards are not padded
        self.store = runner.store
        self.weight_bytes = runner.weight_bytes
        self._runner = runner
        self._shapes = shapes
        self._capture = capture
        self._padded: dict[Shape, _Padded] = {}
        self._output = torch.empty(0, device=runner.device, dtype=runner.dtype)
        self._enabled = True
        self._pool: tuple[int, int] | None = None  # that captures take their memory from

    @property
    def num_graphs(self) -> int:
        """Captured so far."""
        return sum(padded.graph is not None for padded in self._padded.values())

    @torch.inference_mode()
    def forward(self, batch: Batch) -> Tensor:
        """See ModelRunner.forward."""
        shape = self._shapes.find(batch) if self._enabled else None
        if shape is None or (self._capture and shape not in self._padded):
            return self._runner.forward(batch)
        padded = self._padded_to(shape)
        keep = padded.buffers.fill(batch)
        if padded.graph is not None:
            padded.graph.replay()
        else:
            self._compute(padded)
        return self._output.index_select(0, keep)

    @torch.inference_mode()
    def warm_up(self, report: Callable[[str], None]) -> None:
        """Capture every shape and check one; where that fails, run everything eagerly.

        Args:
            report: takes one line for each phase.
        """
        if not self._capture:
            return
        started = time.perf_counter()
        shapes = self._shapes.all()
        report(f"{self.name}: capturing {len(shapes)} CUDA graphs")
        try:
            # A capture that fails leaves its own stream behind as the current one.
            with torch.cuda.stream(torch.cuda.current_stream(self.device)):
                self._capture_all(shapes)
                self._compile_kernels()
            found = self._difference()
        except Exception as error:  # not capturable, out of memory, a kernel too large
            self._give_up(report, str(error).split("\n")[0])
            return
        if not found <= TOLERANCE[self.dtype]:  # NaN too
            self._give_up(report, f"relative difference {found:.1e} to the eager forward")
            return
        seconds = time.perf_counter() - started
        report(f"{self.name}: captured {self.num_graphs} CUDA graphs, {seconds:.1f} s")

    def _give_up(self, report: Callable[[str], None], reason: str) -> None:
        self._enabled = False
        self._leave_pool()
        self._padded.clear()
        self._output = self._output.new_empty(0)
        report(f"{self.name}: running without CUDA graphs: {reason}")

    def _leave_pool(self) -> None:
        """Where a capture has failed halfway.

        Some releases of torch then leave the allocator in the pool, and memory that it keeps for
        later could not be given back any more. With others there is nothing to leave: that raises,
        and says nothing that anybody has to know.
        """
        if self._pool is None:
            return
        index = self.device.index or 0
        with suppress(RuntimeError):
            torch._C._cuda_endAllocateToPool(index, self._pool)
            torch._C._cuda_releasePool(index, self._pool)

    def _capture_all(self, shapes: list[Shape]) -> None:
        """Largest first, so that the smaller ones find their memory in the pool they share."""
        self._pool = pool = torch.cuda.graph_pool_handle()
        stream = torch.cuda.Stream(self.device)
        self._reserve_output(max(shape.num_rows for shape in shapes))
        for shape in shapes:
            padded = self._padded_to(shape)
            current = torch.cuda.current_stream(self.device)
            stream.wait_stream(current)
            with torch.cuda.stream(stream):
                for _ in range(_WARM_UPS):
                    self._compute(padded)
            current.wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            # The HTTP side of the process may touch CUDA meanwhile: only this thread is watched.
            with torch.cuda.graph(
                graph, pool=pool, stream=stream, capture_error_mode="thread_local"
            ):
                self._compute(padded)
            padded.graph = graph
        torch.cuda.synchronize(self.device)

    def _compile_kernels(self) -> None:
        """Those that no graph has, once the model has run: requests would wait for them.

        Of texts too short for what graphs do; and of spans longer than any shape, as ends of
        prompts are.
        """
        longest = self._runner.longest_attended()
        beyond = {longest} if longest > self._shapes.longest else set()
        for num_tokens in sorted({*self._shapes.lengths[0], *beyond}):
            self._run_alone(num_tokens, num_tokens)
        for num_tokens in beyond:
            self._run_alone(num_tokens, max(num_tokens, self.max_length))

    def _run_alone(self, num_tokens: int, length: int) -> None:
        """The last tokens of a text of `length`, all of it in page 0."""
        pages = [0] * -(-length // self.page_size)
        self._runner.forward(Batch((Span(pages, length - num_tokens, [0] * num_tokens, 0),)))

    def _padded_to(self, shape: Shape) -> _Padded:
        if shape not in self._padded:
            self._padded[shape] = _Padded(
                StaticBuffers(shape, self.max_length, self.page_size, self.device)
            )
        return self._padded[shape]

    def _compute(self, padded: _Padded) -> None:
        """Logits of what the buffers hold, into the first rows of the output that all share."""
        logits = self._runner.run(padded.buffers.plan())
        if padded.graph is None and len(self._output) < len(logits):
            self._reserve_output(len(logits))
        self._output[: len(logits)].copy_(logits)

    def _reserve_output(self, num_rows: int) -> None:
        self._output = self._output.new_empty(num_rows, self.vocab_size)

    def _difference(self) -> float:
        """See `difference`: of replayed logits to eager ones.

        Writes KV into the first pages; nothing is in them yet.
        """
        spans = tuple(
            Span([1 + number], 0, [(31 * number + 7) % self.vocab_size], 1) for number in range(3)
        )
        eager, replayed = [], []
        for count in range(1, min(4, self.num_pages)):
            batch = Batch(spans[:count])
            eager.append(self._runner.forward(batch))
            replayed.append(self.forward(batch))
        return difference(torch.cat(replayed), torch.cat(eager))
