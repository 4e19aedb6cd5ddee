"""Start all kernels of a pass, or of an update of the weights, on a GPU at once, with CUDA graphs.

The host needs longer to start a small kernel than the GPU needs to run it. A graph records the kernels of a pass, with
the addresses of all tensors, and starts them together. The kernels are those of the pass without a graph. Random
numbers are too: a graph draws them from the generator of the device, whose seed each micro-batch sets.
"""

import itertools
import logging
import traceback
import warnings
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from moe.training.optim import Muon

log = logging.getLogger(__name__)

In = TypeVar("In", bound=tuple[Any, ...])
Out = TypeVar("Out")

MOST = 8  # graphs of a run; what changes more often is not worth the time that recording takes


class Recorded(NamedTuple):
    """A pass that was recorded. Each replay reads `inputs` and overwrites `result` and `gradients`.

    gradients: of each trainable parameter, None where the pass gives none.
    """

    graph: torch.cuda.CUDAGraph
    inputs: Any
    result: Any
    gradients: list[Tensor | None]


class Graphs:
    """Runs passes as CUDA graphs, one graph for each combination of numbers and shapes that a graph cannot read anew.

    A pass in which the host waits for the GPU, or draws random numbers, cannot be recorded. From the first such pass
    on, all passes run without a graph, and `obstacle` says why.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.stream = torch.cuda.Stream()
        self.pool = torch.cuda.graph_pool_handle()  # graphs run one after another, so they can share their memory
        self.recorded: dict[Hashable, Recorded] = {}
        self.obstacle: str | None = None
        self.update_places: tuple[int, ...] = ()
        self.update_graph: torch.cuda.CUDAGraph | None = None

    def run(self, function: Callable[[In], Out], inputs: In, *, numbers: Hashable, keep: bool) -> Out:
        """Return `function(inputs)`, and add the gradients that it gives to those of the parameters.

        inputs: a NamedTuple of tensors, or None in the place of a tensor. The function reads all tensors that change
            from here, or from the parameters and buffers of the model.
        numbers: what else the function depends on. A change is recorded anew.
        keep: return tensors that stay as they are in the next call.
        """
        if self.obstacle is None:
            shapes = tuple(None if value is None else value.shape for value in inputs)
            tensors = itertools.chain(self.model.parameters(), self.model.buffers())
            key = (numbers, shapes, tuple(tensor.data_ptr() for tensor in tensors))
            if key not in self.recorded:
                self._record(key, function, inputs)
        if self.obstacle is not None:
            return function(inputs)
        recorded = self.recorded[key]
        for place, value in zip(recorded.inputs, inputs, strict=True):
            if place is not None:
                place.copy_(value)
        recorded.graph.replay()
        for p, gradient in zip(self.parameters, recorded.gradients, strict=True):
            if gradient is not None and p.grad is not None:
                p.grad += gradient
            elif gradient is not None:
                p.grad = gradient.clone() if keep else gradient  # the next replay overwrites `gradient`
        result = tree_map_only(Tensor, Tensor.clone, recorded.result) if keep else recorded.result
        return cast(Out, result)

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """Take a step of an optimizer, as a graph if it is Muon, which has many kernels.

        It is recorded in the first step that finds all gradients, weights and momenta where they were in the step
        before. They stay there if passes are graphs and a step has one micro-batch.
        """
        if self.obstacle is not None or not isinstance(optimizer, Muon) or not optimizer.recordable:
            optimizer.step()
            return
        optimizer.read_rates()
        places = optimizer.places()
        if places != self.update_places:
            self.update_places, self.update_graph = places, None
            optimizer.update()
            return
        if self.update_graph is None:
            self.update_graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.update_graph, pool=self.pool, stream=self.stream):
                optimizer.update()
        self.update_graph.replay()

    def used(self) -> dict[str, str]:
        """Return for the record of a run whether graphs were used, and if not, why."""
        return {"cuda_graph": "used" if self.obstacle is None else f"not used, because {self.obstacle}"}

    def _record(self, key: Hashable, function: Callable[[Any], Any], inputs: Any) -> None:
        """Record the function, or set `obstacle`. Gradients and the random state are as before afterward."""
        if len(self.recorded) == MOST:
            self._give_up(f"{MOST} passes differed in a number, a shape or the place of a weight")
            return
        before = [p.grad for p in self.parameters]
        places = type(inputs)(*(None if value is None else value.clone() for value in inputs))
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.random.fork_rng(devices=[torch.cuda.current_device()]):
            with torch.cuda.stream(self.stream):
                self._without_gradients(function, places)  # creates what libraries need; this may wait
                why = obstacle(lambda: self._without_gradients(function, places))
            torch.cuda.current_stream().wait_stream(self.stream)
            if why is None:
                self._forget_gradients()
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, pool=self.pool, stream=self.stream):
                    result = function(places)
                self.recorded[key] = Recorded(graph, places, result, [p.grad for p in self.parameters])
            else:
                self._give_up(why)
        for p, gradient in zip(self.parameters, before, strict=True):
            p.grad = gradient

    def _without_gradients(self, function: Callable[[Any], Any], places: Any) -> None:
        self._forget_gradients()
        function(places)

    def _forget_gradients(self) -> None:
        for p in self.parameters:
            p.grad = None

    def _give_up(self, why: str) -> None:
        self.recorded.clear()
        self.obstacle = why
        log.info("cuda_graph: not used, because %s", why)


def obstacle(run: Callable[[], object]) -> str | None:
    """Run a pass, and return in words why it cannot be recorded; None if it can.

    A graph would repeat what the host has read from the GPU, and the random numbers that it has drawn by itself.
    """
    before = torch.get_rng_state()
    with warnings.catch_warnings(action="ignore"):  # PyTorch calls this mode a prototype
        torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    except RuntimeError as error:
        if "synchronizing" not in str(error):
            raise
        place = traceback.extract_tb(error.__traceback__)[-1]
        return f"the host waits for the GPU in {'/'.join(Path(place.filename).parts[-3:])}:{place.lineno}"
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return None if torch.equal(before, torch.get_rng_state()) else "the host draws random numbers in a pass"
