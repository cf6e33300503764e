"""The model of a step on many H100s. Nothing here is measured: constants are published, or named as assumed."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

from mmssl.build import complete_config
from mmssl.config import Config
from mmssl.train import predicted_cost, untrained_task
from scripts.bench.scale_model import Link, Links, Machine, Work, step_seconds, step_terms

BF16 = 989.4e12
"""FLOP/s of an H100 SXM in dense bf16, NVIDIA H100 datasheet (which prints twice that, with sparsity)."""
FP32 = 66.9e12
"""FLOP/s of an H100 SXM in fp32 without TF32, in which the loss is computed; the same datasheet."""
NVLINK = 450e9
"""Bytes/s that an H100 sends to others of its node: half of NVLink 4's 900 GB/s in both directions; the same."""
NIC = 50e9
"""Bytes/s of a GPU's own InfiniBand NDR adapter, 400 Gb/s; NVIDIA DGX H100 user guide: eight adapters, eight GPUs."""
NODE = 8
CORES = 14
"""CPU cores per GPU: a DGX H100 has two processors of 56; the same guide."""
WITHIN_RING, ACROSS_RING, WITHIN_TREE, ACROSS_TREE = 3.4e-6, 9.6e-6, 1.2e-6, 8.5e-6
"""Seconds per hop in NCCL's own model of its time, src/graph/tuning.cc: ring (simple) and tree (LL128), over NVLink and
over the network."""
LAUNCHES = 5e-3
"""Assumed: seconds per step that no kernel fills."""
LINE_RATE = 0.8
"""Assumed: the part of a connection's rate that large messages reach."""


@dataclass(frozen=True)
class Projection:
    """A model on many GPUs."""

    flops: float
    """Per pair, forward and backward."""
    weights: int
    dim: int
    utilisation: float
    """Assumed: FLOP/s of the towers and the loss, relative to the peak."""
    load: float
    """CPU seconds per pair of the loader."""
    micro_batch: int

    def machine(self) -> Machine:
        """Nodes of eight H100 SXM with an InfiniBand adapter each."""
        multiply = 2 * self.dim / (FP32 * self.utilisation)
        collective = NODE * NIC * LINE_RATE  # rings of all GPUs of a node leave it over all adapters
        return Machine(
            step=LAUNCHES,
            sample=self.flops / (BF16 * self.utilisation),
            logit=3 * multiply,
            blocked_logit=4 * multiply,
            load=self.load / CORES,
            within=_links(WITHIN_RING, WITHIN_TREE, NVLINK * LINE_RATE, NVLINK * LINE_RATE),
            # Round a ring of ranks, one adapter of a node sends what the next node receives.
            across=_links(ACROSS_RING, ACROSS_TREE, collective, NIC * LINE_RATE),
            node=NODE,
            device="cuda",
        )

    def text(self, batches: Sequence[int], ranks: Sequence[int]) -> str:
        """One line per batch and number of GPUs, in milliseconds."""
        machine = self.machine()
        lines = [
            f"{self.flops / 1e9:.1f} GFLOP per pair, {self.weights / 1e6:.0f} million weights, {self.dim} dimensions, "
            f"utilisation {self.utilisation:.0%}, micro-batches of {self.micro_batch:,}",
            f"{'batch':>8} {'GPUs':>5} {'each':>7} {'towers':>8} {'loss':>7} {'gather':>7} {'ring':>7} {'reduce':>7} "
            f"{'step':>8} {'by ring':>8} {'pairs/s':>10} {'of ideal':>8} {'cores':>6}",
        ]
        for batch, count in product(batches, ranks):
            work, by_ring = (
                Work(batch, count, self.dim, self.weights, e, self.micro_batch) for e in ("gather", "ring")
            )
            parts, seconds = step_terms(work, machine), step_seconds(work, machine)
            ring, ring_seconds = step_terms(by_ring, machine).exchange, step_seconds(by_ring, machine)
            lines.append(
                f"{batch:8} {count:5} {work.rows:7} {1e3 * parts.towers:8.1f} {1e3 * parts.loss:7.1f} "
                f"{1e3 * parts.exchange:7.1f} {1e3 * ring:7.1f} {1e3 * parts.reduction:7.1f} {1e3 * seconds:8.1f} "
                f"{1e3 * ring_seconds:8.1f} {batch / seconds:10,.0f} {work.rows * machine.sample / seconds:8.0%} "
                f"{work.rows * self.load / seconds:6.1f}"
            )
        return "\n".join(lines)


def project(config: Config, utilisation: float, load_rate: float, micro_batch: int) -> Projection:
    """The towers of a configuration on many GPUs.

    Args:
        load_rate: pairs per CPU-second of the loader.
    """
    config, objectives = complete_config(config)
    task = untrained_task(config, objectives)
    weights = sum(weight.numel() for weight in task.parameters() if weight.requires_grad)
    flops = predicted_cost(task, list(objectives), tokens=config.model.text.max_tokens)
    return Projection(flops, weights, config.model.embed_dim, utilisation, 1 / load_rate, micro_batch)


def _links(ring_hop: float, tree_hop: float, collective: float, single: float) -> Links:
    return Links(Link(ring_hop, 1 / collective), Link(tree_hop, 1 / collective), Link(ring_hop, 1 / single))
