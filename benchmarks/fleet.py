"""What profiling a fleet of pairs takes, by arithmetic. `python -m benchmarks.fleet` prints the tables of
`docs/fleet.md`, which says where the formulas come from.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from benchmarks.measure import table

__all__ = ["Cluster", "Model", "Search", "groups", "layers_by_start", "layers_each_group", "tables"]


@dataclass(frozen=True)
class Model:
    """Sizes of both models of a pair, bfloat16: 70 billion parameters in 80 layers by default."""

    layers: int = 80
    parameters: float = 70e9
    hidden: int = 8192
    kv_bytes: int = 4096  # of one token in one layer: K and V of 8 heads of 128

    @property
    def weight_bytes(self) -> float:
        return 2 * self.parameters

    @property
    def flops(self) -> float:
        """Of one token through one layer, attention to other tokens left out."""
        return 2 * self.parameters / self.layers


@dataclass(frozen=True)
class Cluster:
    """GPUs and what they reach, each; GPU-seconds do not depend on how many of them share a model."""

    flops: float = 0.4 * 989e12  # 40 % of an H100's dense bfloat16
    memory: float = 3.35e12  # bytes per second
    batch: int = 32  # answers that are generated together
    gpus_per_worker: int = 8
    loading: float = 5e9  # bytes per second that reach one worker


@dataclass(frozen=True)
class Search:
    """One way to find the best group of each size.

    Attributes:
        shared: one run from each start serves all groups that start there.
        generate: answers are generated for the task metric; else they are given, for the divergence.
        maps: kinds of maps that are tried; each is a search of its own.
    """

    name: str
    prompts: int
    shared: bool
    generate: bool
    maps: int = 0


PAPER = Search("paper: a run for each group", prompts=50, shared=False, generate=True)
FULL = Search("`full`", prompts=50, shared=True, generate=True)
FAST = Search("`fast`", prompts=16, shared=True, generate=False)
MAPPED = Search("`fast`, three kinds of maps", prompts=16, shared=True, generate=False, maps=3)
_SEARCHES = (PAPER, FULL, FAST, MAPPED)

PREFIX = 8192  # tokens
SUFFIX = 64  # tokens of a question and its answer
ANSWER = 32  # tokens of these that are generated
HELD_OUT = 50  # prompts
PAIRS = 1000
MODELS = 32  # of which all ordered pairs are 992
GRANULARITIES = (1, 2, 4)
_HOUR = 3600


def groups(layers: int, granularity: int) -> int:
    """Contiguous groups: m(m+1)/2 of m = L/g blocks."""
    blocks = layers // granularity
    return blocks * (blocks + 1) // 2


def layers_each_group(layers: int, granularity: int) -> int:
    """Recomputed layers, one run for each group: g m(m+1)(m+2)/6."""
    blocks = layers // granularity
    return granularity * blocks * (blocks + 1) * (blocks + 2) // 6


def layers_by_start(layers: int, granularity: int) -> int:
    """Recomputed layers, one run `[s..L-1]` for each start: g m(m+1)/2."""
    return granularity * groups(layers, granularity)


def mapped_plans(layers: int, granularity: int) -> int:
    """Plans that map: three for a group, fewer where it leaves no layers before or after it."""
    return 3 * (groups(layers, granularity) - layers // granularity) + 1


def search_layers(search: Search, model: Model, granularity: int) -> int:
    """Recomputed layers of one prefix. With maps all starts but 0 are run again, from the mapped E."""
    count = layers_by_start if search.shared else layers_each_group
    again = search.maps * (layers_by_start(model.layers, granularity) - model.layers)
    return count(model.layers, granularity) + again


def search_seconds(search: Search, model: Model, granularity: int, cluster: Cluster) -> float:
    """GPU-seconds of one pair: prefills of both models, recompute, and one suffix run for each plan."""
    recomputed = search_layers(search, model, granularity) + search.maps * 2 * model.layers
    plans = groups(model.layers, granularity) + search.maps * mapped_plans(model.layers, granularity)
    return search.prompts * _prompt_seconds(recomputed, plans, model, cluster, generate=search.generate)


def measure_seconds(model: Model, granularity: int, cluster: Cluster) -> float:
    """GPU-seconds of one pair's best groups, one of each size, on the held-out prompts.

    At most: groups that start at the same layer share a run here too.
    """
    plans = model.layers // granularity
    recomputed = layers_by_start(model.layers, granularity)
    return HELD_OUT * _prompt_seconds(recomputed, plans, model, cluster, generate=True)


def _prompt_seconds(recomputed: int, plans: int, model: Model, cluster: Cluster, *, generate: bool) -> float:
    layer_token = model.flops / cluster.flops
    prefills = 2 * PREFIX * model.layers * layer_token
    runs = PREFIX * recomputed * layer_token
    suffixes = plans * SUFFIX * model.layers * layer_token
    return prefills + runs + suffixes + (plans * ANSWER * _decode_seconds(model, cluster) if generate else 0)


def _decode_seconds(model: Model, cluster: Cluster) -> float:
    """GPU-seconds of one generated token: its own KV is read, and the weights once for the batch."""
    kv = PREFIX * model.layers * model.kv_bytes
    return (kv + model.weight_bytes / cluster.batch) / cluster.memory


def load_seconds(loads: int, model: Model, cluster: Cluster) -> float:
    """GPU-seconds that workers wait for weights."""
    return loads * model.weight_bytes / cluster.loading * cluster.gpus_per_worker


# --- tables ---


def work_table(model: Model, cluster: Cluster) -> str:
    """Of one pair, without maps."""
    rows = []
    for granularity in GRANULARITIES:
        for search in _SEARCHES:
            layers = search_layers(search, model, granularity)
            tokens = search.prompts * PREFIX * layers
            seconds = search_seconds(search, model, granularity, cluster)
            rows.append(
                [
                    str(granularity) if search is PAPER else "",
                    search.name,
                    f"{groups(model.layers, granularity):,}" if search is PAPER else "",
                    f"{search.prompts}",
                    f"{tokens / 1e9:,.2f}",
                    f"{search.prompts * layers / model.layers:,.0f}",
                    f"{seconds / _HOUR:,.2f}",
                    f"{PAIRS * seconds / _HOUR:,.0f}",
                ]
            )
    columns = ["g", "search", "groups", "prompts", "layer-tokens, 10^9", "full prefills", "GPU hours a pair"]
    return table([*columns, f"{PAIRS:,} pairs"], rows)


def measure_table(model: Model, cluster: Cluster) -> str:
    """Of one pair: what comes after the search, whichever it was."""
    rows = []
    for granularity in GRANULARITIES:
        hours = measure_seconds(model, granularity, cluster) / _HOUR
        full_prefills = HELD_OUT * layers_by_start(model.layers, granularity) / model.layers
        rows.append([str(granularity), f"{full_prefills:,.0f}", f"{hours:,.2f}", f"{PAIRS * hours:,.0f}"])
    return table(["g", "full prefills, at most", "GPU hours a pair", f"{PAIRS:,} pairs"], rows)


def memory_table(model: Model) -> str:
    """While one prefix is profiled."""
    rows = []
    for granularity in GRANULARITIES:
        starts = model.layers // granularity - 1
        per_prefix = PREFIX * model.hidden * 2 * starts
        kept = FAST.prompts * per_prefix
        rows.append(
            [
                str(granularity),
                str(starts),
                f"{per_prefix / 1e9:.1f}",
                f"{kept / 1e9:,.0f}",
                f"{MODELS * kept / 1e12:.1f}",
            ]
        )
    columns = ["g", "E layers", "E of one prefix, GB", f"of {FAST.prompts} prefixes, GB"]
    return table([*columns, f"of {MODELS} senders, TB"], rows)


def load_table(model: Model, cluster: Cluster) -> str:
    """Weights that are read, by the order of the pairs."""
    orders = (
        ("both models for each pair", 2 * PAIRS),
        ("by receiver: it stays, senders change", PAIRS + MODELS),
        ("16 workers for each pair, both models in each", 16 * 2 * PAIRS),
    )
    rows = [
        [
            name,
            f"{loads:,}",
            f"{loads * model.weight_bytes / 1e12:,.0f}",
            f"{_hours(loads, model, cluster):,.0f}",
        ]
        for name, loads in orders
    ]
    return table(["order", "loads", "TB read", "GPU hours of waiting"], rows)


def _hours(loads: int, model: Model, cluster: Cluster) -> float:
    return load_seconds(loads, model, cluster) / _HOUR


def cluster_table(model: Model, cluster: Cluster) -> str:
    """Days for all pairs at granularity 2: search, measuring, and loading by receiver."""
    sizes = (8, 64, 256)
    rows = []
    for search in _SEARCHES:
        seconds = PAIRS * (
            search_seconds(search, model, 2, cluster) + measure_seconds(model, 2, cluster)
        ) + load_seconds(PAIRS + MODELS, model, cluster)
        days = [f"{seconds / gpus / _HOUR / 24:,.1f}" for gpus in sizes]
        rows.append([search.name, f"{seconds / _HOUR:,.0f}", *days])
    return table(["search", "GPU hours", *(f"{gpus} GPUs, days" for gpus in sizes)], rows)


def papers_hours() -> float:
    """Hours of one A100 by these formulas for the paper's own example, which says 3 h."""
    model = Model(layers=32, parameters=8e9, hidden=4096)
    a100 = Cluster(flops=0.4 * 312e12, memory=2.0e12)
    return search_seconds(PAPER, model, 1, a100) / _HOUR


def tables() -> Iterator[tuple[str, str]]:
    """Title and text of each table of `docs/fleet.md`."""
    model, cluster = Model(), Cluster()
    yield "Search", work_table(model, cluster)
    yield "Measuring", measure_table(model, cluster)
    yield "Loading", load_table(model, cluster)
    yield "Memory", memory_table(model)
    yield "Clusters", cluster_table(model, cluster)


def main() -> None:
    for title, text in tables():
        print(f"{title}\n\n{text}\n")
    print(f"Paper's example: {papers_hours():.1f} h")


if __name__ == "__main__":
    main()
