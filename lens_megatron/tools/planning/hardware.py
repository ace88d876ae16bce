"""Holds published figures of GPUs: memory, arithmetic and bandwidths."""

from dataclasses import dataclass

from lens_megatron.config import ClusterConfig

GIB = 1 << 30


def gib(size: float) -> str:
    """Returns `size` bytes in GiB with one decimal, as the plan prints them."""
    return f"{size / GIB:.1f}"


@dataclass(frozen=True, slots=True)
class Gpu:
    """Figures of NVIDIA's data sheets for the SXM form; `memory_gib` is what torch reports, less than the name says."""

    memory_gib: float
    bfloat16_tflops: float
    """TFLOP/s of dense tensor-core arithmetic."""
    memory_gb_s: float
    link_gb_s: float
    """Gigabytes per second of all NVLink links together, in one direction."""


GPUS = {
    "A800-80GB": Gpu(79.3, 312, 2039, 200),
    "A100-80GB": Gpu(79.3, 312, 2039, 300),
    "H800-80GB": Gpu(79.1, 989, 3352, 200),
    "H100-80GB": Gpu(79.1, 989, 3352, 450),
    "H200-141GB": Gpu(139.8, 989, 4800, 450),
}


@dataclass(frozen=True, slots=True)
class Cluster:
    """The machines that a plan reckons with."""

    name: str
    gpu: Gpu
    nodes: int
    gpus_per_node: int
    memory_bytes: int
    """Memory of one GPU."""
    host_bytes: int
    """Host memory of one node."""
    network_gb_s: float
    """Gigabytes per second that leave a node in one direction."""

    @property
    def gpus(self) -> int:
        return self.nodes * self.gpus_per_node

    @property
    def slowest_link_gb_s(self) -> float:
        """The rate between two GPUs of a group that spans the cluster: NVLink in a node, else a GPU's network share."""
        return self.gpu.link_gb_s if self.nodes == 1 else self.network_gb_s / self.gpus_per_node


def cluster_of(config: ClusterConfig) -> Cluster:
    """The configured cluster, with the data sheet's figures of its GPU."""
    gpu = GPUS[config.gpu]
    memory = config.gpu_memory_gib or gpu.memory_gib
    return Cluster(
        name=f"{config.nodes} x {config.gpus_per_node} {config.gpu}",
        gpu=gpu,
        nodes=config.nodes,
        gpus_per_node=config.gpus_per_node,
        memory_bytes=int(memory * GIB),
        host_bytes=int(config.host_memory_gib * GIB),
        network_gb_s=config.network_gb_s,
    )
